"""Linear layers with low-rank adapters (LoRA) and frozen weights, several on one input, forward and backward.

Formula, for the projections i of one input x, with S_i = s_i * dropout_i(x) @ A_i^T:

    y_i = x @ W_i^T + bias_i + S_i @ B_i^T

    dS_i = s_i * dy_i @ B_i          dx = sum over i of dy_i @ W_i + dropout_i'(dS_i @ A_i)
    dB_i = dy_i^T @ S_i              dA_i = dS_i^T @ dropout_i(x)              dbias_i = sum over rows of dy_i

x is read once for all A_i and saved once, and the products of all projections with a rank in them are one product where
they can be. The adapters' outputs are added in place by a kernel that reads and writes y, or dx, once: at a rank of 16
`addmm` reaches 54 % of the copy speed there, the kernel 92 %. Frozen weights have no gradient; they may be packed, with
a function that expands them, once per use. Dropout masks come from a counter-based generator (Philox, seeded from
torch's) and are drawn again in backward, so that they cost no memory.

Two other ways were measured and dropped (4,096 tokens, H200; benchmarks/RESULTS.md): widening the product to
[x | S] @ [W | B]^T costs 0 to 7 % of the product, but a copy of x and another layout of W; one kernel that makes dS and
dB from one reading of dy is no faster than two products.

Shapes: x [..., K]; W_i [N_i, K], or packed; bias_i [N_i]; A_i [r_i, K]; B_i [N_i, r_i]; y_i [..., N_i].
Dtypes: x and W float16, bfloat16, float32 or float64, the compute dtype. The low-rank products run in `low`, into which
x and the adapters are cast; y_i is given in `out`. Gradients have the dtypes of what they belong to; those of A and B
are accumulated in float32 and rounded once, to the dtype of A and B.

Floor, for T rows of e-byte elements, beyond the products with W: forward T*(K + 2*sum N)*e bytes, backward
T*(3*K + 2*sum N)*e.

Raises ValueError for shapes that do not fit, TypeError for weights that require a gradient.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); gradients by the chain rule. Salmon et
al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011) for Philox.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import cdiv, device_kind, launch, no_output, once_differentiable, register_op, use_triton
from ._weights import compute_weight

# The dense weight [N, K] from the packed one, its dtype, and whether it is for a gradient.
Expand = Callable[[torch.Tensor, torch.dtype, bool], torch.Tensor]


class Projection(NamedTuple):
    """One linear layer, with or without an adapter.

    Attributes:
        weight: [N, K], frozen; or packed in any way that `expand` understands.
        bias: [N] or None, frozen or trained.
        a, b: the adapter, [r, K] and [N, r]; both None where there is none.
        scaling: s above.
        dropout: probability, in [0, 1), of zeroing an element of the adapter's input.
        expand: gives the dense weight; None: `weight` is dense.
        out_features: N; needed where `weight` is packed and there is no adapter.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    scaling: float = 1.0
    dropout: float = 0.0
    expand: Expand | None = None
    out_features: int | None = None


# ---------------------------------------------------------------------------------------------------- torch reference


def _reference_add(y: torch.Tensor, s: torch.Tensor, b: torch.Tensor) -> None:
    """y += s @ b^T, rounded once."""
    wide = torch.promote_types(torch.promote_types(y.dtype, s.dtype), torch.float32)
    total = y if y.dtype == wide else y.to(wide)
    total.addmm_(s.to(wide), b.to(wide).t())  # in place, which autocast leaves alone
    if total is not y:
        y.copy_(total)


def _reference_keep(shape: tuple[int, int], dropout: float, seed: int, device: torch.device) -> torch.Tensor:
    """The mask of kept elements, from a torch generator."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(shape, generator=generator, device=device) >= dropout


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _keep(row, first_column, width, seed, threshold, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps: [len(row), BLOCK_N] from `first_column` on, a multiple of 4.

    Four neighbours share a counter. Seven rounds of Philox-4x32 pass the tests of randomness of its paper.
    """
    quad = first_column // 4 + tl.arange(0, BLOCK_N // 4)
    counter = row[:, None] * ((width + 3) // 4) + quad[None, :]
    a, b, c, d = tl.randint4x(seed, counter.to(tl.uint32, bitcast=False), 7)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (row.shape[0], BLOCK_N))
    return bits.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit
