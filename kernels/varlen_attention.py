"""Attention over documents that lie one behind the other: each token sees its own document and nothing else.

    o_t = sum over s of softmax_s(scale * q_t . k_s) v_s
          s in the document of t; s <= t if causal; s > t - window with a window

Documents are cut out and computed by `scaled_dot_product_attention`, runs of equal length in one call, so that no
matrix of all tokens by all tokens exists and no document can see another. Memory is O(tokens) with the fused kernels of
torch; a window shorter than a document takes a mask of that document's length squared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention within documents.

    Args:
        query: [H, T, D], T tokens of all documents.
        key, value: [G, T, D], H a multiple of G: query heads share key and value heads in equal runs.
        lengths: of the documents in tokens, in order; they add up to T.
        scale: of the scores; default 1 / sqrt(D).
        causal: tokens see only themselves and what is before them.
        window: with `causal`, the number of tokens that one sees, itself included; None for all.
        dropout: probability of dropping an attention weight, from torch's generator.

    Returns:
        [T, H, D], contiguous, in the dtype of `query`.

    Raises:
        ValueError: shapes that do not fit, or a window without `causal`.
    """
    heads, tokens, _ = query.shape
    if key.shape != value.shape[:2] + query.shape[2:] or key.shape[1] != tokens or heads % key.shape[0]:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit")
    if sum(lengths) != tokens or any(length < 0 for length in lengths):
        raise ValueError(f"documents of {sum(lengths)} tokens in all, but {tokens} tokens")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window of {window} tokens needs causal attention and at least one token")
    outputs, start = [], 0
    for length, run in itertools.groupby(lengths):
        count = len(list(run))
        stop = start + count * length
        if length:
            q, k, v = (
                each[:, start:stop].unflatten(1, (count, length)).transpose(0, 1) for each in (query, key, value)
            )
            mask = None
            if window is not None and window < length:
                mask = _band(length, window, query.device)
            output = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=scale,
                enable_gqa=heads != key.shape[0],
            )
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        start = stop
    if not outputs:
        return query.new_empty(0, heads, value.shape[-1])
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[length, length], true where a token sees another."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
