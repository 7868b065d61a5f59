"""Plain linear layers that read the output of a norm: it is not kept for backward, but made again there.

What a norm of decoder_layers.py returns is an ordinary tensor; what it was made of is noted beside it. A linear layer
that trains its weight and is given such a tensor keeps what the note says, which the norm keeps anyway, and not the
tensor. Whoever else reads, copies or saves the tensor finds nothing unusual. Layers of one input (query, key and value;
gate and up) are one function together, by the groups of lora.py: kernels/linears.py.

What is asked at every call: the class of nn.Linear, no hooks, plain weights of the input's dtype or autocast. Layers
with adapters or packed weights are lora.py's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels._launch import device_kind
from hf_turbo.kernels._weights import cast_weight
from hf_turbo.kernels.add_rms_norm import dtype_of
from hf_turbo.kernels.linears import Source, linears
from torch import nn

from . import lora
from .engine import Patch, has_hooks, is_live, is_plain, stock_class


class _Note(NamedTuple):
    tensor: weakref.ref[torch.Tensor]
    source: Source
    version: int


# By the id of a tensor, as long as it lives. Not on the tensor: its attributes are saved and copied with it.
_NOTES: dict[int, _Note] = {}


def note(y: torch.Tensor, source: Source) -> None:
    """Says what `y` was made of."""
    key = id(y)
    _NOTES[key] = _Note(weakref.ref(y, lambda _: _NOTES.pop(key, None)), source, y._version)


def _source_of(y: torch.Tensor) -> Source | None:
    noted = _NOTES.get(id(y))
    return noted.source if noted is not None and noted.tensor() is y and noted.version == y._version else None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in, None where it is off."""
    kind = device_kind(device)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def is_plain_linear(module: Any) -> bool:
    """Whether calling `module` is F.linear of its parameters and nothing else."""
    return (
        isinstance(module, nn.Module)
        and stock_class(module) is nn.Linear
        and not has_hooks(module)
        and {"weight", "bias"} <= module._parameters.keys()  # neither is a buffer, say
        and is_plain(module._parameters["weight"], module._parameters["bias"])
        and module._parameters["weight"] is not None
        and module._parameters["weight"].numel() > 0
    )


def compute(modules: tuple[Any, ...], y: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """The outputs of linear layers for one input, or None where they have to be called one by one."""
    if not (
        is_live()
        and torch.is_grad_enabled()
        and type(y) is torch.Tensor
        and y.is_floating_point()
        and y.numel() > 0
        and not (y.is_meta and torch._C._len_torch_dispatch_stack() == 0)  # without data, and nobody looks on
        and not torch.compiler.is_compiling()  # before the next, which it cannot see through
        and not y.is_inference()
        and all(map(is_plain_linear, modules))
    ):
        return None
    parameters: list[Any] = [
        (module._parameters["weight"], module._parameters["bias"])
        for module in modules
        if module.in_features == y.shape[-1]
    ]
    if len(parameters) < len(modules):
        return None
    source, flat = _source_of(y), [each for pair in parameters for each in pair if each is not None]
    # Of one layer whose input is not made again, or of no gradient at all, there is nothing to gain.
    if (source is None and len(modules) == 1) or not (y.requires_grad or any(each.requires_grad for each in flat)):
        return None
    low = autocast_dtype(y.device)
    dtype = y.dtype if low is None else low
    if any(each.device != y.device or each.dtype != ((low and each.dtype) or dtype) for each in flat) or (
        low is not None and torch.float64 in {y.dtype, *(each.dtype for each in flat)}
    ):
        return None
    weights = [cast_weight(weight, dtype) for weight, _ in parameters]
    biases = [None if bias is None else bias.to(dtype) for _, bias in parameters]
    wide = low is not None and _dtype_in_stock(y, source) != dtype
    return linears(y if y.dtype == dtype else y.to(dtype), weights, biases, source, wide)


def _dtype_in_stock(y: torch.Tensor, source: Source | None) -> torch.dtype:
    """Of y as stock has it, in which autograd adds the gradients that y gets from several layers. A norm that only
    linear layers read gives them what autocast would make of it (decoder_layers.py)."""
    if source is None:
        return y.dtype
    return dtype_of(source.h.dtype, source.weight, source.norm.round_before_weight)


def of_mlp(mlp: nn.Module, modules: tuple[Any, ...], y: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """`compute` for the projections of an MLP that a decoder layer has marked."""
    return compute(modules, y) if mlp in _MLPS else None


_MLPS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class MarkPatch(Patch):
    """Lets the MLP of a decoder layer compute the projections of its input together."""

    def __init__(self, id: str, mlp: nn.Module):
        self.id, self._mlp = id, weakref.ref(mlp)

    def apply(self) -> None:
        mlp = self._mlp()
        if mlp is not None:
            _MLPS.add(mlp)

    def revert(self) -> bool:
        mlp = self._mlp()
        if mlp is not None:
            _MLPS.discard(mlp)
        return True


def make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a member of a group, or of a layer alone."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if is_live() and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            group = lora.group_of(self)
            outputs = compute((self,), input) if group is None else group.compute(self, input)
            if outputs is not None:
                return outputs[0]
        result: torch.Tensor = stock(self, input)
        return result

    return forward
