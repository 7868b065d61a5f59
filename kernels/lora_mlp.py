"""Gated MLP whose three projections carry low-rank adapters (LoRA) on frozen weights, forward and backward.

Formula, with S = s * x @ A^T for each projection:

    gate = x @ Wg^T + S_g @ Bg^T       up = x @ Wu^T + S_u @ Bu^T       h = act(gate) * up
    y = h @ Wd^T + S_d @ Bd^T                                           S_d = s_d * h @ Ad^T

    dh = dy @ Wd + dS_d @ Ad,  then dgate and dup as in glu.py, and the gradients of the projections as in lora.py

The adapters' outputs of gate and up are never added to the [T, I] results of the products with W: the kernels of the
activation and of its derivative add S @ B^T in registers, from [T, r] and [N, r] that stay in cache, and likewise
dS_d @ Ad to dh. h is not saved but made again, in the pass that makes dgate and dup, for the gradient of Ad.

Shapes: x [..., K]; Wg, Wu [I, K]; Wd [N, I]; y [..., N]. The first two projections have the input x, the third h.
Dtypes, errors and the packed form of weights: see lora.py. No dropout: its mask would have to be drawn for h.

Floor, for T rows of e-byte elements, beyond the products with W: forward T*(K + 3*I + I + 2*N)*e bytes, backward
T*(3*K + 6*I + 4*I + I + 2*N)*e.

Source: see glu.py and lora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import cdiv, launch, once_differentiable, register_op, use_triton
from .glu import ACTIVATIONS, reference_backward, reference_forward, share_of, slope_of
from .lora import (
    MAX_RANK_BLOCK,
    Adapters,
    Projection,
    Static,
    adapter_gradients,
    add_input_gradient,
    add_low_rank,
    bias_gradient,
    check,
    linear,
    low_rank_add_,
    low_rank_gradients,
    low_rank_inputs,
    rank_block,
    static_of,
    tensors_of,
)

# ---------------------------------------------------------------------------------------------------- torch reference


def _reference_sum(y: torch.Tensor, s: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    """y + s @ b^T in float32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    if s is None or b is None:
        return y.to(wide)
    wide = torch.promote_types(wide, s.dtype)
    return torch.addmm(y.to(wide), s.to(wide), b.to(wide).t())


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    rows,
    width,
    row_stride,
    s_gate_ptr,
    s_up_ptr,
    s_stride,
    b_gate_ptr,
    b_up_ptr,
    gate_rank,
    up_rank,
    blocks,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h for one tile per program."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    t, n = (row, row < rows), (column, column < width)
    offset = row[:, None] * row_stride + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < width)
    gate = tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if gate_rank > 0:
        gate = add_low_rank(
            gate, s_gate_ptr, s_stride, t, b_gate_ptr, gate_rank, 1, n, gate_rank, RANK, ONE_BLOCK, IEEE
        )
    if up_rank > 0:
        up = add_low_rank(up, s_up_ptr, s_stride, t, b_up_ptr, up_rank, 1, n, up_rank, RANK, ONE_BLOCK, IEEE)
    share, _ = share_of(gate, ACTIVATION)
    h = gate * share * up
    tl.store(h_ptr + row[:, None] * width + column[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    rows,
    width,
    row_stride,
    s_gate_ptr,
    s_up_ptr,
    s_stride,
    b_gate_ptr,
    b_up_ptr,
    gate_rank,
    up_rank,
    ds_down_ptr,
    ds_down_stride,
    a_down_ptr,
    down_rank,
    blocks,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    IEEE: tl.constexpr,
    KEEP_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dgate and dup for one tile per program. With KEEP_H dh is overwritten by h."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    t, n = (row, row < rows), (column, column < width)
    offset = row[:, None] * row_stride + column[None, :]
    dense = row[:, None] * width + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < width)
    gate = tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + dense, mask=mask, other=0.0).to(tl.float32)
    if gate_rank > 0:
        gate = add_low_rank(
            gate, s_gate_ptr, s_stride, t, b_gate_ptr, gate_rank, 1, n, gate_rank, RANK, ONE_BLOCK, IEEE
        )
    if up_rank > 0:
        up = add_low_rank(up, s_up_ptr, s_stride, t, b_up_ptr, up_rank, 1, n, up_rank, RANK, ONE_BLOCK, IEEE)
    if down_rank > 0:
        dh = add_low_rank(dh, ds_down_ptr, ds_down_stride, t, a_down_ptr, 1, width, n, down_rank, RANK, ONE_BLOCK, IEEE)
    share, rest = share_of(gate, ACTIVATION)
    activated = gate * share
    dup = dh * activated
    dgate = dh * up * (share + gate * slope_of(gate, share, rest, ACTIVATION))
    tl.store(dgate_ptr + offset, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + offset, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    if KEEP_H:
        # The layouts of load and store may differ: no thread stores h where another has yet to load dh.
        tl.debug_barrier()
        h = activated * up
        tl.store(dh_ptr + dense, h.to(dh_ptr.dtype.element_ty), mask=mask)


# H200, [4096, 14336] bf16, rank 16: forward 107 us (floor 83; 32 x 128 with 8 warps: 111). Adding the products to the
# tile instead of starting from it: 148 us.
_FORWARD_TILE = {"BLOCK_T": 32, "BLOCK_N": 64, "num_warps": 4}
# Never of 64 rows: those go to wgmma, and Triton 3.6 computes nonsense and reads out of bounds then, depending on which
# ranks are known when it compiles (ranks 1, 64 and 130; or 64, 64 and 64 without the branches).
_BACKWARD_TILE = {"BLOCK_T": 32, "BLOCK_N": 64, "num_warps": 4}


# ---------------------------------------------------------------------------------------------------------------- ops

# gate and up are the results of the products with W, [T, I] each, or `up` is None and `gate` [T, 2 I] holds both, as do
# their gradients then. The adapters' parts that are None are left out of the sum.

_Part = torch.Tensor | None


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if up is not None:
        return gate, up
    width = gate.shape[1] // 2
    return gate[:, :width], gate[:, width:]


def _rank(b: _Part) -> int:
    return 0 if b is None else b.shape[1]


def _empty_forward(
    gate: torch.Tensor, up: _Part, s_gate: _Part, b_gate: _Part, s_up: _Part, b_up: _Part, activation: str
) -> torch.Tensor:
    return gate.new_empty(_halves(gate, up)[0].shape)


def _forward(
    gate: torch.Tensor, up: _Part, s_gate: _Part, b_gate: _Part, s_up: _Part, b_up: _Part, activation: str
) -> torch.Tensor:
    h = _empty_forward(gate, up, s_gate, b_gate, s_up, b_up, activation)
    if h.numel() == 0:
        return h
    gate, up = _halves(gate, up)
    if not use_triton(gate):
        reference_forward(_reference_sum(gate, s_gate, b_gate), _reference_sum(up, s_up, b_up), activation, h)
        return h
    (rows, width), gate_rank, up_rank = h.shape, _rank(b_gate), _rank(b_up)
    s = s_gate if s_gate is not None else s_up
    blocks = cdiv(width, _FORWARD_TILE["BLOCK_N"])
    launch(
        _forward_kernel,
        (cdiv(rows, _FORWARD_TILE["BLOCK_T"]) * blocks,),
        h.device,
        gate,
        up,
        h,
        rows,
        width,
        gate.stride(0),
        gate if s_gate is None else s_gate,
        gate if s_up is None else s_up,
        0 if s is None else s.stride(0),
        gate if b_gate is None else b_gate,
        gate if b_up is None else b_up,
        gate_rank,
        up_rank,
        blocks,
        ACTIVATION=activation,
        RANK=rank_block(max(gate_rank, up_rank)),
        ONE_BLOCK=max(gate_rank, up_rank) <= MAX_RANK_BLOCK,
        IEEE=s is None or s.dtype == torch.float32,
        **_FORWARD_TILE,
    )
    return h


def _empty_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: _Part,
    s_gate: _Part,
    b_gate: _Part,
    s_up: _Part,
    b_up: _Part,
    ds_down: _Part,
    a_down: _Part,
    keep_h: bool,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(gate), gate.new_empty(0) if up is None else torch.empty_like(up)


def _backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: _Part,
    s_gate: _Part,
    b_gate: _Part,
    s_up: _Part,
    b_up: _Part,
    ds_down: _Part,
    a_down: _Part,
    keep_h: bool,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    gradients = _empty_backward(dh, gate, up, s_gate, b_gate, s_up, b_up, ds_down, a_down, keep_h, activation)
    if dh.numel() == 0:
        return gradients
    dgate, dup = _halves(gradients[0], None if up is None else gradients[1])
    gate, up = _halves(gate, up)
    if not use_triton(gate):
        gate, up = _reference_sum(gate, s_gate, b_gate), _reference_sum(up, s_up, b_up)
        a = None if a_down is None else a_down.t()
        reference_backward(_reference_sum(dh, ds_down, a), gate, up, activation, dgate, dup)
        if keep_h:
            reference_forward(gate, up, activation, dh)
        return gradients
    (rows, width), gate_rank, up_rank = dh.shape, _rank(b_gate), _rank(b_up)
    down_rank = 0 if a_down is None else a_down.shape[0]
    s = s_gate if s_gate is not None else s_up
    low = s if s is not None else ds_down
    blocks = cdiv(width, _BACKWARD_TILE["BLOCK_N"])
    launch(
        _backward_kernel,
        (cdiv(rows, _BACKWARD_TILE["BLOCK_T"]) * blocks,),
        dh.device,
        dh,
        gate,
        up,
        dgate,
        dup,
        rows,
        width,
        gate.stride(0),
        gate if s_gate is None else s_gate,
        gate if s_up is None else s_up,
        0 if s is None else s.stride(0),
        gate if b_gate is None else b_gate,
        gate if b_up is None else b_up,
        gate_rank,
        up_rank,
        gate if ds_down is None else ds_down,
        0 if ds_down is None else ds_down.stride(0),
        gate if a_down is None else a_down,
        down_rank,
        blocks,
        ACTIVATION=activation,
        RANK=rank_block(max(gate_rank, up_rank, down_rank)),
        ONE_BLOCK=max(gate_rank, up_rank, down_rank) <= MAX_RANK_BLOCK,
        IEEE=low is None or low.dtype == torch.float32,
        KEEP_H=keep_h,
        **_BACKWARD_TILE,
    )
    return gradients


_lora_glu = register_op(
    "lora_glu(Tensor gate, Tensor? up, Tensor? s_gate, Tensor? b_gate, Tensor? s_up, Tensor? b_up, str activation)"
    " -> Tensor",
    _forward,
    _empty_forward,
)
# Overwrites dh, which the caller owns, with h where keep_h is set.
_lora_glu_backward = register_op(
    "lora_glu_backward(Tensor(a!) dh, Tensor gate, Tensor? up, Tensor? s_gate, Tensor? b_gate, Tensor? s_up,"
    " Tensor? b_up, Tensor? ds_down, Tensor? a_down, bool keep_h, str activation) -> (Tensor, Tensor)",
    _backward,
    _empty_backward,
)


# ----------------------------------------------------------------------------------------------------------- autograd


def _parts(s: _Part, adapters: Adapters, width: int) -> tuple[_Part, _Part, _Part, _Part]:
    """S_g, B_g, S_u, B_u, each None where there is no adapter; from one adapter for both where they are packed."""
    if s is None:
        return None, None, None, None
    if len(adapters.b) == 2:
        s_gate, s_up = (
            None if b is None else s[:, each] for b, each in zip(adapters.b, adapters.stack.columns, strict=True)
        )
        return s_gate, adapters.b[0], s_up, adapters.b[1]
    (b,) = adapters.b
    assert b is not None
    return s, b[:width], s, b[width:]


# What follows is computed of all rows at once, or of a tile of them at a time (tiled_mlp.py). `weight(i)` gives the
# dense matrix of projection i, and `seeds` holds one seed for each: of dropout, which there is in tiles only.

Weight = Callable[[int], torch.Tensor]


def hidden_of(
    x: torch.Tensor, into: Adapters, weight: Weight, biases: Sequence[_Part], seeds: Sequence[int] = ()
) -> tuple[torch.Tensor, _Part, _Part]:
    """gate and up before their adapters, or both in one and None; and S of both."""
    s = low_rank_inputs(x, into, seeds)
    hidden = [linear(x, weight(i), bias, x.dtype) for i, bias in enumerate(biases)]
    return hidden[0], hidden[1] if len(hidden) == 2 else None, s


def product_of(gate: torch.Tensor, up: _Part, s: _Part, into: Adapters, activation: str) -> torch.Tensor:
    """h."""
    width = gate.shape[1] if up is not None else gate.shape[1] // 2
    return _lora_glu(gate, up, *_parts(s, into, width), activation)


class Gradients(NamedTuple):
    """Of the input, and of the biases, all A and all B."""

    x: _Part
    biases: list[_Part]
    a: list[_Part]
    b: list[_Part]


def gradients_of(
    x: torch.Tensor,
    hidden: tuple[torch.Tensor, _Part, _Part, _Part],
    given: torch.Tensor,
    adapters: Sequence[Adapters],
    weight: Weight,
    activation: str,
    need_x: bool,
    dtypes: Sequence[torch.dtype | None],
    seeds: Sequence[int] = (),
) -> Gradients:
    """All gradients.

    Args:
        hidden: gate, up, S of both, and S_d.
        given: the gradient of y.
        dtypes: of the gradients of all biases, all A, all B; None for those that are not needed.
    """
    (gate, up, s, s_down), (into, down) = hidden, adapters
    count = len(dtypes) // 3
    bias_dtypes, a_dtypes, b_dtypes = (dtypes[i * count : (i + 1) * count] for i in range(3))
    biases: list[_Part] = [None] * count
    a: list[_Part] = [None] * count
    b: list[_Part] = [None] * count

    dy = given if given.dtype == x.dtype else given.to(x.dtype)
    bias_dtype = bias_dtypes[-1]
    if bias_dtype is not None:
        biases[-1] = bias_gradient(dy, bias_dtype)
    ds_down = None
    if s_down is not None:
        ds_down = torch.empty_like(s_down)
        b_down = down.b[0]
        assert b_down is not None
        b[-1] = adapter_gradients(given, s_down, b_down, down.stack.scaling[0], ds_down, b_dtypes[-1])
    dh = torch.mm(dy, weight(count - 1))
    del dy, given
    parts, drops = _parts(s, into, dh.shape[1]), ds_down is not None and down.stack.dropout[0] > 0
    if drops:  # the kernel would have to draw the mask
        assert ds_down is not None
        add_input_gradient(dh, ds_down, down, seeds[-1:])
    added = (None, None) if drops else (ds_down, down.a)
    dgate, dup = _lora_glu_backward(dh, gate, up, *parts, *added, a_dtypes[-1] is not None, activation)
    if ds_down is not None and a_dtypes[-1] is not None:
        (a[-1],) = low_rank_gradients(dh, ds_down, a_dtypes[-1:], down.stack, seeds[-1:] or (0,))
    del dh

    dx, ds = None, None if s is None else torch.empty_like(s)
    for i, dhidden in enumerate((dgate,) if up is None else (dgate, dup)):
        bias_dtype = bias_dtypes[i]
        if bias_dtype is not None:
            biases[i] = bias_gradient(dhidden, bias_dtype)
        b_i = into.b[i]
        if b_i is not None:
            assert s is not None
            assert ds is not None
            each = into.stack.columns[i]
            b[i] = adapter_gradients(dhidden, s[:, each], b_i, into.stack.scaling[i], ds[:, each], b_dtypes[i])
        if need_x:
            dense_weight = weight(i)
            dx = torch.mm(dhidden, dense_weight) if dx is None else dx.addmm_(dhidden, dense_weight)
            del dense_weight
    if ds is not None:
        if any(a_dtypes[:-1]):
            a[:-1] = low_rank_gradients(x, ds, a_dtypes[:-1], into.stack, seeds[:-1] or (0,) * (count - 1))
        if dx is not None:
            add_input_gradient(dx, ds, into, seeds[:-1])
    return Gradients(dx, biases, a, b)


# The product with Wd is a node of its own that saves nothing: all that the gradients need is saved by the node before.
# Recomputation under non-reentrant checkpointing stops at the last saved tensor, and this product, the last of its
# layer, is then not computed a second time. The two nodes are joined by `link`, an empty stand-in for y: the gradient
# of y is passed on as that of `link`.


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        link: torch.Tensor,
        h: torch.Tensor,
        s_down: torch.Tensor | None,
        b_down: torch.Tensor | None,
        bias: torch.Tensor | None,
        static: Static,
    ) -> torch.Tensor:
        y = linear(h, static.weight_of(h.dtype, False)(-1), bias, static.out)
        if s_down is not None:
            low_rank_add_(y, s_down, b_down, 0.0, 0)
        return y.view(link.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return dy, None, None, None, None, None


class _Hidden(torch.autograd.Function):
    """Projections: gate, up and down, or gate_up and down. Returns `link`, h, S_d and B_d in the dtype of S_d."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, activation: str, static: Static, features: int, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        count, layout = len(static.weights), static.layout
        ctx.set_materialize_grads(False)  # h has none, and would be given one of zeros
        ctx.static, ctx.activation, ctx.shape, ctx.versions = static, activation, x.shape, static.versions()
        link = x.new_empty((), dtype=static.out).expand(*x.shape[:-1], features)
        x = x.reshape(-1, x.shape[-1])
        gathered = layout.gather(tensors[count : 2 * count], tensors[2 * count :])
        into, down = layout.adapters(gathered)
        gate, up, s = hidden_of(x, into, static.weight_of(x.dtype, False), tensors[: count - 1])
        h = product_of(gate, up, s, into, activation)
        s_down = low_rank_inputs(h, down, ())
        b_down = None if down.b[0] is None else down.b[0].detach()
        ctx.save_for_backward(x, gate, up, s, s_down, *gathered)
        ctx.mark_non_differentiable(*(each for each in (h, s_down, b_down) if each is not None))
        return link, h, s_down, b_down

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, *_: None) -> tuple[Any, ...]:
        static = ctx.static
        static.check(ctx.versions)
        x, gate, up, s, s_down, *gathered = ctx.saved_tensors
        need_x, _, _, _, *need = ctx.needs_input_grad
        dx, biases, a, b = gradients_of(
            x,
            (gate, up, s, s_down),
            dy.reshape(-1, dy.shape[-1]),
            static.layout.adapters(gathered),
            static.weight_of(x.dtype, True),
            ctx.activation,
            need_x,
            static.wanted(need),
        )
        return None if dx is None else dx.view(ctx.shape), None, None, None, *biases, *a, *b


def _inner_width(projections: tuple[Projection, ...]) -> int:
    """I, as far as it is known without expanding a weight; otherwise what `down` takes it to be."""
    known = set()
    for projection in projections[:-1]:
        if projection.b is not None:
            known.add(projection.b.shape[0])
        elif projection.expand is None:
            known.add(projection.weight.shape[0])
    if len(known) > 1:
        raise ValueError(f"gate and up must have the same number of outputs, got {sorted(known)}")
    if not known:
        down = projections[-1]
        return (down.weight if down.a is None else down.a).shape[-1]
    (width,) = known
    if len(projections) == 3:
        return width
    if width % 2:
        raise ValueError(f"gate_up must have an even number of outputs, got {width}")
    return width // 2


def checked(
    width: int,
    dtype: torch.dtype,
    projections: tuple[Projection, ...],
    activation: str,
    low: torch.dtype | None,
    out: torch.dtype | None,
) -> tuple[Static, int]:
    """What autograd need not see, and the columns of y. Raises for what does not fit an input of `width` columns."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if len(projections) not in (2, 3):
        raise ValueError(f"gate, up and down, or gate_up and down; got {len(projections)} projections")
    for projection in projections[:-1]:
        check(width, projection)
    check(_inner_width(projections), projections[-1])
    down = projections[-1]
    features = down.out_features
    if down.b is not None or down.expand is None:
        features = (down.weight if down.b is None else down.b).shape[0]
    if features is None:
        raise ValueError("a packed down projection without an adapter needs out_features")
    return static_of(dtype, projections, low, out, (len(projections) - 1, 1)), features


def gated_mlp_of(
    width: int,
    dtype: torch.dtype,
    projections: tuple[Projection, ...],
    activation: str,
    low: torch.dtype | None,
    out: torch.dtype | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`lora_gated_mlp` of inputs of one width and dtype: checked once, called many times."""
    if any(projection.dropout for projection in projections):
        raise ValueError("a gated MLP with dropout in its adapters must be computed in tiles, or one by one")
    static, features = checked(width, dtype, projections, activation, low, out)
    down, tensors = projections[-1], tensors_of(projections)

    def gated_mlp(x: torch.Tensor) -> torch.Tensor:
        link, h, s_down, b_down = _Hidden.apply(x, activation, static, features, *tensors)
        bias = None if down.bias is None else down.bias.detach()
        return _Down.apply(link, h, s_down, b_down, bias, static)

    return gated_mlp


def lora_gated_mlp(
    x: torch.Tensor,
    projections: tuple[Projection, ...],
    activation: str,
    low: torch.dtype | None = None,
    out: torch.dtype | None = None,
) -> torch.Tensor:
    """down(act(gate(x)) * up(x)).

    Args:
        x: [..., K], in the dtype to compute in; dense weights are cast to it.
        projections: gate, up and down; or gate_up, which holds gate before up, and down. None with dropout.
        activation: "silu", "gelu_tanh" or "gelu".
        low: dtype of the low-rank products; default: that of x.
        out: dtype of the output; default: that of x.

    Returns:
        [..., N], N being the outputs of down.
    """
    return gated_mlp_of(x.shape[-1], x.dtype, projections, activation, low, out)(x)
