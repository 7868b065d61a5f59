"""Causal attention within documents whose scores are capped, which has sinks, or both: by torch operations.

    s_tj = softcap * tanh(scale * q_t . k_j / softcap), or scale * q_t . k_j without softcap
    p_tj = exp(s_tj) / (exp(sink) + sum over visible i of exp(s_ti)), exp(sink) left out without sinks
    o_t  = sum over visible j of p_tj v_j

    visible to t: what is of its document, at t or before it, and less than a window before it if there is one.
    A sink is a learned logit per query head that takes weight, and has no value.

With do the gradient of o, and all sums over what is visible:

    dp_tj = do_t . v_j          delta_t = sum_j p_tj dp_tj          dv_j = sum_t p_tj do_t
    ds_tj = p_tj (dp_tj - delta_t), times 1 - tanh^2 with softcap
    dq_t  = scale * sum_j ds_tj k_j          dk_j = scale * sum_t ds_tj q_t
    dsink = - sum_t p_t,sink delta_t

Memory: query, key and value are kept for backward, which computes the weights again. At any time there are the scores
of some rows of some documents: about five tensors of at most `_MOST_SCORES` elements in float32. transformers' eager
attention keeps several tensors of rows * heads * columns^2 for backward, in every layer.

Cost: bound by memory, since scores are written and read between operations. Eager attention with a softcap in 16 bits
moves about 40 bytes per score forward and 60 backward; here it is 55 and 110, since statistics are in float32 and
weights are computed twice, but of the visible blocks alone: from 56 % of the scores of long documents to all of those
up to `_ROWS`, and padding is left out. Measured on an H200, with heads of 256: 0.7 to 1.0 times eager's time for
documents of 100 to 1,500 tokens, with padding; 1.4 to 1.65 times for equal lengths, which are stock's but where
micro-batches share a pass; a tenth of the memory. Documents of about the same length go into one batch, since each
batch costs some 50 launches forward and backward.

Precision: products take the dtype of the inputs, everything between them is float32 (float64 for float64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from ._launch import once_differentiable

# Scores that exist at a time: 128 MiB in float32.
_MOST_SCORES = 1 << 25
# Rows of scores computed together: an eighth of a document, so that little is computed of what is not visible, and not
# fewer than these, below which launches cost more than what they leave out.
_ROWS = 128
# Documents share a batch where filling them up to the longest adds no more scores per head than these, or than a
# quarter: about what the launches of another batch cost a GPU.
_FILLING = 1 << 18


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    through: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Causal attention within documents, with capped scores, sinks or both.

    Args:
        query: [H, T, D], T tokens of all documents.
        key: [G, T, D], H a multiple of G: query heads share key and value heads in equal runs.
        value: [G, T, E].
        lengths: of the documents in tokens, in order; they add up to T.
        scale: of the scores.
        window: number of tokens that one sees, itself included; None for all.
        softcap: bound of the scores; None for none.
        sinks: [H], a logit per query head; None for none.
        through: calls the function that computes it, for who keeps its output for a second forward.

    Returns:
        [T, H, E], contiguous, in the dtype of `query`; under autocast in autocast's, as products are there.

    Raises:
        ValueError: a softcap that is not positive, or sinks of another shape.
    """
    if softcap is not None and softcap <= 0:
        raise ValueError(f"a softcap of {softcap} is not positive")
    if sinks is not None and sinks.shape != query.shape[:1]:
        raise ValueError(f"sinks {list(sinks.shape)} of {query.shape[0]} query heads")
    device = query.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (each.to(dtype) for each in (query, key, value))
    options = _Options(scale, window, softcap)
    batches = _batches(tuple(lengths), query.device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        arguments = query, key, value, sinks, batches, options
        output: torch.Tensor
        output = _CappedAttention.apply(*arguments) if through is None else through(_CappedAttention.apply, *arguments)
    return output


class _Options(NamedTuple):
    scale: float
    window: int | None
    softcap: float | None


class _Batch(NamedTuple):
    """Documents that are computed together, filled up to the longest.

    Attributes:
        documents, longest: how many, and tokens of the longest.
        tokens: [n] of all documents, on the device.
        slots: [n], where these are among `documents * longest`.
    """

    documents: int
    longest: int
    tokens: torch.Tensor
    slots: torch.Tensor

    def gather(self, flat: torch.Tensor) -> torch.Tensor:
        """[heads, T, D] to [documents, heads, longest, D], zeros behind each document."""
        heads, _, width = flat.shape
        padded = flat.new_zeros(self.documents * self.longest, heads, width)
        padded.index_copy_(0, self.slots, flat.transpose(0, 1).index_select(0, self.tokens))
        return padded.view(self.documents, self.longest, heads, width).transpose(1, 2)

    def scatter(self, padded: torch.Tensor, into: torch.Tensor) -> None:
        """[documents, heads, longest, D] to their places in [T, heads, D]."""
        rows = padded.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)
        into.index_copy_(0, self.tokens, rows.to(into.dtype))


