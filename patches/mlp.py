"""Gated MLPs of transformers: `down(act(gate(x)) * up(x))` with separate or packed gate and up projections.

The projections stay modules and are called as such, so adapters, quantized layers and hooks on them keep working. Where
`down_proj` is a plain linear layer, the product is not stored for backward but computed again there, in the pass that
computes its gradients. Where adapters or 4-bit weights are all that the projections add, lora.py computes the whole MLP
in one function. Long passes are computed by tiles of rows where tiling.py says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from hf_turbo.kernels._launch import device_kind
from hf_turbo.kernels.glu import glu, glu_linear, glu_packed, glu_packed_linear
from hf_turbo.kernels.tiled_mlp import Tile, tiled_mlp
from torch import nn

from . import checkpointing, linears, lora, tiling, waiting
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

_SPLIT = {"a862e25b581d", "d4ef735e49a4"}  # Llama, Mistral, Qwen, Gemma, OLMo, SmolLM3, Granite; Qwen2.5-VL
_PACKED = {"9f5ff4eec5b7"}  # Phi-3, GLM


def _activation(module: nn.Module | None) -> str | None:
    """The kernel's name of an activation module, None where it is not one of those it computes."""
    if module is None or has_hooks(module):
        return None
    name = type(module).__name__
    if name in {"SiLUActivation", "SiLU"}:
        return "silu"
    # These hold the function they compute; the pure-Python variants round differently.
    function = getattr(module, "act", None)
    if name == "GELUTanh":
        if not isinstance(function, functools.partial) or function.func is not nn.functional.gelu:
            return None
        return "gelu_tanh" if function.keywords == {"approximate": "tanh"} else None
    if name == "GELUActivation":
        return "gelu" if function is nn.functional.gelu else None
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return None


def _is_plain_linear(module: Any, product: torch.Tensor) -> bool:
    """Whether calling `module` is F.linear of its parameters and nothing else, in a dtype the fused op takes."""
    if stock_class(module) is not nn.Linear or has_hooks(module) or not is_plain(module.weight, module.bias):
        return False
    return module.weight.dtype == product.dtype or torch.is_autocast_enabled(device_kind(product.device))


def _usable(*tensors: torch.Tensor) -> bool:
    first = tensors[0]
    return (
        is_plain(*tensors)
        and first.is_floating_point()
        and all(t.dtype == first.dtype and t.shape == first.shape and t.device == first.device for t in tensors)
    )


def _make_split_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        activation = _activation(self.act_fn) if is_live() else None
        if activation is None:
            return stock(self, x)
        projections = self.gate_proj, self.up_proj, self.down_proj
        tile = tiling.tile_of(self, x)
        fused = lora.gated_mlp(projections, x, activation, tile)
        if fused is None and tile is not None:
            fused = _by_tiles(self, projections, x, activation, tile, stock)
        if fused is not None:
            return fused
        both = linears.of_mlp(self, (self.gate_proj, self.up_proj), x)
        gate, up = both if both is not None else (self.gate_proj(x), self.up_proj(x))
        down = self.down_proj
        if not _usable(gate, up):
            return down(self.act_fn(gate) * up)
        with waiting.saved_by(self, up):
            if torch.is_grad_enabled() and _is_plain_linear(down, gate):
                return glu_linear(gate, up, down.weight, down.bias, activation)
            return down(glu(gate, up, activation))

    return forward


