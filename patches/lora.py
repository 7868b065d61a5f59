"""LoRA layers of PEFT, on plain, 4-bit and 8-bit linear layers of bitsandbytes, and 4-bit layers without an adapter.

Each is computed by one fused function instead of PEFT's chain of modules: see kernels/lora.py. Two kinds of groups go
further. The query, key and value projections of an attention are computed together when the first of them is called;
the others pick their result up, if they are called with the very same input. The three projections of a gated MLP are
one function with its activation (patches/mlp.py asks for it here).

What is decided at every call, since adapters come and go in training: one active adapter, not merged, not disabled, no
variant, no hooks on what is bypassed. Otherwise PEFT's own forward runs, and it does where no gradient is wanted: in
generation bitsandbytes has faster paths for few rows.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels import _launch
from hf_turbo.kernels.dequantize import Nested, Packed4bit
from hf_turbo.kernels.lora import Projection, lora_add, lora_linears
from hf_turbo.kernels.lora_mlp import lora_gated_mlp
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .conflicts import module_conflict
from .engine import (
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

_ATTENTION = ("q_proj", "k_proj", "v_proj")


# ------------------------------------------------------------------------------------------------ what a layer computes


class _Adapter(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float


class _Layer(NamedTuple):
    """One linear layer as `lora_linears` takes it, with its dtypes for an input."""

    projection: Projection
    compute: torch.dtype
    low: torch.dtype
    out: torch.dtype


def _adapter(layer: Any) -> _Adapter | str:
    """The one active adapter of a LoRA layer, or why PEFT has to compute it."""
    # Straight from the dictionaries: nn.Module.__getattr__ costs more than all the rest here.
    state, modules = layer.__dict__, layer._modules
    if state["_disable_adapters"]:
        return "adapters are disabled"
    if state["merged_adapters"]:
        return "adapters are merged"
    active, a_modules = state["_active_adapter"], modules["lora_A"]._modules
    names = [name for name in ((active,) if isinstance(active, str) else active) if name in a_modules]
    if len(names) != 1:
        return f"{len(names)} active adapters"
    name = names[0]
    if name in state["lora_variant"]:
        return f"the adapter is a variant: {type(state['lora_variant'][name]).__name__}"
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
    return _Adapter(a.weight, b.weight, state["scaling"][name], probability)


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
    bias = base._parameters["bias"]
    if not is_plain(bias):
        return "biases are sharded or partitioned"
    return None


class _Expanded:
    """Expanded weights that outlive their use, by what they were expanded from.

    Two kinds: those that are kept for the whole training because the user said so, and the last one that recomputation
    (under checkpointing) used of a block, until its gradient uses it again. The weight of `down_proj` is the last of
    its block in recompute and the first in backward, so that keeping it takes no memory at the peak.
    """

    def __init__(self) -> None:
        self._kept = WeakIdKeyDictionary()  # QuantStates cannot be hashed
        self._last: tuple[Any, torch.Tensor] | None = None

    def keep(self, state: Any) -> None:
        self._kept[state] = None

    def forget(self, state: Any) -> None:
        self._kept.pop(state, None)
        self._last = None

    def get(self, state: Any, packed: torch.Tensor, dtype: torch.dtype, backward: bool) -> torch.Tensor:
        if not self._kept or state not in self._kept:
            return _expand(state, packed, dtype)
        dense = self._kept[state]
        if dense is None or dense.dtype != dtype or dense.device != packed.device:
            dense = self._kept[state] = _expand(state, packed, dtype)
        return dense

    def get_last(self, state: Any, packed: torch.Tensor, dtype: torch.dtype, backward: bool) -> torch.Tensor:
        """`get` for a weight that is the last of its block."""
        last, self._last = self._last, None
        if backward and last is not None and last[0] is state and last[1].dtype == dtype:
            return last[1]
        dense = self.get(state, packed, dtype, backward)
        if not backward and torch._C._current_graph_task_id() != -1:  # in a backward pass: this is recomputation
            self._last = (state, dense)
        return dense


_EXPANDED = _Expanded()


_PACKED = WeakIdKeyDictionary()  # QuantState -> (address, absmax, Packed4bit)


def _expand(state: Any, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bitsandbytes weight [N, K] in `dtype`, the same bits as bitsandbytes gives."""
    if not (packed.is_cuda or _launch.INTERPRET):
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(packed.view(-1, 1), state).to(dtype)
    known = _PACKED.get(state)
    # A state that moves to another device gets other tensors.
    if known is None or known[0] != packed.data_ptr() or known[1] is not state.absmax:
        nested = None
        if state.nested:
            nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
        weight = Packed4bit(packed, state.absmax, state.code, state.blocksize, state.shape, nested)
        known = _PACKED[state] = (packed.data_ptr(), state.absmax, weight)
    return known[2].expand(dtype)


