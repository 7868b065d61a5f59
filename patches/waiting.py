"""What layers that are not checkpointed keep for backward: one tensor of some of them waits in pinned host memory.

Of what a layer of a Llama keeps, two thirds are the two products that its gated MLP multiplies. One of the two is as
much as a host link takes while the layer computes; the other stays. Which layers these are is a matter of speed
(policies/checkpointing.py). In a layer that comes to be checkpointed nothing has to wait.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from . import checkpointing
from .engine import Patch
from .host_memory import HostStore

# By MLP: the store, and the layer that it is part of.
_PLACES: weakref.WeakKeyDictionary[nn.Module, tuple[HostStore, weakref.ref[Any]]] = weakref.WeakKeyDictionary()


def saved_by(mlp: nn.Module, product: torch.Tensor) -> AbstractContextManager[Any]:
    """What to compute in, for this one of the products to wait in host memory if it is to be kept."""
    place = _PLACES.get(mlp)
    if place is None or torch.compiler.is_compiling():
        return nullcontext()
    store, layer = place[0], place[1]()
    if layer is None or layer.gradient_checkpointing or not checkpointing.may_leave(product):
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(*checkpointing.to_store(store, product))


class Waits(Patch):
    """Gives MLPs a store.

    Args:
        mlps: with the layers that they are part of.
    """

    id = "offload:products"

    def __init__(self, mlps: list[tuple[nn.Module, nn.Module]], budget: int):
        # Held by the MLPs alone: pinned memory goes when the model goes.
        self._mlps = [(weakref.ref(mlp), weakref.ref(layer)) for mlp, layer in mlps]
        self._budget = budget

    def apply(self) -> None:
        store = HostStore(lambda device: checkpointing.COPIES[device.type](device), self._budget, staying=1)
        for mlp, layer in self._mlps:
            module = mlp()
            if module is not None:
                _PLACES[module] = store, layer

    def revert(self) -> bool:
        found = [_PLACES.pop(module, None) for mlp, _ in self._mlps if (module := mlp()) is not None]
        for store in {place[0] for place in found if place is not None}:
            store.trim()
        return True


def waits(mlp: nn.Module) -> bool:
    return mlp in _PLACES


def end_training(model: nn.Module) -> None:
    """Frees the host memory; the next training takes it again."""
    for store in {_PLACES[module][0] for module in model.modules() if module in _PLACES}:
        store.trim()
