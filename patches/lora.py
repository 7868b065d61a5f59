"""LoRA layers of PEFT, on plain, 4-bit and 8-bit linear layers of bitsandbytes, and 4-bit layers without an adapter.

Each is computed by one fused function instead of PEFT's chain of modules: see kernels/lora.py. Two kinds of groups go
further. The query, key and value projections of an attention are computed together when the first of them is called;
the others pick their result up, if they are called with the very same input. The three projections of a gated MLP are
one function with its activation (patches/mlp.py asks for it here).

What is decided at every call, since adapters come and go in training: one active adapter, not merged, not disabled, no
variant but DoRA (kernels/dora.py), no hooks on what is bypassed. Otherwise PEFT's own forward runs, and it does in
evaluation and generation: bitsandbytes has faster paths for few rows.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels._launch import device_kind
from hf_turbo.kernels.dora import dora_linears_of
from hf_turbo.kernels.lora import Projection, linears_of, lora_add
from hf_turbo.kernels.lora_mlp import gated_mlp_of
from hf_turbo.kernels.tiled_mlp import Tile, tiled_lora_mlp_of
from torch import nn

from . import expanded_weights
from .conflicts import module_conflict
from .engine import (
    AttributePatch,
    ClassSwap,
    Exactness,
    Finding,
    Patch,
    has_hooks,
    is_live,
    is_plain,
    is_swapped,
    same_name_subclass,
    stock_class,
)
from .expanded_weights import expander_of
from .lora_watch import Watch
from .sums import FULL_SUMS

_ATTENTION = ("q_proj", "k_proj", "v_proj")


# ------------------------------------------------------------------------------------------------ what a layer computes


class _Adapter(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float
    magnitude: torch.Tensor | None  # of DoRA


class _Layer(NamedTuple):
    """One linear layer as `lora_linears` or `dora_linears` takes it, with its dtypes for an input."""

    projection: Projection
    compute: torch.dtype
    low: torch.dtype
    out: torch.dtype
    magnitude: torch.Tensor | None


def _active_names(layer: Any) -> list[str]:
    """The active adapters that a LoRA layer has."""
    active = layer.__dict__["_active_adapter"]
    return [name for name in ((active,) if isinstance(active, str) else active) if name in layer.lora_A]


def _adapter(layer: Any) -> _Adapter | str:
    """The one active adapter of a LoRA layer, or why PEFT has to compute it."""
    # Straight from the dictionaries: nn.Module.__getattr__ costs more than all the rest here.
    state, modules = layer.__dict__, layer._modules
    if state["_disable_adapters"]:
        return "adapters are disabled"
    if state["merged_adapters"]:
        return "adapters are merged"
    a_modules, names = modules["lora_A"]._modules, _active_names(layer)
    if len(names) != 1:
        return f"{len(names)} active adapters"
    name = names[0]
    variant = state["lora_variant"].get(name)
    if variant is not None and not _is_dora(variant):
        return f"the adapter is a variant: {type(variant).__name__}"
    if state["lora_bias"].get(name):
        return "the adapter has a bias"
    if not state["cast_input_dtype_enabled"]:
        return "casting of the adapter's input is switched off"
    a, b, dropout = a_modules[name], modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"adapter matrices are {type(a).__name__}s"
    if has_hooks(a) or has_hooks(b) or has_hooks(dropout):
        return "hooks or an instance forward inside the adapter"
    probability = 0.0
    if type(dropout) is nn.Dropout:
        probability = dropout.p if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:
        return f"dropout is a {type(dropout).__name__}"
    if probability >= 1:
        return "dropout of everything"
    if not is_plain(a.weight, b.weight) or a.weight.numel() == 0 or b.weight.numel() == 0:
        return "adapter matrices are sharded or partitioned"
    if a.weight.dtype != b.weight.dtype:
        return "adapter matrices of different dtypes"
    magnitude: torch.Tensor | str | None = None
    if variant is not None:
        # In evaluation too, so that the report says what training will do.
        if type(dropout) is nn.Dropout and dropout.p > 0:
            return "DoRA with dropout: PEFT computes another formula"
        magnitude = _magnitude(layer, name)
    if isinstance(magnitude, str):
        return magnitude
    return _Adapter(a.weight, b.weight, state["scaling"][name], probability, magnitude)


def _is_dora(variant: Any) -> bool:
    variants = sys.modules.get("peft.tuners.lora.variants")
    return variants is not None and type(variant) is getattr(variants, "DoraLinearVariant", None)


def _magnitude(layer: Any, name: str) -> torch.Tensor | str:
    """DoRA's magnitudes of one adapter, or why PEFT has to compute it."""
    if layer.__dict__["ephemeral_gpu_offload"]:
        return "DoRA with offloading (ephemeral_gpu_offload)"
    module: Any = layer._modules["lora_magnitude_vector"]._modules.get(name)
    dora = sys.modules.get("peft.tuners.lora.dora")
    if dora is None or type(module) is not getattr(dora, "DoraLinearLayer", None) or module.fan_in_fan_out:
        return f"magnitudes are in a {type(module).__name__}"
    if has_hooks(module):
        return "hooks or an instance forward inside the adapter"
    magnitude: torch.Tensor = module._parameters["weight"]
    if not is_plain(magnitude) or magnitude.numel() == 0:
        return "magnitudes are sharded or partitioned"
    return magnitude


