"""Attention over documents that lie one behind the other: each token sees its own document and nothing else.

    o_t = sum over s of softmax_s(scale * q_t . k_s) v_s
          s in the document of t; s <= t if causal; s > t - window with a window

No matrix of all tokens by all tokens exists, and no document can see another. Two ways, by measurement on an H200 (32
query heads on 8 key heads of 128, bf16, forward and backward, microseconds):

    8 documents of 512 tokens       variable-length kernel 127 + 350, one call a document 301 + 2,315
    20 of 100 to 1,500              630 + 1,815 against 1,290 + 6,485
    2 of 2,048                      282 + 815 against 188 + 938
    1 of 32,768                     25,400 + 69,900 against 15,300 + 43,100

* torch's FlashAttention for documents of any lengths, in one call: on CUDA, in 16 bits.
* `scaled_dot_product_attention`, runs of equal length in one call: where all documents are of one length, and
  everywhere else. A window shorter than a document takes a mask of that document's length squared.

Capped scores and attention sinks neither of them computes: capped_attention.py does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .capped_attention import capped_attention
from .capped_attention import needs_lengths as capped_attention_needs_lengths


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int] | None,
    *,
    starts: torch.Tensor | None = None,
    longest: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    through: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Attention within documents.

    Args:
        query: [H, T, D], T tokens of all documents.
        key, value: [G, T, D], H a multiple of G: query heads share key and value heads in equal runs.
        lengths: of the documents in tokens, in order; they add up to T. None where the host does not know them, as
            while a CUDA graph is recorded: then `starts` and `longest` say all.
        starts: [documents + 1] int32 on the device of `query`, where each document begins and the last ends; made
            from `lengths` if not given.
        longest: with `lengths` None, no document has more tokens than this.
        scale: of the scores; default 1 / sqrt(D).
        causal: tokens see only themselves and what is before them.
        window: with `causal`, the number of tokens that one sees, itself included; None for all.
        dropout: probability of dropping an attention weight, from torch's generator.
        softcap: scores s become softcap * tanh(s / softcap); None to leave them.
        sinks: [H], a logit for each query head that joins the softmax, and takes weight from the tokens; None for none.
        through: calls operators, as `through(operator, *args, **kwargs)`, for who keeps their outputs for a second
            forward. Of what they return the output alone is looked at, which is their result or the first of several.

    Returns:
        [T, H, D], contiguous, in the dtype of `query`.

    Raises:
        ValueError: shapes that do not fit, a window without `causal`, lengths that have to be known here, or softcap or
            sinks without `causal` or with dropout.
    """
    heads, tokens, _ = query.shape
    if key.shape != value.shape[:2] + query.shape[2:] or key.shape[1] != tokens or heads % key.shape[0]:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window of {window} tokens needs causal attention and at least one token")
    is_capped = softcap is not None or sinks is not None
    if is_capped and (not causal or dropout):
        raise ValueError("softcap and sinks need causal attention and no dropout")
    by_flash = not is_capped and _flash_can(query, value)
    through = _plainly if through is None else through
    scale_of_scores = query.shape[-1] ** -0.5 if scale is None else scale
    options: dict[str, Any] = {"scale": scale_of_scores, "window": window, "softcap": softcap, "sinks": sinks}
    if lengths is None and is_capped and starts is not None and longest is not None:
        return capped_attention(query, key, value, None, starts=starts, longest=longest, **options, through=through)
    if lengths is None:
        if not by_flash or starts is None or longest is None:
            raise ValueError("lengths=None needs starts, longest, and what FlashAttention or a kernel takes")
        return _flash(query, key, value, starts, longest, scale, causal, window, dropout, through)
    if sum(lengths) != tokens or any(length < 0 for length in lengths):
        raise ValueError(f"documents of {sum(lengths)} tokens in all, but {tokens} tokens")
    if is_capped:
        return capped_attention(
            query, key, value, lengths, starts=starts, longest=longest or 0, **options, through=through
        )
    if by_flash and not (window is None and len(set(lengths)) == 1):
        if starts is None:
            starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=query.device)
        return _flash(query, key, value, starts, max(lengths), scale, causal, window, dropout, through)
    return _by_runs(query, key, value, lengths, scale, causal, window, dropout, through)


def _plainly(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return operator(*args, **kwargs)


def needs_lengths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_capped: bool = False) -> bool:
    """Whether `lengths` may not be None for these, [H, T, D] and [G, T, D]; with capped scores or sinks."""
    return capped_attention_needs_lengths(query, key, value) if is_capped else not _flash_can(query, value)


def _flash_can(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's FlashAttention takes these, with their gradients."""
    width = query.shape[-1]
    return (
        _FLASH is not None
        and query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and value.dtype == query.dtype
        and value.shape[-1] == width
        and width % 8 == 0
        and query.shape[1] > 0
        and width <= _widest(query.device.index)
    )


@functools.cache
def _widest(device: int) -> int:
    """The widest head that FlashAttention differentiates on a device: 0 where it does not run."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < (8, 0):
        return 0
    return 256 if capability in ((8, 0), (9, 0)) else 192


def _find_flash() -> Any:
    """torch's operator, as long as it takes what it is given here."""
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    names = [argument.name for argument in operator.default._schema.arguments] if operator is not None else []
    expected = [*("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"), "dropout_p", "is_causal"]
    expected += ["return_debug_mask", "scale"]
    windows = {"window_size_left", "window_size_right"}
    return operator if names[: len(expected)] == expected and windows <= set(names) else None


_FLASH = _find_flash()


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
    window: int | None,
    dropout: float,
    through: Callable[..., Any],
) -> torch.Tensor:
    query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    windows = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: torch.Tensor = through(
        _FLASH, query, key, value, starts, starts, longest, longest, dropout, causal, False, scale=scale, **windows
    )[0]
    return output.contiguous()


def _by_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float | None,
    causal: bool,
    window: int | None,
    dropout: float,
    through: Callable[..., Any],
) -> torch.Tensor:
    heads = query.shape[0]
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
            output = through(
                scaled_dot_product_attention,
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
