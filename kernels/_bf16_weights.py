"""bfloat16 weights that lose no updates: beside the rest of an exact float32 master, or rounded by chance.

A bfloat16 number is the upper half of a float32 one. With M the 32 bits of the master as an integer:

    weight = (M + 0x8000) >> 16                 the nearest bfloat16; of two equally near that of larger magnitude
    remainder = M - (weight << 16)              -0x8000 ... 0x7FFF: 16 bits
    M = (weight << 16) + remainder

Signs, exponents, subnormal numbers and zeros need no care: bits of a sign and a magnitude count up with the magnitude,
and a carry into the exponent is the next number. A master that is NaN is any NaN.

Casts round to even where two are equally near. That leaves no room: 65,537 masters become an even weight, two of them
by halves, and 65,536 remainders tell them apart. So one half is up, always: once in 131,072 masters the weight is the
other one of two equally near numbers than a cast would take, and the master is exact.

A remainder that belongs to another weight (somebody has written weights unnoticed) is worth half a unit in the last
place at most, and never more: beside a zero or an infinity it cannot turn the sign or make a NaN.

By chance: r is uniform in 0 ... 0xFFFF, and

    weight = (M + r) >> 16                      up with the probability of the part that is cut off: the mean is exact

r is a hash of the element's place, with two keys that are hashes of a seed, the step and the tensor: the same numbers
on any device, whatever else is trained, and again after a resume.

Source: Gupta et al., "Deep Learning with Limited Numerical Precision" (2015), for rounding by chance; the hash has
multipliers by C. Wellons, "Prospecting for Hash Functions" (2018), chosen for the least bias of 32-bit mixers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NAN = 0x7FC00000
_UINT32 = 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------- torch reference


def join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 master of a bfloat16 weight and its int16 remainder."""
    high, rest = weight.view(torch.int16).int(), remainder.int()
    magnitude = high & 0x7FFF
    rest = torch.where(magnitude == 0, rest.clamp(min=0), rest)
    rest = torch.where(magnitude >= 0x7F80, rest.clamp(max=0), rest)
    return ((high << 16) + rest).view(torch.float32)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 weight and the int16 remainder of a float32 master."""
    bits = _bits(master)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def round_by_chance(value: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """bfloat16 of float32; `random` int32, uniform in 0 ... 0xFFFF."""
    return ((_bits(value) + random) >> 16).to(torch.int16).view(torch.bfloat16)


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.int32).masked_fill(value.isnan(), _NAN)


def keys_of(seed: int, stream: int, step: int) -> tuple[int, int]:
    """The two keys of a tensor's random numbers at a step."""
    key = _mix_integer(_mix_integer((stream * 0x61C88647 + seed) & _UINT32) ^ (step & _UINT32))
    return key, _mix_integer(key ^ 0x6A09E667)


def random_halves(keys: tuple[int, int], count: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Three times uniform int32 in 0 ... 0xFFFF, for each of `count` elements: of the weight and of two states."""
    element = torch.arange(count, dtype=torch.int64, device=device) & _UINT32
    word = _mix_tensor((_mix_tensor(element ^ keys[0]) + keys[1]) & _UINT32)
    second = _mix_tensor(word ^ 0x5851F42D)
    return (word >> 16).int(), (second >> 16).int(), (second & 0xFFFF).int()


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """int64 that holds 32 bits without a sign; products wrap, and their lower bits are right."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


def _mix_integer(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _UINT32
    x ^= x >> 15
    x = (x * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def join_bits(high, remainder):
    """As `join`, of int16 bits of the weight."""
    high = high.to(tl.int32)
    rest = remainder.to(tl.int32)
    magnitude = high & 0x7FFF
    rest = tl.where(magnitude == 0, tl.maximum(rest, 0), rest)
    rest = tl.where(magnitude >= 0x7F80, tl.minimum(rest, 0), rest)
    return ((high << 16) + rest).to(tl.float32, bitcast=True)


@triton.jit
def bits_of(value):
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FC00000, bits)


@triton.jit
def upper_half(bits, added):
    """int16 bits of a bfloat16."""
    return ((bits + added) >> 16).to(tl.int16)


@triton.jit
def mix(x):
    """uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def store_keys(keys_ptr, tensor, stream, step, seed, mask):
    """As `keys_of`, to row `tensor` of keys_ptr [tensors, 2] int32."""
    start = (stream * 0x61C88647 + seed).to(tl.uint32, bitcast=True)
    key = mix(mix(start) ^ step.to(tl.int32).to(tl.uint32, bitcast=True))
    tl.store(keys_ptr + tensor * 2, key.to(tl.int32, bitcast=True), mask=mask)
    second = mix(key ^ 0x6A09E667)
    tl.store(keys_ptr + tensor * 2 + 1, second.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def random_word(keys_ptr, tensor, element):
    """uint32 of each element; `element` int64."""
    first = tl.load(keys_ptr + tensor * 2).to(tl.uint32, bitcast=True)
    second = tl.load(keys_ptr + tensor * 2 + 1).to(tl.uint32, bitcast=True)
    return mix(mix(element.to(tl.uint32) ^ first) + second)


@triton.jit
def second_word(word):
    """Of the two states, from that of the weight."""
    return mix(word ^ 0x5851F42D)
