"""Checkpointed layers that keep what backward needs after all, as far as memory is free, pass by pass.

A script that checkpoints says that it has to fit, and pays with a second forward of every layer. A layer kept is called
as if it were not checkpointed: the same values and the same random numbers, so the same bits.

What a layer keeps is measured where it is recomputed, which makes just that, and so takes no memory that stock would
not take. Until every layer was recomputed once, none is kept; nor ever where one cannot be measured, writes to its own
buffers, or gets other inputs than [rows, length, H].
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from . import device_memory, tiling
from .engine import is_plain

# Given the bytes that each layer would keep, those that the rest of the pass takes at most (None where unknown), and
# the device: how many of the last ones are kept.
Plan = Callable[[list[float], float | None, torch.device], int]


class _Measured(NamedTuple):
    tokens: int
    longest: int
    bytes: int


class Stack:
    """Layers that run one after another, and the plan of their present pass.

    Attributes:
        passes: that were planned. kept: layers kept in all of them.
        kept_bytes: that the present pass keeps in this way, as far as measured.
    """

    def __init__(self, layers: Iterable[nn.Module], plan: Plan):
        self._layers = [weakref.ref(layer) for layer in layers]
        self._plan = plan
        self.forget()

    def forget(self) -> None:
        """Measures and counts anew: the next training may have other adapters, dtypes and lengths."""
        self._measured: list[_Measured | None] = [None] * len(self._layers)
        self._called = len(self._layers)  # the layer called last
        self._keep = 0  # of the last layers, in the present pass
        self._caution = 1.0
        self._rest: tuple[float, int] | None = None  # bytes, and of how many tokens
        self._began: tuple[int, int, int] | None = None  # tokens, bytes in tensors, and the most ever
        self.passes = self.kept = 0
        self.kept_bytes = 0.0

    @property
    def layers(self) -> int:
        return len(self._layers)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing was recomputed of the last pass."""
        return self._keep == self.layers

    def keeps(self, index: int, hidden_states: torch.Tensor) -> bool:
        """Whether the layer of this number is to be called as if it were not checkpointed, with [rows, length, H]."""
        if hidden_states.ndim != 3:
            return False
        # While a CUDA graph is recorded nothing may be asked of the device: `begin` was called before.
        capturing = hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()
        if index <= self._called and not capturing:
            rows, length, _ = hidden_states.shape
            self.begin(rows * length, length, hidden_states.device)
        self._called = index
        return index >= self.layers - self._keep

    def begin(self, tokens: int, longest: int, device: torch.device) -> None:
        """Plans a pass of rows of this length at most."""
        self._look_back(device)
        sizes = [self._bytes_of(each, tokens, longest) for each in self._measured if each is not None]
        self._keep, self.kept_bytes = 0, 0.0
        if len(sizes) == self.layers and tokens:
            rest = None
            if self._rest is not None:  # of fewer tokens not less: some of it is there whatever their number
                rest = self._rest[0] * max(1.0, tokens / self._rest[1])
            self._keep = min(self._plan([self._caution * each for each in sizes], rest, device), self.layers)
            self.kept_bytes = sum(sizes[self.layers - self._keep :])
        self.passes += 1
        self.kept += self._keep
        allocated, peak = device_memory.allocated(device), device_memory.peak_allocated(device)
        self._began = None if allocated is None or peak is None or not tokens else (tokens, allocated, peak)

    @staticmethod
    def _bytes_of(measured: _Measured, tokens: int, longest: int) -> float:
        """Where rows are longer than measured: as if all grew with the square of their length, as eager attention."""
        return measured.bytes * tokens / measured.tokens * max(1.0, longest / measured.longest)

    def _look_back(self, device: torch.device) -> None:
        """What the last pass took besides, at most: less than the peak of all passes leaves for it."""
        if self._began is None:
            return
        tokens, allocated, peak_before = self._began
        peak = device_memory.peak_allocated(device) or 0
        rest = max(peak - allocated - self.kept_bytes, 0.0)
        if self._rest is None or (peak > peak_before and rest > self._rest[0]):
            self._rest = rest, tokens

    def tighten(self) -> bool:
        """After memory ran out: from here on half as much is kept. False where nothing was since the last time."""
        self._caution *= 2
        kept, self._keep = self._keep > 0, 0
        return kept

    def watch(self, index: int, hidden_states: torch.Tensor) -> Callable[[list[torch.Tensor]], None] | None:
        """What is to be told the tensors that a recomputation of the layer makes; None where that is known."""
        layer, known = self._layers[index](), self._measured[index]
        if layer is None or hidden_states.ndim != 3 or hidden_states.numel() == 0:
            return None
        rows, length, _ = hidden_states.shape
        if known is not None and length <= known.longest:
            return None
        versions = [buffer._version for buffer in layer.buffers()]

        def made(tensors: list[torch.Tensor]) -> None:
            layer = self._layers[index]()
            if layer is None or not all(map(is_plain, tensors)) or not all(map(_has_storage, layer.parameters())):
                return
            # It writes to its buffers (running statistics), and in stock it does so twice.
            if [buffer._version for buffer in layer.buffers()] != versions:
                return
            with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameters
                own = {each.untyped_storage().data_ptr() for each in (*layer.parameters(), *layer.buffers())}
                storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
            size = sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)
            size += round(tiling.left_out(layer, rows * length))
            self._measured[index] = _Measured(rows * length, length, size)

        return made


def _has_storage(parameter: torch.Tensor) -> bool:
    """Whether it is a tensor that lies somewhere, and not a wrapper of others."""
    return is_plain(parameter) or type(parameter).__module__.partition(".")[0] == "bitsandbytes"


# By layer: its stack, and its number there.
PLACES: weakref.WeakKeyDictionary[nn.Module, tuple[Stack, int]] = weakref.WeakKeyDictionary()


def stack_of(backbone: nn.Module) -> Stack | None:
    """The stack of a backbone's `layers`, where some may be kept."""
    layers = getattr(backbone, "layers", None)
    place = PLACES.get(layers[0]) if isinstance(layers, nn.ModuleList) and len(layers) else None
    return None if place is None else place[0]


def kept_bytes(backbone: nn.Module) -> float:
    """That the present pass of a backbone keeps instead of recomputing it."""
    stack = stack_of(backbone)
    return 0.0 if stack is None else stack.kept_bytes


def tighten(backbone: nn.Module) -> bool:
    """After memory ran out in a backbone: whether keeping less may help."""
    stack = stack_of(backbone)
    return stack is not None and stack.tighten()
