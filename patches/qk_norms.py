"""Norms of queries and keys that wait for the rotary embedding behind them, which does both in one pass.

In attention layers known by their fingerprints nobody but `apply_rotary_pos_emb` reads what `q_norm` and `k_norm` put
out. Called within the forward of such a layer, a norm hands on its input as it is, and notes that it waits. The
function that stands for `apply_rotary_pos_emb` (rope.py) takes what waits; if it cannot do both in one pass, it norms
first. What waits does so until the layer's forward ends: a norm that was then left out is an error.

What is asked at every call: that the layer's forward and the function are those that are known, and that the norm has
no hooks.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels.add_rms_norm import Norm
from torch import nn

from .conflicts import module_conflict
from .engine import ClassSwap, Patch, forward_of, has_forward, is_live, is_plain, same_name_subclass, stock_class
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
    """Of each thread, as layers are recomputed in others: the layer whose forward runs, and what waits in it."""

    attention: nn.Module | None = None
    waiting: dict[str, Waiting] = {}  # noqa: RUF012  (never written outside of a layer)


_HERE = _Here()
# What stands for the rotary embedding, and takes what waits.
ROTATIONS: weakref.WeakSet[Any] = weakref.WeakSet()


def wait(module: nn.Module, x: torch.Tensor, understood: Callable[[Any], Norm | None]) -> bool:
    """Whether the norm of x is left to the rotary embedding."""
    attention = _HERE.attention
    if attention is None or x.ndim != 4:
        return False
    name = next((each for each in _NORMS if attention._modules.get(each) is module), None)
    norm, weight = understood(module), module._parameters.get("weight")
    if name is None or name in _HERE.waiting or norm is None or weight is None or not is_plain(x, weight):
        return False
    _HERE.waiting[name] = Waiting(x, weight, norm)
    return True


def take(q: Any, k: Any) -> tuple[Waiting | None, Waiting | None]:
    """What waits of queries and keys."""
    found: list[Waiting | None] = []
    for name, view in zip(_NORMS, (q, k), strict=True):
        waiting = _HERE.waiting.get(name)
        if waiting is not None and isinstance(view, torch.Tensor) and _is_view(view, waiting.x):
            del _HERE.waiting[name]
            found.append(waiting)
        else:
            found.append(None)
    return found[0], found[1]


def _is_view(view: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a tensor is another, or its transpose."""
    return view.data_ptr() == x.data_ptr() and view.numel() == x.numel() and view.dtype == x.dtype


def _forward_below(cls: type) -> Callable[..., Any]:
    """The forward of a class, ours looked through, as it is now."""
    forwards = (vars(each) for each in cls.__mro__ if "_hf_turbo_difference" not in vars(each))
    found: Callable[..., Any] = next(each["forward"] for each in forwards if "forward" in each)
    return found


def _make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Of an attention layer in which norms may wait."""
    namespace = inspect.unwrap(stock).__globals__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Whoever has replaced either since may do something else with what the norms put out.
        current = _forward_below(type(self))
        is_known = current is stock and namespace.get(ROTATION) in ROTATIONS
        if torch.compiler.is_compiling() or not is_live() or not is_known:
            return current(self, *args, **kwargs)
        outer = _HERE.attention, _HERE.waiting
        _HERE.attention, _HERE.waiting = self, {}
        try:
            outputs = stock(self, *args, **kwargs)
            left_out = ", ".join(_HERE.waiting)
        finally:
            _HERE.attention, _HERE.waiting = outer
        if left_out:
            raise RuntimeError(
                f"hf_turbo: {left_out} of {type(self).__name__} waited for {ROTATION}, which did not take it: one of "
                "them was changed while the layer ran. Use hf_turbo.enable(rope=False)"
            )
        return outputs

    return forward


def patches_of(model: nn.Module, understood: Callable[[Any], Norm | None]) -> list[Patch]:
    """For attention layers that are known, and whose norms are."""
    found: list[Patch] = []
    for name, module in model.named_modules():
        norms = [module._modules.get(each) for each in _NORMS]
        if any(norm is None or understood(norm) is None for norm in norms) or has_forward(module, _make_forward):
            continue
        cls = stock_class(module)
        if fingerprint(forward_of(cls)) in _ATTENTIONS and module_conflict(module) is None:
            found.append(ClassSwap(f"rope:{name}", module, same_name_subclass(cls, _make_forward)))
    return found
