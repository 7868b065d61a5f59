"""Language-model head and loss in one op that never holds the logits of more than one chunk of rows.

    y = hidden @ weight^T + bias                       [N, V]
    z = softcap * tanh(logit_scale * y / softcap) / temperature      (without softcap: logit_scale * y / temperature)
    log_prob_i = z[i, target_i] - logsumexp(z[i])
    loss = -sum_i log_prob_i / num_items               (num_items: given, or the number of labels that count)

Shapes: hidden [..., H]; weight [V, H]; bias [V]; labels, targets [...] int64. Statistics, sums and loss are fp32.

Method: rows whose label is `ignore_index` are dropped, the rest run in chunks of a few thousand rows, so that the GEMMs
keep their speed. A chunk's logits are turned in place into the gradient of its log-probabilities, in forward, and both
gradient GEMMs follow at once; backward only scales. A frozen head costs no weight gradient. Gradients accumulate in
fp32 over chunks and are rounded once. Where the upstream gradient differs by row and the head is trained (preference
and policy losses), or the entropy is differentiated, backward computes each chunk's logits again.

Floor: 2*N*V*H FLOP per GEMM: 4*N*V*H frozen (logits, d_hidden), 6*N*V*H trained (and d_weight); memory traffic of the
logits chunk 4*N*V*itemsize. Extra memory: one chunk of logits, d_hidden and d_weight in fp32.

Errors: IndexError for a label outside [0, V) that is not `ignore_index`; TypeError for dtypes that F.linear would
refuse; ValueError for shapes that do not match.

Source: d log_prob_t / d z_j = [j = t] - p_j and d entropy / d z_j = -p_j * (log p_j + entropy), from the softmax.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._beside import beside, may_run_beside
from ._launch import cdiv, device_kind, launch, once_differentiable, register_op, use_triton
from ._weights import compute_weight
from .tied_embedding import Tie, tie_of

# Bytes of logits held at a time, and the fewest rows of a chunk. The products of a frozen head run at full speed on an
# H200 with 1,024 rows. A trained one reads and writes its fp32 sum for each chunk: 8,192 rows of 2048, forward and
# backward, take 22.1, 19.7 and 18.7 ms with 256 MiB, 512 MiB and 1 GiB of a 128k vocabulary's logits.
_CHUNK_BYTES, _TIMES_TRAINED = {"cuda": 256 << 20}, {"cuda": 2}
_CHUNK_BYTES_ELSEWHERE = 64 << 20
_LEAST_ROWS, _ROW_TILE = 256, 128

# An fp32 sum of as many bytes becomes the 16-bit gradient of the weight where it lies, so that both are never there
# together: bytes, rows of the weight that a part is a multiple of, and elements that are rounded at a time.
_IN_PLACE_BYTES, _PART_ROWS, _AT_A_TIME = 64 << 20, 64, 1 << 24

# Optional per-row outputs. The statistics tensor [7, rows] holds log_prob, the maximum of z, log(sum(exp(z - maximum)))
# and these. Maximum and log-sum are kept apart, as adding them would cost digits of every small log-probability.
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_STATISTICS = 7


def _bit(name: str) -> int:
    """The statistics op takes the outputs asked for as bits."""
    return 1 << OPTIONAL_OUTPUTS.index(name)


class LogitTransform(NamedTuple):
    """z = softcap * tanh(logit_scale * y / softcap) * inv_temperature; softcap 0 means none."""

    logit_scale: float = 1.0
    softcap: float = 0.0
    inv_temperature: float = 1.0


# ------------------------------------------------------------------------------------------------ torch reference


def _transform(y: torch.Tensor, transform: LogitTransform) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Returns z and dz/dy of fp32 (or fp64) projections."""
    scale, softcap, inv_temperature = transform
    if transform == LogitTransform():
        return y, 1.0
    if softcap:
        tanh = torch.tanh(y * (scale / softcap))
        return tanh * (softcap * inv_temperature), (1 - tanh * tanh) * (scale * inv_temperature)
    return y * (scale * inv_temperature), scale * inv_temperature


