"""Frozen bitsandbytes weights back to floating point: 4-bit blockwise (NF4, FP4) and int8 row-wise.

Formula, in float32, every product and sum rounded by itself, and one rounding to the dtype of y at the end:

    4-bit    y[j] = code[nibble(j)] * absmax[j // blocksize]
             nibble(j) = packed[j // 2] >> 4 for even j, packed[j // 2] & 15 for odd j
             absmax[i] = nested.code[absmax_u8[i]] * nested.absmax[i // nested.blocksize] + nested.offset    if nested
    int8     y[n, k] = weight[n, k] * (scale[n] * (1 / 127))      scale_first: the backward of Linear8bitLt
             y[n, k] = (weight[n, k] * scale[n]) * (1 / 127)      otherwise: int8_vectorwise_dequant

j counts the elements of y row by row. These are the bits of bitsandbytes 0.50, on CUDA and, by the torch reference, on
CPUs, where bitsandbytes is right and but for numbers that hardly occur:
- Its CUDA kernels flush products below 2^-126 to zero, and so does the Triton kernel. On CPUs they are kept, which its
  AVX-512 kernel does except for bfloat16.
- Its CUDA kernels make nibble 8 of FP4 -0.0, where its table says 0.0. A table that says -0.0 gives that sign too.
- Its AVX-512 kernel takes the absmax of other blocks where blocksize exceeds the length of a row; nothing here does.

Shapes: packed, any shape, of ceil(n / 2) bytes or more for the n elements of y; absmax [ceil(n / blocksize)]; code
[16]; nested.code [256], nested.absmax [ceil(ceil(n / blocksize) / nested.blocksize)], nested.offset one element;
weight [N, K], scale [N]. out may be any view of the shape of y that does not overlap itself; rows that lie a pitch
apart are written in place at full speed, other views through a dense copy.
Dtypes: packed of any quant_storage dtype, read as bytes; absmax float32, or uint8 if nested; tables and offset float32;
weight int8, scale float32; y float16, bfloat16 or float32. No gradients: these weights are frozen.

Floor, for n elements of y of e bytes: n * (1/2 + e) + 4 * n / blocksize bytes; nested n * (1/2 + e) + n / blocksize,
and 4 more bytes per nested.blocksize * blocksize elements; int8 n * (1 + e) + 4 * N.

Raises TypeError for dtypes, ValueError for shapes, devices and block sizes that do not fit.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023) and "LLM.int8()" (2022); order of
roundings as in bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import INTERPRET, cdiv, launch, no_output, register_op, use_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Nested(NamedTuple):
    """How absmax is itself quantized: `state2` and `offset` of a bitsandbytes QuantState."""

    code: torch.Tensor  # [256] float32
    absmax: torch.Tensor  # [ceil(blocks / blocksize)] float32
    offset: torch.Tensor  # one float32
    blocksize: int


# ---------------------------------------------------------------------------------------------------- torch reference


def _reference_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested: Nested | None,
    y: torch.Tensor,
) -> None:
    """Fills `y`."""
    n = y.numel()
    absmax = absmax[: cdiv(n, blocksize)]
    if nested is not None:
        outer = nested.absmax.repeat_interleave(nested.blocksize)[: len(absmax)]
        absmax = nested.code[absmax.long()] * outer + nested.offset
    nibbles = torch.stack((packed >> 4, packed & 15), -1).view(-1)[:n]
    y.copy_((code[nibbles.long()] * absmax.repeat_interleave(blocksize)[:n]).view(y.shape))


def _reference_int8(weight: torch.Tensor, scale: torch.Tensor, scale_first: bool, y: torch.Tensor) -> None:
    """Fills `y`."""
    scale = scale.unsqueeze(1)
    y.copy_(weight * (scale * (1 / 127)) if scale_first else weight * scale * (1 / 127))


# ------------------------------------------------------------------------------------------------------------- Triton

_PTX = tl.constexpr(torch.version.hip is None and not INTERPRET)


@triton.jit
def _product(x, y):
    """x * y, rounded by itself (no compiler contracts inline PTX into an fma), with subnormals flushed."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x * y


