"""Gated linear unit, alone and with the linear layer behind it (SwiGLU and GeGLU MLPs), forward and backward.

Formula, computed in float32 and rounded once:

    h = act(gate) * up               act(g) = g * p(g)
    p = sigmoid(g)                                            silu
    p = sigmoid(2 z),  z = sqrt(2/pi) * (g + 0.044715 g^3)    gelu_tanh, because (1 + tanh z) / 2 = sigmoid(2 z)
    p = (1 + erf(g / sqrt 2)) / 2                             gelu

    dup = dh * g * p                 dgate = dh * up * (p + g * p'(g))

    y = h @ weight^T + bias          dh = dy @ weight,  dweight = dy^T @ h,  dbias = sum over rows of dy

The linear versions save gate and up and not h: the kernel that makes dgate and dup makes h again, bit for bit, for
dweight. The packed versions take gate and up as the halves of one tensor (Phi-3, GLM) and give one packed gradient.

Shapes: gate, up, h [..., I]; gate_up [..., 2 I]; weight [N, I], bias [N], y [..., N]. Rows of gate and up must be
contiguous and lie two strides apart, or are copied first.
Dtypes: float16, bfloat16, float32; float64 takes the torch reference. h has dtype promote(gate, up). Under autocast
the inputs of the product are cast as F.linear would cast them; otherwise h, weight and bias must have one dtype.

Floor, for T rows of e-byte elements: forward 3*T*I*e bytes, backward 5*T*I*e, or 6*T*I*e where h is made again; plus
the matrix products: 2*T*N*I operations forward, 2*T*N*I for dh and 2*T*N*I for dweight.

Raises ValueError for unknown activations and shapes or devices that do not fit, TypeError for dtypes that do not.

Source: Shazeer, "GLU Variants Improve Transformer" (2020); Hendrycks and Gimpel, "Gaussian Error Linear Units"
(2016); gradients by the chain rule.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ._launch import (
    cdiv,
    device_kind,
    in_rows,
    launch,
    once_differentiable,
    register_op,
    rows_of,
    use_triton,
    with_rows,
)
from ._weights import cast_weight

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")

_CUBIC = 0.044715
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


# ---------------------------------------------------------------------------------------------------- torch reference


def _exponent(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return gate
    return 2 * _SQRT_2_OVER_PI * gate * (1 + _CUBIC * gate * gate)


def _reference_share(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """p(gate)."""
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
    return torch.sigmoid(_exponent(gate, activation))


def _reference_slope(gate: torch.Tensor, share: torch.Tensor, activation: str) -> torch.Tensor:
    """p'(gate), given p(gate)."""
    if activation == "gelu":
        return torch.exp(-0.5 * gate * gate) * (1 / math.sqrt(2 * math.pi))
    # sigmoid(-e) rather than 1 - sigmoid(e), which cancels for large gates.
    slope = share * torch.sigmoid(-_exponent(gate, activation))
    if activation == "gelu_tanh":
        slope = slope * (2 * _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * gate * gate))
    return slope


def reference_forward(gate: torch.Tensor, up: torch.Tensor, activation: str, h: torch.Tensor) -> None:
    """Fills `h`."""
    wide = torch.promote_types(torch.promote_types(gate.dtype, up.dtype), torch.float32)
    gate = gate.to(wide)
    torch.mul(gate * _reference_share(gate, activation), up.to(wide), out=h)


def reference_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
) -> None:
    """Fills `dgate` and `dup`."""
    wide = torch.promote_types(torch.promote_types(gate.dtype, up.dtype), torch.float32)
    dh, gate, up = dh.to(wide), gate.to(wide), up.to(wide)
    share = _reference_share(gate, activation)
    torch.mul(dh, gate * share, out=dup)
    torch.mul(dh * up, share + gate * _reference_slope(gate, share, activation), out=dgate)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def share_of(gate, ACTIVATION: tl.constexpr):
    """p(gate) and 1 - p(gate), neither by cancellation where p is a sigmoid.

    A product that feeds a sum is an explicit fma: no compiler then has anything left to contract, and the forward and
    the backward kernel compute the same bits.
    """
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        return share, 1.0 - share
    exponent = gate
    if ACTIVATION == "gelu_tanh":
        exponent = 1.5957691216057308 * gate * tl.fma(0.044715 * gate, gate, 1.0)
    decay = tl.exp(-tl.abs(exponent))
    larger = 1.0 / (1.0 + decay)
    smaller = decay * larger
    return tl.where(exponent >= 0, larger, smaller), tl.where(exponent >= 0, smaller, larger)


