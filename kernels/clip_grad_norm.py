"""Clipping of gradients by their total 2-norm, over many tensors in three launches.

Formula:

    norm  = sqrt(sum over all elements of g^2)
    scale = min(1, max_norm / (norm + 1e-6))            g = scale * g, in place

The host waits for nothing: the scale stays on the device, and the last launch does nothing where it is 1.

Shapes: gradients contiguous, of any shapes, on one device. Dtypes: float32, bfloat16, float16, mixed too (one launch
more, both ways, for each further dtype); float64 takes the torch reference. The norm is a 0-dim tensor of the dtype to
which those of the gradients promote. Sums and the scale are float32 whatever the dtype, and nothing is rounded in
between; partial sums are added up in a fixed order.

A norm that is not finite acts as in torch: infinity, also by overflow of its dtype, makes the scale zero (and infinite
gradients NaN), NaN makes every gradient NaN.

Floor, for N elements of e bytes: N*e bytes, and 2*N*e more where gradients are scaled.

The two halves can be had alone. A step that reads all gradients once more can scale them as it reads them, which saves
2*N*e bytes: of bf16 gradients of 1.24e9 weights 1.2 ms at 4 TB/s, of float32 ones 2.4. Gradients then stay in memory as
they were, so this is for where nobody reads them in between (patches/clipping.py).

Raises ValueError for tensors that do not fit together, TypeError for dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import launch, use_triton
from ._multi_tensor import addresses_of, are_aligned, chunk_table, pointer_at, triton_dtype, upload

_TILE = 4096  # elements: 32 per thread
_WARPS = 4
_MANY = 1 << 28  # elements, from which on a program works on 16 tiles, so that the partial sums stay few


# ---------------------------------------------------------------------------------------------------- torch reference


def _reference(grads: Sequence[torch.Tensor], max_norm: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and what to multiply gradients by; computes in float32 or float64."""
    wide = torch.promote_types(dtype, torch.float32)
    norms = torch.stack([torch.linalg.vector_norm(grad, dtype=wide) for grad in grads])
    exact = torch.linalg.vector_norm(norms)
    norm = exact.to(dtype)
    return norm, (max_norm / (torch.where(norm.isfinite(), exact, norm.to(wide)) + 1e-6)).clamp(max=1.0)


