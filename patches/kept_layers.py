"""Checkpointed layers that keep what backward needs after all, as far as memory is free, pass by pass.

A script that checkpoints says that it has to fit, and pays with a second forward of every layer. A layer kept is called
as if it were not checkpointed: the same values and the same random numbers, so the same bits. Between that and
recomputing all of it there is a middle way: the outputs of attention are kept, and the rest is recomputed
(kept_attention.py).

What a layer keeps is measured where it is recomputed, which makes just that, and so takes no memory that stock would
not take; what its attention keeps, where it runs forward. Until every layer was recomputed once, none is kept; nor ever
where one cannot be measured, writes to its own buffers, or gets other inputs than [rows, length, H].
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from . import device_memory, tiling
from .engine import is_plain
from .kept_attention import Calls


class Costs(NamedTuple):
    """Of one layer in one pass.

    Attributes:
        whole: bytes that it keeps where nothing is recomputed. attention: those of attention's outputs alone; None
            where these cannot be kept.
        products, scores: FLOP of its forward, of linear layers and of attention.
    """

    whole: float
    attention: float | None
    products: float
    scores: float


class Kept(NamedTuple):
    """What a pass keeps.

    Attributes:
        whole: how many of the last layers. attention: the numbers of those that keep attention's outputs.
    """

    whole: int = 0
    attention: tuple[int, ...] = ()


# Given the costs of all layers, the bytes that the rest of the pass takes at most (None where unknown), the device, and
# what was kept before: what is kept.
Plan = Callable[[list[Costs], float | None, torch.device, Kept], Kept]


class _Measured(NamedTuple):
    tokens: int
    longest: int
    bytes: int


class _Attention(NamedTuple):
    tokens: int
    longest: int
    bytes: int
    flops: float


class Stack:
    """Layers that run one after another, and the plan of their present pass.

    Attributes:
        passes: that were planned. kept: layers kept in all of them. attended: those that kept attention's outputs.
        kept_bytes: that the present pass keeps in this way, as far as measured.
    """

    def __init__(self, layers: Iterable[nn.Module], plan: Plan, flops_per_token: Sequence[float] = ()):
        self._layers = [weakref.ref(layer) for layer in layers]
        self._plan, self._flops = plan, list(flops_per_token) or [1.0] * len(self._layers)
        self.forget()

    def forget(self) -> None:
        """Measures and counts anew: the next training may have other adapters, dtypes and lengths."""
        self._measured: list[_Measured | None] = [None] * len(self._layers)
        self._attention: list[_Attention | None] = [None] * len(self._layers)
        self._called = len(self._layers)  # the layer called last
        self._keep = Kept()  # in the present pass
        self._caution = 1.0
        self._rest: tuple[float, int] | None = None  # bytes, and of how many tokens
        self._began: tuple[int, int, int] | None = None  # tokens, bytes in tensors, and the most ever
        self.passes = self.kept = self.attended = 0
        self.kept_bytes = 0.0

    @property
    def layers(self) -> int:
        return len(self._layers)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing was recomputed of the last pass."""
        return self._keep.whole == self.layers

    def keeps(self, index: int, hidden_states: torch.Tensor, longest: int | None = None) -> bool:
        """Whether the layer of this number is to be called as if it were not checkpointed, with [rows, length, H].

        Args:
            longest: tokens of the longest document, where that is not `length`.
        """
        if hidden_states.ndim != 3:
            return False
        # While a CUDA graph is recorded nothing may be asked of the device: `begin` was called before.
        capturing = hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()
        if index <= self._called and not capturing:
            rows, length, _ = hidden_states.shape
            self.begin(rows * length, length, hidden_states.device, longest)
        self._called = index
        return index >= self.layers - self._keep.whole

    def begin(self, tokens: int, length: int, device: torch.device, longest: int | None = None) -> None:
        """Plans a pass of rows of this length at most, and documents of so many tokens."""
        self._look_back(device)
        costs = [
            self._costs_of(index, tokens, length, length if longest is None else longest)
            for index, measured in enumerate(self._measured)
            if measured is not None
        ]
        before, self._keep, self.kept_bytes = self._keep, Kept(), 0.0
        if len(costs) == self.layers and tokens:
            rest = None
            if self._rest is not None:  # of fewer tokens not less: some of it is there whatever their number
                rest = self._rest[0] * max(1.0, tokens / self._rest[1])
            careful = [
                each._replace(
                    whole=self._caution * each.whole,
                    attention=None if each.attention is None else self._caution * each.attention,
                )
                for each in costs
            ]
            self._keep = self._plan(careful, rest, device, before)
            self.kept_bytes = sum(each.whole for each in costs[self.layers - self._keep.whole :])
            self.kept_bytes += sum(costs[index].attention or 0.0 for index in self._keep.attention)
        self.passes += 1
        self.kept += self._keep.whole
        self.attended += len(self._keep.attention)
        allocated, peak = device_memory.allocated(device), device_memory.peak_allocated(device)
        self._began = None if allocated is None or peak is None or not tokens else (tokens, allocated, peak)

    def _costs_of(self, index: int, tokens: int, length: int, longest: int) -> Costs:
        measured, attention = self._measured[index], self._attention[index]
        assert measured is not None
        # Where rows are longer than measured: as if all grew with the square of their length, as eager attention.
        whole = measured.bytes * tokens / measured.tokens * max(1.0, length / measured.longest)
        products = tokens * self._flops[index]
        if attention is None:
            return Costs(whole, None, products, 0.0)
        share = tokens / attention.tokens
        return Costs(whole, share * attention.bytes, products, share * attention.flops * longest / attention.longest)

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
        kept, self._keep = self._keep != Kept(), Kept()
        return kept

    def calls(self, index: int, is_watched: bool) -> Calls | None:
        """Where the calls of attention in a recomputed layer go; None where they are made as ever.

        Args:
            is_watched: whether the layer is measured in this pass.
        """
        if index in self._keep.attention:
            return Calls(keeps=True)
        return Calls(keeps=False) if is_watched else None

    def called(self, index: int, calls: Calls, tokens: int, longest: int) -> None:
        """Notes what attention was measured to keep."""
        if calls.keeps:
            return
        self._attention[index] = _Attention(tokens, longest, calls.bytes, calls.flops) if calls.bytes else None

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
