"""A step that one of several processes does again under DistributedDataParallel, while the others wait for it.

Nobody has to agree on that. What the others see of a process are the collectives that it takes part in, each once, in
one order, whenever it comes to them: a process that does its step again is a slow one. So what was made before memory
ran out must not be made again, and what was not made yet has to follow:

* Buffers are broadcast at the beginning of the step, before its first forward instead of in it.
* Collectives of the loss are written down (collectives.py).
* Gradients are averaged bucket by bucket, within the backward of the last micro-batch. Where that fails, the buckets
  that have left hold what this process had to give; the others may wait for the next one. The step is done again
  without telling DDP of gradients; then it is told of those that it had not been told of, and goes on.

Nothing of a step that goes well is different.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .collectives import Tape
from .engine import ClassSwap, same_name_subclass

# What is asked of torch beside its documented interface. Where one is gone, no step is done again.
_ASKED = {
    DistributedDataParallel: ("_build_params_for_reducer", "_check_sync_bufs_pre_fwd", "_sync_buffers"),
    torch.distributed.Reducer: ("_autograd_hook", "_check_reducer_finalized", "_remove_autograd_hooks"),
}
_IS_KNOWN = all(hasattr(owner, name) for owner, names in _ASKED.items() for name in names)
# Nodes of autograd that bear hooks of ours for good, by model.
_NODES: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


class Replica:
    """This process's part of a training under DDP.

    Attributes:
        tape: the collectives of the present step.
    """

    def __init__(self, model: Any):
        """`model`: as the training step is called with it."""
        self.model, self.tape = model, Tape()
        self._against = _conflict(model)
        self._is_counting = False  # DDP counts gradients of this step: a forward with gradients has told it to
        self._is_awaited = False  # it did in a step that is done again, and some may have left
        self._is_muted = False
        self._told = set[int]()  # of which parameters DDP was told, as far as known
        self._watches: list[Any] = []
        self._has_own_hooks = False
        self._forwards: RemovableHandle | None = None
        if self._against is None:
            self._parameters = model._build_params_for_reducer()[0]
            self._forwards = model.register_forward_hook(self._make_forward_hook())
            # While DDP notes in which order gradients come, in its first step, it must not be told of any twice.
            if not (model.find_unused_parameters or model._has_rebuilt_buckets):
                self._nodes = self._hook(self._watch)

    def begin_step(self) -> None:
        """Before the first micro-batch of a step."""
        self.tape.begin()
        self._told.clear()
        self._is_counting = self._is_awaited = False
        if self._against is not None:
            return
        model = self.model
        if model._has_rebuilt_buckets and not self._has_own_hooks:
            self.close()
        if model._check_sync_bufs_pre_fwd():
            model._sync_buffers()
        # From here to the end of the last forward, where DDP sets it; or clears it, behind one without gradients.
        model.require_forward_param_sync = False

    def go_on(self) -> None:
        """Before each of the others."""
        if self._is_counting:
            self.tape.against = "gradients are averaged more than once a step"

    def end(self) -> None:
        """The training is over. Hooks that stand in for DDP's own stay."""
        self.close()
        if self._forwards is not None:
            self._forwards.remove()

    def close(self) -> None:
        """Ends what is only watched of gradients."""
        if not self._has_own_hooks:
            while self._watches:
                self._watches.pop().remove()

    # ------------------------------------------------------------------------------------------------------- a retry

    def fails(self, codes: list[Any]) -> None:
        """Looks at the code of the frames that memory ran out in, the innermost one last."""
        if codes[-1:] == [DistributedDataParallel._pre_forward.__code__]:
            self._against = self._against or "DDP was making its buckets"

    def conflict(self) -> str | None:
        """Why this process cannot do the step again without the others, or None."""
        return self._against or self.tape.against

    def take_back(self) -> None:
        """The step is about to be done again."""
        self.tape.rewind()
        self.model.require_forward_param_sync = False
        if self._is_counting:
            self._is_awaited = True
            if not self._has_own_hooks:  # DDP's own cannot be told to wait
                self.close()
                self.model.reducer._remove_autograd_hooks()
                self._has_own_hooks = True
                _NODES[self.model] = self._hook(self._tell)

    def again(self, is_last: bool) -> AbstractContextManager[None]:
        """Around each micro-batch of the step that is done again: with DDP only if it does not know of it."""
        return nullcontext() if is_last and not self._is_awaited else self._alone()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        base: Any = type(self.model)
        swap = ClassSwap("ddp:alone", self.model, same_name_subclass(base, _make_forward))
        swap.apply()
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False
            swap.revert()

    def settle(self) -> None:
        """After the last of them: what the others still wait for.

        Raises:
            torch.OutOfMemoryError: DDP is where it cannot go on; `conflict` says so.
        """
        if not self.tape.is_over:
            raise RuntimeError(
                "hf_turbo: a step that ran out of memory was done again, and asks the other processes for less than "
                "before. Use memory='as_is' for this training"
            )
        if not self._is_awaited:
            return
        reducer, self._against = self.model.reducer, "gradients were already being exchanged between the processes"
        _Within.apply(torch.zeros((), requires_grad=True), self._tell_the_rest).backward()
        try:
            reducer._check_reducer_finalized()
        except RuntimeError as error:
            raise torch.OutOfMemoryError("CUDA out of memory. Gradients were not exchanged") from error
        self._against, self._is_awaited = None, False
        self.model.require_forward_param_sync = True

    def _tell_the_rest(self) -> None:
        reducer = self.model.reducer
        for place in reversed(range(len(self._parameters))):  # as DDP expects them
            if place not in self._told:
                try:
                    reducer._autograd_hook(place)
                except RuntimeError as error:
                    if "ready only once" not in str(error):
                        raise

    # --------------------------------------------------------------------------------------------------------- hooks

    def _hook(self, what: Callable[[int], Callable[..., None]]) -> list[Any]:
        """Hooks behind the accumulation of each gradient, where DDP has its own; the nodes that bear them."""
        nodes = [get_gradient_edge(parameter).node for parameter in self._parameters]
        self._watches.extend(node.register_hook(what(place)) for place, node in enumerate(nodes))
        return nodes

    def _make_forward_hook(self) -> Callable[..., None]:
        this = weakref.ref(self)

        def forward_hook(model: Any, *_: Any) -> None:
            replica = this()
            if replica is not None and not replica._is_muted and torch.is_grad_enabled():
                replica._is_counting |= model.require_backward_grad_sync

        return forward_hook

    def _watch(self, place: int) -> Callable[..., None]:
        this = weakref.ref(self)

        def watch(*_: Any) -> None:
            replica = this()
            if replica is not None and replica._is_counting:
                replica._told.add(place)

        return watch

    def _tell(self, place: int) -> Callable[..., None]:
        """Of DDP's kind, except while the step is done again. Stays with the model."""
        this, model = weakref.ref(self), weakref.ref(self.model)

        def tell(*_: Any) -> None:
            replica, found = this(), model()
            if found is None or (replica is not None and replica._is_muted):
                return
            if replica is not None and replica._is_counting:
                replica._told.add(place)
            found.reducer._autograd_hook(place)

        return tell


def _conflict(model: Any) -> str | None:
    """Why what this model exchanges with other processes is not known, or None."""
    if type(model) is not DistributedDataParallel:
        return f"{type(model).__name__} is not torch's DistributedDataParallel"
    if not _IS_KNOWN:
        return "this version of torch's DistributedDataParallel is not known"
    settings = {
        "static_graph": "static_graph is on: DDP knows of one backward a step",
        "mixed_precision": "DDP casts weights by itself",
        "gradient_as_bucket_view": "gradient_as_bucket_view is on: gradients have left as they come",
        "_use_python_reducer": "compiled autograd averages the gradients",
        "_delay_all_reduce_all_params": "gradients are averaged with a delay",
        "buffer_hook": "a hook exchanges the buffers",
    }
    for name, reason in settings.items():
        if getattr(model, name, None):
            return reason
    if model._join_config.enable:
        return "DDP's join is on"
    if any(hasattr(each, "_in_backward_optimizers") for each in model.parameters()):
        return "an optimizer steps at every backward"
    return None


def _make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)

    return forward


class _Within(torch.autograd.Function):
    """Calls something within a backward: DDP ends its work when one ends."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.call()
        return dy, None
