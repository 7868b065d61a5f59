"""Checkpointing without reentrant autograd, with less work for the host than torch's.

A layer runs forward and saves nothing but its inputs; when backward asks for the first saved tensor, the layer runs
again, up to the last tensor that it saved, and hands out what it saves then. That is what
`torch.utils.checkpoint.checkpoint(use_reentrant=False)` does, and so does this: the same random numbers, the same
autocast, the same errors. torch pays for generality with weak dictionaries, wrappers and context managers at each saved
tensor, some thirty of a decoder layer, three times a step; here a tensor costs a slot, and states are restored only
where they differ. What is not understood (`is_plain`) goes to torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError, checkpoint

from . import kept_attention

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]
Watch = Callable[[list[torch.Tensor]], None]

_DEVICES = {"cpu", "cuda"}
_ADVICE = "Switch hf_turbo's checkpointing off (checkpointing=False) and torch's debug mode on to see the operators"
# What is asked of torch beside its documented interface. Where one is gone, torch does it all.
_ASKED = {
    torch.utils.checkpoint: ("_checkpoint_debug_enabled", "_enable_checkpoint_early_stop"),
    torch._C._autograd: ("_saved_tensors_hooks_is_enabled",),
    torch._C: (
        "_are_functorch_transforms_active",
        "_current_graph_task_id",
        "_get_graph_exec_group",
        "_len_torch_dispatch_stack",
        "_len_torch_function_stack",
    ),
}
_IS_KNOWN = all(hasattr(owner, name) for owner, names in _ASKED.items() for name in names)


def is_reentrant(function: Any) -> bool:
    """Whether what checkpoints a layer is torch's, with reentrant autograd."""
    keywords = getattr(function, "keywords", {})
    return getattr(function, "func", function) is checkpoint and keywords.get("use_reentrant") is not False


def understands(function: Any) -> bool:
    """Whether this is torch's checkpoint without reentrant autograd, and nothing else: no contexts, no debugging."""
    keywords = getattr(function, "keywords", {})
    return (
        getattr(function, "func", None) is checkpoint
        and keywords.get("use_reentrant") is False
        and not getattr(function, "args", ())
        and keywords.keys() <= {"use_reentrant", "preserve_rng_state"}
    )


def is_plain(stock: Any, args: tuple[Any, ...], device: torch.device) -> bool:
    """Whether a call of `stock` on `args`, made now, can be made here: `understands(stock)`, tensors of one device and
    the CPU, and nobody who watches the operators.
    """
    return (
        _IS_KNOWN
        and understands(stock)
        and torch.is_grad_enabled()
        and device.type in _DEVICES
        and all(_is_of(device, arg) for arg in args)
        and torch.utils.checkpoint._checkpoint_debug_enabled is None
        and torch.utils.checkpoint._enable_checkpoint_early_stop is None
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not (device.type == "cuda" and _DRAWS and torch.cuda.is_current_stream_capturing())
    )


def _is_of(device: torch.device, arg: Any) -> bool:
    """Whether an argument draws random numbers on no other device; what is inside containers is not looked at."""
    if isinstance(arg, torch.Tensor):
        return arg.device == device or arg.device.type == "cpu"
    return not isinstance(arg, (tuple, list, dict, set))


def recompute_in_backward(
    stock: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    device: torch.device,
    hooks: Hooks | None = None,
    watch: Watch | None = None,
    calls: kept_attention.Calls | None = None,
) -> Any:
    """`stock(function, *args)`, where `is_plain(stock, args, device)`.

    Args:
        device: the one whose random numbers `function` may draw, beside the CPU's.
        hooks: to pack and unpack the tensors among `args` with; default: those that are in force.
        watch: told the tensors that a recomputation has made for backward.
        calls: of attention, which a recomputation leaves out as far as they are kept there.
    """
    region = _Region(function, args, device, stock.keywords.get("preserve_rng_state", True), hooks, watch, calls)
    pack, unpack = region.pack, region.unpack
    with saved_tensors_hooks(pack, unpack), kept_attention.recording(calls, pack, unpack, region.position):
        return function(*args)


class _Slot:
    """What autograd holds instead of a saved tensor; freed when the graph needs the tensor no more."""

    __slots__ = ("__weakref__", "backward", "tensor")
    tensor: torch.Tensor | None

    def __init__(self) -> None:
        self.tensor = self.backward = None