@functools.lru_cache(maxsize=8)  # the layers of a pass ask for the same
def _batches(lengths: tuple[int, ...], device: torch.device) -> tuple[_Batch, ...]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    together: list[list[int]] = []
    filling = area = 0
    for document in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        length = lengths[document]
        if not length:
            continue
        more = lengths[together[-1][0]] ** 2 - length**2 if together else 0
        if together and filling + more <= max(_FILLING, area // 4):
            together[-1].append(document)
            filling, area = filling + more, area + length**2
        else:
            together.append([document])
            filling, area = 0, length**2
    batches = []
    for documents in together:
        longest = lengths[documents[0]]
        tokens = torch.cat([torch.arange(starts[each], starts[each + 1]) for each in documents])
        slots = torch.cat([torch.arange(lengths[each]) + row * longest for row, each in enumerate(documents)])
        batches.append(_Batch(len(documents), longest, tokens.to(device), slots.to(device)))
    return tuple(batches)


class _Rows(NamedTuple):
    """Some rows of the scores of a batch.

    Attributes:
        rows, keys: of each document.
        weights: [documents, G, H / G, rows, keys], wide.
        tanh: of these scores, of the same shape; None without softcap.
        sunk: [documents, G, H / G, rows, 1], the weights of the sinks; None without.
    """

    rows: slice
    keys: slice
    weights: torch.Tensor
    tanh: torch.Tensor | None
    sunk: torch.Tensor | None


def _rows_of(
    query: torch.Tensor, key: torch.Tensor, sinks: torch.Tensor | None, options: _Options, keep_tanh: bool
) -> Iterator[_Rows]:
    """All rows of a batch's scores, some at a time.

    query is [documents, G, H / G, longest, D], key [documents, G, longest, D].
    """
    documents, groups, shared, longest, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    bound = max(1, _MOST_SCORES // (documents * groups * shared * longest))
    step = min(bound, max(_ROWS, -(-longest // 8)))
    position = torch.arange(longest, device=query.device)
    for start in range(0, longest, step):
        stop = min(start + step, longest)
        first = 0 if options.window is None else max(0, start - options.window + 1)
        rows, keys = slice(start, stop), slice(first, stop)
        products = query[..., rows, :].flatten(2, 3) @ key[:, :, keys].transpose(-1, -2)
        scores = products.to(wide).unflatten(2, (shared, stop - start))
        tanh = None
        if options.softcap is None:
            scores = scores.mul_(options.scale)
        else:
            scores = scores.mul_(options.scale / options.softcap).tanh_()
            tanh = scores if keep_tanh else None
            scores = scores * options.softcap if keep_tanh else scores.mul_(options.softcap)
        distance = position[rows, None] - position[None, keys]
        hidden = distance < 0
        if options.window is not None:
            hidden |= distance >= options.window
        scores = scores.masked_fill_(hidden, -torch.inf)
        if sinks is None:
            yield _Rows(rows, keys, torch.softmax(scores, -1), tanh, None)
            continue
        column = sinks.to(wide).view(1, groups, shared, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, column], -1), -1)
        yield _Rows(rows, keys, weights[..., :-1], tanh, weights[..., -1:])


class _CappedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        batches: tuple[_Batch, ...],
        options: _Options,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.batches, ctx.options = batches, options
        shared = query.shape[0] // key.shape[0]
        output = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        for batch in batches:
            q, k, v = (batch.gather(each) for each in (query, key, value))
            q = q.unflatten(1, (-1, shared))
            o = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
            for each in _rows_of(q, k, sinks, options, keep_tanh=False):
                weighted = each.weights.to(v.dtype).flatten(2, 3) @ v[:, :, each.keys]
                o[..., each.rows, :] = weighted.unflatten(2, (shared, -1))
            batch.scatter(o.flatten(1, 2), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        scale, shared = ctx.options.scale, query.shape[0] // key.shape[0]
        wide = torch.promote_types(query.dtype, torch.float32)
        dquery, dkey, dvalue = (each.new_empty(each.transpose(0, 1).shape) for each in (query, key, value))
        dsinks = None if sinks is None else torch.zeros(len(sinks), dtype=wide, device=sinks.device)
        for batch in ctx.batches:
            q, k, v, dout = (batch.gather(each) for each in (query, key, value, do.transpose(0, 1)))
            q, dout = q.unflatten(1, (-1, shared)), dout.unflatten(1, (-1, shared))
            dq = torch.empty_like(q)
            # Wide: they are sums over all rows that see a key.
            dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
            for each in _rows_of(q, k, sinks, ctx.options, keep_tanh=True):
                some_q, some_do = (x[..., each.rows, :].flatten(2, 3) for x in (q, dout))
                dv[:, :, each.keys] += each.weights.to(v.dtype).flatten(2, 3).transpose(-1, -2) @ some_do
                dweights = (some_do @ v[:, :, each.keys].transpose(-1, -2)).to(wide).view(each.weights.shape)
                delta = (each.weights * dweights).sum(-1, keepdim=True)
                if each.sunk is not None:
                    dsinks -= (each.sunk * delta).sum((0, 3, 4)).flatten()
                dscores = dweights.sub_(delta).mul_(each.weights)
                if each.tanh is not None:
                    dscores = dscores.mul_(1 - each.tanh.square())
                dscores = dscores.mul_(scale).to(q.dtype).flatten(2, 3)
                dq[..., each.rows, :] = (dscores @ k[:, :, each.keys]).unflatten(2, (shared, -1))
                dk[:, :, each.keys] += dscores.transpose(-1, -2) @ some_q
            batch.scatter(dq.flatten(1, 2), dquery)
            batch.scatter(dk, dkey)
            batch.scatter(dv, dvalue)
        gradients = (each.transpose(0, 1) for each in (dquery, dkey, dvalue))
        return *gradients, None if dsinks is None else dsinks.to(sinks.dtype), None, None
