"""Plain linear layers with float32 weights that are trained under autocast.

Each has its input and its weight cast by autocast. Here layers that are called one after the other with the same input
(query, key and value; gate and up) share one copy of it, and weights are looked for among the copies that a step keeps
(shadows.py). What comes already in 16 bits is not cast.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hf_turbo.kernels._launch import device_kind
from hf_turbo.kernels._weights import compute_weight, is_offered
from hf_turbo.kernels.autocast_linear import autocast_linear
from torch import nn

from . import lora
from .conflicts import module_conflict
from .engine import ClassSwap, Exactness, Finding, is_live, is_plain, is_swapped, same_name_subclass, stock_class
from .trainer import gathers_weights, step_conflict, watches_substeps

_LOW = (torch.bfloat16, torch.float16)


class _Copies:
    """The copy of the last input. Gone with the input, so that it outlives no use."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None

    def of(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x in `dtype`."""
        if x.dtype == dtype:
            return x.detach()
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version and last[2].dtype == dtype:
            return last[2]
        low = x.detach().to(dtype)
        self._last = weakref.ref(x, self._forget), x._version, low
        return low

    def _forget(self, reference: weakref.ref[torch.Tensor]) -> None:
        last = self._last
        if last is not None and last[0] is reference:
            self._last = None


_COPIES = _Copies()


def _dtype(module: Any, x: torch.Tensor) -> torch.dtype | None:
    """What autocast computes this call in, None where it is stock's: outside the steps of a trainer, too."""
    if not (is_live() and is_offered() and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return None
    weight, bias = module._parameters.get("weight"), module.bias  # which may be a buffer
    kind = device_kind(x.device)
    if (
        weight is None
        or not torch.is_autocast_enabled(kind)
        or not is_plain(x, weight, bias)
        or weight.dtype != torch.float32
        or not x.is_floating_point()
        or torch.float64 in (x.dtype, None if bias is None else bias.dtype)
        or weight.device != x.device
        or x.shape[-1:] != weight.shape[1:]
        or x.numel() == 0
        or x.is_inference()
    ):
        return None
    dtype = torch.get_autocast_dtype(kind)
    return dtype if dtype in _LOW else None


def _make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        dtype = _dtype(self, input)
        if dtype is None:
            return stock(self, input)
        weight = self._parameters["weight"]
        with torch.no_grad():
            low, low_weight = _COPIES.of(input, dtype), compute_weight(weight, dtype)
        return autocast_linear(input, weight, self.bias, low, low_weight)

    return forward


def _linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Those with float32 weights, but for those of adapters (lora.py) and the head (head.py, trl.py)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = {part for module in model.modules() if lora.is_adapter(module) for part in module.modules()}
    for name, module in model.named_modules():
        if stock_class(module) is not nn.Linear or module is head or module in inside:
            continue
        if isinstance(module.weight, nn.Parameter) and module.weight.dtype == torch.float32:
            yield name, module


def concerns(model: nn.Module, trainer: Any) -> bool:
    """Whether a trainer computes in 16 bits what float32 weights are part of."""
    return trainer.accelerator.mixed_precision in ("bf16", "fp16") and any(True for _ in _linears(model))


def conflict(trainer: Any) -> str | None:
    """Why it is not known when the weights of this training change, or None."""
    if trainer is None:
        return "no Trainer"
    kind = gathers_weights(trainer)
    if kind is not None:
        return f"{kind} gathers weights at every pass"
    if getattr(trainer.args, "torch_compile", False):
        return "torch_compile is on"
    if trainer.accelerator.mixed_precision not in ("bf16", "fp16"):
        return "no autocast"
    return step_conflict(trainer) or watches_substeps(trainer)


def find(model: Any) -> Finding:
    """Class swaps for linear layers with float32 weights."""
    finding = Finding("autocast", "autocast_linear", Exactness.REASSOCIATED)
    for name, module in _linears(model):
        finding.found += 1
        if is_swapped(module):
            finding.patched += 1
            continue
        reason = module_conflict(module)
        if reason is not None:
            finding.refuse(reason)
            continue
        finding.patched += 1
        finding.patches.append(ClassSwap(f"autocast:{name}", module, same_name_subclass(nn.Linear, _make_forward)))
    return finding
