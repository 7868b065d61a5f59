"""Gradient checkpointing of transformers: recomputed with less host time, and inputs of layers in host memory.

A layer calls whatever function was put into its attribute `_gradient_checkpointing_func`; a property of its class hands
that out wrapped, and so outlives TRL's switching checkpointing off and on around generation and reference passes. The
attribute itself stays as the host wrote it. Three features, each with layers of its own:

* Where the function is torch's checkpoint without reentrant autograd, recomputation.py does the same.
* Of those, layers keep what they save after all where memory is free, or of it what attention gives out:
  kept_layers.py, kept_attention.py.
* Each checkpointed layer keeps its input for recomputation: tokens x hidden size per layer. They are copied to pinned
  host memory while the following layers compute, and return one layer ahead of backward, with the same bits. Checkpoint
  saves the layer's inputs, and nothing of its inside, through the hooks that surround its call, in all of its forms.
  Only the hidden states leave: masks and position embeddings are shared by all layers.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import attention_seams, kept_layers, recomputation, tiling
from .engine import ClassSwap, Exactness, Finding, Patch, is_live, is_plain, same_name_subclass, stock_class
from .host_memory import Copies, CudaCopies, HostStore, fills_its_storage
from .varlen import Documents, NotUnderstood

MODULE = "transformers.modeling_layers"
_ATTRIBUTE = "_gradient_checkpointing_func"

# By type of device.
COPIES: dict[str, Callable[[torch.device], Copies]] = {"cuda": CudaCopies}
# Of smaller inputs 32 layers keep 256 MiB at most, and their layers are so short that two more launches show.
MIN_BYTES = 8 * 2**20

_STORES: weakref.WeakKeyDictionary[nn.Module, HostStore] = weakref.WeakKeyDictionary()
_RECOMPUTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_USERS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # features, by layer


def _get(self: nn.Module) -> Any:
    stock = self.__dict__.get(_ATTRIBUTE)
    if stock is None:
        raise AttributeError(_ATTRIBUTE)
    if torch.compiler.is_compiling() or not is_live():
        return stock
    store, recomputed = _STORES.get(self), self in _RECOMPUTED
    if not recomputed and store is None:
        return stock
    return functools.partial(_checkpoint, stock, store, recomputed, kept_layers.PLACES.get(self))


def _set(self: nn.Module, function: Any) -> None:
    self.__dict__[_ATTRIBUTE] = function


def _delete(self: nn.Module) -> None:
    self.__dict__.pop(_ATTRIBUTE, None)


_PROPERTY = property(_get, _set, _delete)


def _checkpoint(
    stock: Callable[..., Any],
    store: HostStore | None,
    recomputed: bool,
    place: tuple[kept_layers.Stack, int] | None,
    function: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`stock(function, *args)`; the first argument, as saved for recomputation, goes through the store."""
    hidden_states = args[0] if args else None
    if not (is_live() and isinstance(hidden_states, torch.Tensor)) or kwargs:
        return stock(function, *args, **kwargs)
    recomputed = recomputed and recomputation.is_plain(stock, args, hidden_states.device)
    watch = calls = None
    if place is not None and recomputed and hidden_states.ndim == 3 and _may_keep(stock):
        stack, index = place
        longest = _longest_document(function, hidden_states)
        if stack.keeps(index, hidden_states, longest):
            with tiling.keeping():
                return function(*args)
        watch = stack.watch(index, hidden_states)
        # What is recorded as a CUDA graph recomputes attention with the rest: handing out fails there.
        if not (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()):
            calls = stack.calls(index, watch is not None)
    hooks = None
    if store is not None and may_leave(hidden_states) and _is_plain_checkpoint(stock):
        hooks = to_store(store, hidden_states)
    if recomputed:
        device = hidden_states.device
        output = recomputation.recompute_in_backward(stock, function, args, device, hooks, watch, calls)
        if place is not None and calls is not None:
            stack.called(index, calls, hidden_states.shape[:-1].numel(), longest)
        return output
    if hooks is None:
        return stock(function, *args)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        return stock(function, *args)


