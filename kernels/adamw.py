"""AdamW over many tensors in two launches, with states as torch.optim.AdamW or as bitsandbytes keeps them.

Formula, per element, with t the number of steps of its tensor, this one included:

    m = beta1 * m + (1 - beta1) * g            v = beta2 * v + (1 - beta2) * g^2
    p = p - lr * weight_decay * p              decoupled decay; behind the update with decay_last
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Full-precision states: m and v in any dtype of their own, read and written once; float32 in between, and float64 for the
bias corrections, lr * weight_decay and 1 - beta. The averages are formed as m + (1 - beta1) * (g - m), which does not
lose the digits of a beta near 1 that float32 has no room for.

8-bit states, in the format of bitsandbytes: blocks of 256 elements of the flat tensor, per block absmax1 and absmax2
(float32), per element a code into a map of 256 values in ascending order (its dynamic maps):

    m = map1[code1] * absmax1[block]           v = map2[code2] * absmax2[block]

m and v are updated in float32; then absmax becomes the block's largest magnitude and a code the one whose value is
nearest to m / absmax (of two equally near the even one). A negative m never takes the code of zero: its sign survives.
An element whose gradient is not finite loses its m and v and keeps its parameter.

Shapes: params, gradients and states contiguous, of equal sizes tensor by tensor, all on one device. Dtypes: parameters
and gradients float32, bfloat16 or float16, one dtype each for all tensors; states likewise, or uint8. float64 takes the
torch reference. Steps are counted in float32 tensors on the device, as `fused=True` keeps them, or by the caller.

bfloat16 parameters drop an update below half a unit in their last place, and bfloat16 averages drop changes of less
than 1/512 in the same way. Two ways out (see _bf16_weights.py), with states of any kind:

    remainders: int16, beside each parameter: together the exact float32 master, which is what is updated
    random:     parameters, and states that are bfloat16, are rounded by chance; the mean is exact

How the nearest code is found: a map of bitsandbytes has 1, 2, 4 ... 64 values (twice as many if it has no negative
ones), evenly spread, in each decade from 1e-7 to 1. The number of thresholds below x is near the least of seven linear
functions of x, one for each decade, since each is less steep than the one before. That is off by less than a half, in
float16 too: rounded to an integer it says which threshold alone is left to compare with, which is exact. Tables of 256
numbers lie in shared memory: what bounds the kernel is the number of instructions, and in L1 each look-up would cost
one for each line that a warp hits.

Both kernels are compiled without fused multiply-add, so that a weight with its remainder takes the very steps of a
float32 weight: with it the compiler contracts the two in different places, and their last bits part.

Floor, for N elements of e-byte parameters and gradients: 3*N*e bytes, 4*N of remainders, and 4 times the bytes of a
state. Of bfloat16 parameters, that is 14*N with bfloat16 states (rounded by chance too), 22*N with float32 states and
26*N with those and remainders; 10*N and 14*N with 8-bit states.

Raises ValueError for tensors that do not fit together, and for maps that are not those of bitsandbytes; TypeError for
dtypes.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019); Dettmers et al., "8-bit Optimizers via
Block-wise Quantization" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._bf16_weights import (
    bits_of,
    join,
    join_bits,
    keys_of,
    random_halves,
    random_word,
    round_by_chance,
    second_word,
    split,
    store_keys,
    upper_half,
)
from ._launch import cdiv, launch, use_triton
from ._multi_tensor import addresses_of, are_aligned, chunk_table, pointer_at, triton_dtype, upload
from .clip_grad_norm import scaled

BLOCK = 256  # elements that share an absmax

_CHUNK = 2048  # elements per program: 8 per thread, 16 bytes of bfloat16
_WARPS = 8
_WARPS_8BIT = 4  # of 16 elements per thread: fewer instructions for what a thread does once

_DECADES = tl.constexpr(7)  # of a map of bitsandbytes
_SEARCH_SCALE = tl.constexpr(64.0)  # for float16 to hold the slope at the smallest of them


class Rates(NamedTuple):
    """What a group of parameters is trained with at one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class BlockStates(NamedTuple):
    """What 8-bit states have beside their codes; lists go by tensor.

    Attributes:
        absmax1, absmax2: float32 [ceil(numel / 256)] each.
        map1, map2: float32 [256], the signed and the unsigned dynamic map of bitsandbytes.
    """

    absmax1: list[torch.Tensor]
    absmax2: list[torch.Tensor]
    map1: torch.Tensor
    map2: torch.Tensor


