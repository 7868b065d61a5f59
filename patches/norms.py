"""RMSNorm and LayerNorm modules of transformers.

Bodies (5.17 and 5.23 agree): four RMSNorm bodies cover nearly all families. They differ in where the weight is applied
with respect to the rounding to the input's dtype, which the kernel reproduces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels.add_rms_norm import Norm
from hf_turbo.kernels.layer_norm import layer_norm
from hf_turbo.kernels.rms_norm import rms_norm
from torch import nn

from . import qk_norms
from .conflicts import module_conflict
from .engine import (
    ClassSwap,
    Exactness,
    Finding,
    forward_of,
    has_hooks,
    is_live,
    is_plain,
    is_swapped,
    same_name_subclass,
    stock_class,
)
from .fingerprint import fingerprint


class _Body(NamedTuple):
    eps: str
    weight_offset: float = 0.0
    round_before_weight: bool = False
    centered: bool = False


_FORWARDS = {
    "d178c290eade": _Body("variance_epsilon", round_before_weight=True),  # Llama, Mistral, Qwen, Phi-3, Granite, GLM
    "b613287a7401": _Body("variance_epsilon"),  # OLMo 2 and 3, gpt-oss
    "37a33a877514": _Body("variance_epsilon"),  # Helium, Nemotron-H: the weight is upcast first, the same product
    "86b8d04b60d2": _Body("variance_epsilon", centered=True),  # Cohere
}
_FORWARDS_WITH_NORM_METHOD = {
    "e5c8558e81c3+77e08567db56": _Body("eps", weight_offset=1.0),  # Gemma, Gemma 2 and 3, Qwen3-Next, Qwen3.5
    "1b2ffe475ed2+e78bb48f60af": _Body("eps"),  # Gemma 3n and 4; the weight is optional
}


def _body(cls: type) -> _Body | None:
    return _body_of(forward_of(cls), getattr(cls, "_norm", None))


@cache  # by what a class has at present: a script may replace either
def _body_of(forward: Callable[..., Any], norm: Any) -> _Body | None:
    known = fingerprint(forward)
    return _FORWARDS.get(known or "") or _FORWARDS_WITH_NORM_METHOD.get(f"{known}+{fingerprint(norm)}")


@cache
def _make_forward_of(body: _Body) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
            weight = getattr(self, "weight", None)
            if not (is_live() and is_plain(hidden_states, weight) and hidden_states.is_floating_point()):
                return stock(self, hidden_states)
            if qk_norms.wait(self, hidden_states, understood):
                return hidden_states
            eps = getattr(self, body.eps)
            if body.centered:
                return layer_norm(hidden_states, weight, None, eps)
            return rms_norm(
                hidden_states,
                weight,
                eps,
                weight_offset=body.weight_offset,
                round_before_weight=body.round_before_weight,
            )

        return forward

    return make_forward


def understood(module: Any) -> Norm | None:
    """What calling an RMSNorm module computes, where that is all it does now."""
    if not isinstance(module, nn.Module) or has_hooks(module) or "_hf_hook" in module.__dict__:
        return None
    body = _body(stock_class(module))
    if body is None or body.centered or any(True for _ in module.children()):
        return None
    weight = module._parameters.get("weight")
    if getattr(module, "weight", None) is not weight or (weight is not None and weight.ndim != 1):
        return None  # the weight is a buffer, say
    return Norm(getattr(module, body.eps), body.weight_offset, body.round_before_weight)


def find(model: nn.Module) -> Finding:
    """Class swaps for every norm whose forward is understood."""
    finding = Finding("norms", "rms_norm, layer_norm", Exactness.REASSOCIATED)
    for name, module in model.named_modules():
        cls = stock_class(module)
        if type(module) is nn.LayerNorm or "Norm" not in cls.__name__ or not hasattr(cls, "forward"):
            continue
        if any(True for _ in module.children()):
            continue
        finding.found += 1
        if is_swapped(module):
            finding.patched += 1
            continue
        body = _body(cls)
        reason = module_conflict(module)
        if reason is None and body is None:
            reason = f"unknown forward of {cls.__name__}"
        if reason is None and getattr(getattr(module, "weight", None), "ndim", 1) > (
            2 if body and body.centered else 1
        ):
            reason = "weight has too many dimensions"
        if reason is not None or body is None:
            finding.refuse(reason or "")
            continue
        finding.patched += 1
        finding.patches.append(ClassSwap(f"norms:{name}", module, same_name_subclass(cls, _make_forward_of(body))))
    return finding