class _Keep(torch.autograd.Function):
    """Has autograd save tensors: hooks see them, and a change in place is an error."""

    @staticmethod
    def forward(ctx: Any, node: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise AssertionError("nothing is differentiated through this node")


class _Done(Exception):
    """Ends a recomputation behind the last tensor that forward saved."""


class _Region:
    """One call of a checkpointed function."""

    __slots__ = (
        "_args",
        "_autocast",
        "_calls",
        "_device",
        "_function",
        "_kept",
        "_like",
        "_places",
        "_random",
        "_slots",
        "_watch",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        device: torch.device,
        preserve_random_state: bool,
        hooks: Hooks | None,
        watch: Watch | None,
        calls: kept_attention.Calls | None,
    ):
        self._function, self._device, self._watch, self._calls = function, device, watch, calls
        # Weakly: a tensor whose node is done, or that no gradient needs, is not kept when recomputed.
        self._slots: list[weakref.ref[_Slot]] = []
        self._like: list[Any] = []
        self._autocast = _autocast_states(device)
        self._random = random_states(device) if preserve_random_state else None
        tensors = {place: arg for place, arg in enumerate(args) if isinstance(arg, torch.Tensor)}
        self._args, self._places = [None if i in tensors else arg for i, arg in enumerate(args)], list(tensors)
        with nullcontext() if hooks is None else saved_tensors_hooks(*hooks):
            # The tensor and not its node: until torch 2.13 the node dies, and frees what it saved, with the tensor.
            self._kept = _Keep.apply(torch.empty(0, requires_grad=True), *tensors.values())

    def pack(self, tensor: torch.Tensor) -> _Slot:
        slot = _Slot()
        self._slots.append(weakref.ref(slot))
        self._like.append((tensor.shape, tensor.dtype, tensor.device))
        return slot

    def position(self) -> int:
        """How many tensors were saved so far."""
        return len(self._slots)

    def unpack(self, slot: _Slot) -> torch.Tensor:
        # A group of backward passes that share a recomputation, this pass, or none: then each look is one of its own.
        backward: Any = torch._C._get_graph_exec_group() or torch._C._current_graph_task_id()
        if slot.tensor is None and slot.backward == backward != -1:
            raise CheckpointError(
                "torch.utils.checkpoint: Unpack is being triggered for a tensor that was already unpacked once. If you "
                "are calling ctx.saved_tensors in backward, make sure to do so only once"
            )
        if backward == -1 or slot.tensor is None or slot.backward != backward:
            self._fill_slots(backward)
        tensor = slot.tensor
        if tensor is None:
            raise CheckpointError(f"torch.utils.checkpoint: recomputation did not reach a saved tensor. {_ADVICE}")
        slot.tensor = None
        return tensor

    def _fill_slots(self, backward: Any) -> None:
        slots, like = self._slots, self._like
        count, different = 0, ""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count, different
            if count >= len(slots):
                raise CheckpointError(f"torch.utils.checkpoint: recomputation does not end where it should. {_ADVICE}")
            if tensor.requires_grad:
                tensor = tensor.detach()
            slot = slots[count]()
            if slot is not None:
                found = tensor.shape, tensor.dtype, tensor.device
                if found != like[count]:
                    different = different or f"tensor {count} was {like[count]} and is {found}"
                slot.tensor, slot.backward = tensor, backward
            count += 1
            if count == len(slots):
                raise _Done
            return tensor

        args = list(self._args)
        for place, tensor in zip(self._places, self._kept.grad_fn.saved_tensors, strict=True):
            args[place] = tensor
        random = None if self._random is None else random_states(self._device)
        try:
            with ExitStack() as stack:
                for state, now in zip(self._autocast, _autocast_states(self._device), strict=True):
                    # Where it is on already, torch enters it too: weights that were cast before are cast anew.
                    if state != now or state[2]:
                        stack.enter_context(torch.autocast(*state))
                stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
                stack.enter_context(torch.enable_grad())
                if self._random is not None:
                    set_random_states(self._random, self._device)
                stack.enter_context(kept_attention.playing(self._calls, pack, lambda: count))
                _run(self._function, args)
        except _Done:
            pass
        finally:
            if random is not None:
                set_random_states(random, self._device)
        if count != len(slots):
            raise CheckpointError(
                "torch.utils.checkpoint: A different number of tensors was saved during the original forward and "
                f"recomputation: {len(slots)} and {count}. {_ADVICE}"
            )
        if different:
            raise CheckpointError(
                "torch.utils.checkpoint: Recomputed values for the following tensors have different metadata than "
                f"during the forward pass: {different}. {_ADVICE}"
            )
        if self._watch is not None:
            alive = [slot() for slot in slots]
            self._watch([slot.tensor for slot in alive if slot is not None and slot.tensor is not None])


@torch.compiler.disable
def _run(function: Callable[..., Any], args: list[Any]) -> None:
    """Compiled autograd must not trace a recomputation: it would save other tensors."""
    function(*args)


def _autocast_states(device: torch.device) -> list[tuple[str, torch.dtype, bool, bool]]:
    """Arguments of `torch.autocast`, for the device and the CPU."""
    cached = torch.is_autocast_cache_enabled()
    return [
        (each, torch.get_autocast_dtype(each), torch.is_autocast_enabled(each), cached)
        for each in {device.type: None, "cpu": None}
    ]


_DRAWS = True  # whether a device may draw random numbers


@contextmanager
def without_random_numbers() -> Iterator[None]:
    """While a CUDA graph is recorded of what draws no random numbers: the device's generator may not be asked then."""
    global _DRAWS
    _DRAWS = False
    try:
        yield
    finally:
        _DRAWS = True


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda" and _DRAWS:
        generators.append(torch.cuda.default_generators[device.index])
    return generators


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Of the CPU's generator, and of the device's."""
    return [generator.get_state() for generator in _generators(device)]


def set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Sets what `random_states` returned."""
    for generator, state in zip(_generators(device), states, strict=True):
        generator.set_state(state)