def _layer(module: Any, x_dtype: torch.dtype, device: torch.device) -> _Layer | str:
    """What a LoRA layer of ours, or a linear layer without an adapter, computes; or why it has to do so itself."""
    adapter: _Adapter | str | None = None
    base, kind = module, _kind(module)
    if kind is not None:
        adapter = _adapter(module)
        if isinstance(adapter, str):
            return adapter
        base = module._modules["base_layer"]
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if autocast is not None and x_dtype == torch.float64:
        return "float64 under autocast"
    parameters = base._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    expand = None
    if type(base) is nn.Linear:
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
        low = compute if adapter is None else (autocast or adapter.a.dtype)
        if conflict is None and low != compute != x_dtype:
            conflict = f"the adapter reads {x_dtype} inputs, the 4-bit weights {compute} ones"
        if conflict is None:
            expand = functools.partial(_EXPANDED.get, weight.quant_state)
    else:
        return f"base layer is a {type(base).__name__}"
    if conflict is not None:
        return conflict
    if weight.device != device or (adapter is not None and adapter.a.device != device):
        return "weights on another device than the input"
    a, b, scaling, dropout = (None, None, 1.0, 0.0) if adapter is None else adapter
    # As a plain tensor: autograd functions must not see a parameter subclass with behaviour of its own.
    if expand is not None:
        weight = weight.data
    return _Layer(Projection(weight, bias, a, b, scaling, dropout, expand), compute, low, out)


# --------------------------------------------------------------------------------------------------------- replacements


def _may_act(x: Any, args: Any = (), kwargs: Any = None) -> bool:
    return (
        is_live()
        and torch.is_grad_enabled()
        and not args
        and not kwargs
        and type(x) in (torch.Tensor, nn.Parameter)
        and x.is_floating_point()
        and x.numel() > 0
        and not torch.compiler.is_compiling()
    )