def scaled(grad: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As clipping writes it: multiplied in float32 or float64, and rounded to its dtype."""
    return (grad.to(scale.dtype) * scale).to(grad.dtype)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _squares_kernel(
    chunks_ptr,
    uploads_ptr,
    numels_ptr,
    numbers_ptr,
    first,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The sum of squares of one chunk per program, to numbers_ptr from `first` on."""
    program = tl.program_id(0)
    tensor = tl.load(chunks_ptr + program * 2)
    start = tl.load(chunks_ptr + program * 2 + 1).to(tl.int64) * (TILE * TILES)
    grad_ptr = pointer_at(tl.load(uploads_ptr + tensor), GRAD, ALIGNED) + start
    rest = tl.minimum(tl.load(numels_ptr + tensor) - start, TILE * TILES).to(tl.int32)
    if ALIGNED:
        rest = tl.multiple_of(rest, 16)
    element = tl.arange(0, TILE)
    squares = tl.zeros((TILE,), tl.float32)
    for tile in tl.static_range(TILES):
        grad = tl.load(grad_ptr + tile * TILE + element, mask=tile * TILE + element < rest, other=0.0).to(tl.float32)
        squares += grad * grad
    tl.store(numbers_ptr + first + program, tl.sum(squares, axis=0))


@triton.jit
def _norm_kernel(numbers_ptr, norm_ptr, scale_ptr, partials, max_norm, PARTIALS: tl.constexpr):
    """One program: the norm from `partials` sums of squares, and what to multiply gradients by."""
    partial = tl.arange(0, PARTIALS)
    total = tl.zeros((PARTIALS,), tl.float32)
    for start in range(0, partials, PARTIALS):
        total += tl.load(numbers_ptr + start + partial, mask=start + partial < partials, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    rounded = norm.to(norm_ptr.dtype.element_ty)
    tl.store(norm_ptr, rounded)
    rounded = rounded.to(tl.float32)
    norm = tl.where(tl.abs(rounded) < float("inf"), norm, rounded)
    scale = tl.div_rn(max_norm, norm + 1e-6)
    tl.store(scale_ptr, tl.where(scale > 1.0, 1.0, scale))  # NaN stays


@triton.jit
def _scale_kernel(
    chunks_ptr,
    uploads_ptr,
    numels_ptr,
    scale_ptr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    scale = tl.load(scale_ptr)
    if scale == 1.0:
        return
    tensor = tl.load(chunks_ptr + program * 2)
    start = tl.load(chunks_ptr + program * 2 + 1).to(tl.int64) * (TILE * TILES)
    grad_ptr = pointer_at(tl.load(uploads_ptr + tensor), GRAD, ALIGNED) + start
    rest = tl.minimum(tl.load(numels_ptr + tensor) - start, TILE * TILES).to(tl.int32)
    if ALIGNED:
        rest = tl.multiple_of(rest, 16)
    element = tl.arange(0, TILE)
    for tile in tl.static_range(TILES):
        mask = tile * TILE + element < rest
        grad = tl.load(grad_ptr + tile * TILE + element, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + tile * TILE + element, (grad * scale).to(GRAD), mask=mask)


# ------------------------------------------------------------------------------------------------------------- public


@functools.lru_cache(maxsize=8)
def _tables(numels: tuple[int, ...], tiles: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Chunks, sizes, and whether the sizes allow wide loads."""
    sizes = torch.tensor(numels, dtype=torch.int64, device="cpu").to(device)
    return chunk_table(numels, _TILE * tiles, device), sizes, are_aligned(numels)


class _Launch(NamedTuple):
    """What the kernels take for gradients of one dtype: chunks, addresses, sizes, and how they are compiled."""

    chunks: torch.Tensor
    uploads: torch.Tensor
    sizes: torch.Tensor
    options: dict[str, Any]


class Gradients:
    """Many gradients, to be clipped by their total norm.

    Version counters are the caller's to bump.

    Args:
        grads: at least one; contiguous, on one device (not checked: it would cost as much as the rest).
        dtypes, numels, addresses: those of the gradients, where they are known; a dtype is that of all.
    """

    def __init__(
        self,
        grads: Sequence[torch.Tensor],
        *,
        dtypes: Sequence[torch.dtype] | torch.dtype | None = None,
        numels: Sequence[int] | None = None,
        addresses: Sequence[int] | None = None,
    ):
        if not grads:
            raise ValueError("clip_grad_norm needs at least one gradient")
        self._grads, self._device = grads, grads[0].device
        if isinstance(dtypes, torch.dtype):
            distinct = [dtypes]
        else:
            dtypes = dtypes or [grad.dtype for grad in grads]
            distinct = list(dict.fromkeys(dtypes))
        self._dtype = functools.reduce(torch.promote_types, distinct)
        if not self._dtype.is_floating_point:
            raise TypeError(f"clip_grad_norm needs floating-point gradients, got {self._dtype}")
        self._launches: list[_Launch] | None = None  # by torch
        if not use_triton(grads[0]) or self._dtype == torch.float64:
            return
        numels = numels or list(map(torch.Tensor.numel, grads))
        addresses = addresses or addresses_of(grads)
        if isinstance(dtypes, torch.dtype) or len(distinct) == 1:
            parts = [(self._dtype, tuple(numels), addresses)]
        else:
            parts = []
            for part in distinct:
                chosen = [i for i, of in enumerate(dtypes) if of == part]
                parts.append((part, tuple(numels[i] for i in chosen), [addresses[i] for i in chosen]))
        tiles = 1 if sum(numels) < _MANY else 16
        launches = (self._launch_of(*part, tiles) for part in parts)
        self._launches = [each for each in launches if len(each.chunks)]

    def _launch_of(self, dtype: torch.dtype, numels: tuple[int, ...], addresses: Sequence[int], tiles: int) -> _Launch:
        chunks, sizes, even = _tables(numels, tiles, self._device)
        options = {
            "GRAD": triton_dtype(dtype),
            "TILE": _TILE,
            "TILES": tiles,
            "ALIGNED": even and are_aligned(addresses),
            "num_warps": _WARPS,
        }
        return _Launch(chunks, upload(addresses, (), self._device), sizes, options)

    @torch.no_grad()
    def norm_and_scale(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm, and what to multiply gradients by for it to be at most `max_norm`, which may be infinite; 0-dim, on
        the device."""
        if self._launches is None:
            return _reference(self._grads, max_norm, self._dtype)
        norm = torch.empty((), dtype=self._dtype, device=self._device)
        scale = torch.empty((), dtype=torch.float32, device=self._device)
        partials = sum(len(chunks) for chunks, *_ in self._launches)
        numbers = torch.empty(partials, dtype=torch.float32, device=self._device)
        first = 0
        for chunks, uploads, sizes, options in self._launches:
            grid = (len(chunks),)
            launch(_squares_kernel, grid, self._device, chunks, uploads, sizes, numbers, first, **options)
            first += len(chunks)
        of_norm = (numbers, norm, scale, partials, float(max_norm))
        launch(_norm_kernel, (1,), self._device, *of_norm, PARTIALS=1024, num_warps=8)
        return norm, scale

    @torch.no_grad()
    def multiply(self, scale: torch.Tensor) -> None:
        """Multiplies them in place by what `norm_and_scale` returned."""
        if self._launches is None:
            for grad in self._grads:
                grad.copy_(scaled(grad, scale))
            return
        for chunks, uploads, sizes, options in self._launches:
            launch(_scale_kernel, (len(chunks),), self._device, chunks, uploads, sizes, scale, **options)


def clip_grad_norm(grads: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scales gradients in place so that their total 2-norm is at most `max_norm`, which may be infinite.

    Returns:
        The norm before clipping, on the device.
    """
    gradients = Gradients(grads)
    norm, scale = gradients.norm_and_scale(max_norm)
    gradients.multiply(scale)
    return norm