def _make_packed_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        activation = _activation(self.activation_fn) if is_live() else None
        if activation is None:
            return stock(self, hidden_states)
        projections = self.gate_up_proj, self.down_proj
        tile = tiling.tile_of(self, hidden_states)
        fused = lora.gated_mlp(projections, hidden_states, activation, tile)
        if fused is None and tile is not None:
            fused = _by_tiles(self, projections, hidden_states, activation, tile, stock)
        if fused is not None:
            return fused
        packed = linears.of_mlp(self, (self.gate_up_proj,), hidden_states)
        gate_up, down = self.gate_up_proj(hidden_states) if packed is None else packed[0], self.down_proj
        if not _usable(gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return down(up * self.activation_fn(gate))
        with waiting.saved_by(self, gate_up):
            if torch.is_grad_enabled() and _is_plain_linear(down, gate_up):
                return glu_packed_linear(gate_up, down.weight, down.bias, activation)
            return down(glu_packed(gate_up, activation))

    return forward


def projections_of(module: nn.Module) -> tuple[Any, ...]:
    """The layers that alone read the input of an MLP whose forward is understood; none of another module."""
    body = fingerprint(forward_of(stock_class(module)))
    names = ("gate_proj", "up_proj") if body in _SPLIT else ("gate_up_proj",) if body in _PACKED else ()
    return tuple(module._modules.get(name) for name in names)


def _by_tiles(
    mlp: nn.Module,
    projections: tuple[Any, ...],
    x: torch.Tensor,
    activation: str,
    tile: Tile,
    stock: Callable[..., Any],
) -> torch.Tensor | None:
    """The MLP by tiles where no projection is one of lora.py's; None where it is computed at once after all."""
    if not (is_plain(x) and x.is_floating_point()) or x.is_inference():
        return None
    kind = device_kind(x.device)
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if all(_is_plain_linear(each, x) for each in projections):
        weights, biases = [each.weight for each in projections], [each.bias for each in projections]
        if torch.float64 in {each.dtype for each in (x, *weights, *biases) if each is not None} - {compute}:
            return None
        return tiled_mlp(x, weights, biases, activation, tile)
    features = getattr(projections[-1], "out_features", None)
    if features is None or not tiling.may_call(mlp, projections):
        return None
    trained = [each for each in mlp.parameters() if each.requires_grad]
    return tiling.by_calls(functools.partial(stock, mlp), x, tile.rows, features, compute, trained)


def find(model: nn.Module, tiled: tiling.Tiling | None = None) -> Finding:
    """Class swaps for every gated MLP whose forward and activation are understood.

    Args:
        tiled: which passes are computed by tiles of rows; None: none are.
    """
    layers = checkpointing.layers_of(model)
    finding = Finding("mlp", "glu", Exactness.REASSOCIATED)
    for name, module in model.named_modules():
        cls = stock_class(module)
        if "MLP" not in cls.__name__ or not hasattr(module, "down_proj"):
            continue
        finding.found += 1
        if is_swapped(module):
            finding.patched += 1
            continue
        body = fingerprint(forward_of(cls))
        reason = module_conflict(module)
        if reason is None and body not in _SPLIT | _PACKED:
            reason = f"unknown forward of {cls.__name__}"
        if reason is None:
            activation = getattr(module, "act_fn" if body in _SPLIT else "activation_fn", None)
            if _activation(activation) is None:
                reason = f"no kernel for activation {type(activation).__name__}"
        if reason is not None:
            finding.refuse(reason)
            continue
        make_forward = _make_split_forward if body in _SPLIT else _make_packed_forward
        finding.patched += 1
        finding.patches.append(ClassSwap(f"mlp:{name}", module, same_name_subclass(cls, make_forward)))
        if tiled is not None:
            parent = layers.get(name.rpartition(".")[0])
            finding.patches.append(tiling.TilePatch(f"tiles:{name}", module, parent, tiled))
    return finding


def find_offload(model: nn.Module, choose: Callable[[list[int], list[float]], list[bool]], budget: int) -> Finding:
    """Host memory for a product of some MLPs; to be asked after `find` has been applied, where nothing is checkpointed.

    Args:
        choose: given, by layer, bytes per token of that product and FLOP per token of its forward: of which it leaves.
        budget: bytes of host memory to use at most.
    """
    finding = Finding("offload", "pinned host memory, MLPs", Exactness.EXACT)
    places, sizes, flops = [], [], []
    for layer in checkpointing.layers_of(model).values():
        finding.found += 1
        mlps = [module for module in layer.modules() if is_swapped(module) and projections_of(module)]
        last = projections_of(mlps[0])[-1] if len(mlps) == 1 else None
        if last is None or stock_class(last) is not nn.Linear:
            finding.refuse("no gated MLP of plain linear layers, patched")
            continue
        places.append((mlps[0], layer))
        sizes.append(last.out_features * last.weight.element_size())
        flops.append(checkpointing.sizes_of(layer)[1])
    chosen = [place for place, leaves in zip(places, choose(sizes, flops), strict=True) if leaves]
    finding.patched = len(chosen)
    if len(chosen) < len(places):
        finding.refuse("copies of more would not hide behind the computation", len(places) - len(chosen))
    if not all(waiting.waits(mlp) for mlp, _ in chosen):
        finding.patches = [waiting.Waits(chosen, budget)]
    return finding
