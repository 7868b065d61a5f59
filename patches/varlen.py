"""Attention by documents: what a flattened pass hands to the attention layers of transformers, and what they compute.

A layer calls its attention function with whatever keyword arguments the backbone was given. Where `documents` is among
them, attention runs within these (kernels/varlen_attention.py); attention_seams.py says how it comes there.
"""

from __future__ import annotations

from typing import Any

import torch
from hf_turbo.kernels.varlen_attention import needs_lengths, varlen_attention
from torch import nn

from . import kept_attention
from .engine import is_plain

# Arguments of attention functions; what a layer's own function makes of the first two, its seam says.
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


def no_mask(tokens: int, device: torch.device, rows: int = 1) -> torch.Tensor:
    """What stands for the mask in a flattened pass.

    A mask of four dimensions is taken for one that is made already, and handed to the layers. It fits no scores, so
    that stock attention, should it get it after all (switched off before a layer is recomputed), does not go wrong.

    Args:
        rows: 0 for FlashAttention, which would take a mask of any shape for one of two dimensions, and read beyond the
            tokens; looking for the longest of no rows is an error, and no more than that.
    """
    return torch.ones(rows, 1, 1, tokens + 1, dtype=torch.bool, device=device)


class NotUnderstood(Exception):
    """A layer asks for attention that does not run by documents."""


def attend(
    documents: Documents,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention of a layer in a flattened pass, within its documents.

    Args:
        documents: of the pass, T tokens in all; the call is counted there.
        module: the attention layer.
        query: [1, H, T, D].
        key, value: [1, G, T, D].
        dropout: probability of dropping an attention weight.
        scaling, is_causal, sliding_window, **kwargs: as transformers' layers call attention functions.
        cap: of the scores.
        sinks: [H], logits that join the softmax.

    Returns:
        [1, T, H, D].

    Raises:
        NotUnderstood: the layer asks for something else.
    """
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotUnderstood("attention is not causal")
    if key.shape[2] != query.shape[2]:
        raise NotUnderstood("attention has other keys than those of the tokens")
    for name in _NOT_COMPUTED:
        if kwargs.get(name) is not None:
            raise NotUnderstood(f"attention takes {name}")
    if dropout and not (cap is None and sinks is None):
        raise NotUnderstood("attention drops weights, and caps its scores or has sinks")
    if not is_plain(sinks) or (sinks is not None and sinks.shape != query.shape[1:2]):
        raise NotUnderstood("attention sinks are not those of the heads")
    if documents.calls == 0:
        is_capped = cap is not None or sinks is not None
        documents.needs_lengths = needs_lengths(query[0], key[0], value[0], is_capped)
    documents.calls += 1
    keeper, visible = kept_attention.current(), min(documents.longest, sliding_window or documents.longest)
    output = varlen_attention(
        query[0],
        key[0],
        value[0],
        documents.lengths,
        starts=documents.starts,
        longest=documents.longest,
        scale=scaling,
        window=sliding_window,
        dropout=dropout,
        softcap=cap,
        sinks=sinks,
        through=None if keeper is None or dropout else keeper.through(visible),
    )
    return output[None]
