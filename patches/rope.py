"""Rotary position embedding: the function `apply_rotary_pos_emb` of each modelling module, found by name at call time.

It is a global of the modelling module, so a patch covers every model of that family in the process.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from hf_turbo.kernels.qk_norm_rope import norm_alone, qk_norm_rope
from hf_turbo.kernels.rope import rope
from torch import nn

from . import norms, qk_norms
from .engine import AttributePatch, Exactness, Finding, forward_of, is_live, is_plain
from .fingerprint import fingerprint

_NAME = qk_norms.ROTATION
_ROTATE_SPLIT, _ROTATE_PAIRS = "a7c43aa4785b", "fb477f4d79eb"


class _Body(NamedTuple):
    """Kernel options, and the width of cos and sin as a fraction of the head, None for any up to all of it."""

    width: float | None = 1.0
    options: dict[str, bool] = {}  # noqa: RUF012  (never written)


# (fingerprint of the function, of the helper it calls)
_BODIES = {
    ("fda17366bb43", _ROTATE_SPLIT): _Body(),  # Llama, Mistral, Qwen, Gemma 1-3, SmolLM3, Granite, Mixtral
    ("9c4b6a7f45d8", _ROTATE_SPLIT): _Body(None),  # Phi-3: partial
    ("34c39627a60b", _ROTATE_SPLIT): _Body(None),  # Qwen3-Next, GLM4-MoE: partial
    ("2aa5059a8f92", _ROTATE_PAIRS): _Body(None, {"interleaved": True}),  # GLM, GLM4: partial, pairs of neighbours
    ("398cf48ae120", _ROTATE_SPLIT): _Body(1.0, {"keep_dtype": True}),  # OLMo 2 and 3: fp32 cos and sin, cast back
    ("18cd35a81942", "4bd1db96facd"): _Body(0.5, {"half_width": True}),  # gpt-oss
}
_SINGLE_TENSOR = ("937f38e50c8e", _ROTATE_SPLIT)  # Gemma 3n and 4


def _usable(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int, width: float | None) -> bool:
    if unsqueeze_dim not in (1, 2) or not is_plain(q, k, cos, sin) or q.ndim != 4 or cos.ndim != 3:
        return False
    batch, length, head_dim = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    rotary_dim = cos.shape[-1]
    return (
        q.is_floating_point()
        and (k is None or (k.ndim == 4 and k.dtype == q.dtype and k.device == q.device))
        and (rotary_dim <= head_dim if width is None else rotary_dim == head_dim * width)
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == length
        and cos.shape == sin.shape
        and cos.dtype == sin.dtype
        and cos.device == q.device
        and not (cos.requires_grad or sin.requires_grad)
    )


def _replacement(stock: Callable[..., Any], key: tuple[str, str]) -> Callable[..., Any]:
    if key == _SINGLE_TENSOR:

        def apply_single(x: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
            if not (is_live() and _usable(x, None, cos, sin, unsqueeze_dim, 1.0)):
                return stock(x, cos, sin, unsqueeze_dim)
            return rope(x, None, cos, sin, unsqueeze_dim=unsqueeze_dim)[0]

        return apply_single

    width, options = _BODIES[key]

    def apply_pair(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        of_q, of_k = qk_norms.take(q, k)
        usable = is_live() and k is not None and _usable(q, k, cos, sin, unsqueeze_dim, width)
        if usable and of_q is not None and of_k is not None and of_q.norm == of_k.norm and not options:
            return qk_norm_rope(q, k, of_q.weight, of_k.weight, cos, sin, of_q.norm, unsqueeze_dim=unsqueeze_dim)
        q, k = _normed(q, of_q), _normed(k, of_k)
        if not usable:
            return stock(q, k, cos, sin, unsqueeze_dim)
        return rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **options)

    return apply_pair


def _normed(x: Any, waiting: qk_norms.Waiting | None) -> Any:
    return x if waiting is None else norm_alone(x, waiting.weight, waiting.norm)


def find(model: nn.Module, fuses_norms: bool = True) -> Finding:
    """Patches of the modelling modules' globals that this model's attention layers read.

    Args:
        fuses_norms: whether norms of queries and keys are left to the rotation, which does both in one pass.
    """
    finding = Finding("rope", "rope", Exactness.REASSOCIATED)
    users: Counter[int] = Counter()
    namespaces: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        namespace = _namespace(forward_of(type(module)))
        if namespace is not None:
            users[id(namespace)] += 1
            namespaces[id(namespace)] = namespace
    for key, namespace in namespaces.items():
        count = users[key]
        finding.found += count
        function = namespace[_NAME]
        if getattr(function, "_hf_turbo", False):
            finding.patched += count
            continue
        body = _body(function, namespace)
        if body is None:
            finding.refuse(f"unknown {_NAME} of {namespace['__name__'].rpartition('.')[2]}", count)
            continue
        replacement = _replacement(function, body)
        replacement._hf_turbo = True  # type: ignore[attr-defined]
        if body != _SINGLE_TENSOR:
            qk_norms.ROTATIONS.add(replacement)
        finding.patched += count
        finding.patches.append(AttributePatch(f"rope:{namespace['__name__']}", namespace, _NAME, replacement))
    if fuses_norms and finding.patched == finding.found:
        together = qk_norms.patches_of(model, norms.understood)
        finding.patches += together
        finding.kernel = "qk_norm_rope" if together else finding.kernel
    return finding


@cache
def _namespace(forward: Callable[..., Any]) -> dict[str, Any] | None:
    """Globals in which a forward looks up the function, whatever is around it; None where it does not."""
    forward = inspect.unwrap(forward)
    code = getattr(forward, "__code__", None)
    if code is None or _NAME not in code.co_names:
        return None
    return forward.__globals__ if _NAME in forward.__globals__ else None


def _body(function: Any, namespace: dict[str, Any]) -> tuple[str, str] | None:
    for helper in ("rotate_half", "_apply_rotary_emb"):
        key = (fingerprint(function) or "", fingerprint(namespace.get(helper)) or "")
        if key in _BODIES or key == _SINGLE_TENSOR:
            return key
    return None