def add_low_rank(
    tile,
    s_ptr,
    s_stride,
    s_rows,
    b_ptr,
    b_row,
    b_rank,
    b_rows,
    rank,
    RANK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    IEEE: tl.constexpr,
):
    """tile + s @ b^T, in float32.

    Products of 16-bit numbers start from the tile: added to it, they would have to change their layout. Those of
    float32 are added to it, as many small terms would each be rounded to the precision of the sum.

    Args:
        s_ptr, s_stride, s_rows: s, its row stride, and rows of it (their numbers, and whether each exists).
        b_ptr, b_row, b_rank, b_rows: b, its strides, and rows of it, likewise.
        RANK: ranks per step; ONE_BLOCK: that one step is enough, which saves the loop.
    """
    s_index, s_mask = s_rows
    b_index, b_mask = b_rows
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    total = tl.zeros(tile.shape, tl.float32) if IEEE else tile
    if ONE_BLOCK:
        column = tl.arange(0, RANK)
        s = tl.load(
            s_ptr + s_index[:, None] * s_stride + column[None, :],
            mask=s_mask[:, None] & (column[None, :] < rank),
            other=0.0,
        )
        b = tl.load(
            b_ptr + b_index[None, :] * b_row + column[:, None] * b_rank,
            mask=b_mask[None, :] & (column[:, None] < rank),
            other=0.0,
        )
        total = tl.dot(s, b.to(s.dtype), total, input_precision=precision)
    else:
        for first in range(0, rank, RANK):
            column = first + tl.arange(0, RANK)
            s = tl.load(
                s_ptr + s_index[:, None] * s_stride + column[None, :],
                mask=s_mask[:, None] & (column[None, :] < rank),
                other=0.0,
            )
            b = tl.load(
                b_ptr + b_index[None, :] * b_row + column[:, None] * b_rank,
                mask=b_mask[None, :] & (column[:, None] < rank),
                other=0.0,
            )
            total = tl.dot(s, b.to(s.dtype), total, input_precision=precision)
    return tile + total if IEEE else total


