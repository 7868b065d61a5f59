"""What is in a batch, read on the host without waiting for the device.

DataLoaders make batches on the CPU, and accelerate sends them. Whoever asks for lengths or labels of what was sent
waits for the device, which has the last step to finish, and then has nothing to do until the host is back. So of the
small tensors that are asked for, copies are taken as they are sent; not the tensors themselves, which a collator may
fill anew. A tensor that was written to since is read from the device.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

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


def _note(made: Any, sent: Any) -> None:
    if not (isinstance(made, Mapping) and isinstance(sent, Mapping)):
        return
    for name in _NAMES:
        one, other = made.get(name), sent.get(name)
        if type(one) is not torch.Tensor or type(other) is not torch.Tensor or one is other:
            continue
        if one.device.type == "cpu" and one.shape == other.shape and one.nbytes <= _MOST_BYTES:
            if other.is_inference():  # whether it is written to is not known
                continue
            _COPIES[id(other)] = _Copy(_reference(other), other._version, one.detach().clone())


def _reference(sent: torch.Tensor) -> weakref.ref[torch.Tensor]:
    key = id(sent)
    return weakref.ref(sent, lambda _: _COPIES.pop(key, None))


def _make_send(stock: Callable[..., Any]) -> Callable[..., Any]:
    def send_to_device(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent = stock(tensor, *args, **kwargs)
        if is_live():
            _note(tensor, sent)
        return sent

    return send_to_device


@functools.cache
def patch() -> ProcessPatch:
    """Of what accelerate's DataLoaders send batches with."""
    from accelerate import data_loader

    stock = data_loader.send_to_device
    return ProcessPatch("host:batches", data_loader, "send_to_device", _make_send(stock))
