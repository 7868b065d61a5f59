"""What speaks against computing a backbone's batches without padding, read off its source, its config and its hooks."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from . import attention_seams, varlen
from .deepspeed import is_of_zero
from .engine import forward_of
from .fingerprint import syntax_tree, unwrapped

DEVICES = {"cpu", "cuda"}

_FSDP2 = "torch.distributed.fsdp._fully_shard."
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


def conflict(backbone: Any, device_type: str) -> str | None:
    """Why a backbone stays stock, or None."""
    if device_type not in DEVICES:
        return f"attention by documents has not been measured on {device_type}"
    if "forward" in backbone.__dict__:
        return "an instance forward"
    if any("forward" in module.__dict__ for module in backbone.layers.modules()):
        return "an instance forward in a layer"
    if len({parameter.device for parameter in backbone.parameters()}) > 1:
        return "its layers are on several devices"
    kinds = _rope_types(backbone.config)
    if any("dynamic" in kind or kind == "longrope" for kind in kinds):
        return "its rotary embedding depends on the longest row"
    try:
        attention_seams.seams(backbone)
    except varlen.NotUnderstood as error:
        return str(error)
    return HookWatch(backbone).conflict() or _mask_conflict(forward_of(type(backbone))) or _windows_conflict(backbone)


def is_harmless(hook: Any) -> bool:
    """Whether a hook does not care for shapes.

    It makes embeddings require gradients, waits to record outputs, or gathers the weights of a layer (FSDP2,
    ZeRO-3).
    """
    module = getattr(hook, "__module__", None) or ""
    is_known = module == "transformers.utils.output_capturing" or module.startswith(_FSDP2)
    return is_known or is_of_zero(hook) or "make_inputs_require_grad" in getattr(hook, "__qualname__", "")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class HookWatch:
    """The hooks inside a backbone, those of the backbone itself left out: they see what they have always seen.

    Hooks come and go during training, and a walk over all modules takes milliseconds: their dictionaries are collected
    once, and looked into again where others are in them.
    """

    def __init__(self, backbone: nn.Module):
        inside = [module for module in backbone.modules() if module is not backbone]
        self._of_modules: list[dict[int, Any]] = [getattr(module, hooks) for module in inside for hooks in _HOOKS]
        self._seen: list[Any] = []
        self._conflict = ""

    def conflict(self) -> str | None:
        """Why these hooks speak against passes without padding, or None."""
        if nn.modules.module._has_any_global_hook():
            return "hooks on all modules would see other shapes"
        hooks = [hook for each in self._of_modules if each for hook in each.values()]
        if hooks != self._seen:
            self._seen = hooks
            self._conflict = "" if all(map(is_harmless, hooks)) else "hooks on its layers would see other shapes"
        return self._conflict or None


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding that a config names, maybe one for each type of layer."""
    found: set[str] = set()
    waiting = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            found |= {str(each[name]) for name in ("rope_type", "type") if isinstance(each.get(name), str)}
            waiting += each.values()
    return found


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


@functools.cache
def masks_know_positions(forward: Callable[..., Any]) -> bool:
    """Whether a backbone's forward hands positions to all masks it makes: where they start anew, a document does."""
    tree = syntax_tree(forward)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _MASKS:
            names = {keyword.arg for keyword in node.keywords}
            if not names & {"position_ids", None}:
                return False
        if isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            if "attention_mask" in keys and "position_ids" not in keys:
                return False
    return tree is not None


def _windows_conflict(backbone: Any) -> str | None:
    """Why windows of attention would be lost: stock puts them into the mask, here the layers have to name them."""
    if getattr(backbone.config, "use_bidirectional_attention", False):
        return "attention is bidirectional"
    for layer in backbone.layers:
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            return "a layer has no self_attn"
        try:
            source = inspect.getsource(unwrapped(forward_of(type(attention))))
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


def dropouts(backbone: Any) -> list[float]:
    """Probabilities of all that is dropped or jittered, by modules of torch or by functions, as far as names tell."""
    found = [module.p for module in backbone.modules() if isinstance(module, nn.Dropout)]
    for owner in (backbone.config, *backbone.layers.modules()):
        for name, value in vars(owner).items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and ("drop" in name or "jitter" in name):
                found.append(float(value))
    return found