@triton.jit
def _sum(x, y):
    """x + y, rounded by itself."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x + y


@triton.jit
def _4bit_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    offset_ptr,
    y_ptr,
    n,
    pitch,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """VECTORS vectors of VECTOR elements per program. A thread has every num_threads-th vector of them: its loads of
    VECTOR / 2 bytes and stores of 16 are contiguous across a warp, and it makes the absmax of a vector once.

    WIDTH is the row length of y, of `pitch` * UNIT elements per row, or 0 where y is dense. WHOLE: VECTOR divides n.
    """
    program = tl.program_id(0)
    local = tl.arange(0, VECTORS)
    element = tl.arange(0, VECTOR)
    start = program.to(tl.int64) * (VECTORS * VECTOR)
    left = n - start
    vector = program * VECTORS + local
    valid = local * VECTOR < left

    # In memory order the bytes of a vector make one little-endian word, high nibble of each byte first.
    byte = tl.arange(0, VECTOR // 2)
    byte_at = local[:, None] * (VECTOR // 2) + byte[None, :]
    byte_mask = tl.broadcast_to(valid[:, None], [VECTORS, VECTOR // 2]) if WHOLE else byte_at * 2 < left
    packed = tl.load(packed_ptr + start // 2 + byte_at, mask=byte_mask, other=0).to(tl.uint32)
    word = tl.sum(packed << (byte * 8).to(tl.uint32)[None, :], axis=1)
    nibble = (word[:, None] >> ((element ^ 1) * 4).to(tl.uint32)[None, :]) & 15

    block = vector // (BLOCKSIZE // VECTOR)
    if nested_code_ptr is None:
        absmax = tl.load(absmax_ptr + block, mask=valid, other=0.0)
    else:
        level = tl.load(absmax_ptr + block, mask=valid, other=0).to(tl.int32)
        PROGRAMS: tl.constexpr = NESTED_BLOCKSIZE * BLOCKSIZE // (VECTORS * VECTOR)
        if NESTED_BLOCKSIZE * BLOCKSIZE % (VECTORS * VECTOR) == 0:
            outer = tl.broadcast_to(tl.load(nested_absmax_ptr + program // PROGRAMS), [VECTORS])
        else:
            outer = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=valid, other=0.0)
        offset = tl.broadcast_to(tl.load(offset_ptr), [VECTORS])
        absmax = _sum(_product(tl.load(nested_code_ptr + level), outer), offset)

    # Through shared memory, where the 16 entries lie in 16 banks: no conflicts.
    code = tl.load(code_ptr + tl.arange(0, 16))
    value = tl.gather(code, tl.reshape(nibble, [VECTORS * VECTOR]).to(tl.int32), axis=0)
    value = tl.reshape(value, [VECTORS, VECTOR])
    y = _product(value, tl.broadcast_to(absmax[:, None], [VECTORS, VECTOR])).to(y_ptr.dtype.element_ty)

    y_mask = tl.broadcast_to(valid[:, None], [VECTORS, VECTOR])
    if WIDTH:
        row = (vector // (WIDTH // VECTOR)).to(tl.int64)
        y_at = row * pitch * UNIT + vector % (WIDTH // VECTOR) * VECTOR
        tl.store(y_ptr + y_at[:, None] + element[None, :], y, mask=y_mask)
    else:
        y_at = local[:, None] * VECTOR + element[None, :]
        tl.store(y_ptr + start + y_at, y, mask=y_mask if WHOLE else y_at < left)


@triton.jit
def _int8_kernel(
    weight_ptr,
    scale_ptr,
    y_ptr,
    width,
    blocks,
    weight_pitch,
    pitch,
    UNIT: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """One block of one row per program, VECTOR elements per thread and step."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    vector = tl.program_id(0) % blocks * VECTORS + tl.arange(0, VECTORS)
    column = vector[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    mask = column < width
    weight = tl.load(weight_ptr + row * weight_pitch + column, mask=mask, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + row)
    if SCALE_FIRST:
        y = weight * (scale * 0.007874015748031496)
    else:
        y = weight * scale * 0.007874015748031496
    tl.store(y_ptr + row * pitch * UNIT + column, y.to(y_ptr.dtype.element_ty), mask=mask)


# Four vectors per thread: four loads in flight before the first is needed, and 40 registers or less.
_VECTORS, _WARPS = 512, 4
_INT8_VECTORS, _INT8_WARPS = 256, 4


# ---------------------------------------------------------------------------------------------------------------- ops


def _pitch_of(y: torch.Tensor, vector: int) -> tuple[int, int] | None:
    """The pitch of the rows of y [N, K] as (count, unit), or None if they are not each contiguous and apart.

    Triton knows of divisibility by 16 only, which the pitch of a row with a LoRA of rank 8 behind it lacks.
    """
    if y.ndim != 2 or y.stride(1) != 1 or y.stride(0) < y.shape[1]:
        return None
    unit = math.gcd(y.stride(0), vector)
    return y.stride(0) // unit, unit


# In the ops the fields of `nested` are arguments of their own; all or none of the tensors are None.


def _fill_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    nested_blocksize: int,
    y: torch.Tensor,
) -> None:
    n = y.numel()
    if n == 0:
        return
    if not use_triton(packed):
        nested = None
        if nested_code is not None and nested_absmax is not None and nested_offset is not None:
            nested = Nested(nested_code, nested_absmax, nested_offset, nested_blocksize)
        _reference_4bit(packed, absmax, code, blocksize, nested, y)
        return
    vector = 16 // y.itemsize
    width, pitch, unit = 0, 0, 1
    if not y.is_contiguous():
        rows = _pitch_of(y, vector)
        if rows is None or y.shape[1] % vector:
            dense = torch.empty(y.shape, dtype=y.dtype, device=y.device)
            _fill_4bit(
                packed, absmax, code, blocksize, nested_code, nested_absmax, nested_offset, nested_blocksize, dense
            )
            y.copy_(dense)
            return
        width, (pitch, unit) = y.shape[1], rows
    launch(
        _4bit_kernel,
        (cdiv(n, _VECTORS * vector),),
        y.device,
        packed,
        absmax,
        code,
        nested_code,
        nested_absmax,
        nested_offset,
        y,
        n,
        pitch,
        WIDTH=width,
        UNIT=unit,
        WHOLE=n % vector == 0,
        BLOCKSIZE=blocksize,
        NESTED_BLOCKSIZE=nested_blocksize,
        VECTOR=vector,
        VECTORS=_VECTORS,
        num_warps=_WARPS,
    )


