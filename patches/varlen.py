"""Attention by documents: the seam between a flattened pass and the attention layers of transformers.

A layer calls the registry's entry "sdpa" with whatever keyword arguments the backbone was given. Where `documents` is
among them, attention runs within these (kernels/varlen_attention.py); otherwise the entry is stock.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from hf_turbo.kernels.varlen_attention import needs_lengths, varlen_attention
from torch import nn

from .engine import ProcessPatch

IMPLEMENTATION = "sdpa"
MODELS = "transformers.modeling_utils"
_NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "cache")


class Documents:
    """The documents of a flattened pass, as the layers hand them to attention.

    Attributes:
        lengths: in tokens; None where they stand in `starts` alone.
        starts: [documents + 1] int32 on the pass's device: where each begins, and where the last ends.
        longest: no document has more tokens.
        calls: of the seam.
        needs_lengths: whether attention goes by `lengths`, and not by `starts`; known after the first call.
    """

    def __init__(self, lengths: list[int] | None, starts: torch.Tensor | None, longest: int):
        self.lengths, self.starts, self.longest, self.calls = lengths, starts, longest, 0
        self.needs_lengths = False

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Documents:
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=starts[1:])
        return cls(lengths, starts.to(device, non_blocking=True), max(lengths))


def no_mask(tokens: int, device: torch.device) -> torch.Tensor:
    """What stands for the mask in a flattened pass.

    A mask of four dimensions is taken for one that is made already, and handed to the layers. It fits no scores, so
    that stock attention, should it get it after all (switched off before a layer is recomputed), does not go wrong.
    """
    return torch.ones(1, 1, 1, tokens + 1, dtype=torch.bool, device=device)


class NotUnderstood(Exception):
    """A layer asks for attention that does not run by documents."""


def registry() -> Any:
    """transformers' attention functions by name; None where transformers was not imported."""
    return getattr(sys.modules.get(MODELS), "AttentionInterface", None)


@functools.cache
def attention_patch(registry: Any) -> ProcessPatch:
    """The entry of the registry that knows documents."""
    mapping = registry._global_mapping
    stock = mapping[IMPLEMENTATION]

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
            raise NotUnderstood("attention is not causal")
        for name in _NOT_COMPUTED:
            if kwargs.get(name) is not None:
                raise NotUnderstood(f"attention takes {name}")
        if documents.calls == 0:
            documents.needs_lengths = needs_lengths(query[0], value[0])
        documents.calls += 1
        output = varlen_attention(
            query[0],
            key[0],
            value[0],
            documents.lengths,
            starts=documents.starts,
            longest=documents.longest,
            scale=scaling,
            window=kwargs.get("sliding_window"),
            dropout=dropout,
        )
        return output[None], None

    return ProcessPatch("padding:sdpa", mapping, IMPLEMENTATION, attention)
