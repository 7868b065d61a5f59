"""The batches of the next step, fetched while the device computes this one.

Without worker processes a DataLoader reads, collates and pins a batch when it is asked for it: when a step is over, its
loss has been waited for, and the device has nothing to do. Here that work is done as soon as the optimizer's step has
been launched. The same batches in the same order; what asks for them, and what it notes of having done so (the end of
an epoch, the remainder of a last batch), is as before.

Left as they are: iterable datasets, which have a state, samplers, datasets and collators that are not known to go by
the index alone (a callback may steer them), and all that draw random numbers, since theirs would come before those that
the rest of the step draws.
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data.dataloader import _DatasetKind, _SingleProcessDataLoaderIter

from .engine import ProcessPatch
from .random_numbers import RandomStates

_NEXT = "_next_data"
_CPU = torch.device("cpu")
# Fetched as in stock before any is fetched early: whether they draw random numbers is to be seen.
_WATCHED = 2

_DATASETS = {"datasets.arrow_dataset", "torch.utils.data.dataset"}
_SAMPLERS = {"torch", "transformers", "accelerate", "datasets", "trl"}


class _Here(threading.local):
    """Of each thread, as others of the script's may go through DataLoaders of their own in the meantime."""

    watching: Prefetch | None = None


_HERE = _Here()


class Prefetch:
    """Of one training.

    Attributes:
        fetched: batches in all. early: those fetched while the device computed.
        against: why no batch is fetched early, or None.
    """

    def __init__(self, trainer: Any):
        self.fetched = self.early = 0
        self.against: str | None = None
        self._trainer = trainer
        self._iterator: weakref.ref[Any] | None = None
        self._of_iterator = self._watched = 0

    @property
    def knows_batches(self) -> bool:
        """Whether what fetches them is known, and makes new tensors for each."""
        return self.against is None and self._watched >= _WATCHED

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the fetching of a step's batches: what is asked for them."""
        _HERE.watching, outer = self, _HERE.watching
        try:
            yield
        finally:
            _HERE.watching = outer

    def observe(self, iterator: Any, fetch: Callable[[Any], Any]) -> Any:
        """What `fetch` returns, having seen whether that draws random numbers."""
        self.fetched += 1
        if self._iterator is None or self._iterator() is not iterator:
            self._iterator, self._of_iterator = weakref.ref(iterator), 0
            self.against = self.against or _conflict(iterator)
        self._of_iterator += 1
        # The first of an epoch has the sampler draw the order of all.
        if self.against is not None or self._of_iterator == 1 or self._watched >= _WATCHED:
            return fetch(iterator)
        before = RandomStates(_CPU)
        batch = fetch(iterator)
        self._watched += 1
        if before != RandomStates(_CPU):
            self.against = "fetching them draws random numbers"
        return batch

    def fetch(self) -> None:
        """Fetches the batches of the next step, after the optimizer's step has been launched."""
        iterator = None if self._iterator is None else self._iterator()
        if not self.knows_batches or iterator is None or _NEXT in vars(iterator):
            return
        state = self._trainer.state
        if state.global_step + 1 >= state.max_steps:  # the present step is not counted yet
            return
        waiting: deque[Callable[[], Any]] = deque()
        for _ in range(self._trainer.args.gradient_accumulation_steps):
            before = RandomStates(_CPU)
            try:
                batch = type(iterator)._next_data(iterator)
            except Exception as error:  # the end of the epoch, or the script's own: raised when asked for
                waiting.append(_raises(error))
                break
            after = RandomStates(_CPU)
            if before != after:
                self.against = "fetching them draws random numbers"
                before.restore()
                waiting.append(_draws(batch, before, after))
                break
            self.early += 1
            waiting.append(_returns(batch))
        if waiting:
            vars(iterator)[_NEXT] = types.MethodType(_hand_out(waiting), iterator)

    def end(self) -> str | None:
        """What came of it, for the report."""
        self._iterator = None
        if self.early:
            until = f", and then no more: {self.against}" if self.against else ""
            return f"data: {self.early} of {self.fetched} batches were fetched while the device computed{until}"
        return f"data: batches are fetched between steps: {self.against}" if self.against and self.fetched else None


def watching() -> Prefetch | None:
    """That of the training whose batches this thread is fetching."""
    return _HERE.watching


def _returns(batch: Any) -> Callable[[], Any]:
    return lambda: batch


def _raises(error: Exception) -> Callable[[], Any]:
    def hand_out() -> Any:
        raise error

    return hand_out


def _draws(batch: Any, before: RandomStates, after: RandomStates) -> Callable[[], Any]:
    """A batch for which random numbers were drawn after all: as if they were drawn now, if nothing else was since."""

    def hand_out() -> Any:
        if before == RandomStates(_CPU):
            after.restore()
        return batch

    return hand_out


def _hand_out(waiting: deque[Callable[[], Any]]) -> Callable[[Any], Any]:
    """The iterator's own `_next_data` until nothing waits any more: what waits is not lost whatever is switched off."""

    def _next_data(self: Any) -> Any:
        batch = waiting.popleft()
        if not waiting:
            vars(self).pop(_NEXT, None)
        if _HERE.watching is not None:
            _HERE.watching.fetched += 1
        return batch()

    return _next_data


def _conflict(iterator: Any) -> str | None:
    """Why the batches of an iterator are fetched as in stock, or None."""
    collator = iterator._collate_fn
    if type(collator).__module__ == "transformers.trainer_utils":  # it removes columns first
        collator = getattr(collator, "data_collator", collator)
    if iterator._dataset_kind != _DatasetKind.Map:
        return "an iterable dataset"
    # Each is known before what it wraps is looked for.
    for sampler in _nested(iterator._index_sampler, "batch_sampler", "sampler"):
        if type(sampler).__module__.partition(".")[0] not in _SAMPLERS:
            return f"{type(sampler).__name__} is a sampler of the script's own"
    for dataset in _nested(iterator._dataset, "dataset", "datasets"):
        if type(dataset).__module__ not in _DATASETS:
            return f"{type(dataset).__name__} is a dataset of the script's own"
        if (getattr(dataset, "format", None) or {}).get("type") == "custom":
            return "the dataset has a transform of the script's own"
    owner = collator if isinstance(collator, types.FunctionType) else type(collator)
    if owner.__module__.partition(".")[0] not in {"transformers", "trl", "torch"}:
        return f"{owner.__name__} is a collator of the script's own"
    return None


def _nested(value: Any, *names: str) -> Iterator[Any]:
    """It, and what it wraps under one of these names: one, or for a name in the plural several."""
    yield value
    for name in names:
        inner = getattr(value, name, None)
        several = inner.values() if isinstance(inner, Mapping) else inner if name.endswith("s") else (inner,)
        for each in several or ():
            if each is not None:
                yield from _nested(each, *names)


def _make_next_data(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def _next_data(self: Any) -> Any:
        watching = _HERE.watching
        return stock(self) if watching is None else watching.observe(self, stock)

    return _next_data


@functools.cache
def patch() -> ProcessPatch:
    """Of DataLoaders without workers: which of them a training asks."""
    cls = _SingleProcessDataLoaderIter
    return ProcessPatch("host:prefetch", cls, _NEXT, _make_next_data(cls._next_data))