def _dense_conflict(base: Any) -> str | None:
    """Why `base` is not F.linear of a frozen weight and nothing else."""
    if has_hooks(base):
        return "hooks or an instance forward on the base layer"
    if not is_plain(base.weight, base.bias) or base.weight.numel() == 0:
        return "base weights are sharded or partitioned"
    if base.weight.requires_grad:
        return "base weights are trained"
    return None


def _packed_conflict(base: Any) -> str | None:
    """Why a bitsandbytes 4-bit layer is not a matrix that can be expanded."""
    if has_hooks(base):
        return "hooks or an instance forward on the base layer"
    weight = base._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    if type(weight).__name__ != "Params4bit" or state is None or weight.numel() == 0:
        return "4-bit weights are not quantized yet, or sharded"
    if tuple(state.shape) != (base.out_features, base.in_features) or getattr(state, "packing_format_for_cpu", False):
        return "4-bit weights in another layout"
    bias = base.bias
    if not is_plain(bias):
        return "biases are sharded or partitioned"
    return None


def _autocast(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in, None where it is off."""
    kind = device_kind(device)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _is_float64(dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether something is in float64, which autocast leaves as it is."""
    return dtype == torch.float64 or any(each is not None and each.dtype == torch.float64 for each in tensors)


def _layer(module: Any, x_dtype: torch.dtype, device: torch.device) -> _Layer | str:
    """What a LoRA layer of ours, or a linear layer without an adapter, computes; or why it has to do so itself."""
    adapter: _Adapter | None = None
    base = module
    if _kind(module) is not None:
        found = _adapter(module)
        if isinstance(found, str):
            return found
        adapter, base = found, module._modules["base_layer"]
    autocast = _autocast(device)
    # Not there: of a parametrized or pruned layer, of another wrapper than ours, of other quantized layers.
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if autocast is not None and _is_float64(x_dtype, weight, adapter and adapter.a):
        return "float64 under autocast"
    expand = None
    if stock_class(base) is nn.Linear:
        conflict = _dense_conflict(base)
        compute = out = autocast or x_dtype
        if conflict is None and autocast is None and weight.dtype != x_dtype:
            conflict = f"weights are {weight.dtype}, the input {x_dtype}"
        low = autocast or (compute if adapter is None else adapter.a.dtype)
    elif _is_4bit(base):
        conflict = _packed_conflict(base)
        if conflict is None and not base.compute_type_is_set:
            conflict = "the compute dtype of 4-bit weights is settled by a first stock call"
        compute = base.compute_dtype or x_dtype
        if conflict is None and bias is not None and bias.dtype != compute:
            conflict = "the bias of 4-bit weights is cast by a first stock call"
        out = x_dtype if adapter is None else torch.promote_types(x_dtype, autocast or x_dtype)
        if adapter is not None and adapter.magnitude is not None:
            # PEFT asks whether CUDA has autocast, and keeps the dtype of what its magnitudes made if so.
            out = torch.promote_types(out, adapter.magnitude.dtype) if torch.is_autocast_enabled() else x_dtype
        low = compute if adapter is None else (autocast or adapter.a.dtype)
        if conflict is None and low != compute != x_dtype:
            conflict = f"the adapter reads {x_dtype} inputs, the 4-bit weights {compute} ones"
        if conflict is None:
            expand = functools.partial(expander_of(weight.quant_state), weight.quant_state)
    else:
        return f"base layer is a {type(base).__name__}"
    if conflict is not None:
        return conflict
    if weight.device != device or (adapter is not None and adapter.a.device != device):
        return "weights on another device than the input"
    a, b, scaling, dropout, magnitude = (None, None, 1.0, 0.0, None) if adapter is None else adapter
    if magnitude is not None and magnitude.device != device:
        return "magnitudes on another device than the input"
    # As a plain tensor: autograd functions must not see a parameter subclass with behaviour of its own.
    if expand is not None:
        weight = weight.data
    return _Layer(
        Projection(weight, bias, a, b, scaling, dropout, expand, base.out_features), compute, low, out, magnitude
    )


# --------------------------------------------------------------------------------------------------------- replacements


def _may_act(module: nn.Module, x: Any, args: Any = (), kwargs: Any = None) -> bool:
    """Whether a call is of a training.

    In reentrant checkpointing the first forward runs without gradients. One row at a time is generation, where
    bitsandbytes has kernels of its own. An input of another width is for stock code to complain about.
    """
    return (
        is_live()
        and (torch.is_grad_enabled() or (module.training and x.ndim > 1 and x.shape[-2] > 1))
        and not args
        and not kwargs
        and type(x) in (torch.Tensor, nn.Parameter)
        and x.is_floating_point()
        and x.numel() > 0
        and x.shape[-1:] == (getattr(module, "in_features", None),)
        and not (x.is_meta and torch._C._len_torch_dispatch_stack() == 0)  # without data, and nobody looks on
        and not torch.compiler.is_compiling()  # before the next, which it cannot see through
        and not x.is_inference()
    )


class _Recipe(NamedTuple):
    """How some layers compute one input together, worked out and checked once."""

    watches: tuple[Watch, ...]
    x_dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    compute: torch.dtype
    call: Callable[..., Any]
    activation: str | None = None

    def fits(self, modules: tuple[Any, ...], x: torch.Tensor, activation: str | None = None) -> bool:
        watches = self.watches
        if not (
            len(watches) == len(modules)
            and self.x_dtype == x.dtype
            and self.device == x.device
            and self.autocast == _autocast(x.device)
            and self.activation == activation
            and all(map(Watch.of, watches, modules))
        ):
            return False
        # The attributes of 4-bit weights would be read by way of their class's __torch_function__.
        with torch._C.DisableTorchFunctionSubclass():
            return all(map(Watch.is_same, watches))

    def __call__(self, x: torch.Tensor, *args: Any) -> Any:
        return self.call(x if x.dtype == self.compute else x.to(self.compute), *args)


# By the first layer that has an adapter. A recipe refers to the modules inside LoRA layers and to layers without an
# adapter, so that such a layer as the key would never be let go.
_RECIPES: weakref.WeakKeyDictionary[nn.Module, _Recipe] = weakref.WeakKeyDictionary()


def _keep_recipe(
    modules: tuple[Any, ...],
    x: torch.Tensor,
    compute: torch.dtype,
    call: Callable[..., Any],
    activation: str | None = None,
) -> _Recipe:
    watches = tuple(Watch(each, None if _kind(each) is None else _active_names(each)[0]) for each in modules)
    recipe = _Recipe(watches, x.dtype, x.device, _autocast(x.device), compute, call, activation)
    key = _key(modules)
    if key is not None:
        _RECIPES[key] = recipe
    return recipe


def _recipe(modules: tuple[Any, ...], x: torch.Tensor, activation: str | None = None) -> _Recipe | None:
    """What was kept for these layers, if it still fits."""
    key = _key(modules)
    recipe = None if key is None else _RECIPES.get(key)
    return recipe if recipe is not None and recipe.fits(modules, x, activation) else None


def watches_of(modules: Iterable[nn.Module]) -> list[Watch]:
    """What is kept of the layers among these modules."""
    return [watch for each in modules if each in _RECIPES for watch in _RECIPES[each].watches]


def _key(modules: tuple[Any, ...]) -> Any:
    return next((module for module in modules if "lora_A" in module._modules), None)


def _compute(modules: tuple[Any, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """The outputs of all layers for one input, or None where one of them has to compute itself."""
    recipe = _recipe(modules, x)
    if recipe is not None:
        return recipe(x)
    layers = [_layer(module, x.dtype, x.device) for module in modules]
    first = layers[0]
    if isinstance(first, str):
        return None
    projections, magnitudes = [], []
    for layer in layers:
        if isinstance(layer, str) or layer[1:4] != first[1:4]:
            return None
        projections.append(layer.projection)
        magnitudes.append(layer.magnitude)
    width, compute, low, out = x.shape[-1], first.compute, first.low, first.out
    call: Callable[[torch.Tensor], Any]
    if any(magnitude is not None for magnitude in magnitudes):
        if any(projection.dropout for projection in projections):
            return None
        dora = dora_linears_of(width, compute, projections, magnitudes, low, out)
        call = lambda x: None if x.ndim < 2 else dora(x)  # noqa: E731  (of one row PEFT makes a matrix)
    else:
        call = linears_of(width, compute, projections, low, out)
    return _keep_recipe(modules, x, compute, call)(x)


def _beside(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The adapter of a layer whose base computes itself: 8-bit weights, trained weights, hooks."""
    if _kind(module) is None:
        return None
    adapter = _adapter(module)
    if isinstance(adapter, str) or adapter.magnitude is not None or adapter.a.device != x.device:
        return None
    autocast = _autocast(x.device)
    if autocast is not None and _is_float64(x.dtype, adapter.a):
        return None
    y = module.base_layer(x)
    low = autocast or adapter.a.dtype
    if autocast is not None and _kind(module) != "Linear":
        y = y.to(torch.promote_types(y.dtype, autocast))
    return lora_add(y, x.to(low), adapter.a, adapter.b, adapter.scaling, adapter.dropout, low)


def _make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _may_act(self, x, args, kwargs):
            return stock(self, x, *args, **kwargs)
        group = _GROUPS.get(self)
        if group is not None:
            outputs = group.compute(self, x)
        else:
            outputs = _compute((self,), x)
        if outputs is not None:
            return outputs[0]
        y = _beside(self, x)
        return stock(self, x, *args, **kwargs) if y is None else y

    return forward


class _Stash(NamedTuple):
    x: torch.Tensor
    version: int
    mode: tuple[torch.dtype | None, bool]
    outputs: dict[nn.Module, torch.Tensor]


Compute = Callable[[tuple[Any, ...], torch.Tensor], tuple[torch.Tensor, ...] | None]


class Group:
    """Layers that are called one after the other with the same input.

    The first computes all; the others find their output here. Where they are not called, or not with that input, the
    group dissolves after a few such calls (cross attention, keys shared between layers). It does so at once where the
    first is not called first: what is left of one forward might be found by the next, with other weights.
    """

    _PATIENCE = 3

    def __init__(self, members: tuple[nn.Module, ...], compute: Compute = _compute):
        self._compute = compute
        self._members = tuple(weakref.ref(member) for member in members)
        self._stash: _Stash | None = None
        self._misses = 0
        self._begun = False

    def compute(self, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        if self._misses >= self._PATIENCE:
            return self._compute((module,), x)
        if module is not self._members[0]():
            if not self._begun:
                self._misses = self._PATIENCE
            return self._take(module, x) or self._compute((module,), x)
        self._begun = True
        if self._stash is not None:
            self._stash = None
            self._misses += 1
            if self._misses >= self._PATIENCE:  # nothing is kept that nobody would clear
                return self._compute((module,), x)
        members = tuple(member for member in (reference() for reference in self._members) if member is not None)
        outputs = self._compute(members, x) if len(members) == len(self._members) else None
        if outputs is None:
            return self._compute((module,), x)
        self._stash = _Stash(x, x._version, _mode(x), dict(zip(members[1:], outputs[1:], strict=True)))
        return outputs

    def forget(self) -> None:
        """Lets go of outputs that nobody has asked for yet."""
        self._stash = None

    def _take(self, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        stash = self._stash
        if stash is None:
            return None
        same = stash.x is x and stash.version == x._version and stash.mode == _mode(x)
        output = stash.outputs.pop(module, None)
        if not same or output is None:
            self._stash = None
            self._misses += 1
            return None
        if not stash.outputs:
            self._stash, self._misses = None, 0
        return (output,)


def _mode(x: torch.Tensor) -> tuple[torch.dtype | None, bool]:
    return _autocast(x.device), torch.is_grad_enabled()


_GROUPS: weakref.WeakKeyDictionary[nn.Module, Group] = weakref.WeakKeyDictionary()


def group_of(module: nn.Module) -> Group | None:
    """The group that a layer is a member of."""
    return _GROUPS.get(module)


def forget_outputs() -> None:
    """After a pass that failed: what some layers have computed for others, which were not called any more."""
    for group in set(_GROUPS.values()):
        group.forget()


def _is_ours(module: nn.Module) -> bool:
    """Whether this is a layer of this file: plain ones are swapped by another."""
    return is_swapped(module) and stock_class(module) is not nn.Linear


def gated_mlp(
    projections: tuple[Any, ...], x: torch.Tensor, activation: str, tile: Tile | None = None
) -> torch.Tensor | None:
    """down(act(gate(x)) * up(x)) in one function, or None where the projections have to be called one by one.

    Args:
        projections: the modules gate, up and down, or gate_up and down.
        tile: rows that are computed at a time; None: all. Adapters with dropout have one function by tiles alone.
    """
    if not any(map(_is_ours, projections)) or not _may_act(projections[0], x):
        return None
    # Their own forwards are not called.
    if any(map(has_hooks, projections)):
        return None
    recipe = _recipe(projections, x, activation)
    if recipe is not None:
        return recipe(x, tile)
    layers: list[_Layer] = []
    dtype = x.dtype
    for module in projections:
        if module is projections[-1]:
            dtype = layers[0].out
        layer = _layer(module, dtype, x.device)
        if isinstance(layer, str) or (layer.projection.dropout and tile is None) or layer.magnitude is not None:
            return None
        layers.append(layer)
    first, down = layers[0], layers[-1]
    # All in one dtype of products. gate and up have one dtype, as they have one input.
    if any((layer.compute, layer.low) != (first.compute, first.low) for layer in layers) or layers[-2].out != first.out:
        return None
    ordered = [layer.projection for layer in layers]
    if isinstance(down.projection.expand, functools.partial):
        expander: Any = down.projection.expand.func
        expand = functools.partial(expander.last_of_its_block, *down.projection.expand.args)
        ordered[-1] = down.projection._replace(expand=expand)
    arguments = x.shape[-1], first.compute, tuple(ordered), activation, first.low, down.out
    by_tiles = tiled_lora_mlp_of(*arguments)
    at_once = None if any(each.dropout for each in ordered) else gated_mlp_of(*arguments)

    def call(x: torch.Tensor, tile: Tile | None) -> torch.Tensor | None:
        if tile is not None:
            return by_tiles(x, tile)
        return None if at_once is None else at_once(x)

    return _keep_recipe(projections, x, first.compute, call, activation)(x, tile)


# ---------------------------------------------------------------------------------------------------------------- find


class _LayerSwap(ClassSwap):
    """The swap of one layer, which takes along what was kept of it."""

    def revert(self) -> bool:
        expanded_weights.forget_waiting()
        module = self._module()
        if isinstance(module, nn.Module):
            _RECIPES.pop(module, None)
        return super().revert()


class GroupPatch(Patch):
    """Computes members of a group together."""

    def __init__(self, id: str, members: tuple[nn.Module, ...], compute: Compute = _compute):
        self.id, self._compute = id, compute
        self._members = tuple(weakref.ref(member) for member in members)

    def apply(self) -> None:
        members = tuple(member() for member in self._members)
        group = Group(tuple(member for member in members if member is not None), self._compute)
        for member in members:
            if member is not None:
                _GROUPS[member] = group

    def revert(self) -> bool:
        for member in self._members:
            module = member()
            if module is not None:
                _GROUPS.pop(module, None)
        return True


class _KeepPatch(Patch):
    """Keeps the expanded weights of a layer for as long as it is applied."""

    def __init__(self, id: str, state: Any):
        self.id, self._state = id, weakref.ref(state)

    def apply(self) -> None:
        state = self._state()
        if state is not None:
            expander_of(state).keep = True

    def revert(self) -> bool:
        state = self._state()
        if state is not None:
            expander_of(state).keep = False
            expander_of(state).let_go()
        return True


@functools.cache
def _lora_classes(names: tuple[str, ...]) -> dict[type, str]:
    """PEFT's classes that are understood; `names` are the modules that have been imported."""
    classes: dict[type, str] = {}
    for name in names:
        for attribute in ("Linear", "Linear4bit", "Linear8bitLt"):
            cls = getattr(sys.modules[name], attribute, None)
            if isinstance(cls, type) and cls.__module__ == name:
                classes[cls] = attribute
    return classes


def _kind(module: nn.Module) -> str | None:
    """Linear, Linear4bit or Linear8bitLt for a LoRA layer of PEFT's, None for all else."""
    names = tuple(name for name in ("peft.tuners.lora.layer", "peft.tuners.lora.bnb") if name in sys.modules)
    return _lora_classes(names).get(stock_class(module))


def _is_4bit(module: nn.Module) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and stock_class(module) is bitsandbytes.nn.Linear4bit


def is_adapter(module: nn.Module) -> bool:
    """Whether this is a LoRA layer of PEFT's, of whatever kind."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and isinstance(module, layer.LoraLayer)


# Of what layers and their adapters are made up; nothing of it mixes rows.
_PARTS = {nn.Linear, nn.Dropout, nn.Identity, nn.ModuleDict, nn.ParameterDict}


def rows_conflict(layer: nn.Module) -> str | None:
    """Why it is not known of a layer's call that each row of its output is made of that row of its input, or None."""
    bitsandbytes, dora = sys.modules.get("bitsandbytes"), sys.modules.get("peft.tuners.lora.dora")
    known = {*_PARTS, getattr(dora, "DoraLinearLayer", nn.Linear)}
    if bitsandbytes is not None:
        known |= {bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt}
    for module in layer.modules():
        if _kind(module) is not None:
            for variant in vars(module)["lora_variant"].values():
                if not _is_dora(variant):
                    return f"the adapter is a variant: {type(variant).__name__}"
        elif stock_class(module) not in known:
            return f"a {type(module).__name__} may mix rows"
        if has_hooks(module):
            return "hooks or an instance forward on its layers"
    return None


def _conflict(module: Any) -> str | None:
    """Why a layer stays stock as things are now."""
    reason = module_conflict(module)
    if reason is not None:
        return reason
    if _is_4bit(module):
        return _packed_conflict(module)
    kind = _kind(module)
    if kind is None:
        return f"no fused path for an adapter on {type(module.get_base_layer()).__name__}"
    if getattr(module, "fan_in_fan_out", False):
        return "weights are stored transposed (fan_in_fan_out)"
    adapter = _adapter(module)
    if isinstance(adapter, str):
        return adapter
    base = module.base_layer
    if type(base).__name__ != kind or (kind == "Linear" and stock_class(base) is not nn.Linear):
        return f"base layer is a {type(base).__name__}"
    reason = module_conflict(base)
    if reason is None and adapter.magnitude is not None:  # not beside a layer that computes itself
        reason = "DoRA on 8-bit weights" if kind == "Linear8bitLt" else None
        if kind == "Linear":
            reason = _dense_conflict(base)
    return reason


def end_training() -> None:
    """Lets go of the weights that recipes hold, so that a model which is moved then leaves nothing behind."""
    _RECIPES.clear()
    forget_outputs()
    expanded_weights.let_go()


def concerns(model: nn.Module) -> bool:
    """Whether a model has LoRA or 4-bit layers at all."""
    return any(is_adapter(module) or _is_4bit(module) for module in model.modules())


def expanded_bytes(model: nn.Module) -> int:
    """What the 4-bit weights of a model take when expanded."""
    states: list[Any] = [getattr(module.weight, "quant_state", None) for module in model.modules() if _is_4bit(module)]
    return sum(math.prod(state.shape) * state.dtype.itemsize for state in states if state is not None)


def find(model: nn.Module, keep_expanded: bool = False, may_wait: bool = True) -> Finding:
    """Class swaps for LoRA layers and 4-bit layers, and the groups among them.

    Args:
        keep_expanded: keep 4-bit weights expanded for the whole training, at two bytes a weight.
        may_wait: whether those that recomputation has expanded may wait for the layer's gradients.
    """
    finding = Finding("lora", "lora_linears, lora_gated_mlp", Exactness.REASSOCIATED)
    inside: set[nn.Module] = set()
    ours: set[nn.Module] = set()
    for name, module in model.named_modules():
        if is_adapter(module):
            inside.update(module.modules())
            inside.discard(module)
        elif not _is_4bit(module) or module in inside:
            continue
        finding.found += 1
        if is_swapped(module):
            finding.patched += 1
            ours.add(module)
            continue
        reason = _conflict(module)
        if reason is not None:
            finding.refuse(reason)
            continue
        finding.patched += 1
        ours.add(module)
        finding.patches.append(
            _LayerSwap(f"lora:{name}", module, same_name_subclass(stock_class(module), _make_forward))
        )
        if is_adapter(module) and _drops(module):
            finding.exactness = Exactness.REDRAWN
        base = getattr(module, "base_layer", module)
        if keep_expanded and _is_4bit(base):
            finding.patches.append(_KeepPatch(f"expanded:{name}", base.weight.quant_state))
    for name, module in model.named_modules():
        members = tuple(child for child in (getattr(module, key, None) for key in _ATTENTION) if child in ours)
        widths = {getattr(member, "in_features", None) for member in members}
        if len(members) > 1 and len(widths) == 1 and not any(member in _GROUPS for member in members):
            finding.patches.append(GroupPatch(f"qkv:{name}", members))
    if finding.patches:
        finding.patches.append(FULL_SUMS)
    if finding.patches and not may_wait:
        finding.patches.append(AttributePatch("lora:waiting", expanded_weights, "MOST_WAITING_BYTES", 0))
    return finding


def _drops(module: Any) -> bool:
    adapter = _adapter(module)
    return not isinstance(adapter, str) and adapter.dropout > 0
