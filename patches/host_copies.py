"""Batches are sent, and what is in them is read on the host, without waiting for the device.

DataLoaders make batches on the CPU, and accelerate sends them. Whoever asks for lengths or labels of what was sent
waits for the device, which has the last step to finish, and then has nothing to do until the host is back. So of the
small tensors that are asked for, copies are taken as they are sent; not the tensors themselves, which a collator may
fill anew. A tensor that was written to since is read from the device.

Accelerate itself waits until a batch has arrived, behind all that the device has to do, unless it is told not to
(`non_blocking`). Where a batch is in pinned tensors of its own, nobody needs to.

All this of batches from DataLoaders that are known (prefetch.py): others may send tensors that are filled later, as
accelerate's does that hands out the batches of one process to others.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from . import prefetch
from .engine import ProcessPatch, is_live

_NAMES = ("attention_mask", "position_ids", "labels")
_MOST_BYTES = 2**24


class _Copy(NamedTuple):
    """Of the values of a tensor that was sent, at this version of it."""

    sent: weakref.ref[torch.Tensor]
    version: int
    values: torch.Tensor


_COPIES: dict[int, _Copy] = {}  # by the id of what was sent, as long as it lives


def known(tensor: torch.Tensor) -> torch.Tensor | None:
    """The values of a tensor on the CPU, where they are known."""
    copy = _COPIES.get(id(tensor))
    if copy is None or copy.sent() is not tensor or copy.version != tensor._version:
        return None
    return copy.values


def of(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor on the CPU; waits for the device where they are not known."""
    values = known(tensor)
    return tensor.cpu() if values is None else values


def _tensors(batch: Any) -> dict[str, torch.Tensor]:
    """Those that are asked for."""
    found = {name: batch.get(name) for name in _NAMES} if isinstance(batch, Mapping) else {}
    return {name: each for name, each in found.items() if type(each) is torch.Tensor}


def _note(made: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> None:
    for name in made.keys() & sent.keys():
        one, other = made[name], sent[name]
        if one is other:
            continue
        if one.device.type == "cpu" and one.shape == other.shape and one.nbytes <= _MOST_BYTES:
            if other.is_inference():  # whether it is written to is not known
                continue
            _COPIES[id(other)] = _Copy(_reference(other), other._version, one.detach().clone())


def _is_pinned(batch: Any) -> bool:
    """Whether nobody needs to keep a batch until it is sent: torch looks after pinned memory that is let go of."""
    return isinstance(batch, Mapping) and all(
        not isinstance(each, torch.Tensor) or each.is_pinned() for each in batch.values()
    )


def _reference(sent: torch.Tensor) -> weakref.ref[torch.Tensor]:
    key = id(sent)
    return weakref.ref(sent, lambda _: _COPIES.pop(key, None))


def _make_send(stock: Callable[..., Any]) -> Callable[..., Any]:
    def send_to_device(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        training = prefetch.watching()
        if training is None or not training.knows_batches or not is_live():
            return stock(tensor, *args, **kwargs)
        if kwargs.get("non_blocking") is False and _is_pinned(tensor):
            kwargs["non_blocking"] = True
        made = _tensors(tensor)  # before some batches, which send what they hold
        sent = stock(tensor, *args, **kwargs)
        _note(made, _tensors(sent))
        return sent

    return send_to_device


@functools.cache
def patch() -> ProcessPatch:
    """Of what accelerate's DataLoaders send batches with."""
    from accelerate import data_loader

    stock = data_loader.send_to_device
    return ProcessPatch("host:batches", data_loader, "send_to_device", _make_send(stock))
