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
from .engine import ClassSwap, Exactness, Finding, is_live, is_plain, is_swapped, same_name_subclass, stock_class
from .trainer import gathers_weights


def _make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if not is_live() or torch.compiler.is_compiling():
            return stock(self, input)
        weight = self._parameters.get("weight")
        if (
            weight is None
            or not (torch.is_grad_enabled() and weight.requires_grad)
            or not is_plain(weight, input)
            or input.numel() == 0
            or input.device != weight.device
            or _options(self) is not None
            or torch._C._are_functorch_transforms_active()
        ):
            return stock(self, input)
        return tied_embedding(input, weight, self.padding_idx)

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
    if reason is None and stock_class(embedding) is not nn.Embedding:
        reason = f"a {type(embedding).__name__}, not a plain embedding"
    if reason is None and (option := _options(embedding)) is not None:  # type: ignore[arg-type]
        reason = f"the embedding has {option}"
    if reason is not None:
        finding.refuse(reason)
        return finding
    finding.patched = 1
    finding.patches.append(ClassSwap("embeddings", embedding, same_name_subclass(nn.Embedding, _make_forward)))
    return finding
