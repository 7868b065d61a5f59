"""How one launch works on many tensors: tables of addresses in device memory.

A kernel of this kind runs one program per chunk of a tensor. A table that never changes says which chunk of which
tensor a program has; addresses that change with every call (those of gradients) are gathered on the host and travel in
one small copy. Such kernels write through addresses, so they are no torch ops: nothing here can be traced, and who
calls them bumps the version counters of what they wrote.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

ALIGNMENT = 16  # bytes: the widest load of a thread

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}

# One call for the whole list; builds of torch without CUDA lack it.
_addresses_equal = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of a torch one that these kernels know."""
    if dtype not in _TRITON_DTYPES:
        raise TypeError(f"no multi-tensor kernel works on {dtype}")
    return _TRITON_DTYPES[dtype]


def addresses_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))


def have_addresses(tensors: list[torch.Tensor], addresses: list[int]) -> bool:
    """Whether the tensors lie where they lay when `addresses` was taken of them."""
    if _addresses_equal is None or len(tensors) != len(addresses):
        return addresses_of(tensors) == addresses
    return _addresses_equal(tensors, addresses, _indices(len(addresses)))


@functools.lru_cache(maxsize=16)
def _indices(count: int) -> list[int]:
    return list(range(count))


def are_aligned(addresses: Sequence[int]) -> bool:
    """Whether all are multiples of ALIGNMENT."""
    return functools.reduce(operator.or_, addresses, 0) % ALIGNMENT == 0


def chunk_table(numels: Sequence[int], chunk: int, device: torch.device) -> torch.Tensor:
    """[programs, 2] int32: the tensor, and the chunk of it, that each program works on."""
    counts = torch.tensor([-(-numel // chunk) for numel in numels], dtype=torch.int64, device="cpu")
    tensor = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    index = torch.arange(len(tensor), device="cpu") - first[tensor]
    return torch.stack([tensor, index], dim=1).to(torch.int32).to(device)


def upload(integers: Sequence[int], doubles: Sequence[float], device: torch.device) -> torch.Tensor:
    """`integers` and, behind them, `doubles` as int64 on the device, in one copy that the host does not wait for."""
    pinned = device.type == "cuda"
    # A new one each time: the allocator of pinned memory hands a block out again only after its copy is done.
    staging = torch.empty(len(integers) + len(doubles), dtype=torch.int64, device="cpu", pin_memory=pinned)
    start = staging.data_ptr()
    (ctypes.c_int64 * len(integers)).from_address(start)[:] = integers  # type: ignore[call-overload]
    (ctypes.c_double * len(doubles)).from_address(start + 8 * len(integers))[:] = doubles  # type: ignore[call-overload]
    return staging.to(device, non_blocking=True)


@triton.jit
def pointer_at(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to DTYPE from an address. ALIGNED promises a multiple of 16 bytes, which wide loads need."""
    pointer = address.to(tl.pointer_type(DTYPE), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
