"""Decoder layers of transformers: the residual addition and the norm behind it are one pass, forward and backward.

    residual, y = add_rms_norm(residual, attention)       then the MLP reads y

The sum is rounded before it is normed, as in stock. Where a norm begins the layer there is nothing to add in forward,
but in backward the gradient of the residual stream joins the norm's in the pass that makes it. The addition that ends a
layer stays: the next layer is another module, with checkpointing between them.

Sub-modules are called as in stock, with ordinary tensors, so that hooks, adapters and other patches see what they
would. Where a norm has hooks or an unknown body, it is called too. The query, key and value projections (`linears.py`)
do not keep what the norm gave them, and neither do gate and up (`mlp.py`).

Under autocast y has the 16 bits that all its readers would cast it to, where all are plain linear layers.

Bodies (5.17 and 5.23 agree). Norms behind attention or MLP (Gemma 2 and 3, GLM 4) and multipliers and dropout
(Granite, Phi-3) act before the addition, as calls of their own. OLMo 2 has no norm behind an addition: only its
projections are patched.
"""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels.add_rms_norm import add_rms_norm, dtype_of
from hf_turbo.kernels.linears import Source
from torch import nn

from . import linears, lora, mlp, norms
from .conflicts import module_conflict
from .engine import (
    ClassSwap,
    Exactness,
    Finding,
    Patch,
    forward_of,
    has_forward,
    has_hooks,
    is_live,
    is_plain,
    is_swapped,
    same_name_subclass,
    stock_class,
)
from .fingerprint import fingerprint, syntax_tree


class _Body(NamedTuple):
    """Names of modules and attributes; None where the layer has none.

    Attributes:
        before_mlp: the norm behind the first addition.
        after_attention, after_mlp: what the branch goes through before it is added.
        multiplier: of both branches.
    """

    before_mlp: str = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None
    multiplier: str | None = None


_FORWARDS = {
    "ca2c2d7b384a": _Body(),  # Llama, Mistral, Qwen, Gemma, SmolLM3, GLM, DeepSeek
    "4515fd5958c4": _Body(),  # Mixtral, MiniMax: another order of arguments
    "416a17be3945": _Body(multiplier="residual_multiplier"),  # Granite
    "dc87b3e2f735": _Body(after_attention="resid_attn_dropout", after_mlp="resid_mlp_dropout"),  # Phi-3
    "5267d7f9a557": _Body(
        "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
    ),  # Gemma 2 and 3
    "be17c4472206": _Body(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),  # GLM 4
}
_POST_NORM = {"e2c6151b9ffa"}  # OLMo 2 and 3, EXAONE 4
_FIRST_NORM = "input_layernorm"
_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))


# ---------------------------------------------------------------------------------------------------------- who reads y


@cache
def _reads_by_projections(forward: Callable[..., Any]) -> bool:
    """Whether an attention's forward does nothing with its input but project it and ask for its shape."""
    tree = syntax_tree(forward)
    function = None if tree is None else tree.body[0]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
        return False
    name = function.args.args[1].arg
    known = {projection for names in _PROJECTIONS for projection in names}
    uses = allowed = 0
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == name:
            uses += 1
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name:
            allowed += node.attr == "shape"
        elif isinstance(node, ast.Call) and len(node.args) == 1 and isinstance(node.args[0], ast.Name):
            callee = node.func
            is_projection = (
                isinstance(callee, ast.Attribute)
                and isinstance(callee.value, ast.Name)
                and callee.value.id == "self"
                and callee.attr in known
            )
            allowed += node.args[0].id == name and is_projection
    return uses == allowed > 0


def _projections(attention: nn.Module) -> tuple[Any, ...]:
    for names in _PROJECTIONS:
        members = tuple(attention._modules.get(name) for name in names)
        if all(member is not None for member in members):
            return members
    return ()


def _only_linears_read(module: nn.Module) -> bool:
    """Whether nobody but plain linear layers reads the input of an attention or an MLP, as things are now."""
    if has_hooks(module):
        return False
    if _reads_by_projections(forward_of(stock_class(module))):
        readers = _projections(module)
    else:
        readers = mlp.projections_of(module)
    return bool(readers) and all(map(linears.is_plain_linear, readers))


# --------------------------------------------------------------------------------------------------------- replacements


