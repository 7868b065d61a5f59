"""What a process asked the others for within a step, written down: a step that is done again does not ask twice.

Losses gather metrics, and some generate together. Each process makes these calls as often, in one order; one that makes
them again would take the others' next ones for its own. So their results are kept for the length of a step (they are a
few numbers), and handed out where the same calls are made again; calls beyond these go to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import distributed

from .engine import AttributePatch, Patch, look_like

# Functions of torch.distributed, and the argument (the first) that they leave a result in.
_RESULTS = {
    "all_gather": "tensor_list",
    "all_gather_into_tensor": "output_tensor",
    "all_gather_object": "object_list",
    "all_reduce": "tensor",
    "barrier": None,
    "broadcast": "tensor",
    "broadcast_object_list": "object_list",
}
# Those whose results are not put down here: after one of them the step is not done again.
_OTHERS = (
    "_broadcast_coalesced",
    "all_gather_coalesced",
    "all_gather_single",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "batch_isend_irecv",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
)
# DDP's own, of buffers: the step's first is made before it (ddp.py).
_AGAINST = {"_broadcast_coalesced": "the wrapped model is called more than once a step, and DDP sends buffers again"}


class _Entry(NamedTuple):
    name: str
    result: Any


class Tape:
    """The calls of one process's present step.

    Attributes:
        against: why they cannot be handed out again, or None.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self._entries: list[_Entry] = []
        self._at = 0
        self.against: str | None = None

    def rewind(self) -> None:
        """The step is done again: its first call is the next."""
        self._at = 0

    @property
    def is_over(self) -> bool:
        """Whether all that was written down has been handed out."""
        return self._at == len(self._entries)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around what belongs to the step."""
        global _RUNNING
        outer, _RUNNING = _RUNNING, self
        try:
            yield
        finally:
            _RUNNING = outer

    def call(self, name: str, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A collective, or what it left when it was made first."""
        if name not in _RESULTS or kwargs.get("async_op") or any(each is True for each in args):
            self.against = _AGAINST.get(name, f"a torch.distributed call is made that is not understood ({name})")
            return stock(*args, **kwargs)
        argument = _RESULTS[name]
        given = None if argument is None else args[0] if args else kwargs[argument]
        if self._at < len(self._entries):
            return self._hand_out(name, given)
        # Made before the call, as there may be no room: then it has not been made.
        kept = _room_for(given)
        try:
            returned = stock(*args, **kwargs)
        except torch.OutOfMemoryError:
            self.against = f"memory ran out within {name}, which other processes take part in"
            raise
        self._entries.append(_Entry(name, _copy(given, kept)))
        self._at += 1
        return returned

    def _hand_out(self, name: str, given: Any) -> None:
        entry = self._entries[self._at]
        self._at += 1
        if entry.name != name or not _is_like(entry.result, given):
            raise RuntimeError(
                f"hf_turbo: a step that ran out of memory was done again, and asks the other processes for something "
                f"else than before ({name}, and not {entry.name}). Use memory='as_is' for this training"
            )
        _copy(entry.result, given)


_RUNNING: Tape | None = None


def _room_for(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value)
    return None if value is None else [_room_for(each) if isinstance(each, torch.Tensor) else each for each in value]


@torch.no_grad()
def _copy(source: Any, target: Any) -> Any:
    """Copies a tensor or a list into another, and returns that."""
    if isinstance(source, torch.Tensor):
        target.copy_(source)
    elif source is not None:
        for place, each in enumerate(source):
            if isinstance(each, torch.Tensor) and isinstance(target[place], torch.Tensor):
                target[place].copy_(each)
            else:
                target[place] = each
    return target


def _is_like(kept: Any, given: Any) -> bool:
    if isinstance(kept, torch.Tensor):
        return isinstance(given, torch.Tensor) and (kept.shape, kept.dtype) == (given.shape, given.dtype)
    if isinstance(kept, list):
        return isinstance(given, list) and len(kept) == len(given)
    return kept is None and given is None


def patches() -> list[Patch]:
    """Patches of torch.distributed, which do nothing while no tape runs. Reducers do not go through these functions."""
    return [_patch(name) for name in (*_RESULTS, *_OTHERS) if callable(getattr(distributed, name, None))]


def _patch(name: str) -> Patch:
    stock = getattr(distributed, name)

    def collective(*args: Any, **kwargs: Any) -> Any:
        tape = _RUNNING
        return stock(*args, **kwargs) if tape is None else tape.call(name, stock, args, kwargs)

    if not name.startswith("_"):  # that one is not Python, and has no signature
        look_like(collective, stock)
    return AttributePatch(f"collectives:{name}", distributed, name, collective)
