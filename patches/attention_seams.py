"""Where the attention layers of a backbone come to know documents, by the attention that its config names.

    "sdpa"     the entry of transformers' registry
    "eager"    the function of the modelling file that its layers hand to the registry as the default. It is a global of
               that file. The registry has no key "eager", and gets none: others list its keys and check names by them
    others     the entry that is transformers' own for FlashAttention, which is told where documents begin

Without documents each is stock. Eager functions are known by their fingerprints: one that does something else to the
scores is left alone, and so is the backbone.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import kept_attention
from .engine import ProcessPatch, forward_of
from .fingerprint import fingerprint, syntax_tree, unwrapped
from .varlen import Documents, NotUnderstood, attend

MODELS = "transformers.modeling_utils"
_FLASH = "transformers.integrations.flash_attention"
_COMPUTED_HERE = ("sdpa", "eager")

# Of transformers 5.17 to 5.23: softmax(scale * q k^T + mask) v of most families; that of the Gemma families, which caps
# the scores if it is given a softcap; and that of gpt-oss, which reads the sinks off its module.
_PLAIN, _CAPPED, _WITH_SINKS = "828ebe6c88fd", "f9088cd612eb", "3073475f7186"


def seams(backbone: Any) -> list[ProcessPatch]:
    """Patches by which the attention layers of a backbone come to know documents.

    Raises:
        NotUnderstood: why there are none.
    """
    implementation = getattr(backbone.config, "_attn_implementation", None)
    if implementation == "sdpa":
        found = [_sdpa(_registry())]
    elif implementation == "eager":
        classes = dict.fromkeys(type(each.self_attn) for each in backbone.layers if hasattr(each, "self_attn"))
        found = list(dict.fromkeys(_eager(*_eager_global(each)) for each in classes))
    else:
        found = [_flash(_registry(), implementation)]
    if not all(patch.can_apply() for patch in found):
        raise NotUnderstood(f"the attention function of {implementation!r} was replaced")
    return found


def is_computed_here(implementation: str | None) -> bool:
    """Whether documents are attended to by kernels/varlen_attention.py, and not by the user's own FlashAttention."""
    return implementation in _COMPUTED_HERE


def _registry() -> Any:
    """transformers' attention functions by name."""
    registry = getattr(sys.modules.get(MODELS), "AttentionInterface", None)
    if registry is None:
        raise NotUnderstood("transformers has no registry of attention functions")
    return registry


def _seam(id: str, functions: dict[str, Any], name: str, by_documents: Callable[..., Any]) -> ProcessPatch:
    """The patch of an attention function that calls `by_documents(documents, module, query, key, value, ...)` instead,
    with what else it is called with but the mask, where there are documents."""
    stock = functions[name]

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        documents = kwargs.get("documents")
        if not isinstance(documents, Documents):
            keeper = kept_attention.current()
            if keeper is None:
                return stock(module, query, key, value, attention_mask, *args, **kwargs)
            with keeper.watching():
                return stock(module, query, key, value, attention_mask, *args, **kwargs)
        del kwargs["documents"]
        return by_documents(documents, module, query, key, value, *args, **kwargs)

    return ProcessPatch(id, functions, name, attention)


@functools.cache
def _sdpa(registry: Any) -> ProcessPatch:
    def by_documents(
        documents: Documents,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs.update(dropout=dropout, scaling=scaling, is_causal=is_causal)
        return attend(documents, module, query, key, value, **kwargs), None

    return _seam("padding:sdpa", registry._global_mapping, "sdpa", by_documents)


def _eager_global(attention: type) -> tuple[ModuleType, str]:
    """The module of an attention class, and the name there of the function that its forward takes for "eager"."""
    forward = unwrapped(forward_of(attention))
    tree, module = syntax_tree(forward), sys.modules.get(getattr(forward, "__module__", ""))
    if tree is None or module is None or vars(module) is not forward.__globals__:
        raise NotUnderstood("the source of its attention cannot be read")
    names = {
        node.args[1].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get_interface"
        and len(node.args) == 2
        and isinstance(node.args[1], ast.Name)
    }
    if len(names) != 1 or not names <= vars(module).keys():
        raise NotUnderstood("the eager function of its attention was not found")
    return module, names.pop()


@functools.cache
def _eager(module: ModuleType, name: str) -> ProcessPatch:
    """Raises NotUnderstood where the function computes anything else than is computed here."""
    body = fingerprint(vars(module)[name])
    if body not in (_PLAIN, _CAPPED, _WITH_SINKS):
        raise NotUnderstood("the eager function of its attention is not known")

    def by_documents(
        documents: Documents,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if args or kwargs.get("scaling") is None:
            raise NotUnderstood("attention is called without a scale")
        if not module.training:
            kwargs["dropout"] = 0.0
        if body == _CAPPED:
            kwargs["cap"] = kwargs.pop("softcap", None)
        if body == _WITH_SINKS:
            kwargs["sinks"], kwargs["s_aux"] = module.sinks, None
        return attend(documents, module, query, key, value, **kwargs), None

    return _seam(f"padding:{module.__name__}.{name}", vars(module), name, by_documents)


@functools.cache
def _flash(registry: Any, implementation: str | None) -> ProcessPatch:
    """Raises NotUnderstood where the entry is another function."""
    mapping = registry._global_mapping
    flash = getattr(sys.modules.get(_FLASH), "flash_attention_forward", None)
    if flash is None or implementation is None or mapping.get(implementation) is not flash:
        raise NotUnderstood(f"attn_implementation is {implementation!r}")

    def by_documents(
        documents: Documents,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        position_ids: torch.Tensor | None = None,  # read off the device, in each layer, to find what is given here
        **kwargs: Any,
    ) -> Any:
        if not query.shape[2] or key.shape[2] != query.shape[2]:
            raise NotUnderstood("attention has other keys than those of the tokens, or no tokens at all")
        documents.calls += 1
        kwargs["cu_seq_lens_q"] = kwargs["cu_seq_lens_k"] = documents.starts
        kwargs["max_length_q"] = kwargs["max_length_k"] = documents.longest
        return flash(module, query, key, value, None, *args, **kwargs)

    return _seam(f"padding:{implementation}", mapping, implementation, by_documents)
