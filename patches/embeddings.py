"""Trained embeddings whose weight is the language-model head's too: one gradient for both (kernels/tied_embedding.py).

The loss of head.py and trl.py leaves the head's gradient with the embedding. Where they are stock, or autograd does not
come to the embedding after the head, the two gradients are added as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hf_turbo.kernels.tied_embedding import tied_embedding
from torch import nn

from .conflicts import module_conflict
from .engine import (
    ClassSwap,
    Exactness,
    Finding,
    forward_of,
    is_live,
    is_plain,
    is_swapped,
    same_name_subclass,
    stock_class,
)
from .fingerprint import fingerprint
from .trainer import gathers_weights

_SCALED = {"296da2c51a33"}  # Gemma, Gemma 3 and their kin: times `embed_scale`, a buffer


def _is_tied(module: Any, ids: torch.Tensor) -> bool:
    """Whether this call is a lookup in a trained weight and nothing else, by autograd alone."""
    if not is_live() or torch.compiler.is_compiling():
        return False
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and torch.is_grad_enabled()
        and weight.requires_grad
        and is_plain(weight, ids)
        and ids.numel() > 0
        and ids.device == weight.device
        and _options(module) is None
    )


def _make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return tied_embedding(input, self.weight, self.padding_idx) if _is_tied(self, input) else stock(self, input)

    return forward


def _make_scaled_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, input_ids: torch.Tensor) -> torch.Tensor:
        if not _is_tied(self, input_ids):
            return stock(self, input_ids)
        return tied_embedding(input_ids, self.weight, self.padding_idx) * self.embed_scale.to(self.weight.dtype)

    return forward


def _options(module: nn.Embedding) -> str | None:
    """What else than a lookup an embedding does."""
    return next((each for each in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(module, each)), None)


def tied(model: Any) -> nn.Module | None:
    """The embedding that shares a trained weight with the head, if any."""
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "get_input_embeddings")):
        return None
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    weight = getattr(embedding, "weight", None)
    is_trained = isinstance(weight, torch.Tensor) and weight.requires_grad
    return embedding if is_trained and weight is getattr(head, "weight", None) else None


def conflict(trainer: Any) -> str | None:
    """Why a trainer's embeddings, or those of a loop of the script's own, stay stock; or None."""
    kind = gathers_weights(trainer)
    return kind and f"{kind} gathers weights at every pass"


def find(model: Any) -> Finding:
    """The class swap of the embedding that is tied to the head."""
    finding, embedding = Finding("embeddings", "tied_embedding", Exactness.EXACT), tied(model)
    if embedding is None:
        return finding
    finding.found = 1
    if is_swapped(embedding):
        finding.patched = 1
        return finding
    reason = module_conflict(embedding)
    cls, make_forward = stock_class(embedding), _make_forward
    if cls is not nn.Embedding:
        make_forward = _make_scaled_forward
        if reason is None and not (issubclass(cls, nn.Embedding) and fingerprint(forward_of(cls)) in _SCALED):
            reason = f"unknown forward of {cls.__name__}"
    if reason is None and (option := _options(embedding)) is not None:  # type: ignore[arg-type]
        reason = f"the embedding has {option}"
    if reason is not None:
        finding.refuse(reason)
        return finding
    finding.patched = 1
    finding.patches.append(ClassSwap("embeddings", embedding, same_name_subclass(cls, make_forward)))
    return finding