def _statistics_reference(
    logits: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, grad_scale: float, extras: int
) -> torch.Tensor:
    """As the kernel; few passes and little memory, since a chunk of logits is far larger than a CPU's caches."""
    z, slope = _transform(logits.to(_accumulate_dtype(logits.dtype)), transform)
    rows = torch.arange(len(targets), device=targets.device)
    stats = z.new_empty((_STATISTICS, len(targets)))
    if extras & _bit("mean_logits"):
        stats[5] = z.mean(-1)
    if extras & _bit("is_top1"):
        stats[6] = z.argmax(-1) == targets
    top = z.amax(-1)
    shifted = z.sub_(top[:, None]) if z is not logits else z - top[:, None]
    target_shifted = shifted[rows, targets]
    if extras & _bit("entropy"):
        p = shifted.exp()
        total = p.sum(-1)
        # Not a product: a logit of -inf has probability zero, and zero times inf is nan.
        weighted = torch.linalg.vecdot(p, shifted.clamp_(min=torch.finfo(shifted.dtype).min))
        stats[3] = total.log() - weighted / total
    else:
        p = shifted.exp_()
        total = p.sum(-1)
    log_total = total.log()
    p.mul_(total.reciprocal()[:, None])
    stats[0], stats[1], stats[2] = target_shifted - log_total, top, log_total
    if extras & _bit("log_sum_sq_probs"):
        stats[4] = torch.linalg.vecdot(p, p).log()
    if grad_scale:
        p.neg_()
        p[rows, targets] += 1
        if isinstance(slope, torch.Tensor):
            p.mul_(slope)
            slope = 1.0
        torch.mul(p, slope * grad_scale, out=logits)
    return stats


def _gradient_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    top: torch.Tensor,
    log_total: torch.Tensor,
    entropy: torch.Tensor,
    grad_log_prob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    transform: LogitTransform,
) -> None:
    z, slope = _transform(logits.to(top.dtype), transform)
    log_p = z - top[:, None] - log_total[:, None]
    p = log_p.exp()
    grad = -p * grad_log_prob[:, None]
    grad[torch.arange(len(targets), device=targets.device), targets] += grad_log_prob
    if grad_entropy is not None:
        grad -= torch.where(p > 0, p * (log_p + entropy[:, None]), p) * grad_entropy[:, None]
    logits.copy_(grad * slope)


# ------------------------------------------------------------------------------------------------ Triton kernels