class Random(NamedTuple):
    """What rounding by chance draws its numbers from, beside the step and the element.

    Attributes:
        seed: 0 ... 2**31 - 1.
        streams: for each tensor a number of its own.
    """

    seed: int
    streams: list[int]


# ---------------------------------------------------------------------------------------------------- torch reference


def _reference_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: float,
    rates: Rates,
    decay_last: bool,
) -> torch.Tensor:
    """The new parameter, and `m` and `v` in place; all in one dtype, float32 or float64."""
    m.lerp_(grad, 1 - rates.beta1)
    v.lerp_(grad * grad, 1 - rates.beta2)
    return _reference_param(param, m, v, step, rates, decay_last)


def _reference_param(
    param: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: float, rates: Rates, decay_last: bool
) -> torch.Tensor:
    decay = rates.lr * rates.weight_decay
    denominator = (v.sqrt() / math.sqrt(1 - rates.beta2**step)).add_(rates.eps)
    update = (m / denominator).mul_(rates.lr / (1 - rates.beta1**step))
    decayed = param - update if decay_last else param
    return param - (update + decay * decayed)


def _reference_8bit(
    wide: torch.Tensor,
    grad: torch.Tensor,
    code1: torch.Tensor,
    code2: torch.Tensor,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor,
    map1: torch.Tensor,
    map2: torch.Tensor,
    step: float,
    rates: Rates,
    decay_last: bool,
) -> torch.Tensor:
    """The new parameter, and the states of one tensor in place; `wide`, the parameter, and `grad` float32."""
    param, count = wide, wide.numel()
    block = torch.arange(count, device=param.device) // BLOCK
    grad, code1, code2 = grad.flatten(), code1.view(-1), code2.view(-1)
    finite = grad.isfinite()
    m = map1[code1.int()] * absmax1[block] * rates.beta1 + (1 - rates.beta1) * grad
    v = map2[code2.int()] * absmax2[block] * rates.beta2 + (1 - rates.beta2) * (grad * grad)
    m, v = m.where(finite, 0.0), v.where(finite, 0.0)
    wide = param.flatten()
    updated = _reference_param(wide, m, v, step, rates, decay_last).where(finite, wide)
    for state, codes, absmax, values in ((m, code1, absmax1, map1), (v, code2, absmax2, map2)):
        blocks = torch.nn.functional.pad(state.abs(), (0, -count % BLOCK)).view(-1, BLOCK)
        absmax.copy_(blocks.amax(1))
        scale = absmax.reciprocal().where(absmax >= torch.finfo(torch.float32).tiny, 0.0)
        codes.copy_(torch.bucketize(state * scale[block], _thresholds(values)))
    return updated.view(param.shape)


# ------------------------------------------------------------------------------------------------------- nearest code


def _thresholds(values: torch.Tensor) -> torch.Tensor:
    """float32 [255]: the code of x is the number of these that are less than x."""
    if values.shape != (256,) or values.dtype != torch.float32 or not bool((values[1:] > values[:-1]).all()):
        raise ValueError("the map of an 8-bit state has 256 float32 values in ascending order")
    middle = (values[:-1] + values[1:]) * 0.5
    odd = torch.arange(255, device=values.device) % 2 == 1
    # In the middle between two codes the even one is taken: from an odd code on, x need only reach the threshold.
    middle = torch.where(odd, torch.nextafter(middle, middle.new_full((), -math.inf)), middle)
    zero = (values == 0).nonzero().flatten()
    if len(zero) and zero > 0:
        middle[zero - 1] = -torch.finfo(torch.float32).tiny  # negative x are not zero, however near
    return middle