@triton.jit
def _add_kernel(
    y_ptr,
    s_ptr,
    b_ptr,
    rows,
    width,
    rank,
    s_stride,
    b_row,
    b_rank,
    blocks,
    seed,
    threshold,
    inverse_keep,
    DROPOUT: tl.constexpr,
    RANK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y += s @ b^T, one tile per program; y is contiguous."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_column = (tl.program_id(0) % blocks) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + row[:, None] * width + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < width)
    y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    s_rows, b_rows = (row, row < rows), (column, column < width)
    if DROPOUT:
        delta = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        delta = add_low_rank(delta, s_ptr, s_stride, s_rows, b_ptr, b_row, b_rank, b_rows, rank, RANK, ONE_BLOCK, IEEE)
        y += tl.where(_keep(row, first_column, width, seed, threshold, BLOCK_N), delta * inverse_keep, 0.0)
    else:
        y = add_low_rank(y, s_ptr, s_stride, s_rows, b_ptr, b_row, b_rank, b_rows, rank, RANK, ONE_BLOCK, IEEE)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dropout_kernel(
    x_ptr,
    out_ptr,
    rows,
    width,
    blocks,
    seed,
    threshold,
    inverse_keep,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_column = (tl.program_id(0) % blocks) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    offset = row[:, None] * width + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < width)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    kept = tl.where(_keep(row, first_column, width, seed, threshold, BLOCK_N), x * inverse_keep, 0.0)
    tl.store(out_ptr + offset, kept.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pack_kernel(p0, p1, p2, p3, p4, p5, out_ptr, e0, e1, e2, e3, e4, e5, BLOCK: tl.constexpr):
    """Casts up to six contiguous tensors, which end at e0 ... e5 in `out`, into it."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(p0 + index, mask=index < e0, other=0.0).to(tl.float32)
    value += tl.load(p1 + (index - e0), mask=(index >= e0) & (index < e1), other=0.0).to(tl.float32)
    value += tl.load(p2 + (index - e1), mask=(index >= e1) & (index < e2), other=0.0).to(tl.float32)
    value += tl.load(p3 + (index - e2), mask=(index >= e2) & (index < e3), other=0.0).to(tl.float32)
    value += tl.load(p4 + (index - e3), mask=(index >= e3) & (index < e4), other=0.0).to(tl.float32)
    value += tl.load(p5 + (index - e4), mask=(index >= e4) & (index < e5), other=0.0).to(tl.float32)
    tl.store(out_ptr + index, value.to(out_ptr.dtype.element_ty), mask=index < e5)


# H200, y [4096, 14336] bf16, ranks 16 / 32 / 64: 60 / 62 / 69 us (floor 55); 32 x 256 and 64 x 256 tiles: 60 / 69 / 88.
_BLOCK_T, _BLOCK_N, _WARPS = 64, 128, 4
_PACK_BLOCK = 2048


# Ranks per step of a tile's product: tl.dot wants 16 at least; 64 keeps both operands small.
MAX_RANK_BLOCK = 64


def rank_block(rank: int) -> int:
    return 16 if rank <= 16 else 32 if rank <= 32 else MAX_RANK_BLOCK


def _threshold(dropout: float) -> int:
    return min(round(dropout * 2**32), 2**32 - 1)


# ---------------------------------------------------------------------------------------------------------------- ops


def _add(y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, dropout: float, seed: int) -> None:
    rows, width = y.shape
    if y.numel() == 0 or s.shape[1] == 0:
        return
    if dropout and y.dtype == torch.float64 and use_triton(s):
        # The mask must be that of `_dropout`, which saw the dtype of s.
        delta = torch.zeros_like(y, dtype=torch.float32)
        _add(delta, s, b, dropout, seed)
        y += delta
        return
    if not use_triton(y) or s.dtype == torch.float64:
        if dropout:
            delta = torch.zeros(rows, width, dtype=torch.promote_types(s.dtype, torch.float32), device=y.device)
            _reference_add(delta, s, b)
            y += (delta * _reference_keep((rows, width), dropout, seed, y.device)).div_(1 - dropout)
        else:
            _reference_add(y, s, b)
        return
    ieee = s.dtype == torch.float32
    # Products of float32 take more registers: 64 columns and 32 ranks at a time do not spill.
    width_block, rank = (64, min(32, rank_block(s.shape[1]))) if ieee else (_BLOCK_N, rank_block(s.shape[1]))
    blocks = cdiv(width, width_block)
    launch(
        _add_kernel,
        (cdiv(rows, _BLOCK_T) * blocks,),
        y.device,
        y,
        s,
        b,
        rows,
        width,
        s.shape[1],
        s.stride(0),
        b.stride(0),
        b.stride(1),
        blocks,
        seed,
        _threshold(dropout),
        1 / (1 - dropout),
        DROPOUT=dropout > 0,
        RANK=rank,
        ONE_BLOCK=s.shape[1] <= rank,
        IEEE=ieee,
        BLOCK_T=_BLOCK_T,
        BLOCK_N=width_block,
        num_warps=_WARPS,
    )


def _empty_dropout(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dropout(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    out = _empty_dropout(x, dropout, seed)
    rows, width = x.shape
    if x.numel() == 0:
        return out
    x = x.contiguous()
    if not use_triton(x):
        return torch.mul(x, _reference_keep((rows, width), dropout, seed, x.device), out=out).div_(1 - dropout)
    blocks = cdiv(width, _BLOCK_N)
    launch(
        _dropout_kernel,
        (cdiv(rows, _BLOCK_T) * blocks,),
        x.device,
        x,
        out,
        rows,
        width,
        blocks,
        seed,
        _threshold(dropout),
        1 / (1 - dropout),
        BLOCK_T=_BLOCK_T,
        BLOCK_N=_BLOCK_N,
        num_warps=_WARPS,
    )
    return out


def _pack(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Up to six tensors, cast and flattened, one behind the other."""
    if not use_triton(tensors[0]):
        return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    tensors = [tensor.contiguous() for tensor in tensors]
    ends, end = [], 0
    for tensor in tensors:
        end += tensor.numel()
        ends.append(end)
    out = torch.empty(end, dtype=dtype, device=tensors[0].device)
    missing = 6 - len(tensors)
    launch(
        _pack_kernel,
        (cdiv(end, _PACK_BLOCK),),
        out.device,
        *tensors,
        *tensors[-1:] * missing,
        out,
        *ends,
        *ends[-1:] * missing,
        BLOCK=_PACK_BLOCK,
    )
    return out


low_rank_add_ = register_op(
    "low_rank_add_(Tensor(a!) y, Tensor s, Tensor b, float dropout, int seed) -> ()", _add, no_output
)
_lora_dropout = register_op("lora_dropout(Tensor x, float dropout, int seed) -> Tensor", _dropout, _empty_dropout)
_lora_pack = register_op(
    "lora_pack(Tensor[] tensors, ScalarType dtype) -> Tensor",
    _pack,
    lambda tensors, dtype: tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype),
)


# ----------------------------------------------------------------------------------------------------------- autograd


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in `dtype`, rounded once."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if torch.promote_types(a.dtype, dtype) == a.dtype:
        return torch.mm(a, b).to(dtype)
    if device_kind(a.device) == "cuda" and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    wide = torch.promote_types(a.dtype, dtype)
    return torch.mm(a.to(wide), b.to(wide)).to(dtype)


def bias_gradient(dy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum over the rows of `dy` in `dtype`, rounded once: `Tensor.sum` would round each row to `dtype` first."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dtype)


def draw_seed(device: torch.device) -> int:
    """A seed that follows torch's generator of the device: the same after the same `manual_seed`, and in recompute.

    On CUDA the generator is moved on without launching anything.
    """
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
        offset = generator.get_offset()
        generator.set_offset(offset + 4)
        return (generator.initial_seed() + 0x9E3779B1 * offset) % (2**31 - 1)
    return int(torch.randint(2**31 - 1, ()).item())


class Stack(NamedTuple):
    """The adapters of projections on one input, without their tensors.

    Attributes:
        columns: where the ranks of projection i are among those of all, as slices; empty where it has no adapter.
        scaling, dropout: as in Projection.
        together: the scaling, where one product with the input makes all S_i; None where each has its own.
    """

    columns: tuple[slice, ...]
    scaling: tuple[float, ...]
    dropout: tuple[float, ...]
    together: float | None


class Adapters(NamedTuple):
    """The adapters of projections on one input, in one dtype.

    Attributes:
        a: all A_i, one above the other, [sum r_i, K]; None where there are no adapters.
        b: the B_i, each [N_i, r_i]; None where there is no adapter.
        stack: the rest.
    """

    a: torch.Tensor | None
    b: list[torch.Tensor | None]
    stack: Stack


# Where a matrix is among what was gathered: size, stride and offset in the first tensor, or the number of its own.
_Place = tuple[tuple[int, int], tuple[int, int], int] | int
# Elements. Matrices larger than this are not copied for the host's sake: 14,336 x 64 is copied, 14,336 x 128 is not.
_COPIED_AT_MOST = 2**20


class Layout:
    """How the adapters of some projections lie in memory while they are used: in `low`, those of one input stacked.

    What has to be stacked or cast is copied into one flat tensor by one launch, and small matrices with it. A backward
    pass then has one tensor to save instead of many; each would cost host time, most of all under checkpointing.

    Args:
        a, b, scaling, dropout: of each projection, as in Projection. Six matrices at most.
        low: the dtype.
        sizes: how many projections share the first input, the second, ...
    """

    def __init__(
        self,
        a: Sequence[torch.Tensor | None],
        b: Sequence[torch.Tensor | None],
        scaling: Sequence[float],
        dropout: Sequence[float],
        low: torch.dtype,
        sizes: Sequence[int],
    ):
        inputs, start = [], 0
        for size in sizes:
            inputs.append(range(start, start + size))
            start += size
        adapted = [[i for i in members if a[i] is not None] for members in inputs]
        # A matrix is (0, i) for A_i and (1, i) for B_i; those of an input are in order, A first.
        given: dict[tuple[int, int], Any] = {
            (kind, i): matrices[i] for members in adapted for kind, matrices in enumerate((a, b)) for i in members
        }
        copied = {(0, i) for members in adapted for i in members if len(members) > 1}
        copied |= {key for key, each in given.items() if each.dtype != low or not each.is_contiguous()}
        if copied:
            copied |= {key for key, each in given.items() if each.numel() <= _COPIED_AT_MOST}
        self._low = low
        self._copied = [key for key in given if key in copied]
        self._kept = [key for key in given if key not in copied]
        places: dict[tuple[int, int], _Place] = {}
        offset = 0
        for key in self._copied:
            rows, columns = given[key].shape
            places[key] = ((rows, columns), (columns, 1), offset)
            offset += rows * columns
        for number, key in enumerate(self._kept, start=bool(copied)):
            places[key] = number

        self._places: list[tuple[_Place | None, list[_Place | None], Stack]] = []
        for members, present in zip(inputs, adapted, strict=True):
            columns_of, end = [], 0
            for i in members:
                rank = given[0, i].shape[0] if i in present else 0
                columns_of.append(slice(end, end + rank))
                end += rank
            stacked = places[0, present[0]] if present else None
            if isinstance(stacked, tuple):
                (_, width), strides, first = stacked
                stacked = ((end, width), strides, first)
            scalings = {scaling[i] for i in present}
            together = len(scalings) == 1 and not any(dropout[i] for i in members)
            stack = Stack(
                tuple(columns_of),
                tuple(scaling[i] for i in members),
                tuple(dropout[i] for i in members),
                scalings.pop() if together else None,
            )
            self._places.append((stacked, [places.get((1, i)) for i in members], stack))
        self.stacks = [stack for _, _, stack in self._places]

    def gather(self, a: Sequence[torch.Tensor | None], b: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
        """What `adapters` makes the matrices from, and backward has to save."""
        matrices: Any = (a, b)
        kept = tuple(matrices[kind][i] for kind, i in self._kept)
        if not self._copied:
            return kept
        return _lora_pack([matrices[kind][i] for kind, i in self._copied], self._low), *kept

    def adapters(self, gathered: Sequence[torch.Tensor]) -> list[Adapters]:
        """The adapters of each input."""

        def at(place: _Place | None) -> torch.Tensor | None:
            if place is None:
                return None
            return gathered[place] if isinstance(place, int) else gathered[0].as_strided(*place)

        return [Adapters(at(a), [at(each) for each in b], stack) for a, b, stack in self._places]


def low_rank_inputs(x: torch.Tensor, adapters: Adapters, seeds: Sequence[int]) -> torch.Tensor | None:
    """All S_i side by side, [T, sum r_i], in the dtype of the adapters."""
    a, (columns, scaling, dropout, together) = adapters.a, adapters.stack
    if a is None:
        return None
    if x.dtype != a.dtype:
        x = x.to(a.dtype)
    s = x.new_empty(x.shape[0], a.shape[0])
    # On a CPU the order in which a product in float32 is summed, and with it its error, goes by its width: on some
    # three adapters together have 1.3 times the error of one. So there each has a product of its own, as in stock.
    if together is not None and (device_kind(x.device) != "cpu" or x.dtype != torch.float32):
        return torch.addmm(s, x, a.t(), beta=0, alpha=together, out=s)
    for i, each in enumerate(columns):
        if each.stop > each.start:
            dropped = _lora_dropout(x, dropout[i], seeds[i]) if dropout[i] else x
            s_i = s[:, each]
            torch.addmm(s_i, dropped, a[each].t(), beta=0, alpha=scaling[i], out=s_i)
    return s


def adapter_gradients(
    dy: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    ds: torch.Tensor | None,
    b_dtype: torch.dtype | None,
) -> torch.Tensor | None:
    """Of one projection: dB_i = dy_i^T @ S_i if its dtype is given; fills dS_i = s_i * dy_i @ B_i if that is given.

    All in the dtype of S but dB_i.
    """
    if dy.dtype != s.dtype:
        dy = dy.to(s.dtype)
    if ds is not None:
        torch.addmm(ds, dy, b, beta=0, alpha=scaling, out=ds)
    return None if b_dtype is None else product(dy.t(), s, b_dtype)


def low_rank_gradients(
    x: torch.Tensor, ds: torch.Tensor, dtypes: Sequence[torch.dtype | None], stack: Stack, seeds: Sequence[int]
) -> list[torch.Tensor | None]:
    """dA_i = dS_i^T @ dropout_i(x) for those whose dtype is given."""
    x = x if x.dtype == ds.dtype else x.to(ds.dtype)
    # In float32 each product is that of stock: cuBLAS makes longer sums for several at once, with larger errors.
    stackable = len(dtypes) == 1 or ds.itemsize == 2
    if stackable and None not in dtypes and len(set(dtypes)) == 1 and not any(stack.dropout):
        stacked = product(ds.t(), x, dtypes[0])  # type: ignore[arg-type]
        return [stacked] if len(dtypes) == 1 else [stacked[each] for each in stack.columns]
    gradients: list[torch.Tensor | None] = []
    for dtype, each, dropout, seed in zip(dtypes, stack.columns, stack.dropout, seeds, strict=True):
        if dtype is None:
            gradients.append(None)
            continue
        dropped = _lora_dropout(x, dropout, seed) if dropout else x
        gradients.append(product(ds[:, each].t(), dropped, dtype))
    return gradients


def add_input_gradient(dx: torch.Tensor, ds: torch.Tensor, adapters: Adapters, seeds: Sequence[int]) -> None:
    """dx += sum over i of dropout_i'(dS_i @ A_i)."""
    a, stack = adapters.a, adapters.stack
    assert a is not None
    if not any(stack.dropout):
        low_rank_add_(dx, ds, a.t(), 0.0, 0)
        return
    for each, dropout, seed in zip(stack.columns, stack.dropout, seeds, strict=True):
        low_rank_add_(dx, ds[:, each], a[each].t(), dropout, seed)


def dense(weight: torch.Tensor, expand: Expand | None, dtype: torch.dtype, backward: bool) -> torch.Tensor:
    """The weight [N, K] in `dtype`. The allocator hands the block of one expanded weight to the next."""
    if expand is not None:
        return expand(weight, dtype, backward)
    return compute_weight(weight, dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x @ weight^T + bias, computed in the dtype of x, in a contiguous tensor of `dtype`."""
    y = torch.nn.functional.linear(x, weight, bias if bias is None else bias.to(x.dtype))
    return y if y.dtype == dtype else y.to(dtype)


class Static(NamedTuple):
    """What autograd need not see of the projections.

    Frozen weights are not among the tensors that an autograd function saves: they are there anyway, and each would cost
    host time. Dense ones that were changed in between are found by their versions, as autograd finds them.
    """

    weights: tuple[torch.Tensor, ...]
    expand: tuple[Expand | None, ...]
    layout: Layout
    dtypes: tuple[torch.dtype | None, ...]  # of all biases, all A, all B
    low: torch.dtype
    out: torch.dtype

    def wanted(self, needed: Sequence[bool]) -> list[torch.dtype | None]:
        """The dtypes of the gradients that are needed, of all biases, all A, all B; None for the others."""
        return [dtype if need else None for dtype, need in zip(self.dtypes, needed, strict=True)]

    def weight_of(self, dtype: torch.dtype, backward: bool) -> Callable[[int], torch.Tensor]:
        """The dense matrices in `dtype`, by the number of their projection."""
        return lambda i: dense(self.weights[i], self.expand[i], dtype, backward)

    def versions(self) -> list[int]:
        return [weight._version for weight, expand in zip(self.weights, self.expand, strict=True) if expand is None]

    def check(self, versions: list[int]) -> None:
        """Raises RuntimeError where a weight was changed since `versions` were taken."""
        if versions and versions != self.versions():
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                "frozen weight of a layer with an adapter"
            )


def static_of(
    dtype: torch.dtype,
    projections: Sequence[Projection],
    low: torch.dtype | None,
    out: torch.dtype | None,
    sizes: Sequence[int] | None = None,
) -> Static:
    """Args: dtype: of the input, and default of `low` and `out`; sizes: see Layout, default one input for all."""
    weights, biases, a, b, scaling, dropout, expand, _ = zip(*projections, strict=True)
    layout = Layout(a, b, scaling, dropout, low or dtype, sizes or (len(projections),))
    dtypes = tuple(None if each is None else each.dtype for each in (*biases, *a, *b))
    return Static(weights, expand, layout, dtypes, low or dtype, out or dtype)


def tensors_of(projections: Sequence[Projection]) -> tuple[torch.Tensor | None, ...]:
    """All biases, all A, all B: what autograd has to see."""
    return tuple(each[field] for field in (1, 2, 3) for each in projections)  # type: ignore[misc]


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, static: Static, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        count, layout = len(static.weights), static.layout
        (stack,) = layout.stacks
        ctx.set_materialize_grads(False)
        ctx.static, ctx.shape, ctx.versions = static, x.shape, static.versions()
        x = x.reshape(-1, x.shape[-1])
        ctx.seeds = tuple(draw_seed(x.device) if dropout else 0 for dropout in stack.dropout)
        gathered = layout.gather(tensors[count : 2 * count], tensors[2 * count :])
        (adapters,) = layout.adapters(gathered)
        s = low_rank_inputs(x, adapters, ctx.seeds)
        outputs = []
        for i, weight in enumerate(static.weights):
            y = linear(x, dense(weight, static.expand[i], x.dtype, False), tensors[i], static.out)
            b_i = adapters.b[i]
            if b_i is not None:
                assert s is not None
                low_rank_add_(y, s[:, stack.columns[i]], b_i, 0.0, 0)
            outputs.append(y.view(*ctx.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(x, s, *gathered)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_gradients: torch.Tensor | None) -> tuple[Any, ...]:
        static, count = ctx.static, len(output_gradients)
        static.check(ctx.versions)
        x, s, *gathered = ctx.saved_tensors
        (adapters,) = static.layout.adapters(gathered)
        need_x, _, *need = ctx.needs_input_grad
        dtypes = static.wanted(need)
        gradients: list[torch.Tensor | None] = [None] * (3 * count)
        dx = ds = None
        if s is not None and (need_x or any(need[count : 2 * count])):
            ds = (torch.empty_like if None not in output_gradients else torch.zeros_like)(s)
        for i, dy in enumerate(output_gradients):
            if dy is None:
                # An adapter whose output was not used has no gradient, as under stock: an optimizer passes over it.
                dtypes[count + i] = None
                continue
            given = dy.reshape(-1, dy.shape[-1])
            dy = given if given.dtype == x.dtype else given.to(x.dtype)
            if dtypes[i] is not None:
                gradients[i] = bias_gradient(dy, dtypes[i])
            b_i = adapters.b[i]
            if b_i is not None:
                assert s is not None
                each, scaling = adapters.stack.columns[i], adapters.stack.scaling[i]
                ds_i = None if ds is None else ds[:, each]
                gradients[2 * count + i] = adapter_gradients(
                    given, s[:, each], b_i, scaling, ds_i, dtypes[2 * count + i]
                )
            del given
            if need_x:
                weight = dense(static.weights[i], static.expand[i], x.dtype, True)
                dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
                del weight
        if ds is not None:
            wanted = dtypes[count : 2 * count]
            if any(wanted):
                gradients[count : 2 * count] = low_rank_gradients(x, ds, wanted, adapters.stack, ctx.seeds)
            if dx is not None:
                add_input_gradient(dx, ds, adapters, ctx.seeds)
        return None if dx is None else dx.view(ctx.shape), None, *gradients


class _LoRAAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        ctx.shape, ctx.layout, ctx.dtypes = x.shape, layout, (x.dtype, a.dtype, b.dtype)
        x = x.reshape(-1, x.shape[-1])
        ctx.seeds = (draw_seed(x.device) if layout.stacks[0].dropout[0] else 0,)
        gathered = layout.gather([a], [b])
        (adapters,) = layout.adapters(gathered)
        s = low_rank_inputs(x, adapters, ctx.seeds)
        assert s is not None
        assert adapters.b[0] is not None
        out = y.reshape(-1, y.shape[-1]).clone(memory_format=torch.contiguous_format)
        low_rank_add_(out, s, adapters.b[0], 0.0, 0)
        ctx.save_for_backward(x, s, *gathered)
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, s, *gathered = ctx.saved_tensors
        (adapters,) = ctx.layout.adapters(gathered)
        stack, b = adapters.stack, adapters.b[0]
        assert b is not None
        _, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        ds = torch.empty_like(s) if need_x or need_a else None
        given, b_dtype = dy.reshape(-1, dy.shape[-1]), ctx.dtypes[2] if need_b else None
        db = adapter_gradients(given, s, b, stack.scaling[0], ds, b_dtype)
        dx = da = None
        if ds is not None and need_a:
            (da,) = low_rank_gradients(x, ds, [ctx.dtypes[1]], stack, ctx.seeds)
        if ds is not None and need_x:
            dx = torch.zeros_like(x)
            add_input_gradient(dx, ds, adapters, ctx.seeds)
            dx = dx.view(ctx.shape)
        return dy, dx, da, db, None


def check(width: int, projection: Projection) -> None:
    """Raises for a projection that does not fit an input of `width` columns."""
    weight, bias, a, b = projection[:4]
    if weight.requires_grad:
        raise TypeError("the weight under an adapter must be frozen (requires_grad=False)")
    if projection.expand is None and (weight.ndim != 2 or weight.shape[1] != width):
        raise ValueError(f"weight must have shape [N, {width}], got {list(weight.shape)}")
    if projection.expand is None and bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    if (a is None) != (b is None):
        raise ValueError("an adapter is two matrices: give both a and b, or neither")
    if a is not None and b is not None:
        check_adapter(width, a, b, projection.dropout)
        if projection.expand is None and b.shape[0] != weight.shape[0]:
            raise ValueError(f"b must have {weight.shape[0]} rows like weight, got {b.shape[0]}")


def check_adapter(width: int, a: torch.Tensor, b: torch.Tensor, dropout: float) -> None:
    """Raises for an adapter that does not fit an input of `width` columns."""
    if a.ndim != 2 or a.shape[1] != width or b.ndim != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(f"a must be [r, {width}] and b [N, r], got {list(a.shape)} and {list(b.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def linears_of(
    width: int, dtype: torch.dtype, projections: Sequence[Projection], low: torch.dtype | None, out: torch.dtype | None
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """`lora_linears` of inputs of one width and dtype: checked once, called many times."""
    if not 1 <= len(projections) <= 3:
        raise ValueError(f"between one and three projections, got {len(projections)}")
    for projection in projections:
        check(width, projection)
    static, tensors = static_of(dtype, projections, low, out), tensors_of(projections)
    return lambda x: _LoRALinears.apply(x, static, *tensors)


def lora_linears(
    x: torch.Tensor, projections: Sequence[Projection], low: torch.dtype | None = None, out: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """All projections of one input.

    Args:
        x: [..., K], in the dtype to compute in; dense weights are cast to it.
        projections: three at most, each with a weight of K columns.
        low: dtype of the low-rank products; default: that of x.
        out: dtype of the outputs; default: that of x.

    Returns:
        One [..., N_i] for each.
    """
    return linears_of(x.shape[-1], x.dtype, projections, low, out)(x)


def lora_add(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float = 1.0,
    dropout: float = 0.0,
    low: torch.dtype | None = None,
) -> torch.Tensor:
    """y + scaling * dropout(x) @ a^T @ b^T: an adapter beside a layer that makes y [..., N] from x [..., K] itself."""
    check_adapter(x.shape[-1], a, b, dropout)
    if y.shape != (*x.shape[:-1], b.shape[0]):
        raise ValueError(f"y must be {[*x.shape[:-1], b.shape[0]]}, got {list(y.shape)}")
    return _LoRAAdd.apply(y, x, a, b, Layout([a], [b], [scaling], [dropout], low or x.dtype, [1]))