@triton.jit
def _transform_kernel(y, logit_scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """z and dz/dy of one block (a scalar slope where it is the same everywhere)."""
    y = y * logit_scale
    if HAS_SOFTCAP:
        tanh = 2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0
        z = tanh * softcap * inv_temperature
        slope = (1.0 - tanh * tanh) * (logit_scale * inv_temperature)
    else:
        z = y * inv_temperature
        slope = logit_scale * inv_temperature
    return z, slope


@triton.jit
def _load_kernel(row_ptr, start, n_cols, WIDE: tl.constexpr, LANES: tl.constexpr, FULL: tl.constexpr):
    """Columns [start, start + LANES * WIDE) of a row as [LANES, WIDE], each lane's next to each other, and their
    numbers; -inf behind the end."""
    cols = start + tl.arange(0, LANES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    if FULL:
        y = tl.load(row_ptr + cols).to(tl.float32)
    else:
        y = tl.load(row_ptr + cols, mask=cols < n_cols, other=-float("inf")).to(tl.float32)
    return y, cols


@triton.jit(do_not_specialize=["n_rows"])  # which is another at every call, and a stride only
def _statistics_kernel(
    logits_ptr,
    logits_stride,
    targets_ptr,
    stats_ptr,
    n_rows,
    n_cols,
    logit_scale,
    softcap,
    inv_temperature,
    grad_scale,
    HAS_TRANSFORM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQ_PROBS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
):
    # One program per row, and few rows at a time, so that the second pass finds the row in L2. A thread keeps maxima
    # and sums of its own lanes until the end: nothing is reduced across threads within the loop.
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    target = tl.load(targets_ptr + row)
    y_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < n_cols), other=0.0).to(tl.float32)
    z_target, slope_target = y_target, 1.0
    if HAS_TRANSFORM:
        z_target, slope_target = _transform_kernel(y_target, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
    m = tl.full((LANES,), -float("inf"), tl.float32)
    safe_before = tl.zeros((LANES,), tl.float32)
    exps = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    before = tl.full((LANES,), -float("inf"), tl.float32)
    for start in range(0, n_cols, LANES * WIDE):
        end = start + LANES * WIDE
        if end <= n_cols:
            y, cols = _load_kernel(row_ptr, start, n_cols, WIDE, LANES, True)
        else:
            y, cols = _load_kernel(row_ptr, start, n_cols, WIDE, LANES, False)
        z = y
        if HAS_TRANSFORM:
            z, _ = _transform_kernel(y, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
            if end > n_cols:
                z = tl.where(cols < n_cols, z, -float("inf"))
        if HAS_MEAN:
            total += tl.sum(tl.where(cols < n_cols, z, 0.0), axis=1)
        highest = tl.max(z, axis=1)
        if HAS_TOP1:
            # `argmax` returns the first maximum: a tie with an earlier token is not a top-1 prediction.
            if end <= target:
                before = tl.maximum(before, highest)
            elif start < target:
                before = tl.maximum(before, tl.max(tl.where(cols < target, z, -float("inf")), axis=1))
        new_m = tl.maximum(m, highest)
        # Lanes of -inf alone must not make (-inf) - (-inf).
        safe = tl.where(new_m == -float("inf"), 0.0, new_m)
        rescale = tl.exp2((m - safe) * LOG2E)
        shifted = z - safe[:, None]
        e = tl.exp2(shifted * LOG2E)
        if HAS_ENTROPY:
            # Sum of e * (z - m), all of one sign: the entropy comes without cancellation. A logit of -inf adds nothing.
            weighted = (weighted + exps * (safe_before - safe)) * rescale
            weighted += tl.sum(e * tl.maximum(shifted, -1e30), axis=1)
        exps = exps * rescale + tl.sum(e, axis=1)
        if HAS_SQ_PROBS:
            squares = squares * (rescale * rescale) + tl.sum(e * e, axis=1)
        m = new_m
        safe_before = safe
    # The lanes together.
    top = tl.max(m, axis=0)
    safe_top = tl.where(top == -float("inf"), 0.0, top)
    rescale = tl.exp2((m - safe_top) * LOG2E)
    if HAS_ENTROPY:
        weighted = tl.sum((weighted + exps * (safe_before - safe_top)) * rescale, axis=0)
    s = tl.sum(exps * rescale, axis=0)
    log_s = tl.log(s)
    tl.store(stats_ptr + row, z_target - top - log_s)
    tl.store(stats_ptr + n_rows + row, top)
    tl.store(stats_ptr + 2 * n_rows + row, log_s)
    if HAS_ENTROPY:
        tl.store(stats_ptr + 3 * n_rows + row, log_s - weighted / s)
    if HAS_SQ_PROBS:
        tl.store(stats_ptr + 4 * n_rows + row, tl.log(tl.sum(squares * (rescale * rescale), axis=0)) - 2.0 * log_s)
    if HAS_MEAN:
        tl.store(stats_ptr + 5 * n_rows + row, tl.sum(total, axis=0) / n_cols)
    if HAS_TOP1:
        is_top1 = (z_target >= top) & (z_target > tl.max(before, axis=0))
        tl.store(stats_ptr + 6 * n_rows + row, is_top1.to(tl.float32))
    if HAS_GRAD:
        # Every thread must have read the target's logit before any overwrites it.
        tl.debug_barrier()
        shift = log_s * LOG2E
        for start in range(0, n_cols, LANES * WIDE):
            if start + LANES * WIDE <= n_cols:
                y, cols = _load_kernel(row_ptr, start, n_cols, WIDE, LANES, True)
            else:
                y, cols = _load_kernel(row_ptr, start, n_cols, WIDE, LANES, False)
            z = y
            factor = grad_scale
            if HAS_TRANSFORM:
                z, slope = _transform_kernel(y, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
                factor = slope * grad_scale
            grad = -tl.exp2((z - top) * LOG2E - shift) * factor
            if start + LANES * WIDE <= n_cols:
                tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty))
            else:
                tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < n_cols)
        # The target's own, over what all columns have got.
        tl.debug_barrier()
        grad = (1.0 - tl.exp2((z_target - top) * LOG2E - shift)) * slope_target * grad_scale
        in_range = (target >= 0) & (target < n_cols)
        tl.store(row_ptr + target, grad.to(logits_ptr.dtype.element_ty), mask=in_range)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    logits_stride,
    targets_ptr,
    top_ptr,
    log_total_ptr,
    entropy_ptr,
    grad_log_prob_ptr,
    grad_entropy_ptr,
    n_cols,
    logit_scale,
    softcap,
    inv_temperature,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    ptrs = logits_ptr + row * logits_stride + cols
    y = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    z, slope = _transform_kernel(y, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
    log_p = z - tl.load(top_ptr + row) - tl.load(log_total_ptr + row)
    p = tl.exp(log_p)
    grad = (tl.where(cols == tl.load(targets_ptr + row), 1.0, 0.0) - p) * tl.load(grad_log_prob_ptr + row)
    if HAS_ENTROPY_GRAD:
        surprise = tl.where(z == -float("inf"), 0.0, p * (log_p + tl.load(entropy_ptr + row)))
        grad -= surprise * tl.load(grad_entropy_ptr + row)
    tl.store(ptrs, (grad * slope).to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scaled_cast_kernel(x_ptr, factors_ptr, out_ptr, width, blocks_of_row, BLOCK: tl.constexpr):
    row = tl.program_id(0) // blocks_of_row
    cols = (tl.program_id(0) % blocks_of_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    offsets = row.to(tl.int64) * width + cols
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0) * tl.load(factors_ptr + row)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------ ops


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Columns next to each other that a thread keeps a maximum and sums of: as many as a 16-byte load has in 16 bits.
_WIDE = 8


def _tile(n_cols: int, has_gradient: bool) -> tuple[int, int]:
    """Columns per step of the statistics, and warps.

    H200, 1,024 rows of 128,256 bf16 with entropy and top-1 (a copy takes 0.127 ms), ms with and without the gradient:
    16,384 columns 0.187 and 0.099, 8,192 columns 0.211 and 0.084, 2,048 columns 0.214 and 0.075. The fewer rows at a
    time, the more of them does the second pass find in L2; the more, the less does the first wait for loads.
    """
    block = min(16384 if has_gradient else 2048, triton.next_power_of_2(max(n_cols, 4 * _WIDE)))
    return block, max(1, block // 512)


def _block(n_cols: int) -> tuple[int, int]:
    """Columns of a program and warps, 16 columns a thread."""
    block = min(2048, triton.next_power_of_2(max(n_cols, 16)))
    return block, max(1, block // 512)


def _statistics_impl(
    logits: torch.Tensor,
    targets: torch.Tensor,
    logit_scale: float,
    softcap: float,
    inv_temperature: float,
    grad_scale: float,
    extras: int,
) -> torch.Tensor:
    transform = LogitTransform(logit_scale, softcap, inv_temperature)
    if not use_triton(logits):
        return _statistics_reference(logits, targets, transform, grad_scale, extras)
    n_rows, n_cols = logits.shape
    stats = logits.new_empty((_STATISTICS, n_rows), dtype=torch.float32)
    block, warps = _tile(n_cols, grad_scale != 0.0)
    launch(
        _statistics_kernel,
        (n_rows,),
        logits.device,
        logits,
        logits.stride(0),
        targets,
        stats,
        n_rows,
        n_cols,
        logit_scale,
        softcap,
        inv_temperature,
        grad_scale,
        HAS_TRANSFORM=transform != LogitTransform(),
        HAS_SOFTCAP=softcap != 0.0,
        HAS_GRAD=grad_scale != 0.0,
        HAS_ENTROPY=bool(extras & _bit("entropy")),
        HAS_SQ_PROBS=bool(extras & _bit("log_sum_sq_probs")),
        HAS_MEAN=bool(extras & _bit("mean_logits")),
        HAS_TOP1=bool(extras & _bit("is_top1")),
        WIDE=_WIDE,
        LANES=max(block // _WIDE, 1),
        num_warps=warps,
    )
    return stats


def _statistics_fake(logits: torch.Tensor, targets: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty((_STATISTICS, logits.shape[0]), dtype=_accumulate_dtype(logits.dtype))


_statistics = register_op(
    "head_statistics_(Tensor(a!) logits, Tensor targets, float logit_scale, float softcap, float inv_temperature,"
    " float grad_scale, int extras) -> Tensor",
    _statistics_impl,
    _statistics_fake,
)


def _gradient_impl(
    logits: torch.Tensor,
    targets: torch.Tensor,
    top: torch.Tensor,
    log_total: torch.Tensor,
    entropy: torch.Tensor,
    grad_log_prob: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    logit_scale: float,
    softcap: float,
    inv_temperature: float,
) -> None:
    transform = LogitTransform(logit_scale, softcap, inv_temperature)
    if not use_triton(logits):
        _gradient_reference(logits, targets, top, log_total, entropy, grad_log_prob, grad_entropy, transform)
        return
    n_rows, n_cols = logits.shape
    block, warps = _block(n_cols)
    launch(
        _gradient_kernel,
        (n_rows, cdiv(n_cols, block)),
        logits.device,
        logits,
        logits.stride(0),
        targets,
        top,
        log_total,
        entropy,
        grad_log_prob,
        grad_log_prob if grad_entropy is None else grad_entropy,
        n_cols,
        logit_scale,
        softcap,
        inv_temperature,
        HAS_SOFTCAP=softcap != 0.0,
        HAS_ENTROPY_GRAD=grad_entropy is not None,
        BLOCK=block,
        num_warps=warps,
    )


_gradient = register_op(
    "head_gradient_(Tensor(a!) logits, Tensor targets, Tensor top, Tensor log_total, Tensor entropy,"
    " Tensor grad_log_prob, Tensor? grad_entropy, float logit_scale, float softcap, float inv_temperature) -> ()",
    _gradient_impl,
    lambda *_: None,
)


def _scaled_cast_impl(x: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
    if not use_triton(x) or not x.is_contiguous() or not out.is_contiguous():
        out.copy_(x * factors[:, None])
        return
    if not x.numel():
        return
    rows, width = x.shape
    block = 2048
    blocks = cdiv(width, block)
    launch(_scaled_cast_kernel, (rows * blocks,), x.device, x, factors, out, width, blocks, BLOCK=block)


# Fills `out` with x [rows, width] times one factor per row, rounded once.
_scaled_cast = register_op(
    "scaled_cast_(Tensor x, Tensor factors, Tensor(a!) out) -> ()", _scaled_cast_impl, lambda *_: None
)


def _parts_of(weight: torch.Tensor, dtype: torch.dtype) -> list[slice]:
    """The rows of the weight whose gradients are summed in one tensor of `dtype`: all, or a first part with room for
    the whole gradient once it is rounded, and the rest."""
    rows = weight.shape[0]
    first = -(-rows // (2 * _PART_ROWS)) * _PART_ROWS
    is_large = weight.numel() * dtype.itemsize >= _IN_PLACE_BYTES
    if is_large and first < rows and 2 * weight.dtype.itemsize == dtype.itemsize:
        return [slice(0, first), slice(first, rows)]
    return [slice(0, rows)]


def _narrow(parts: list[torch.Tensor], factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The parts, which are emptied, times `factor`, rounded once, in the memory of the first."""
    factors = factor.view(1)
    first = parts.pop(0).view(1, -1)
    out = first.view(like.dtype)[:, : like.numel()]
    # What is written over must have been read. Of 16 bits, as many elements as lie before fit where these have been;
    # the very first ones go through a tensor of their own.
    done = min(_AT_A_TIME, first.numel())
    piece = first.new_empty(1, done, dtype=like.dtype)
    _scaled_cast(first[:, :done], factors, piece)
    out[:, :done] = piece
    del piece
    while done < first.numel():
        stop = min(2 * done, first.numel())
        _scaled_cast(first[:, done:stop], factors, out[:, done:stop])
        done = stop
    while parts:
        rest = parts.pop(0).view(1, -1)
        _scaled_cast(rest, factors, out[:, done : done + rest.numel()])
        done += rest.numel()
    return out.view(like.shape)


# ------------------------------------------------------------------------------------------------ GEMMs and chunks


def _chunks(n_rows: int, n_cols: int, itemsize: int, device: torch.device, is_trained: bool) -> list[slice]:
    """Equal slices of the rows whose logits fit the chunk budget; multiples of 128 rows keep GEMM tiles whole."""
    kind = device_kind(device)
    budget = _CHUNK_BYTES.get(kind, _CHUNK_BYTES_ELSEWHERE) * (_TIMES_TRAINED.get(kind, 1) if is_trained else 1)
    most = max(_LEAST_ROWS, budget // max(1, n_cols * itemsize))
    count = -(-n_rows // most)
    rows = n_rows if count <= 1 else -(-n_rows // (count * _ROW_TILE)) * _ROW_TILE
    return [slice(start, min(start + rows, n_rows)) for start in range(0, n_rows, max(rows, 1))]


def accumulate(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b in fp32 without rounding the product to the inputs' dtype: rounding each chunk's product biases a
    sum over chunks. `total` None starts a sum (no zeros to write and read back)."""
    low_precision = a.dtype in (torch.bfloat16, torch.float16)
    if low_precision and device_kind(a.device) == "cuda":
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    if low_precision:
        a, b = a.float(), b.float()
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


class _Head:
    """The operands of one call in the dtype of the GEMMs; a large fp32 weight is cast once, not once per chunk."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        self.hidden = hidden.to(dtype)
        self.weight = compute_weight(weight, dtype)
        self.bias = None if bias is None else bias.to(dtype)
        shape = hidden.shape[0], weight.shape[0]
        self.chunks = _chunks(*shape, self.hidden.element_size(), hidden.device, weight.requires_grad)
        rows = max((chunk.stop - chunk.start for chunk in self.chunks), default=0)
        self._buffer = self.hidden.new_empty((rows, weight.shape[0]))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the products of gradients read."""
        return [self.hidden, self.weight_of_gradient, self._buffer]

    @functools.cached_property
    def weight_of_gradient(self) -> torch.Tensor:
        """The weight as `accumulate` takes it: widened once where it would be for every chunk."""
        narrow = device_kind(self.weight.device) != "cuda" and self.weight.dtype in (torch.bfloat16, torch.float16)
        return self.weight.float() if narrow else self.weight

    def logits(self, chunk: slice) -> torch.Tensor:
        """[rows of the chunk, V], in a buffer that the next call overwrites."""
        out = self._buffer[: chunk.stop - chunk.start]
        if self.bias is None:
            return torch.mm(self.hidden[chunk], self.weight.t(), out=out)
        return torch.addmm(self.bias, self.hidden[chunk], self.weight.t(), out=out)


class _Gradients:
    """fp32 sums of the gradients of hidden, weight and bias over chunks; only those that are needed."""

    def __init__(self, head: _Head, needs: tuple[bool, bool, bool], weight: torch.Tensor):
        self._head = head
        self._needs = needs
        wide = _accumulate_dtype(head.hidden.dtype)
        self.hidden = head.hidden.new_empty(head.hidden.shape, dtype=wide) if needs[0] else None
        self._parts = _parts_of(weight, wide)
        self.weight: list[torch.Tensor] = []
        self.bias: torch.Tensor | None = None

    @property
    def sums(self) -> list[torch.Tensor]:
        return [each for each in (self.hidden, *self.weight, self.bias) if each is not None]

    def add(self, chunk: slice, grad_logits: torch.Tensor) -> None:
        if self.hidden is not None:
            self.hidden[chunk] = accumulate(None, grad_logits, self._head.weight_of_gradient)
        if self._needs[1]:
            before: list[Any] = self.weight or [None] * len(self._parts)
            hidden = self._head.hidden[chunk]
            self.weight = [
                accumulate(total, grad_logits[:, rows].t(), hidden)
                for total, rows in zip(before, self._parts, strict=True)
            ]
        if self._needs[2]:
            total = grad_logits.sum(0, dtype=_accumulate_dtype(grad_logits.dtype))
            self.bias = total if self.bias is None else self.bias.add_(total)


# ------------------------------------------------------------------------------------------------ autograd


class _SelectRows(torch.autograd.Function):
    """rows[index] for unique indices: backward is a copy, where index_select's adds one element at a time."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.n_rows = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros((ctx.n_rows, *grad.shape[1:])).index_copy_(0, index, grad), None


def select_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """rows [N, H] to [n, H], the rows of `index` [n], which names none twice."""
    return _SelectRows.apply(rows, index)


class _LinearLogProb(torch.autograd.Function):
    """Per-row log-probabilities of the targets, and the optional statistics.

    Gradients are computed in forward, for an upstream gradient of one per row, where that is exact: for a frozen head
    whatever the upstream gradient (d log_prob_i / d hidden_i is its own row), for a trained head if `uniform` promises
    one upstream value shared by all rows. Elsewhere backward computes the logits again.

    Who asks for statistics reads them before backward, on the host. So the last products, which they do not need, run
    beside that: the device has something to do until the host is back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
        outputs: tuple[str, ...],
        uniform: bool,
        tie: Tie | None,
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.tie = tie
        device_type = device_kind(hidden.device)
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        needs = ctx.needs_input_grad[:3]
        ahead = any(needs) and (uniform or not (needs[1] or needs[2]))
        # fp16 cannot hold the small probabilities of a large vocabulary; a power of two is exact to undo.
        grad_scale = 1.0 if ahead else 0.0
        if ahead and dtype == torch.float16:
            steepest = abs(transform.logit_scale * transform.inv_temperature)
            grad_scale = 2.0 ** (10 - max(0, math.ceil(math.log2(max(steepest, 1.0)))))
        extras_bits = sum(map(_bit, outputs))
        with torch.autocast(device_type, enabled=False):
            head = _Head(hidden, weight, bias, dtype)
            gradients = _Gradients(head, needs, weight) if ahead else None
            stats = head.hidden.new_empty((_STATISTICS, hidden.shape[0]), dtype=_accumulate_dtype(dtype))
            ctx.is_done = None
            for chunk in head.chunks:
                logits = head.logits(chunk)
                stats[:, chunk] = _statistics(logits, targets[chunk], *transform, grad_scale, extras_bits)
                if gradients is None:
                    continue
                if chunk is head.chunks[-1] and outputs and may_run_beside(hidden):
                    with beside([*head.tensors, *gradients.sums]) as side:
                        gradients.add(chunk, logits)
                    ctx.is_done = side.handed_over(gradients.sums)
                else:
                    gradients.add(chunk, logits)
        log_prob, top, log_total, entropy, log_sum_sq_probs, mean_logits, is_top1 = stats.clone().unbind()
        ctx.save_for_backward(
            hidden, weight, bias, targets, top, log_total, entropy, None if gradients is None else gradients.hidden
        )
        ctx.sums = None if gradients is None else (gradients.weight, gradients.bias)
        ctx.dtype, ctx.transform, ctx.grad_scale = dtype, transform, grad_scale
        values = {
            "entropy": entropy,
            "log_sum_sq_probs": log_sum_sq_probs,
            "mean_logits": mean_logits,
            "is_top1": is_top1 > 0,
        }
        extras = tuple(values[name] if name in outputs else None for name in OPTIONAL_OUTPUTS)
        ctx.mark_non_differentiable(*(extra for extra in extras[1:] if extra is not None))
        return log_prob, *extras

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        nothing = (None,) * 8
        if grad_log_prob is None and grad_entropy is None:
            return nothing
        hidden, weight, bias, targets, top, log_total, entropy, grad_hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        # The weight's sum is large, so it is scaled in place and handed out; a second backward computes it again.
        sums, ctx.sums = ctx.sums, None
        if ctx.is_done is not None:
            ctx.is_done.wait()
        if sums is not None and grad_entropy is None and grad_log_prob is not None:
            upstream = grad_log_prob.to(top.dtype) * (1.0 / ctx.grad_scale)
            shared = upstream[:1].squeeze(0) if len(upstream) else upstream.new_zeros(())
            return (
                _row_scaled(grad_hidden, upstream, hidden) if needs[0] else None,
                _left_with(ctx.tie, _weight_gradient(sums[0], shared, weight)) if needs[1] else None,
                _scaled(sums[1], shared, bias) if needs[2] else None,
                *nothing[3:],
            )
        if grad_log_prob is None:
            grad_log_prob = torch.zeros_like(top)
        grad_log_prob = grad_log_prob.to(top.dtype).contiguous()
        if grad_entropy is not None:
            grad_entropy = grad_entropy.to(top.dtype).contiguous()
        with torch.autocast(device_kind(hidden.device), enabled=False):
            head = _Head(hidden, weight, bias, ctx.dtype)
            gradients = _Gradients(head, needs, weight)
            for chunk in head.chunks:
                logits = head.logits(chunk)
                row_entropy_grad = None if grad_entropy is None else grad_entropy[chunk]
                _gradient(
                    logits,
                    targets[chunk],
                    top[chunk],
                    log_total[chunk],
                    entropy[chunk],
                    grad_log_prob[chunk],
                    row_entropy_grad,
                    *ctx.transform,
                )
                gradients.add(chunk, logits)
        one = top.new_ones(())
        return (
            gradients.hidden.to(hidden.dtype) if gradients.hidden is not None else None,
            _left_with(ctx.tie, _weight_gradient(gradients.weight, one, weight)) if needs[1] else None,
            _scaled(gradients.bias, one, bias) if needs[2] else None,
            *nothing[3:],
        )


def _weight_gradient(parts: list[torch.Tensor], factor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum over all chunks; `parts` is emptied."""
    if len(parts) > 1:
        return _narrow(parts, factor, weight)
    return _scaled(parts.pop() if parts else None, factor, weight)


def _scaled(total: torch.Tensor | None, factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """total * factor in the dtype of `like`, rounded once, in one pass; no rows at all give zeros."""
    if total is None:
        return torch.zeros_like(like)
    if total.dtype == like.dtype:
        return total.mul_(factor)
    out = torch.empty_like(like)
    _scaled_cast(total.view(1, -1), factor.view(1), out.view(1, -1))
    return out


def _row_scaled(rows: torch.Tensor, factors: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """rows [N, H] times one factor each, in the dtype of `like`, rounded once; `rows` stay for a second backward."""
    out = torch.empty_like(rows, dtype=like.dtype)
    _scaled_cast(rows, factors.contiguous(), out)
    return out


def _left_with(tie: Tie | None, gradient: torch.Tensor) -> torch.Tensor | None:
    """The weight's gradient for autograd; None where an embedding of the same weight sees to it."""
    return None if tie is not None and tie.takes(gradient) else gradient


def _check_operands(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} does not match weight {tuple(weight.shape)}: need [..., H], [V, H]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}, weight {tuple(weight.shape)}: need [V] and [V, H]")
    if not torch.is_autocast_enabled(device_kind(hidden.device)):
        dtypes = {hidden.dtype, weight.dtype} | ({bias.dtype} if bias is not None else set())
        if len(dtypes) > 1:
            raise TypeError(f"hidden, weight and bias differ in dtype ({dtypes}): cast them, or run under autocast")


# ------------------------------------------------------------------------------------------------ public


def linear_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transform: LogitTransform | None = None,
    outputs: tuple[str, ...] = (),
    uniform: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Log-probability of each target under the head, without the logits.

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V] or None. Under autocast the GEMMs run in the autocast dtype.
        targets: [N] int64 in [0, V); not checked.
        transform: logit scale, softcap and temperature.
        outputs: which of OPTIONAL_OUTPUTS to compute. Entropy (nats) is differentiable, the others are not.
        uniform: promises that the loss weights every row alike (a sum or mean times anything), so that a trained head's
            gradient can be computed in forward, saving a GEMM. A broken promise gives wrong weight gradients.

    Returns:
        (log_prob, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N] fp32 (is_top1 bool), None where not asked.
    """
    _check_operands(hidden, weight, bias)
    transform = transform or LogitTransform()
    return _LinearLogProb.apply(hidden, weight, bias, targets, transform, outputs, uniform, tie_of(weight))


@torch.compiler.disable  # the number of labelled rows is data: one graph break, before the head
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    num_items: torch.Tensor | float | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Cross-entropy of the labels under the head, without the logits.

    Args:
        hidden: [..., H] hidden states, already aligned with the labels (shifted by the caller).
        weight: [V, H]. bias: [V] or None. Under autocast the GEMMs run in the autocast dtype.
        labels: [...] int64; rows labelled `ignore_index` cost nothing.
        num_items: denominator of the summed loss, e.g. the labels of the whole optimizer step; None: the labels here.
        logit_scale: multiplies the projection. softcap: tanh cap applied after it (Gemma 2).

    Returns:
        fp32 scalar. As in torch, nan where there is nothing to average (0 / 0); gradients are then zero.

    Raises:
        IndexError: a label outside [0, V). TypeError, ValueError: see the module.
    """
    _check_operands(hidden, weight, bias)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not match hidden {tuple(hidden.shape)}: need [...], [..., H]"
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    labels = labels.reshape(-1)
    counted = labels != ignore_index
    wrong = (counted & ((labels < 0) | (labels >= weight.shape[0]))).any()
    index = counted.nonzero().squeeze(-1)
    if bool(wrong):
        raise IndexError(
            f"a label lies outside the vocabulary: labels must be {ignore_index} or in [0, {weight.shape[0]}). "
            "Check the tokenizer against the model's vocabulary size"
        )
    transform = LogitTransform(logit_scale, softcap or 0.0, 1.0)
    selected, targets = select_rows(rows, index), labels.index_select(0, index)
    log_prob, *_ = _LinearLogProb.apply(selected, weight, bias, targets, transform, (), True, tie_of(weight))
    return -log_prob.sum() / (len(index) if num_items is None else num_items)