@triton.jit
def slope_of(gate, share, rest, ACTIVATION: tl.constexpr):
    """p'(gate), given p(gate) and 1 - p(gate)."""
    if ACTIVATION == "gelu":
        return tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    slope = share * rest
    if ACTIVATION == "gelu_tanh":
        slope = slope * (1.5957691216057308 * (1.0 + 0.134145 * gate * gate))
    return slope


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    width,
    blocks,
    inner,
    gate_outer,
    gate_inner,
    up_outer,
    up_inner,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row per program; h is dense in the row order of gate."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate_row = row // inner * gate_outer + row % inner * gate_inner
    up_row = row // inner * up_outer + row % inner * up_inner
    gate = tl.load(gate_ptr + gate_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_row + column, mask=mask, other=0.0).to(tl.float32)
    share, _ = share_of(gate, ACTIVATION)
    h = gate * share * up
    tl.store(h_ptr + row * width + column, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    width,
    blocks,
    inner,
    dh_outer,
    dh_inner,
    gate_outer,
    gate_inner,
    up_outer,
    up_inner,
    gradient_stride,
    ACTIVATION: tl.constexpr,
    KEEP_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row per program. With KEEP_H dh is overwritten by h."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    dh_row = row // inner * dh_outer + row % inner * dh_inner
    gate_row = row // inner * gate_outer + row % inner * gate_inner
    up_row = row // inner * up_outer + row % inner * up_inner
    gate = tl.load(gate_ptr + gate_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_row + column, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + dh_row + column, mask=mask, other=0.0).to(tl.float32)
    share, rest = share_of(gate, ACTIVATION)
    activated = gate * share
    dup = dh * activated
    dgate = dh * up * (share + gate * slope_of(gate, share, rest, ACTIVATION))
    gradient = row * gradient_stride + column
    tl.store(dgate_ptr + gradient, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + gradient, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    if KEEP_H:
        # The layouts of load and store may differ: no thread stores h where another has yet to load dh.
        tl.debug_barrier()
        h = activated * up
        tl.store(dh_ptr + dh_row + column, h.to(dh_ptr.dtype.element_ty), mask=mask)


# 16 elements per thread: two 16-byte loads of each input in flight.
_BLOCK, _WARPS = 2048, 4


# ---------------------------------------------------------------------------------------------------------------- ops

# In every op `up` may be None: `gate` then holds both halves.


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if up is not None:
        return gate, up
    width = gate.shape[-1] // 2
    return gate[..., :width], gate[..., width:]


def _walk(gate: torch.Tensor, *others: torch.Tensor) -> tuple[int, int, list[torch.Tensor], list[int]]:
    """Rows, `inner`, the tensors as they can be walked, and the outer and inner strides of each.

    Contiguous tensors are one long row: no tail of a row then idles part of a program.
    """
    if gate.is_contiguous() and all(other.is_contiguous() for other in others):
        return 1, 1, [gate, *others], [0, 0] * (1 + len(others))
    layout = rows_of(gate)
    tensors, strides = [gate], [layout.outer_stride, layout.inner_stride]
    for other in others:
        other, outer, inner = in_rows(other, layout)
        tensors.append(other)
        strides += (outer, inner)
    return gate.numel() // gate.shape[-1], layout.inner, tensors, strides


def _empty_forward(gate: torch.Tensor, up: torch.Tensor | None, activation: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(_halves(gate, up)[0], dtype=dtype)


def _forward(gate: torch.Tensor, up: torch.Tensor | None, activation: str, dtype: torch.dtype) -> torch.Tensor:
    h = _empty_forward(gate, up, activation, dtype)
    if h.numel() == 0:
        return h
    gate, up = _halves(gate, up)
    if not (use_triton(gate) and use_triton(up)):
        reference_forward(gate, up, activation, h)
        return h
    rows, inner, (gate, up), strides = _walk(gate, up)
    width = gate.numel() // rows
    blocks = cdiv(width, _BLOCK)
    launch(
        _forward_kernel,
        (rows * blocks,),
        gate.device,
        gate,
        up,
        h,
        width,
        blocks,
        inner,
        *strides,
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return h


def _empty_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(gate), gate.new_empty(0) if up is None else torch.empty_like(gate, dtype=up.dtype)


def _gradients(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, keep_h: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    gradients = _empty_backward(dh, gate, up, activation)
    if dh.numel() == 0:
        return gradients
    dgate, dup = _halves(gradients[0], None if up is None else gradients[1])
    gate, up = _halves(gate, up)
    if not (use_triton(gate) and use_triton(up)):
        reference_backward(dh, gate, up, activation, dgate, dup)
        if keep_h:
            reference_forward(gate, up, activation, dh)
        return gradients
    rows, inner, (gate, up, walked_dh), strides = _walk(gate, up, dh)
    width = gate.numel() // rows
    blocks = cdiv(width, _BLOCK)
    launch(
        _backward_kernel,
        (rows * blocks,),
        gate.device,
        walked_dh,
        gate,
        up,
        dgate,
        dup,
        width,
        blocks,
        inner,
        *strides[4:],
        *strides[:4],
        gradients[0].shape[-1],
        ACTIVATION=activation,
        KEEP_H=keep_h,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    if keep_h and walked_dh is not dh:
        dh.copy_(walked_dh)
    return gradients


def _backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _gradients(dh, gate, up, activation, keep_h=False)


def _backward_keep_h(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _gradients(dh, gate, up, activation, keep_h=True)


glu_forward = register_op(
    "glu(Tensor gate, Tensor? up, str activation, ScalarType dtype) -> Tensor", _forward, _empty_forward
)
glu_backward = register_op(
    "glu_backward(Tensor dh, Tensor gate, Tensor? up, str activation) -> (Tensor, Tensor)", _backward, _empty_backward
)
# Overwrites dh, which the caller owns, with h: one [T, I] buffer less at the peak of the backward pass.
glu_backward_keep_h_ = register_op(
    "glu_backward_keep_h(Tensor(a!) dh, Tensor gate, Tensor? up, str activation) -> (Tensor, Tensor)",
    _backward_keep_h,
    _empty_backward,
)


# ----------------------------------------------------------------------------------------------------------- autograd


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        dtype = gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)
        return glu_forward(gate, up, activation, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = glu_backward(dh, gate, up, ctx.activation)
        return dgate, None if up is None else dup, None


class _GLULinear(torch.autograd.Function):
    """All of h, weight and bias have the dtype of weight here."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.activation = activation
        return F.linear(glu_forward(gate, up, activation, weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        need_gate, need_up, need_weight, need_bias = ctx.needs_input_grad[:4]
        rows, width = dy.numel() // weight.shape[0], weight.shape[1]
        dy = dy.reshape(rows, weight.shape[0])
        dgate = dup = dweight = h = None
        if need_gate or need_up:
            dh = torch.mm(dy, weight).view(*gate.shape[:-1], width)
            if need_weight:
                dgate, dup = glu_backward_keep_h_(dh, gate, up, ctx.activation)
                h = dh
            else:
                dgate, dup = glu_backward(dh, gate, up, ctx.activation)
        elif need_weight:
            h = glu_forward(gate, up, ctx.activation, weight.dtype)
        if h is not None:
            dweight = torch.mm(dy.t(), h.reshape(rows, width))
        dbias = dy.sum(0) if need_bias else None
        return dgate if need_gate else None, dup if need_up else None, dweight, dbias, None


def _checked(
    gate: torch.Tensor, up: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """gate and up with rows that can be walked, and the width of h."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not gate.is_floating_point() or (up is not None and not up.is_floating_point()):
        raise TypeError("glu needs floating-point tensors")
    if gate.ndim == 0:
        raise ValueError("glu needs at least one dimension")
    width = gate.shape[-1]
    if up is None:
        if width % 2:
            raise ValueError(f"the last dimension of gate_up must be even, got {width}")
        width //= 2
    elif up.shape != gate.shape or up.device != gate.device:
        raise ValueError(
            f"gate and up must have one shape and device, got {list(gate.shape)} on {gate.device} and {list(up.shape)} "
            f"on {up.device}"
        )
    return with_rows(gate), up, width


def _apply_linear(
    gate: torch.Tensor, up: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    gate, up, width = _checked(gate, up, activation)
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ValueError(f"weight must have shape [N, {width}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    dtype = gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)
    kind = device_kind(gate.device)
    if torch.is_autocast_enabled(kind):
        # As autocast casts the inputs of F.linear (float64 is left alone), outside the Function so that autograd casts
        # the gradients back. The cast of the weight bypasses autocast's cache: it has one use per forward.
        low = torch.get_autocast_dtype(kind)
        if dtype != torch.float64:
            dtype = low
        if weight.dtype != torch.float64:
            weight = cast_weight(weight, low)
        if bias is not None and bias.dtype != torch.float64:
            bias = bias.to(low)
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        raise TypeError(
            f"act(gate) * up is {dtype}, weight {weight.dtype}"
            + (f", bias {bias.dtype}" if bias is not None else "")
            + ": cast them to one dtype, or run under torch.autocast"
        )
    return _GLULinear.apply(gate, up, weight, bias, activation)


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up.

    Args:
        gate, up: [..., I], any strides.
        activation: "silu", "gelu_tanh" or "gelu".
    """
    return _GLU.apply(*_checked(gate, up, activation)[:2], activation)


def glu_packed(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up for gate_up [..., 2 I], which holds gate before up; its gradient is one tensor."""
    return _GLU.apply(*_checked(gate_up, None, activation)[:2], activation)


def glu_linear(
    gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """F.linear(act(gate) * up, weight, bias) that does not save the product.

    Args:
        gate, up: [..., I], any strides.
        weight: [N, I]; bias: [N] or None; frozen or trained.
        activation: "silu", "gelu_tanh" or "gelu".
    """
    return _apply_linear(gate, up, weight, bias, activation)


def glu_packed_linear(
    gate_up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """`glu_linear` for gate_up [..., 2 I], which holds gate before up."""
    return _apply_linear(gate_up, None, weight, bias, activation)