def _longest_document(function: Any, hidden_states: torch.Tensor) -> int:
    """Tokens of the longest document that a layer attends to; `function` has its arguments but for the tensors."""
    documents = getattr(function, "keywords", {}).get("documents")
    return documents.longest if isinstance(documents, Documents) else hidden_states.shape[-2]


def _may_keep(function: Any) -> bool:
    """Whether a layer whose forward runs once differs in nothing from one that `function` has recomputed."""
    # Without preserve_rng_state, recomputation draws other numbers. Hooks of the script's own (save_on_cpu, activation
    # offloading, a checkpoint around this one) would be handed all that the layer saves, and not its input alone.
    return (
        function.keywords.get("preserve_rng_state", True)
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def to_store(store: HostStore, one: torch.Tensor) -> recomputation.Hooks:
    """Hooks that put this one tensor into the store."""
    pointer, shape, stride = one.data_ptr(), one.shape, one.stride()

    def pack(tensor: torch.Tensor) -> Any:
        # By memory, not by identity: autograd hands out an alias.
        if tensor.data_ptr() != pointer or tensor.shape != shape or tensor.stride() != stride:
            return tensor
        return store.put(tensor)

    return pack, store.get


def may_leave(tensor: torch.Tensor) -> bool:
    """Whether letting go of a tensor that is kept for backward frees memory that is worth a copy."""
    return (
        torch.is_grad_enabled()
        and tensor.device.type in COPIES
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
        and is_plain(tensor)
        and tensor.is_floating_point()
        and tensor.numel() * tensor.element_size() >= max(MIN_BYTES, 1)
        # Gradient accumulation holds on to leaves: embeddings made to require gradients.
        and not (tensor.is_leaf and tensor.requires_grad)
        and fills_its_storage(tensor)
        # Hooks of the script's own (save_on_cpu, TRL's activation offloading, a checkpoint around this one) see nothing
        # that goes through inner hooks.
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def _is_plain_checkpoint(function: Any) -> bool:
    """Whether this is torch's checkpoint of a whole layer: not transformers' offload, not selective checkpointing."""
    keywords = getattr(function, "keywords", {})
    return getattr(function, "func", function) is checkpoint and "context_fn" not in keywords


class _Stores(Patch):
    """Gives layers their store."""

    id = "offload:store"

    def __init__(self, layers: list[nn.Module], store: HostStore):
        # Held by the layers alone: pinned memory goes when the model goes.
        self._layers = weakref.WeakSet(layers)
        self._store: HostStore | None = store

    def apply(self) -> None:
        assert self._store is not None
        for layer in self._layers:
            _STORES[layer] = self._store
        self._store = None

    def revert(self) -> bool:
        stores = {store for layer in self._layers if (store := _STORES.pop(layer, None)) is not None}
        for store in stores:
            store.trim()
        return True


class _Recomputed(Patch):
    """Marks layers."""

    id = "checkpointing:layers"

    def __init__(self, layers: list[nn.Module]):
        self._layers = weakref.WeakSet(layers)

    def apply(self) -> None:
        _RECOMPUTED.update(self._layers)

    def revert(self) -> bool:
        for layer in self._layers:
            _RECOMPUTED.discard(layer)
        return True


class _Keeps(Patch):
    """Gives the layers of a stack their places in it."""

    id = "memory:stack"

    def __init__(self, layers: list[nn.Module], plan: kept_layers.Plan, flops_per_token: list[float]):
        self._places = weakref.WeakKeyDictionary({layer: place for place, layer in enumerate(layers)})
        self._stack = kept_layers.Stack(layers, plan, flops_per_token)

    def apply(self) -> None:
        for layer, place in self._places.items():
            kept_layers.PLACES[layer] = self._stack, place

    def revert(self) -> bool:
        for layer in self._places:
            kept_layers.PLACES.pop(layer, None)
        return True


class _HandOut(ClassSwap):
    """Gives a layer the property, for as long as one of the features wants it."""

    def __init__(self, role: str, name: str, layer: nn.Module):
        subclass = same_name_subclass(stock_class(layer), None, **{_ATTRIBUTE: _PROPERTY})
        super().__init__(f"{role}:{name}", layer, subclass)

    def apply(self) -> None:
        layer = self._module()
        if layer is not None:
            users = _USERS[layer] = _USERS.get(layer, 0) + 1
            if users == 1:
                super().apply()

    def revert(self) -> bool:
        layer = self._module()
        if layer is None:
            return True
        users = _USERS[layer] = _USERS[layer] - 1
        return users > 0 or super().revert()


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The layers that transformers can checkpoint, by name."""
    cls = getattr(sys.modules.get(MODULE), "GradientCheckpointingLayer", None)
    return {name: module for name, module in model.named_modules() if cls is not None and isinstance(module, cls)}


def find(model: nn.Module, *, asked: bool | None) -> Finding:
    """Class swaps for every layer that may be recomputed here.

    Args:
        asked: whether the training checkpoints; None where only the layers themselves can tell, now or later.
    """
    finding = Finding("checkpointing", "slots, no weak dictionaries", Exactness.EXACT)
    layers, swaps = [], []
    for name, layer in layers_of(model).items():
        finding.found += 1
        function = layer.__dict__.get(_ATTRIBUTE)
        reason = _conflict(layer, asked, layer in _RECOMPUTED)
        # A trainer that asks switches it on later, by its own arguments.
        if reason is None and not (asked or (layer.gradient_checkpointing and recomputation.understands(function))):
            reason = "acts once gradient checkpointing is on, with use_reentrant=False"
        if reason is None:
            finding.patched += 1
        else:
            finding.refuse(reason)
        if (reason is None or reason.startswith("acts once")) and layer not in _RECOMPUTED:
            layers.append(layer)
            swaps.append(_HandOut("checkpointing", name, layer))
    if layers:
        finding.patches = [_Recomputed(layers), *swaps]
    return finding


def _conflict(layer: Any, asked: bool | None, patched: bool) -> str | None:
    """Why the function of a layer is called as it is, or None."""
    if not patched and type(layer).__name__.startswith("FSDP"):
        return "already wrapped by FSDP"
    if not asked and layer.gradient_checkpointing and not _is_plain_checkpoint(layer.__dict__.get(_ATTRIBUTE)):
        return "checkpointed selectively, or by a function other than torch's"
    if asked is False and not layer.gradient_checkpointing:
        return "gradient checkpointing is off"
    return None


def find_offload(
    model: nn.Module, *, asked: bool | None, why_not: Callable[[int, float], str | None], budget: int
) -> Finding:
    """A store, and class swaps for every layer whose input may wait in it.

    Args:
        asked: whether the training checkpoints; None where only the layers themselves can tell, now or later.
        why_not: given bytes per token of a layer's input and FLOP per token of its forward, why it stays stock.
        budget: bytes of host memory to use at most.
    """
    finding = Finding("offload", "pinned host memory", Exactness.EXACT)
    store, swaps, layers = HostStore(lambda device: COPIES[device.type](device), budget), [], []
    visits = _experts_per_token(model)
    for name, layer in layers_of(model).items():
        finding.found += 1
        reason = _conflict(layer, asked, layer in _STORES) or why_not(*sizes_of(layer, visits))
        if reason is None and layer not in _STORES:
            layers.append(layer)
            swaps.append(_HandOut("offload", name, layer))
        if reason is None and not (asked or layer.gradient_checkpointing):
            reason = "acts once gradient checkpointing is on"
        if reason is None:
            finding.patched += 1
        else:
            finding.refuse(reason)
    if layers:
        finding.patches = [_Stores(layers, store), *swaps]
    return finding


def find_memory(model: nn.Module, plan: kept_layers.Plan) -> Finding:
    """Stacks of layers that need not be recomputed where memory is free: those that `find` has.

    Args:
        plan: how many are kept.
    """
    finding = Finding("memory", "kept where memory is free", Exactness.EXACT)
    stacks: dict[str, list[nn.Module]] = {}
    names, visits = layers_of(model), _experts_per_token(model)
    for name, layer in names.items():
        finding.found += 1
        if layer not in _RECOMPUTED:
            finding.refuse("gradient checkpointing is off, or torch's own")
            continue
        if any(name.startswith(f"{other}.") for other in names):
            finding.refuse("inside another checkpointed layer")
            continue
        finding.patched += 1
        if layer not in kept_layers.PLACES:
            stacks.setdefault(name.rpartition(".")[0], []).append(layer)
    for name, layers in stacks.items():
        if len({parameter.device for layer in layers for parameter in layer.parameters()}) > 1:
            finding.patched -= len(layers)
            finding.refuse("layers on several devices", len(layers))
        else:
            flops = [sizes_of(layer, visits)[1] for layer in layers]
            finding.patches += [*_seams(model.get_submodule(name.rpartition(".")[0])), _Keeps(layers, plan, flops)]
    return finding


def _seams(backbone: nn.Module) -> list[Patch]:
    """Patches by which attention comes to know that its outputs are kept; none where it is not understood."""
    if not hasattr(backbone, "config") or not hasattr(backbone, "layers"):
        return []
    try:
        return list(attention_seams.seams(backbone))
    except NotUnderstood:
        return []


def _stacks_of(model: nn.Module) -> set[kept_layers.Stack]:
    return {kept_layers.PLACES[layer][0] for layer in layers_of(model).values() if layer in kept_layers.PLACES}


def tighten(model: nn.Module) -> bool:
    """After memory ran out: layers keep half as much as before. False where none was kept since the last time."""
    tightened = [stack.tighten() for stack in _stacks_of(model)]
    return any(tightened)


class Added(Patch):
    """Checkpointing of a model whose script did not ask for it, without reentrant autograd: the same bits."""

    id = "checkpointing:added"

    def __init__(self, model: Any):
        self._model = weakref.ref(model)

    @staticmethod
    def can_apply(model: Any) -> bool:
        """Whether the model knows how to checkpoint, and none of its layers does so already."""
        layers = layers_of(model).values()
        knows = getattr(model, "supports_gradient_checkpointing", False) and hasattr(
            model, "gradient_checkpointing_enable"
        )
        return knows and bool(layers) and not any(each.gradient_checkpointing for each in layers)

    def apply(self) -> None:
        model = self._model()
        if model is not None:
            _switch_of(model, "enable")({"use_reentrant": False})

    def revert(self) -> bool:
        model = self._model()
        if model is not None:
            _switch_of(model, "disable")()
        return True


def _switch_of(model: Any, name: str) -> Callable[..., None]:
    # Renamed after transformers 5.17, which has the second name only.
    switch: Callable[..., None] | None = getattr(model, f"activation_checkpointing_{name}", None)
    return switch or getattr(model, f"gradient_checkpointing_{name}")


def trainer_asks(trainer: Any) -> bool:
    """Whether `train()` switches checkpointing on."""
    # Renamed after transformers 5.17, which has the second name only.
    return any(getattr(trainer.args, f"{name}_checkpointing", False) for name in ("activation", "gradient"))


def is_reentrant(trainer: Any) -> bool:
    """Whether a training goes backward from within backward, layer by layer, or its model may do so already."""
    kwargs = _trainer_kwargs(trainer)
    if trainer_asks(trainer) and kwargs and kwargs.get("use_reentrant") is not False:
        return True
    layers = {} if trainer.model is None else layers_of(trainer.model)  # of a model_init they are stock
    on = (layer for layer in layers.values() if layer.gradient_checkpointing)
    return any(recomputation.is_reentrant(layer.__dict__.get(_ATTRIBUTE)) for layer in on)


def trainer_conflict(trainer: Any) -> str | None:
    """Why this trainer's checkpoints are torch's own business, or None."""
    kwargs = _trainer_kwargs(trainer)
    if kwargs.get("offload"):
        return "checkpointing with offload=True: transformers offloads by itself"
    if kwargs.get("selective") or "context_fn" in kwargs:
        return "selective checkpointing"
    if getattr(trainer.args, "torch_compile", False):
        return "torch.compile decides what is kept for backward"
    return None


def recomputation_conflict(trainer: Any) -> str | None:
    """Why this trainer's layers are recomputed by torch, or None."""
    kwargs = {name: value for name, value in _trainer_kwargs(trainer).items() if name != "every_n_layers"}
    odd = not recomputation.understands(functools.partial(checkpoint, **kwargs)) if kwargs else False
    conflict = trainer_conflict(trainer)
    return conflict or (f"{', '.join(f'{k}={v!r}' for k, v in kwargs.items())} is torch's to do" if odd else None)


def is_recomputed(model: nn.Module) -> bool:
    """Whether all its layers are recomputed here, where they are."""
    return all(layer in _RECOMPUTED for layer in layers_of(model).values())


def is_offloaded(model: nn.Module) -> bool:
    """Whether inputs of its layers go to host memory, where they are recomputed."""
    return any(layer in _STORES for layer in layers_of(model).values())


def offload_conflict(trainer: Any) -> str | None:
    """Why this trainer's checkpoints stay where they are, or None."""
    if getattr(trainer.args, "activation_offloading", False):
        return "activation_offloading is on: TRL offloads by itself"
    return trainer_conflict(trainer)


def _trainer_kwargs(trainer: Any) -> dict[str, Any]:
    for name in ("activation", "gradient"):
        kwargs = getattr(trainer.args, f"{name}_checkpointing_kwargs", None)
        if kwargs:
            return dict(kwargs)
    return {}


def end_training(model: nn.Module | None) -> str | None:
    """Frees the host memory; the next training takes it again. Returns what became of recomputation, for the report."""
    if model is None:
        return None
    for store in {_STORES[layer] for layer in layers_of(model).values() if layer in _STORES}:
        store.trim()
    stacks = _stacks_of(model)
    layers = sum(stack.passes * stack.layers for stack in stacks)
    kept, attended = sum(stack.kept for stack in stacks), sum(stack.attended for stack in stacks)
    for stack in stacks:
        stack.forget()
    if not (kept or attended):
        return None
    note = f"memory: {kept / layers:.0%} of the checkpointed layers' passes needed no recomputation"
    return f"{note}, {attended / layers:.0%} none of attention" if attended else note


def sizes_of(layer: nn.Module, experts_per_token: int | None = None) -> tuple[int, float]:
    """Bytes per token of a layer's input and FLOP per token of its forward, attention scores left out.

    Read off its weights: the first linear layer takes hidden states, and they have the dtype of the norms' weights.
    """
    weights, width, itemsize = 0.0, 0, 0
    for module in layer.modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not any(module.children()):
            # Quantized weights are packed: their number is not that of their elements.
            weights += int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
            width = width or int(module.in_features)  # type: ignore[arg-type]
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1 and parameter.is_floating_point():
                itemsize = itemsize or parameter.element_size()
            elif parameter.ndim == 2:
                weights += parameter.numel()
                width = width or parameter.shape[0]
            elif parameter.ndim == 3:  # experts
                weights += parameter.numel() * min((experts_per_token or parameter.shape[0]) / parameter.shape[0], 1.0)
    return width * (itemsize or 2), 2 * weights


def _experts_per_token(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    for candidate in (config, getattr(config, "text_config", None)):
        visits = getattr(candidate, "num_experts_per_tok", None)
        if isinstance(visits, int):
            return visits
    return None
