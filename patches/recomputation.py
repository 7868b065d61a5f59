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
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.utils.checkpoint
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError, checkpoint

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]

_AUTOCAST_DEVICES = ("cpu", "cuda")
_ADVICE = "Switch hf_turbo's checkpointing off (checkpointing=False) and torch's debug mode on to see the operators"


def is_plain(stock: Any, device: torch.device) -> bool:
    """Whether a call of `stock`, made now for tensors of `device`, is torch's checkpoint without reentrant autograd and
    nothing else: no contexts, no debugging, nobody who watches the operators.
    """
    keywords = getattr(stock, "keywords", {})
    return (
        getattr(stock, "func", None) is checkpoint
        and keywords.get("use_reentrant") is False
        and not getattr(stock, "args", ())
        and keywords.keys() <= {"use_reentrant", "preserve_rng_state"}
        and torch.utils.checkpoint._checkpoint_debug_enabled is None
        and torch.utils.checkpoint._enable_checkpoint_early_stop is None
        and device.type in _AUTOCAST_DEVICES
        and torch.is_grad_enabled()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def recompute_in_backward(
    stock: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    device: torch.device,
    hooks: Hooks | None = None,
) -> Any:
    """`stock(function, *args)`, where `is_plain(stock, device)`.

    Args:
        device: the one whose random numbers `function` may draw, beside the CPU's.
        hooks: to pack and unpack the tensors among `args` with; default: those that are in force.
    """
    region = _Region(function, args, device, stock.keywords.get("preserve_rng_state", True), hooks)
    with saved_tensors_hooks(region.pack, region.unpack):
        return function(*args)


class _Slot:
    """What autograd holds instead of a saved tensor; freed when the graph needs the tensor no more."""

    __slots__ = ("__weakref__", "backward", "tensor")
    tensor: torch.Tensor | None

    def __init__(self) -> None:
        self.tensor = self.backward = None


class _Argument:
    """A tensor, kept as autograd keeps what it saves."""

    __slots__ = ("_kept", "_requires_grad", "_unpack", "_version")

    def __init__(self, tensor: torch.Tensor, hooks: Hooks | None):
        self._requires_grad, self._version = tensor.requires_grad, tensor._version
        self._kept: Any = tensor
        self._unpack: Callable[[Any], torch.Tensor] | None = None
        if hooks is not None:
            pack, self._unpack = hooks
            self._kept = pack(tensor.detach())

    def get(self) -> torch.Tensor:
        if self._unpack is not None:
            return self._unpack(self._kept).detach().requires_grad_(self._requires_grad)
        tensor: torch.Tensor = self._kept
        if tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: an "
                f"argument of a checkpointed function, {list(tensor.shape)}, is at version {tensor._version}; expected "
                f"version {self._version} instead"
            )
        return tensor


class _Done(Exception):
    """Ends a recomputation behind the last tensor that forward saved."""


class _Region:
    """One call of a checkpointed function."""

    __slots__ = ("_args", "_autocast", "_device", "_function", "_like", "_random", "_slots")

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        device: torch.device,
        preserve_random_state: bool,
        hooks: Hooks | None,
    ):
        self._function, self._device = function, device
        # Weakly: a tensor whose node is done, or that no gradient needs, is not kept when recomputed.
        self._slots: list[weakref.ref[_Slot]] = []
        self._like: list[Any] = []
        self._autocast = _autocast_states()
        self._random = _random_states(device) if preserve_random_state else None
        hooks = hooks or torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._args = [_Argument(arg, hooks) if isinstance(arg, torch.Tensor) else arg for arg in args]

    def pack(self, tensor: torch.Tensor) -> _Slot:
        slot = _Slot()
        self._slots.append(weakref.ref(slot))
        self._like.append((tensor.shape, tensor.dtype, tensor.device))
        return slot

    def unpack(self, slot: _Slot) -> torch.Tensor:
        # A group of backward passes that share a recomputation, this pass, or none: then each look is one of its own.
        backward: Any = torch._C._get_graph_exec_group() or torch._C._current_graph_task_id()
        if backward == -1 or slot.tensor is None or slot.backward != backward:
            self._fill_slots(backward)
        tensor = slot.tensor
        if tensor is None:
            raise CheckpointError(f"torch.utils.checkpoint: recomputation did not reach a saved tensor. {_ADVICE}")
        slot.tensor = None
        return tensor

    def _fill_slots(self, backward: Any) -> None:
        slots, like = self._slots, self._like
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            if tensor.requires_grad:
                tensor = tensor.detach()
            found, slot = (tensor.shape, tensor.dtype, tensor.device), slots[count]()
            if slot is not None:
                if found != like[count]:
                    raise CheckpointError(
                        "torch.utils.checkpoint: Recomputed values for the following tensors have different metadata "
                        f"than during the forward pass: tensor {count} was {like[count]} and is {found}. {_ADVICE}"
                    )
                slot.tensor, slot.backward = tensor, backward
            count += 1
            if count == len(slots):
                raise _Done
            return tensor

        args = [arg.get() if isinstance(arg, _Argument) else arg for arg in self._args]
        random = None if self._random is None else _random_states(self._device)
        try:
            with ExitStack() as stack:
                for state, now in zip(self._autocast, _autocast_states(), strict=True):
                    if state != now:
                        stack.enter_context(torch.autocast(*state))
                stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
                stack.enter_context(torch.enable_grad())
                if self._random is not None:
                    _set_random_states(self._random, self._device)
                _run(self._function, args)
        except _Done:
            return
        finally:
            if random is not None:
                _set_random_states(random, self._device)
        raise CheckpointError(
            "torch.utils.checkpoint: A different number of tensors was saved during the original forward and "
            f"recomputation: {len(slots)} and {count}. {_ADVICE}"
        )


@torch._disable_dynamo
def _run(function: Callable[..., Any], args: list[Any]) -> None:
    """Compiled autograd must not trace a recomputation: it would save other tensors."""
    function(*args)


def _autocast_states() -> list[tuple[str, torch.dtype, bool, bool]]:
    """Arguments of `torch.autocast`, by device."""
    cached = torch.is_autocast_cache_enabled()
    return [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cached)
        for device in _AUTOCAST_DEVICES
    ]


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    return generators


def _random_states(device: torch.device) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators(device)]


def _set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    for generator, state in zip(_generators(device), states, strict=True):
        generator.set_state(state)
