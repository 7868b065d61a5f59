"""16-bit copies of wider weights under autocast, made once per optimizer step: shadows.

Autocast casts a weight in every forward of the model and again in every recomputation, though it changes once per
optimizer step. Which weights are cast, and how often, shows in one step; from the next on those that are cast more than
once are cast together when the step begins, where memory is plainly free, and let go when its last backward is done.
Kernels and patches find the copies by `kernels/_weights.py`.

A copy is handed out as long as its weight is the same object, at the same address, of the same version. That does not
show every write (`weight.data.add_()` changes none of these), so a copy lives no longer than a step, of frozen weights
neither, and only what `Trainer.training_step` computes with gradients sees it: evaluation, generation and callbacks do
not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from hf_turbo.kernels import _weights

from . import device_memory

# Given the bytes of all copies, those that a step takes besides at most (None where unknown), and the device.
Fits = Callable[[int, float | None, torch.device], bool]


class _Cast:
    """Casts of one weight in the present step, and the copy of it if there is one."""

    __slots__ = ("_address", "_dtype", "_version", "_weight", "count", "low")

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        self._weight, self._dtype, self.count = weakref.ref(weight), dtype, 0
        self._version, self._address = 0, 0
        self.low: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor | None:
        """What is still cast, None where it is gone."""
        return self._weight()

    def is_of(self, weight: torch.Tensor, dtype: torch.dtype) -> bool:
        return self._weight() is weight and self._dtype == dtype

    def is_current(self, weight: torch.Tensor) -> bool:
        """Whether the weight is as it was when the copy was made, as far as that shows."""
        return self._version == weight._version and self._address == weight.data_ptr()

    def empty(self) -> torch.Tensor | None:
        """Room for a copy, which is to be filled next."""
        weight = self._weight()
        if weight is None:
            return None
        self._version, self._address = weight._version, weight.data_ptr()
        self.low = torch.empty_like(weight, dtype=self._dtype, requires_grad=False)
        return self.low

    @property
    def bytes(self) -> int:
        weight = self._weight()
        return 0 if weight is None else weight.numel() * self._dtype.itemsize


class Shadows:
    """Those of one training.

    Args:
        fits: whether memory for so many bytes of copies is plainly free.

    Attributes:
        steps: that had copies. bytes: of all copies, at most.
    """

    def __init__(self, fits: Fits):
        self._fits, self._casts = fits, dict[int, _Cast]()
        self._is_begun = self._is_refused = False
        self._is_known = False  # whether a whole step has shown what is cast, and what memory it takes
        self._held = 0  # bytes of the last copies
        self.steps = self.bytes = 0

    # ------------------------------------------------------------------------------------------------ what asks

    def __call__(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The copy of a weight, if there is one; notes that it is asked for."""
        if weight.dtype != torch.float32 or not isinstance(weight, torch.nn.Parameter):
            return None
        cast = self._casts.get(id(weight))
        if cast is None or not cast.is_of(weight, dtype):
            cast = self._casts[id(weight)] = _Cast(weight, dtype)
        cast.count += 1
        if cast.low is None or not cast.is_current(weight):
            return None
        # What is recorded is done again in later steps, from other addresses.
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return cast.low

    @contextmanager
    def training_step(self, is_last: bool) -> Iterator[None]:
        """Around one micro-batch, which may be the last of its optimizer step."""
        if not self._is_begun:
            self._begin()
        before = _weights.offer(self)
        try:
            yield
        finally:
            _weights.offer(before)
            if is_last:
                self.end_step()

    # ------------------------------------------------------------------------------------------------ what is kept

    def end_step(self) -> None:
        """Weights may change from here on."""
        self._is_known = self._is_known or self._is_begun
        self._is_begun = False
        for cast in self._casts.values():
            cast.low = None

    def tighten(self) -> bool:
        """After memory ran out: no copies any more. False where there were none."""
        held = any(cast.low is not None for cast in self._casts.values())
        self._is_refused = True
        self._casts.clear()
        return held

    def _begin(self) -> None:
        self._is_begun = True
        alive = [(cast, cast.weight) for cast in self._casts.values() if cast.count > 1]
        again = [(cast, weight) for cast, weight in alive if weight is not None]
        self._casts = {id(weight): cast for cast, weight in again}
        for cast, _ in again:
            cast.count = 0
        if self._is_refused or not self._is_known or not again:
            return
        total, device = sum(cast.bytes for cast, _ in again), again[0][1].device
        allocated, peak = device_memory.allocated(device), device_memory.peak_allocated(device)
        # Among the peak are copies of an earlier step.
        rest = None if allocated is None or peak is None else max(peak - allocated - self._held, 0)
        if not self._fits(total, rest, device):
            self._held = 0
            return
        try:
            _fill([cast for cast, _ in again])
        except torch.OutOfMemoryError:
            self.tighten()
            return
        self._held = total
        self.steps += 1
        self.bytes = max(self.bytes, total)

    def note(self) -> str | None:
        """What is worth saying of them at the end of the training."""
        if not self.steps:
            return None
        return f"16-bit copies of weights, {self.bytes / 2**30:.2f} GiB, in {self.steps} steps"


@torch.no_grad()
def _fill(casts: list[_Cast]) -> None:
    """Makes copies, in one launch for all."""
    made = [(cast.weight, cast.empty()) for cast in casts]
    pairs = [(weight, low) for weight, low in made if weight is not None and low is not None]
    if pairs:
        torch._foreach_copy_([low for _, low in pairs], [weight for weight, _ in pairs])