def _search_table(values: torch.Tensor, signed: bool) -> torch.Tensor:
    """float32 [256], on the device of `values`: -inf, then the thresholds times _SEARCH_SCALE.
    `values` has to be a map in which `_nearest_code` finds its way.
    """
    ends = _thresholds(values.cpu())
    items = 1 if signed else 2
    for side in (ends[ends > 0].double(), -ends[ends < 0].flip(0).double()):
        lines = [items * (2.0**i * (10.0 ** (6 - i) * side + 0.8) / 0.9 - 1.0) for i in range(_DECADES.value)]
        off = torch.stack(lines).amin(0) - torch.arange(len(side), device="cpu")
        if bool((off.abs() > 0.251).any()):
            raise ValueError("the map of an 8-bit state is none of bitsandbytes' dynamic maps")
    return torch.cat([ends.new_full((1,), -math.inf), ends * _SEARCH_SCALE.value]).to(values.device)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _factors_kernel(
    groups_ptr,
    steps_ptr,
    uploads_ptr,
    factors_ptr,
    tensors,
    rate_groups,
    step_stride,
    streams_ptr,
    keys_ptr,
    seed,
    DEVICE_STEPS: tl.constexpr,
    TENSORS: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """Counts the step of each tensor that has a gradient, and fills its row of factors_ptr [tensors, 8] float32 and,
    if RANDOM, of keys_ptr [tensors, 2] int32.

    uploads_ptr holds int64 addresses of gradients [tensors], then float64 rates [rate_groups, 5], then, unless
    DEVICE_STEPS, float64 steps: [tensors], or one for all with a step_stride of 0.
    """
    tensor = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    valid = tensor < tensors
    valid = valid & (tl.load(uploads_ptr + tensor, mask=valid, other=0) != 0)
    doubles_ptr = (uploads_ptr + tensors).to(tl.pointer_type(tl.float64), bitcast=True)
    if DEVICE_STEPS:
        step_ptr = tl.load(steps_ptr + tensor, mask=valid, other=0).to(tl.pointer_type(tl.float32), bitcast=True)
        counted = tl.load(step_ptr, mask=valid, other=0.0) + 1.0
        tl.store(step_ptr, counted, mask=valid)
        step = counted.to(tl.float64)
    else:
        step = tl.load(doubles_ptr + rate_groups * 5 + tensor * step_stride, mask=valid, other=1.0)
    rates_ptr = doubles_ptr + tl.load(groups_ptr + tensor, mask=valid, other=0) * 5
    lr = tl.load(rates_ptr, mask=valid, other=0.0)
    beta1 = tl.load(rates_ptr + 1, mask=valid, other=0.5)
    beta2 = tl.load(rates_ptr + 2, mask=valid, other=0.5)
    eps = tl.load(rates_ptr + 3, mask=valid, other=0.0)
    weight_decay = tl.load(rates_ptr + 4, mask=valid, other=0.0)
    row = factors_ptr + tensor * 8
    tl.store(row, (lr / (1.0 - tl.exp2(step * tl.log2(beta1)))).to(tl.float32), mask=valid)
    tl.store(row + 1, (1.0 / tl.sqrt(1.0 - tl.exp2(step * tl.log2(beta2)))).to(tl.float32), mask=valid)
    tl.store(row + 2, eps.to(tl.float32), mask=valid)
    tl.store(row + 3, (lr * weight_decay).to(tl.float32), mask=valid)
    tl.store(row + 4, beta1.to(tl.float32), mask=valid)
    tl.store(row + 5, (1.0 - beta1).to(tl.float32), mask=valid)
    tl.store(row + 6, beta2.to(tl.float32), mask=valid)
    tl.store(row + 7, (1.0 - beta2).to(tl.float32), mask=valid)
    if RANDOM:
        store_keys(keys_ptr, tensor, tl.load(streams_ptr + tensor, mask=valid, other=0), step, seed, valid)


@triton.jit
def _average(old, new, beta, weight):
    """beta * old + weight * new, where beta + weight = 1, from whichever end is nearer."""
    change = new - old
    return tl.where(weight < 0.5, old + weight * change, new - beta * change)


@triton.jit
def _change(param, update, factors, DECAY_LAST: tl.constexpr):
    """What is taken from the parameter. It is summed first: the parameter, far larger, is rounded once."""
    decay = tl.load(factors + 3)
    if DECAY_LAST:
        change = tl.fma(param - update, decay, update)
    else:
        change = tl.fma(param, decay, update)
    return change


@triton.jit
def _load_grad(address, start, element, mask, other, scale_ptr, GRAD: tl.constexpr, ALIGNED: tl.constexpr):
    """float32; scaled, if there is a scale, and rounded as clipping would have written it."""
    grad = tl.load(pointer_at(address, GRAD, ALIGNED) + start + element, mask=mask, other=other).to(tl.float32)
    if scale_ptr is not None:
        grad = (grad * tl.load(scale_ptr)).to(GRAD).to(tl.float32)
    return grad


@triton.jit
def _load_param(pointers, start, element, mask, PARAM: tl.constexpr, ALIGNED: tl.constexpr, REMAINDER: tl.constexpr):
    """float32; with REMAINDER the master."""
    address = tl.load(pointers)
    if REMAINDER:
        high = tl.load(pointer_at(address, tl.int16, ALIGNED) + start + element, mask=mask, other=0)
        remainder_ptr = pointer_at(tl.load(pointers + 6), tl.int16, ALIGNED) + start
        param = join_bits(high, tl.load(remainder_ptr + element, mask=mask, other=0))
    else:
        param = tl.load(pointer_at(address, PARAM, ALIGNED) + start + element, mask=mask, other=0.0).to(tl.float32)
    return param


@triton.jit
def _store_param(
    param,
    word,
    pointers,
    start,
    element,
    mask,
    PARAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    REMAINDER: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """`word`: of random bits, if RANDOM."""
    address = tl.load(pointers)
    if REMAINDER:
        bits = bits_of(param)
        tl.store(pointer_at(address, tl.int16, ALIGNED) + start + element, upper_half(bits, 0x8000), mask=mask)
        remainder_ptr = pointer_at(tl.load(pointers + 6), tl.int16, ALIGNED) + start
        tl.store(remainder_ptr + element, bits.to(tl.int16), mask=mask)
    elif RANDOM:
        rounded = upper_half(bits_of(param), (word >> 16).to(tl.int32))
        tl.store(pointer_at(address, tl.int16, ALIGNED) + start + element, rounded, mask=mask)
    else:
        tl.store(pointer_at(address, PARAM, ALIGNED) + start + element, param.to(PARAM), mask=mask)


@triton.jit
def _update_kernel(
    chunks_ptr,
    pointers_ptr,
    uploads_ptr,
    factors_ptr,
    keys_ptr,
    scale_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    DECAY_LAST: tl.constexpr,
    REMAINDER: tl.constexpr,
    RANDOM: tl.constexpr,
    RANDOM_STATE: tl.constexpr,
):
    """One chunk per program. pointers_ptr [tensors, 7] int64: parameter, m, v, numel, -, -, remainder."""
    tensor = tl.load(chunks_ptr + tl.program_id(0) * 2)
    grad_address = tl.load(uploads_ptr + tensor)
    if grad_address == 0:
        return
    start = tl.load(chunks_ptr + tl.program_id(0) * 2 + 1).to(tl.int64) * CHUNK
    pointers = pointers_ptr + tensor * 7
    factors = factors_ptr + tensor * 8
    m_ptr = pointer_at(tl.load(pointers + 1), STATE, ALIGNED) + start
    v_ptr = pointer_at(tl.load(pointers + 2), STATE, ALIGNED) + start
    rest = tl.minimum(tl.load(pointers + 3) - start, CHUNK).to(tl.int32)
    if ALIGNED:
        rest = tl.multiple_of(rest, 16)
    element = tl.arange(0, CHUNK)
    mask = element < rest
    grad = _load_grad(grad_address, start, element, mask, 0.0, scale_ptr, GRAD, ALIGNED)
    m = tl.load(m_ptr + element, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + element, mask=mask, other=0.0).to(tl.float32)
    param = _load_param(pointers, start, element, mask, PARAM, ALIGNED, REMAINDER)
    m = _average(m, grad, tl.load(factors + 4), tl.load(factors + 5))
    v = _average(v, grad * grad, tl.load(factors + 6), tl.load(factors + 7))
    update = tl.load(factors) * (m / tl.fma(tl.sqrt_rn(v), tl.load(factors + 1), tl.load(factors + 2)))
    param -= _change(param, update, factors, DECAY_LAST)
    word = element
    if RANDOM:
        word = random_word(keys_ptr, tensor, start + element)
    _store_param(param, word, pointers, start, element, mask, PARAM, ALIGNED, REMAINDER, RANDOM)
    if RANDOM_STATE:
        second = second_word(word)
        m_ptr = pointer_at(tl.load(pointers + 1), tl.int16, ALIGNED) + start
        v_ptr = pointer_at(tl.load(pointers + 2), tl.int16, ALIGNED) + start
        tl.store(m_ptr + element, upper_half(bits_of(m), (second >> 16).to(tl.int32)), mask=mask)
        tl.store(v_ptr + element, upper_half(bits_of(v), (second & 0xFFFF).to(tl.int32)), mask=mask)
    else:
        tl.store(m_ptr + element, m.to(STATE), mask=mask)
        tl.store(v_ptr + element, v.to(STATE), mask=mask)


@triton.jit
def _scale(absmax):
    """1 / absmax; 0 for a block of nothing but zeros (or of subnormal numbers, whose reciprocal overflows)."""
    return tl.where(absmax >= 1.1754944e-38, 1.0 / tl.maximum(absmax, 1.1754944e-38), 0.0)


@triton.jit
def _nearest_code(x, ends, SIGNED: tl.constexpr):
    """The code (int32) of |x| <= 1, which is given times _SEARCH_SCALE. `ends` is what `_search_table` makes."""
    # In float16, of which a GPU computes two at a time. From 1024 on it holds integers, in its last bits.
    items: tl.constexpr = 1.0 if SIGNED else 2.0
    size = tl.abs(x.to(tl.float16))
    below = tl.full(x.shape, 127.0 if SIGNED else 254.0, tl.float16)  # no more, whatever x
    for decade in tl.static_range(_DECADES):
        slope = tl.full(x.shape, items * 2.0**decade * 10.0 ** (6 - decade) / 0.9 / _SEARCH_SCALE, tl.float16)
        offset = tl.full(x.shape, items * (2.0**decade * 0.8 / 0.9 - 1.0), tl.float16)
        below = tl.minimum(below, tl.fma(size, slope, offset))
    index = (below + 1024.0).to(tl.int16, bitcast=True).to(tl.int32) - 0x6400
    if SIGNED:
        index = index ^ ((x.to(tl.int32, bitcast=True) >> 31) & 255) ^ 128  # 128 + index, or 127 - index
    else:
        index += 1
    return tl.where(x > tl.gather(ends, index, 0), index, index - 1)


@triton.jit
def _update_8bit_kernel(
    chunks_ptr,
    pointers_ptr,
    uploads_ptr,
    factors_ptr,
    keys_ptr,
    scale_ptr,
    map1_ptr,
    map2_ptr,
    ends1_ptr,
    ends2_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DECAY_LAST: tl.constexpr,
    REMAINDER: tl.constexpr,
    RANDOM: tl.constexpr,
):
    """A chunk of whole blocks per program. pointers_ptr [tensors, 7] int64: parameter, codes, numel, absmaxes,
    remainder.
    """
    tensor = tl.load(chunks_ptr + tl.program_id(0) * 2)
    grad_address = tl.load(uploads_ptr + tensor)
    if grad_address == 0:
        return
    start = tl.load(chunks_ptr + tl.program_id(0) * 2 + 1).to(tl.int64) * CHUNK
    pointers = pointers_ptr + tensor * 7
    factors = factors_ptr + tensor * 8
    code1_ptr = pointer_at(tl.load(pointers + 1), tl.uint8, ALIGNED) + start
    code2_ptr = pointer_at(tl.load(pointers + 2), tl.uint8, ALIGNED) + start
    absmax1_ptr = pointer_at(tl.load(pointers + 4), tl.float32, False) + start // BLOCK_SIZE
    absmax2_ptr = pointer_at(tl.load(pointers + 5), tl.float32, False) + start // BLOCK_SIZE
    rest = tl.minimum(tl.load(pointers + 3) - start, CHUNK).to(tl.int32)
    if ALIGNED:
        rest = tl.multiple_of(rest, 16)
    blocks: tl.constexpr = CHUNK // BLOCK_SIZE
    block = tl.arange(0, blocks)
    in_rest = block * BLOCK_SIZE < rest
    element = tl.arange(0, CHUNK)
    mask = element < rest
    value = tl.arange(0, 256)
    # What is not there is not finite, and has no part in the block's largest magnitude.
    grad = _load_grad(grad_address, start, element, mask, float("inf"), scale_ptr, GRAD, ALIGNED)
    code1 = tl.load(code1_ptr + element, mask=mask, other=0).to(tl.int32)
    code2 = tl.load(code2_ptr + element, mask=mask, other=0).to(tl.int32)
    param = _load_param(pointers, start, element, mask, PARAM, ALIGNED, REMAINDER)
    # What a block shares is multiplied first.
    scale1 = tl.load(absmax1_ptr + block, mask=in_rest, other=0.0) * tl.load(factors + 4)
    scale2 = tl.load(absmax2_ptr + block, mask=in_rest, other=0.0) * tl.load(factors + 6)

    finite = tl.abs(grad) < float("inf")
    m = tl.gather(tl.load(map1_ptr + value), code1, 0)
    v = tl.gather(tl.load(map2_ptr + value), code2, 0)
    m = tl.fma(m, _of_elements(scale1, CHUNK), tl.load(factors + 5) * grad)
    v = tl.fma(v, _of_elements(scale2, CHUNK), tl.load(factors + 7) * grad * grad)
    m = tl.where(finite, m, 0.0)
    v = tl.where(finite, v, 0.0)
    # The reciprocal as the square of a root: one instruction, where a division takes nine.
    root = tl.rsqrt(tl.fma(tl.sqrt(v), tl.load(factors + 1), tl.load(factors + 2)))
    update = tl.load(factors) * m * root * root
    param -= tl.where(finite, _change(param, update, factors, DECAY_LAST), 0.0)
    word = element
    if RANDOM:
        word = random_word(keys_ptr, tensor, start + element)
    _store_param(param, word, pointers, start, element, mask, PARAM, ALIGNED, REMAINDER, RANDOM)

    absmax1 = tl.max(tl.reshape(tl.abs(m), (blocks, BLOCK_SIZE)), axis=1)
    absmax2 = tl.max(tl.reshape(v, (blocks, BLOCK_SIZE)), axis=1)
    tl.store(absmax1_ptr + block, absmax1, mask=in_rest)
    tl.store(absmax2_ptr + block, absmax2, mask=in_rest)
    code1 = _nearest_code(m * _of_elements(_scale(absmax1) * _SEARCH_SCALE, CHUNK), tl.load(ends1_ptr + value), True)
    code2 = _nearest_code(v * _of_elements(_scale(absmax2) * _SEARCH_SCALE, CHUNK), tl.load(ends2_ptr + value), False)
    tl.store(code1_ptr + element, code1.to(tl.uint8), mask=mask)
    tl.store(code2_ptr + element, code2.to(tl.uint8), mask=mask)


@triton.jit
def _of_elements(value, CHUNK: tl.constexpr):
    """[blocks] -> [CHUNK]"""
    return tl.reshape(tl.broadcast_to(value[:, None], (value.shape[0], CHUNK // value.shape[0])), (CHUNK,))


# ---------------------------------------------------------------------------------------------------------- the tables


class MultiTensorAdamW:
    """AdamW over a fixed list of tensors, whose addresses are taken once.

    The tensors are kept alive; whoever gives one of them other memory (`.data = `) has to make a new object.

    Args:
        params, exp_avgs, exp_avg_sqs: by tensor; the latter two are codes (uint8) with `blocks`.
        groups: for each tensor the index of its Rates.
        steps: for each tensor a 0-dim float32 tensor on the device, counted up by `update`; None: the caller counts.
        blocks: the rest of 8-bit states.
        decay_last: decay the updated parameter rather than the old one, as bitsandbytes does on a GPU.
        remainders: int16, by tensor: with bfloat16 parameters the exact float32 master. Of zeros at first.
        random: round bfloat16 parameters, and bfloat16 states, by chance.
    """

    def __init__(
        self,
        params: list[torch.Tensor],
        exp_avgs: list[torch.Tensor],
        exp_avg_sqs: list[torch.Tensor],
        groups: list[int],
        *,
        steps: list[torch.Tensor] | None = None,
        blocks: BlockStates | None = None,
        decay_last: bool = False,
        remainders: list[torch.Tensor] | None = None,
        random: Random | None = None,
    ):
        self.params, self.exp_avgs, self.exp_avg_sqs, self.groups = params, exp_avgs, exp_avg_sqs, groups
        self.steps, self.blocks, self.decay_last = steps, blocks, decay_last
        self.remainders, self.random = remainders, random
        self._check()
        self.device = params[0].device
        self._on_triton = use_triton(params[0])
        if not self._on_triton:
            return
        numels = [param.numel() for param in params]
        absmax = [addresses_of(blocks.absmax1), addresses_of(blocks.absmax2)] if blocks else [[0] * len(params)] * 2
        rest = addresses_of(remainders) if remainders is not None else [0] * len(params)
        columns = [*map(addresses_of, (params, exp_avgs, exp_avg_sqs)), numels, *absmax, rest]
        # Wide loads need sizes and addresses that allow them; tensors that do not are slow, and make the others slow.
        self._aligned = are_aligned([value for column in (*columns[:4], rest) for value in column])
        self._chunks = chunk_table(numels, _CHUNK, self.device)
        self._ends = list(accumulate(cdiv(numel, _CHUNK) for numel in numels))
        self._pointers = _on_device(list(zip(*columns, strict=True)), torch.int64, self.device)
        self._groups = _on_device(groups, torch.int32, self.device)
        self._steps = _on_device(addresses_of(steps), torch.int64, self.device) if steps is not None else None
        self._factors = torch.empty((len(params), 8), dtype=torch.float32, device=self.device)
        self._streams = _on_device(random.streams, torch.int32, self.device) if random is not None else None
        self._keys = torch.empty((len(params), 2), dtype=torch.int32, device=self.device) if random else None
        self._ends_of_codes = [_search_table(blocks.map1, True), _search_table(blocks.map2, False)] if blocks else []

    def _check(self) -> None:
        lists = [self.params, self.exp_avgs, self.exp_avg_sqs]
        if not self.params or {len(self.groups), *map(len, lists)} != {len(self.params)}:
            raise ValueError("MultiTensorAdamW needs as many parameters as states and groups, and at least one")
        for tensors in lists:
            if len({tensor.dtype for tensor in tensors}) > 1:
                raise ValueError("MultiTensorAdamW needs one dtype for all parameters, and one for all states")
        for param, m, v in zip(*lists, strict=True):
            if not (param.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
                raise ValueError("MultiTensorAdamW needs contiguous parameters and states")
            if not param.numel() == m.numel() == v.numel():
                raise ValueError(f"a parameter {list(param.shape)} has states {list(m.shape)}, {list(v.shape)}")
        if self.exp_avgs[0].dtype != self.exp_avg_sqs[0].dtype:
            raise ValueError("MultiTensorAdamW needs one dtype for all parameters, and one for all states")
        if (self.exp_avgs[0].dtype == torch.uint8) != (self.blocks is not None):
            raise ValueError("8-bit states need blocks, others must not have them")
        if self.steps is not None and any(step.dtype != torch.float32 for step in self.steps):
            raise ValueError("steps on the device are float32")
        if self.remainders is None and self.random is None:
            return
        if self.params[0].dtype != torch.bfloat16 or (self.remainders is not None and self.random is not None):
            raise ValueError("bfloat16 parameters have remainders or are rounded by chance, others neither")
        if self.random is not None and len(self.random.streams) != len(self.params):
            raise ValueError("rounding by chance needs a stream for each parameter")
        for param, rest in zip(self.params, self.remainders or (), strict=self.remainders is not None):
            if rest.dtype != torch.int16 or rest.numel() != param.numel() or not rest.is_contiguous():
                raise ValueError(f"a parameter {list(param.shape)} has a remainder {rest.dtype} {list(rest.shape)}")

    @property
    def is_8bit(self) -> bool:
        return self.blocks is not None

    def update(
        self,
        grads: Sequence[torch.Tensor | None],
        rates: Sequence[Rates],
        steps: Sequence[float] | float | None = None,
        addresses: list[int] | None = None,
        scale: torch.Tensor | None = None,
    ) -> None:
        """One step in place. The version counters of what is written are the caller's to bump.

        Args:
            grads: for each parameter its gradient, contiguous and of its size, or None to leave it out. Gradients are
                of one dtype. Not checked again.
            rates: by group.
            steps: for each parameter the number of this step, where it has a gradient, or one number for all; None if
                they are counted on the device.
            addresses: those of the gradients, 0 for None, where they are known.
            scale: 0-dim float32, what to multiply gradients by first; they are rounded to their dtype after it. They
                stay as they are.
        """
        if (steps is None) == (self.steps is None):
            raise ValueError("steps are counted either on the device or by the caller")
        if not self._on_triton:
            self._reference([g if g is None or scale is None else scaled(g, scale) for g in grads], rates, steps)
            return
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return
        if addresses is None:
            addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
        doubles = [number for group in rates for number in group]
        one_step = not isinstance(steps, Sequence)
        if steps is not None:
            doubles += [steps] if one_step else steps  # type: ignore[list-item, arg-type]
        uploads = upload(addresses, doubles, self.device)
        launch(
            _factors_kernel,
            (cdiv(len(addresses), 128),),
            self.device,
            self._groups,
            self._steps,
            uploads,
            self._factors,
            len(addresses),
            len(rates),
            0 if one_step else 1,
            self._streams,
            self._keys,
            self.random.seed if self.random is not None else 0,
            DEVICE_STEPS=self.steps is not None,
            TENSORS=128,
            RANDOM=self.random is not None,
        )
        chunks = self._chunks_of(addresses)
        aligned = self._aligned and are_aligned(addresses)
        param, grad = triton_dtype(self.params[0].dtype), triton_dtype(given.dtype)
        if self.blocks is None:
            launch(
                _update_kernel,
                (len(chunks),),
                self.device,
                chunks,
                self._pointers,
                uploads,
                self._factors,
                self._keys,
                scale,
                PARAM=param,
                GRAD=grad,
                STATE=triton_dtype(self.exp_avgs[0].dtype),
                CHUNK=_CHUNK,
                ALIGNED=aligned,
                DECAY_LAST=self.decay_last,
                fp_fusion=False,
                REMAINDER=self.remainders is not None,
                RANDOM=self.random is not None,
                RANDOM_STATE=self.random is not None and self.exp_avgs[0].dtype == torch.bfloat16,
                num_warps=_WARPS,
            )
            return
        first, second = self._ends_of_codes
        launch(
            _update_8bit_kernel,
            (len(chunks),),
            self.device,
            chunks,
            self._pointers,
            uploads,
            self._factors,
            self._keys,
            scale,
            self.blocks.map1,
            self.blocks.map2,
            first,
            second,
            PARAM=param,
            GRAD=grad,
            CHUNK=_CHUNK,
            BLOCK_SIZE=BLOCK,
            ALIGNED=aligned,
            DECAY_LAST=self.decay_last,
            fp_fusion=False,
            REMAINDER=self.remainders is not None,
            RANDOM=self.random is not None,
            num_warps=_WARPS_8BIT,
        )

    def _chunks_of(self, addresses: list[int]) -> torch.Tensor:
        """The part of the table from the first tensor that has a gradient to the last: not a program for each chunk
        where few are stepped. It begins at 16 bytes, for which Triton has compiled.
        """
        if addresses[0] and addresses[-1]:
            return self._chunks
        given = [i for i, address in enumerate(addresses) if address]
        start = self._ends[given[0] - 1] if given[0] else 0
        return self._chunks[start & ~1 : self._ends[given[-1]]]

    @torch.no_grad()
    def _reference(
        self, grads: Sequence[torch.Tensor | None], rates: Sequence[Rates], steps: Sequence[float] | float | None
    ) -> None:
        for i, (param, grad, m, v) in enumerate(zip(self.params, grads, self.exp_avgs, self.exp_avg_sqs, strict=True)):
            if grad is None:
                continue
            if self.steps is not None:
                step = self.steps[i].add_(1).item()
            else:
                step = steps[i] if isinstance(steps, Sequence) else steps  # type: ignore[assignment]
            group = rates[self.groups[i]]
            wide = torch.promote_types(param.dtype, torch.float32)
            master = param.to(wide) if self.remainders is None else join(param, self.remainders[i])
            if self.blocks is not None:
                absmax1, absmax2, map1, map2 = self.blocks
                new = _reference_8bit(
                    master, grad.float(), m, v, absmax1[i], absmax2[i], map1, map2, step, group, self.decay_last
                )
                self._write(i, step, new)
                continue
            wide_m, wide_v = m.to(wide), v.to(wide)
            new = _reference_update(master, grad.to(wide), wide_m, wide_v, step, group, self.decay_last)
            self._write(i, step, new, *((wide_m, wide_v) if wide_m is not m else ()))

    def _write(self, i: int, step: float, param: torch.Tensor, *states: torch.Tensor) -> None:
        """Rounds the new parameter and what is given of its states to their dtypes."""
        values, targets = [param, *states], [self.params[i], self.exp_avgs[i], self.exp_avg_sqs[i]]
        if self.remainders is not None:
            values[0], remainder = split(param)
            self.remainders[i].copy_(remainder)
        halves: tuple[torch.Tensor, ...] = ()
        if self.random is not None:
            keys = keys_of(self.random.seed, self.random.streams[i], int(step))
            halves = random_halves(keys, param.numel(), self.device)
        for place, (target, value) in enumerate(zip(targets, values, strict=False)):
            by_chance = halves and target.dtype == torch.bfloat16
            target.copy_(round_by_chance(value, halves[place].view(value.shape)) if by_chance else value)


def _on_device(values: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)
