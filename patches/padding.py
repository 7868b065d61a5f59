"""Padding-free passes: the text backbone computes the tokens of a batch, and not its padding.

In front of the backbone `[B, S]` with a mask becomes `[1, tokens]`, each token at the position it had; behind it the
hidden states return to their places, with zeros where padding was. In between, attention runs document by document
(kernels/varlen_attention.py); everything else in a decoder layer is done token by token. The seam in attention is
transformers' registry entry "sdpa", which acts where a layer hands it the lengths of documents, and is stock otherwise.

A row that the script has packed itself, positions starting anew at each document, goes the same way, and needs no mask
of all tokens by all tokens.

What could go wrong is ruled out in this order:

* The backbone's `forward` may use the mask for nothing but to make causal masks (read off its source), full or with a
  window that the attention layers pass on.
* In the first pass every layer has to call the seam, as many times as there are layers: a layer with another kind of
  memory (convolution, recurrence, attention of its own) does not, and the pass is done again by stock.
* Where padding bears labels, its hidden states count: such batches stay stock (`labels_on_padding`), and a gradient
  that arrives at padding switches the feature off, loudly.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hf_turbo.kernels.varlen_attention import varlen_attention
from torch import nn

from .engine import (
    ClassSwap,
    Exactness,
    Finding,
    ProcessPatch,
    forward_of,
    is_live,
    is_swapped,
    same_name_subclass,
    stock_class,
)
from .fingerprint import syntax_tree

MODELS = "transformers.modeling_utils"
DEVICES = {"cpu"}

_MASKS = {"create_causal_mask", "create_sliding_window_causal_mask"}
_MASK_ARGUMENTS = {
    "attention_mask",
    "cache_position",
    "config",
    "input_embeds",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
}
# Arguments of a backbone's forward: to be flattened, for the loss alone, and those that must be off.
_FLATTENED = {"input_ids", "attention_mask", "position_ids", "inputs_embeds"}
_OF_LOSS = {"labels", "shift_labels", "num_items_in_batch"}
_OF_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"}
_OFF = ("output_attentions", "output_hidden_states", "output_router_logits")


class Documents:
    """The documents of a flattened pass, as the layers hand them to attention.

    Attributes:
        lengths: in tokens.
        calls: of the seam.
    """

    def __init__(self, lengths: list[int]):
        self.lengths, self.calls = lengths, 0


class _NotUnderstood(Exception):
    """A layer asks for attention that does not run by documents."""


# ------------------------------------------------------------------------------------------------------------ attention


@functools.cache
def _attention_patch(registry: Any) -> ProcessPatch:
    mapping = registry._global_mapping
    stock = mapping["sdpa"]

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        documents = kwargs.get("documents")
        if not isinstance(documents, Documents):
            return stock(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise _NotUnderstood("attention is not causal")
        for name in ("softcap", "s_aux", "position_bias", "cache"):
            if kwargs.get(name) is not None:
                raise _NotUnderstood(f"attention takes {name}")
        documents.calls += 1
        window = kwargs.get("sliding_window")
        output = varlen_attention(
            query[0], key[0], value[0], documents.lengths, scale=scaling, window=window, dropout=dropout
        )
        return output[None], None

    return ProcessPatch("padding:sdpa", mapping, "sdpa", attention)


# ------------------------------------------------------------------------------------------------------------- backbone


class _State:
    """What is known of one backbone.

    Attributes:
        reason: why it stays stock after all; found in its first pass, or by a gradient at padding.
        tried: whether a flattened pass went through.
        skip: whether the batches of the present step bear labels on padding.
        stock_tokens, tokens: that stock would have computed, and that were computed.
    """

    def __init__(self) -> None:
        self.reason, self.tried, self.skip = "", False, False
        self.stock_tokens = self.tokens = 0


_STATES: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()


class _Restore(torch.autograd.Function):
    """[1, tokens, H] to [B, S, H], zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, index: torch.Tensor, rows: int, columns: int, state: _State) -> Any:
        ctx.save_for_backward(index)
        ctx.state = state
        padded = flat.new_zeros(rows * columns, flat.shape[-1])
        return padded.index_copy_(0, index, flat[0]).view(rows, columns, -1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        of_padding = torch.ones(len(dy), dtype=torch.bool, device=dy.device).index_fill_(0, index, False)
        if not ctx.state.reason and bool(dy[of_padding].any()):
            ctx.state.reason = "the loss depends on padding"
            warnings.warn(
                "hf_turbo: this loss depends on the hidden states of padding, which hf_turbo had left out; from here "
                "on they are computed. Use padding=False for a run that agrees with stock from its first step",
                RuntimeWarning,
                stacklevel=2,
            )
        return dy.index_select(0, index)[None], None, None, None, None


def _make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    parameters = [
        each for each in inspect.signature(stock).parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    names = [each.name for each in parameters[1:]]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not is_live() or len(args) > len(names):
            return stock(self, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        state = _STATES.get(self)
        if state is None or state.reason or not _may_flatten(self, kwargs):
            return stock(self, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None:
            lengths = _packed(kwargs["position_ids"])
            output = None if lengths is None else _run(self, stock, kwargs, Documents(lengths), state)
            return stock(self, **kwargs) if output is None else output
        real = mask != 0
        rows, columns = real.shape
        counts = real.sum(1).tolist()
        if state.skip or min(counts) == columns:
            return stock(self, **kwargs)
        index = real.flatten().nonzero().flatten()
        output = _run(self, stock, _flattened(kwargs, index), Documents(counts), state)
        if output is None:
            return stock(self, **kwargs)
        state.tokens += len(index)
        state.stock_tokens += rows * columns
        output.last_hidden_state = _Restore.apply(output.last_hidden_state, index, rows, columns, state)
        return output

    return forward


def _run(backbone: Any, stock: Callable[..., Any], kwargs: dict[str, Any], documents: Documents, state: _State) -> Any:
    """One row of documents through the backbone; None where it turns out that it cannot be done, as if never tried."""
    random = None if state.tried else torch.get_rng_state()
    # A mask of four dimensions is taken for one that is made already, and handed to the layers. It fits no scores, so
    # that stock attention, should it get it after all (switched off before a layer is recomputed), does not go wrong.
    mask = torch.ones(1, 1, 1, sum(documents.lengths) + 1, dtype=torch.bool, device=kwargs["position_ids"].device)
    # The config's default may be a cache, where a plain loop leaves it on: nobody generates from this pass.
    kwargs = {**kwargs, "attention_mask": mask, "documents": documents, "use_cache": False}
    try:
        output = stock(backbone, **kwargs)
        layers = len(backbone.layers)
        if not state.tried and documents.calls != layers:
            raise _NotUnderstood(f"{documents.calls} of {layers} layers attend through the registry")
    except _NotUnderstood as error:
        state.reason = str(error)
        if random is not None:
            torch.set_rng_state(random)
        return None
    state.tried = True
    return output


def _packed(position_ids: torch.Tensor) -> list[int] | None:
    """Lengths of the documents in a packed row, as stock finds them: where positions do not go on. None for one."""
    starts = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    bounds = [0, *starts.tolist(), position_ids.shape[1]]
    return [end - start for start, end in pairwise(bounds)] if len(bounds) > 2 else None


def _may_flatten(backbone: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call is of a training on padded or packed rows, and asks for nothing but hidden states."""
    mask, config = kwargs.get("attention_mask"), backbone.config
    inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    position_ids = kwargs.get("position_ids")
    if not (
        torch.is_grad_enabled()
        and backbone.training
        and isinstance(inputs, torch.Tensor)
        and inputs.numel() > 0
        and inputs.device.type in DEVICES
        and (_is_mask(mask, inputs) if mask is not None else len(inputs) == 1 and _has_documents(config, kwargs))
        and config._attn_implementation == "sdpa"
        and kwargs.get("past_key_values") is None
        and not kwargs.get("use_cache")
        and kwargs.get("return_dict") is not False
    ):
        return False
    if not all(map(_is_harmless, backbone.embed_tokens._forward_hooks.values())):
        return False  # NEFTune's noise goes by shape
    if any(getattr(config, name, False) if kwargs.get(name) is None else kwargs[name] for name in _OFF):
        return False
    if position_ids is not None and not (position_ids.ndim == 2 and position_ids.shape[1] == inputs.shape[1]):
        return False
    # Anything else that goes by token would have to be flattened too.
    known = _FLATTENED | _OF_LOSS | (_OF_PACKING if mask is None else set())
    return not any(isinstance(value, torch.Tensor) for name, value in kwargs.items() if name not in known)


def _has_documents(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether stock keeps the documents of a packed row apart, if there are any: not where it makes a cache."""
    use_cache = kwargs.get("use_cache")
    return kwargs.get("position_ids") is not None and not (config.use_cache if use_cache is None else use_cache)


def _is_mask(mask: Any, inputs: torch.Tensor) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape == inputs.shape[:2]


def _is_harmless(hook: Any) -> bool:
    """Whether a hook does not care for shapes: it makes embeddings require gradients, or waits to record outputs."""
    is_recorder = getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
    return is_recorder or "make_inputs_require_grad" in getattr(hook, "__qualname__", "")


def _flattened(kwargs: dict[str, Any], index: torch.Tensor) -> dict[str, Any]:
    """The same call on the tokens at `index` of all rows together."""
    mask, position_ids = kwargs["attention_mask"], kwargs.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(mask.shape[1], device=mask.device)[None]
    flat = dict(kwargs)
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            flat[name] = kwargs[name].flatten(0, 1).index_select(0, index)[None]
    flat["position_ids"] = position_ids.expand(mask.shape).flatten().index_select(0, index)[None]
    return flat


# ------------------------------------------------------------------------------------------------------------- findings


@functools.cache
def _mask_conflict(forward: Callable[..., Any]) -> str | None:
    """Why flattening would change what a backbone's forward computes, as far as its source tells."""
    tree = syntax_tree(forward)
    if tree is None:
        return "its source cannot be read"
    allowed: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name == "isinstance":
                allowed |= {id(each) for each in ast.walk(node.args[0])}
            if name in _MASKS or name == "mask_function":
                arguments = {keyword.arg for keyword in node.keywords} - {None}
                if node.args or not arguments <= _MASK_ARGUMENTS:
                    return f"{name} is called with {', '.join(sorted(map(str, arguments - _MASK_ARGUMENTS)))}"
                allowed |= {id(keyword.value) for keyword in node.keywords}
        if isinstance(node, ast.Dict):
            keys = {str(key.value) for key in node.keys if isinstance(key, ast.Constant)}
            if "attention_mask" in keys:
                if not keys <= _MASK_ARGUMENTS:
                    return f"masks depend on {', '.join(sorted(keys - _MASK_ARGUMENTS))}"
                allowed |= {id(value) for value in node.values}
        if isinstance(node, ast.Name) and node.id.startswith("create_") and node.id not in _MASKS:
            return f"masks are made by {node.id}"
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if "create_causal_mask" not in names:
        return "it makes no causal mask"
    for node in ast.walk(tree):
        reads = isinstance(node, ast.Name) and node.id == "attention_mask" and isinstance(node.ctx, ast.Load)
        if reads and id(node) not in allowed:
            return "it reads the mask itself"
    return None


def _windows_conflict(backbone: Any) -> str | None:
    """Why windows of attention would be lost: stock puts them into the mask, here the layers have to name them."""
    if getattr(backbone.config, "use_bidirectional_attention", False):
        return "attention is bidirectional"
    for layer in backbone.layers:
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            return "a layer has no self_attn"
        try:
            source = inspect.getsource(inspect.unwrap(forward_of(type(attention))))
        except (OSError, TypeError):
            return "the source of its attention cannot be read"
        if "**kwargs" not in source.partition("attention_interface(")[2]:
            return "its attention does not pass arguments on"
        kind = getattr(attention, "layer_type", None) or _layer_type(backbone.config, layer)
        windowed = kind == "sliding_attention" or (kind is None and getattr(backbone.config, "sliding_window", None))
        if windowed and "sliding_window=" not in source:
            return "its attention does not name its window"
    return None


def _layer_type(config: Any, layer: Any) -> str | None:
    types, index = getattr(config, "layer_types", None), getattr(layer.self_attn, "layer_idx", None)
    return types[index] if types and index is not None and index < len(types) else None


def backbones(model: nn.Module) -> dict[str, Any]:
    """Text backbones of transformers inside a model, by name."""
    cls = getattr(sys.modules.get(MODELS), "PreTrainedModel", None)
    return {
        name: module
        for name, module in model.named_modules()
        if cls is not None
        and isinstance(module, cls)
        and isinstance(getattr(module, "layers", None), nn.ModuleList)
        and hasattr(module, "embed_tokens")
    }


def find(model: nn.Module, *, device_type: str) -> Finding:
    """Class swaps for backbones that may compute flattened batches, and the seam in attention."""
    finding = Finding("padding", "varlen_attention", Exactness.REASSOCIATED)
    registry = getattr(sys.modules.get(MODELS), "AttentionInterface", None)
    swaps = []
    for name, backbone in backbones(model).items():
        finding.found += 1
        reason = _conflict(backbone, device_type, registry)
        if reason is not None:
            finding.refuse(reason)
            continue
        finding.patched += 1
        if any(p > 0 for p in _dropouts(backbone)):
            finding.exactness = Exactness.REDRAWN
        if not is_swapped(backbone):
            _STATES[backbone] = _State()
            subclass = same_name_subclass(stock_class(backbone), _make_forward)
            swaps.append(ClassSwap(f"padding:{name}", backbone, subclass))
    if swaps:
        finding.patches = [_attention_patch(registry), *swaps]
    return finding


def _conflict(backbone: Any, device_type: str, registry: Any) -> str | None:
    if device_type not in DEVICES:
        return f"attention by documents has not been measured on {device_type} yet"
    implementation = getattr(backbone.config, "_attn_implementation", None)
    if implementation != "sdpa":
        return f"attn_implementation is {implementation!r}"
    if "forward" in backbone.__dict__:
        return "an instance forward"
    hooks = (
        hook
        for module in backbone.layers.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    if not all(map(_is_harmless, hooks)):
        return "hooks on its layers would see other shapes"
    if registry is None or not _attention_patch(registry).can_apply():
        return "the registry entry 'sdpa' was replaced"
    state = _STATES.get(backbone)
    if state is not None and state.reason:
        return state.reason
    return _mask_conflict(forward_of(type(backbone))) or _windows_conflict(backbone)


def _dropouts(backbone: Any) -> list[float]:
    drops = [module.p for module in backbone.modules() if isinstance(module, nn.Dropout)]
    return [*drops, float(getattr(backbone.config, "attention_dropout", 0.0) or 0.0)]


# ----------------------------------------------------------------------------------------------------------------- host


def labels_on_padding(batch: Any) -> bool:
    """Whether a label of a micro-batch is predicted by padding: the one before it in its row, or itself."""
    labels, mask = (batch.get(name) for name in ("labels", "attention_mask")) if hasattr(batch, "get") else (None, None)
    if not (isinstance(labels, torch.Tensor) and isinstance(mask, torch.Tensor)) or labels.shape != mask.shape:
        return False
    if labels.ndim != 2 or labels.device.type not in DEVICES:
        return False
    padding = mask == 0
    return bool(((labels != -100)[:, 1:] & padding[:, :-1]).any())


def batches_fetched(model: nn.Module, batches: list[Any]) -> None:
    """Looks at the micro-batches of the next step."""
    if not _STATES:  # a walk over all modules takes milliseconds, at every step
        return
    states = [_STATES[module] for module in model.modules() if module in _STATES]
    if states:
        skip = any(map(labels_on_padding, batches))
        for state in states:
            state.skip = skip


def end_training(model: nn.Module | None) -> str | None:
    """What came of it, for the report; None where nothing was flattened."""
    if model is None:
        return None
    states = [_STATES[module] for module in model.modules() if module in _STATES]
    stock_tokens, tokens = (sum(getattr(state, name) for state in states) for name in ("stock_tokens", "tokens"))
    reasons = {state.reason for state in states if state.reason}
    for state in states:
        state.skip, state.stock_tokens, state.tokens = False, 0, 0
    if reasons:
        return f"padding: computed after all, because {'; '.join(sorted(reasons))}"
    if not stock_tokens:
        return None
    removed = 1 - tokens / stock_tokens
    return f"padding: {tokens:,} tokens computed where stock computes {stock_tokens:,} ({removed:.0%} removed)"