def _compute(modules: tuple[Any, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """The outputs of all layers for one input, or None where one of them has to compute itself."""
    layers = [_layer(module, x.dtype, x.device) for module in modules]
    first = layers[0]
    if isinstance(first, str):
        return None
    projections = []
    for layer in layers:
        if isinstance(layer, str) or layer[1:] != first[1:]:
            return None
        projections.append(layer.projection)
    return lora_linears(x.to(first.compute), projections, first.low, first.out)


def _beside(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The adapter of a layer whose base computes itself: 8-bit weights, trained weights, hooks."""
    if _kind(module) is None:
        return None
    adapter = _adapter(module)
    if isinstance(adapter, str) or adapter.a.device != x.device:
        return None
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    if autocast is not None and x.dtype == torch.float64:
        return None
    y = module.base_layer(x)
    low = autocast or adapter.a.dtype
    if autocast is not None and _kind(module) != "Linear":
        y = y.to(torch.promote_types(y.dtype, autocast))
    return lora_add(y, x.to(low), adapter.a, adapter.b, adapter.scaling, adapter.dropout, low)


def _make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _may_act(x, args, kwargs):
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
    autocast: Any
    outputs: dict[nn.Module, torch.Tensor]


class _Group:
    """Layers that are called one after the other with the same input.

    The first computes all; the others find their output here. Where they are not called, or not with that input, the
    group dissolves after a few such calls (cross attention, keys shared between layers).
    """

    _PATIENCE = 3

    def __init__(self, members: tuple[nn.Module, ...]):
        self._members = tuple(weakref.ref(member) for member in members)
        self._stash: _Stash | None = None
        self._misses = 0

    def compute(self, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        if self._misses >= self._PATIENCE:
            return _compute((module,), x)
        if module is not self._members[0]():
            return self._take(module, x) or _compute((module,), x)
        if self._stash is not None:
            self._stash = None
            self._misses += 1
        members = tuple(member() for member in self._members)
        outputs = None if None in members else _compute(members, x)
        if outputs is None:
            return _compute((module,), x)
        self._stash = _Stash(x, x._version, _autocast(x), dict(zip(members[1:], outputs[1:], strict=True)))
        return outputs

    def _take(self, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        stash = self._stash
        if stash is None:
            return None
        same = stash.x is x and stash.version == x._version and stash.autocast == _autocast(x)
        output = stash.outputs.pop(module, None)
        if not same or output is None:
            self._stash = None
            self._misses += 1
            return None
        if not stash.outputs:
            self._stash, self._misses = None, 0
        return (output,)


def _autocast(x: torch.Tensor) -> Any:
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)


_GROUPS: weakref.WeakKeyDictionary[nn.Module, _Group] = weakref.WeakKeyDictionary()


def gated_mlp(projections: tuple[Any, ...], x: torch.Tensor, activation: str) -> torch.Tensor | None:
    """down(act(gate(x)) * up(x)) in one function, or None where the projections have to be called one by one.

    Args:
        projections: the modules gate, up and down, or gate_up and down.
    """
    if not any(map(is_swapped, projections)) or not _may_act(x):
        return None
    layers: list[_Layer] = []
    dtype = x.dtype
    for module in projections:
        # Their own forwards are not called.
        if has_hooks(module):
            return None
        if module is projections[-1]:
            dtype = layers[0].out
        layer = _layer(module, dtype, x.device)
        if isinstance(layer, str) or layer.projection.dropout:
            return None
        layers.append(layer)
    first, down = layers[0], layers[-1]
    # All in one dtype of products. gate and up have one dtype, as they have one input.
    if any((layer.compute, layer.low) != (first.compute, first.low) for layer in layers) or layers[-2].out != first.out:
        return None
    ordered = [layer.projection for layer in layers]
    if down.projection.expand is not None:
        ordered[-1] = down.projection._replace(
            expand=functools.partial(_EXPANDED.get_last, *down.projection.expand.args)
        )
    return lora_gated_mlp(x.to(first.compute), tuple(ordered), activation, first.low, down.out)


# ---------------------------------------------------------------------------------------------------------------- find


class _GroupPatch(Patch):
    """Computes members of a group together."""

    def __init__(self, id: str, members: tuple[nn.Module, ...]):
        self.id = id
        self._members = tuple(weakref.ref(member) for member in members)

    def apply(self) -> None:
        members = tuple(member() for member in self._members)
        group = _Group(tuple(member for member in members if member is not None))
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
            _EXPANDED.keep(state)

    def revert(self) -> bool:
        state = self._state()
        if state is not None:
            _EXPANDED.forget(state)
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


def _is_adapter(module: nn.Module) -> bool:
    layer = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and isinstance(module, layer.LoraLayer)


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
    expected = {"Linear": "Linear", "Linear4bit": "Linear4bit", "Linear8bitLt": "Linear8bitLt"}[kind]
    if type(base).__name__ != expected or (kind == "Linear" and type(base) is not nn.Linear):
        return f"base layer is a {type(base).__name__}"
    return module_conflict(base)


def find(model: nn.Module, keep_expanded: bool = False) -> Finding:
    """Class swaps for LoRA layers and 4-bit layers, and the groups among them.

    Args:
        keep_expanded: keep 4-bit weights expanded for the whole training, at two bytes a weight.
    """
    finding = Finding("lora", "lora_linears, lora_gated_mlp", Exactness.REASSOCIATED)
    inside: set[nn.Module] = set()
    ours: set[nn.Module] = set()
    for name, module in model.named_modules():
        if _is_adapter(module):
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
        finding.patches.append(ClassSwap(f"lora:{name}", module, same_name_subclass(type(module), _make_forward)))
        if _is_adapter(module) and _drops(module):
            finding.exactness = Exactness.REDRAWN
        base = getattr(module, "base_layer", module)
        if keep_expanded and _is_4bit(base):
            finding.patches.append(_KeepPatch(f"expanded:{name}", base.weight.quant_state))
    for name, module in model.named_modules():
        members = tuple(child for child in (getattr(module, key, None) for key in _ATTENTION) if child in ours)
        widths = {getattr(member, "in_features", None) for member in members}
        if len(members) > 1 and len(widths) == 1 and not any(member in _GROUPS for member in members):
            finding.patches.append(_GroupPatch(f"qkv:{name}", members))
    return finding


def _drops(module: Any) -> bool:
    adapter = _adapter(module)
    return not isinstance(adapter, str) and adapter.dropout > 0
