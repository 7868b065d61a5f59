"""cuBLAS may add up the parts of a long 16-bit product in 16 bits, which torch allows by default.

The low-rank products of LoRA are of that kind: thousands of terms for each of a few columns. Which products are split
so depends on their shapes, and those of ours, of several adapters at once, are not those of stock; on an H200 a
gradient of B was off by 1.2 times as much as stock's. While LoRA layers are patched, all sums are made in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .engine import Patch

_FLAGS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


class _FullSums(Patch):
    """For the whole process, there as long as any activation wants it; what the user forbids already stays so."""

    id = "lora:sums"

    def __init__(self) -> None:
        self._users, self._changed = 0, list[str]()

    def apply(self) -> None:
        self._users += 1
        if self._users == 1:
            self._changed = [flag for flag in _FLAGS if getattr(torch.backends.cuda.matmul, flag)]
            for flag in self._changed:
                setattr(torch.backends.cuda.matmul, flag, False)

    def revert(self) -> bool:
        self._users -= 1
        if self._users > 0:
            return True
        untouched = [flag for flag in self._changed if not getattr(torch.backends.cuda.matmul, flag)]
        for flag in untouched:
            setattr(torch.backends.cuda.matmul, flag, True)
        return untouched == self._changed


FULL_SUMS = _FullSums()


@contextmanager
def full_sums() -> Iterator[None]:
    """For the length of a `with` block."""
    FULL_SUMS.apply()
    try:
        yield
    finally:
        FULL_SUMS.revert()
