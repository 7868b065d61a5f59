"""Norms of queries and keys that wait for the rotary embedding behind them, which does both in one pass.

In attention layers known by their fingerprints nobody but `apply_rotary_pos_emb` reads what `q_norm` and `k_norm` put
out. Called there, a norm hands on its input as it is, and notes that it waits. The function that stands for
`apply_rotary_pos_emb` (rope.py) takes what waits; if it cannot do both in one pass, it norms first.

What is asked at every call: that the function is still ours, and that the norm has no hooks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels.add_rms_norm import Norm
from torch import nn

from .engine import Patch, forward_of, is_plain, stock_class
from .fingerprint import fingerprint

ROTATION = "apply_rotary_pos_emb"
_NORMS = ("q_norm", "k_norm")
# Forwards of attention layers, of transformers 5.17 to 5.23.
_ATTENTIONS = {
    "b010047c8436",  # Qwen 3, Qwen3-MoE
    "41778ecc9b97",  # Gemma 3
}


class Waiting(NamedTuple):
    """What has not been normed yet: x, by the weight of a module."""

    x: torch.Tensor
    weight: torch.Tensor
    norm: Norm


class _Here(threading.local):
    """Of each thread: layers are recomputed in others."""

    def __init__(self) -> None:
        self.waiting: dict[str, Waiting] = {}


_HERE = _Here()
# Norms that may wait: their names, and where the function behind them is looked up.
_PARTS: weakref.WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any]]] = weakref.WeakKeyDictionary()


def wait(module: nn.Module, x: torch.Tensor, understood: Callable[[Any], Norm | None]) -> bool:
    """Whether the norm of x is left to the rotary embedding."""
    part = _PARTS.get(module)
    if part is None or x.ndim != 4 or torch.compiler.is_compiling():
        return False
    name, namespace = part
    norm, weight = understood(module), module._parameters.get("weight")
    if norm is None or weight is None or not is_plain(x, weight) or not _is_ours(namespace.get(ROTATION)):
        return False
    _HERE.waiting[name] = Waiting(x, weight, norm)
    return True


def take(q: Any, k: Any) -> tuple[Waiting | None, Waiting | None]:
    """What waits of queries and keys. What is left of a layer that failed in between is dropped."""
    waiting, _HERE.waiting = _HERE.waiting, {}
    if not waiting:
        return None, None
    return _of(waiting.get("q_norm"), q), _of(waiting.get("k_norm"), k)


def _of(waiting: Waiting | None, view: Any) -> Waiting | None:
    """If a tensor is what waits, or its transpose."""
    if waiting is None or not isinstance(view, torch.Tensor):
        return None
    return waiting if view.data_ptr() == waiting.x.data_ptr() and view.numel() == waiting.x.numel() else None


def _is_ours(function: Any) -> bool:
    return getattr(function, "_hf_turbo", False)


class _QKNormPatch(Patch):
    """Lets a norm wait."""

    def __init__(self, id: str, norm: nn.Module, name: str, namespace: dict[str, Any]):
        self.id, self._norm, self._part = id, weakref.ref(norm), (name, namespace)

    def apply(self) -> None:
        norm = self._norm()
        if norm is not None:
            _PARTS[norm] = self._part

    def revert(self) -> bool:
        norm = self._norm()
        if norm is not None:
            _PARTS.pop(norm, None)
        return True


def patches_of(model: nn.Module, understood: Callable[[Any], Norm | None]) -> list[Patch]:
    """For the norms of queries and keys whose layers are known."""
    found: list[Patch] = []
    for name, module in model.named_modules():
        norms = [module._modules.get(each) for each in _NORMS]
        if any(each is None for each in norms):
            continue
        forward = forward_of(stock_class(module))
        if fingerprint(forward) not in _ATTENTIONS or "forward" in module.__dict__:
            continue
        for each, norm in zip(_NORMS, norms, strict=True):
            if norm is not None and norm not in _PARTS and understood(norm) is not None:
                found.append(_QKNormPatch(f"rope:{name}.{each}", norm, each, forward.__globals__))
    return found