def _add_and_norm(
    norm: Any, residual: torch.Tensor, branch: torch.Tensor | None, reader: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + branch and the norm of it, which `reader` is given."""
    understood = norms.understood(norm)
    weight = norm._parameters.get("weight")
    if (
        understood is None
        or not is_plain(residual, branch, weight)
        or not residual.is_floating_point()
        or (branch is not None and (branch.shape != residual.shape or not branch.is_floating_point()))
        or any(each is not None and each.device != residual.device for each in (branch, weight))
    ):
        h = residual if branch is None else residual + branch
        return h, norm(h)
    h_dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
    dtype = dtype_of(h_dtype, weight, understood.round_before_weight)
    low = linears.autocast_dtype(residual.device)
    if low not in (None, dtype) and residual.dtype != torch.float64 and _only_linears_read(reader):
        dtype = low
    h, y = add_rms_norm(residual, branch, weight, understood, dtype)
    if y.requires_grad:
        linears.note(y, Source(h.detach(), weight, understood, y.dtype))
    return h, y


@cache
def _make_forward_of(body: _Body) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(stock).parameters.values())[2:]
        # What stock hands to attention even where it was not given.
        defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}

        def scaled(self: Any, branch: torch.Tensor, after: str | None) -> torch.Tensor:
            if after is not None:
                branch = getattr(self, after)(branch)
            return branch if body.multiplier is None else branch * getattr(self, body.multiplier)

        def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if (
                not is_live()
                or args
                or torch.compiler.is_compiling()  # before what it cannot see through
                or type(hidden_states) is not torch.Tensor
                or hidden_states.numel() == 0
                or hidden_states.is_inference()
            ):
                result: torch.Tensor = stock(self, hidden_states, *args, **kwargs)
                return result
            modules = self._modules
            residual, y = _add_and_norm(modules[_FIRST_NORM], hidden_states, None, modules["self_attn"])
            branch, _ = modules["self_attn"](hidden_states=y, **{**defaults, **kwargs})
            branch = scaled(self, branch, body.after_attention)
            residual, y = _add_and_norm(modules[body.before_mlp], residual, branch, modules["mlp"])
            del branch
            return residual + scaled(self, modules["mlp"](y), body.after_mlp)

        return forward

    return make_forward


# ---------------------------------------------------------------------------------------------------------------- find


def _reason(layer: nn.Module, body: _Body | None) -> str | None:
    """Why a layer stays stock, or None."""
    reason = module_conflict(layer)
    if reason is None and body is None:
        reason = f"unknown forward of {stock_class(layer).__name__}"
    if reason is None and body is not None:
        names = (_FIRST_NORM, body.before_mlp, "self_attn", "mlp", body.after_attention, body.after_mlp)
        if any(name is not None and not isinstance(layer._modules.get(name), nn.Module) for name in names):
            reason = "parts are missing"
        else:
            norm: Any = layer._modules[body.before_mlp]
            if norms.understood(norm) is None:
                reason = f"no kernel for a {stock_class(norm).__name__} here"
    return reason


def _projection_patches(name: str, layer: nn.Module) -> list[Patch]:
    """For the MLP, and for the projections of the attention where all are plain linear layers of one input."""
    mlp, attention = layer._modules.get("mlp"), layer._modules.get("self_attn")
    marks: list[Patch] = [] if mlp is None else [linears.MarkPatch(f"linears:{name}.mlp", mlp)]
    return marks + ([] if attention is None else _attention_patches(f"{name}.self_attn", attention))


def _attention_patches(name: str, attention: nn.Module) -> list[Patch]:
    members = _projections(attention)
    if not all(map(linears.is_plain_linear, members)) or any(map(is_swapped, members)):
        return []
    if len({member.in_features for member in members}) != 1 or any(map(module_conflict, members)):
        return []
    swapped = same_name_subclass(nn.Linear, linears.make_forward)
    patches: list[Patch] = [ClassSwap(f"linears:{name}", member, swapped) for member in members]
    if len(members) > 1:
        patches.append(lora.GroupPatch(f"qkv:{name}", members, linears.compute))
    return patches


def find(model: nn.Module, fuses_norms: bool = True) -> Finding:
    """Class swaps for every decoder layer whose forward is understood, and for its attention's projections.

    Args:
        fuses_norms: False: norms stay stock, and only projections are patched.
    """
    finding = Finding("layers", "add_rms_norm, linears" if fuses_norms else "linears", Exactness.REASSOCIATED)
    patches: dict[type, list[Patch]] = {}
    refused: set[type] = set()
    counts: Counter[type] = Counter()
    for name, layer in model.named_modules():
        cls = stock_class(layer)
        if "DecoderLayer" not in cls.__name__ or not hasattr(cls, "forward"):
            continue
        finding.found += 1
        known = fingerprint(forward_of(cls)) or ""
        body = _FORWARDS.get(known)
        attention = layer._modules.get("self_attn")
        if body is not None and has_forward(layer, _make_forward_of(body)):
            finding.patched += 1
            continue
        if attention is not None and (known in _POST_NORM or (body is not None and not fuses_norms)):
            projections = _attention_patches(f"{name}.self_attn", attention)
            if not fuses_norms:
                finding.refuse("norms=False: its norms stay stock")
            if projections or any(has_forward(each, linears.make_forward) for each in _projections(attention)):
                finding.patched += 1
                finding.patches += _projection_patches(name, layer) if projections else []
            elif fuses_norms:
                finding.refuse("no norm behind an addition, and no plain projections")
            continue
        reason = _reason(layer, body)
        if reason is not None or body is None:
            finding.refuse(reason or "")
            refused.add(cls)
            continue
        counts[cls] += 1
        swap = ClassSwap(f"layers:{name}", layer, same_name_subclass(cls, _make_forward_of(body)))
        patches.setdefault(cls, []).extend([swap, *_projection_patches(name, layer)])
    for cls, found in patches.items():
        if cls in refused:
            # FSDP's policies wrap the instances of the class of the first layer that they find.
            finding.refuse("another layer of its class stays stock", counts[cls])
        else:
            finding.patched += counts[cls]
            finding.patches += found
    return finding