def _fill_int8(weight: torch.Tensor, scale: torch.Tensor, scale_first: bool, y: torch.Tensor) -> None:
    if y.numel() == 0:
        return
    if not use_triton(weight):
        _reference_int8(weight, scale, scale_first, y)
        return
    vector = 16 // y.itemsize
    rows = _pitch_of(y, vector)
    if rows is None:
        dense = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        _fill_int8(weight, scale, scale_first, dense)
        y.copy_(dense)
        return
    blocks = cdiv(weight.shape[1], _INT8_VECTORS * vector)
    launch(
        _int8_kernel,
        (weight.shape[0] * blocks,),
        y.device,
        weight,
        scale,
        y,
        weight.shape[1],
        blocks,
        weight.stride(0),
        rows[0],
        UNIT=rows[1],
        SCALE_FIRST=scale_first,
        VECTOR=vector,
        VECTORS=_INT8_VECTORS,
        num_warps=_INT8_WARPS,
    )


def _empty_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    nested_blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=packed.device)


def _4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    nested_blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    y = torch.empty(shape, dtype=dtype, device=packed.device)
    _fill_4bit(packed, absmax, code, blocksize, nested_code, nested_absmax, nested_offset, nested_blocksize, y)
    return y


def _empty_int8(weight: torch.Tensor, scale: torch.Tensor, scale_first: bool, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def _int8(weight: torch.Tensor, scale: torch.Tensor, scale_first: bool, dtype: torch.dtype) -> torch.Tensor:
    y = _empty_int8(weight, scale, scale_first, dtype)
    _fill_int8(weight, scale, scale_first, y)
    return y


_dequantize_4bit = register_op(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor code, int blocksize, Tensor? nested_code, "
    "Tensor? nested_absmax, Tensor? nested_offset, int nested_blocksize, SymInt[] shape, ScalarType dtype) -> Tensor",
    _4bit,
    _empty_4bit,
)
_dequantize_4bit_out = register_op(
    "dequantize_4bit_out(Tensor packed, Tensor absmax, Tensor code, int blocksize, Tensor? nested_code, "
    "Tensor? nested_absmax, Tensor? nested_offset, int nested_blocksize, Tensor(a!) out) -> ()",
    _fill_4bit,
    no_output,
)
_dequantize_int8 = register_op(
    "dequantize_int8(Tensor weight, Tensor scale, bool scale_first, ScalarType dtype) -> Tensor", _int8, _empty_int8
)
_dequantize_int8_out = register_op(
    "dequantize_int8_out(Tensor weight, Tensor scale, bool scale_first, Tensor(a!) out) -> ()", _fill_int8, no_output
)


# ------------------------------------------------------------------------------------------------------------- public


def _check_output(dtype: torch.dtype, shape: Sequence[int], device: torch.device, out: torch.Tensor | None) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if out is None:
        return
    if out.dtype != dtype:
        raise TypeError(f"out must be {dtype}, got {out.dtype}")
    if list(out.shape) != list(shape) or out.device != device:
        raise ValueError(f"out must be {list(shape)} on {device}, got {list(out.shape)} on {out.device}")
    if out.requires_grad:
        raise ValueError("out requires a gradient: dequantized weights are frozen, and autograd may still read out")


def _checked_table(
    name: str, table: torch.Tensor, dtype: torch.dtype, device: torch.device, least: int, most: int | None = None
) -> torch.Tensor:
    """`table`, dense, if it has the dtype and from `least` to `most` elements."""
    if table.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {table.dtype}")
    if table.device != device:
        raise ValueError(f"the quantized weight is on {device} and {name} on {table.device}")
    count = table.numel()
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"at least {least}"
        raise ValueError(f"{name} must have {wanted} elements, got {count}")
    if not table.is_contiguous():
        table = table.contiguous()
    return table if table.ndim == 1 else table.view(-1)


class Packed4bit:
    """A weight of 4-bit codes, checked once, to be expanded many times.

    Args:
        packed: two codes per byte; any shape and dtype, read as bytes.
        absmax: scale of each block; uint8 if `nested`, else float32.
        code: float32 [16], the value of each code.
        blocksize: elements that share a scale, a multiple of 8.
        shape: that of the weight.
        nested: how absmax is quantized, if it is.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        code: torch.Tensor,
        blocksize: int,
        shape: Sequence[int],
        nested: Nested | None = None,
    ):
        self.shape, self.device = list(shape), packed.device
        n = math.prod(self.shape)
        if blocksize <= 0 or blocksize % 8:
            raise ValueError(f"blocksize must be a positive multiple of 8, got {blocksize}")
        if packed.numel() * packed.itemsize * 2 < n:
            raise ValueError(f"packed holds {packed.numel() * packed.itemsize * 2} codes, shape {self.shape} needs {n}")
        if not packed.is_contiguous():
            packed = packed.contiguous()
        if packed.ndim != 1 or packed.dtype != torch.uint8:
            packed = packed.detach().view(-1).view(torch.uint8)
        blocks, device = cdiv(n, blocksize), packed.device
        absmax = _checked_table("absmax", absmax, torch.float32 if nested is None else torch.uint8, device, blocks)
        code = _checked_table("code", code, torch.float32, device, 16, 16)
        tables: tuple[torch.Tensor | int | None, ...] = (None, None, None, 1)
        if nested is not None:
            if nested.blocksize <= 0:
                raise ValueError(f"nested.blocksize must be positive, got {nested.blocksize}")
            groups = cdiv(blocks, nested.blocksize)
            tables = (
                _checked_table("nested.code", nested.code, torch.float32, device, 256, 256),
                _checked_table("nested.absmax", nested.absmax, torch.float32, device, groups),
                _checked_table("nested.offset", nested.offset, torch.float32, device, 1, 1),
                nested.blocksize,
            )
        self._arguments = (packed, absmax, code, blocksize, *tables)

    def expand(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight in `dtype`; in `out`, any view of that shape, dtype and device, if it is given."""
        _check_output(dtype, self.shape, self.device, out)
        if out is None:
            return _dequantize_4bit(*self._arguments, self.shape, dtype)
        _dequantize_4bit_out(*self._arguments, out)
        return out


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    nested: Nested | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expands a weight of 4-bit codes, as bitsandbytes' `dequantize_4bit` does, bit for bit: see Packed4bit."""
    return Packed4bit(packed, absmax, code, blocksize, shape, nested).expand(dtype, out)


def dequantize_int8(
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    scale_first: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expands the weight of a bitsandbytes `Linear8bitLt`.

    Args:
        weight: int8 [N, K], its CB.
        scale: float32 [N], its SCB.
        dtype: that of the result.
        scale_first: the bits of the weight that its backward makes; False: those of `int8_vectorwise_dequant`.
        out: filled and returned, any view of that shape, dtype and device.
    """
    _check_output(dtype, weight.shape, weight.device, out)
    if weight.dtype != torch.int8:
        raise TypeError(f"weight must be int8, got {weight.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
    scale = _checked_table("scale", scale, torch.float32, weight.device, weight.shape[0], weight.shape[0])
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if out is None:
        return _dequantize_int8(weight, scale, scale_first, dtype)
    _dequantize_int8_out(weight, scale, scale_first, out)
    return out
