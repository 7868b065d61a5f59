"""Causal attention within documents whose scores are capped, which has sinks, or both.

    s_tj = softcap * tanh(scale * q_t . k_j / softcap), or scale * q_t . k_j without softcap
    p_tj = exp(s_tj) / (exp(sink) + sum over visible i of exp(s_ti)), exp(sink) left out without sinks
    o_t  = sum over visible j of p_tj v_j

    visible to t: what is of its document, at t or before it, and less than a window before it if there is one.
    A sink is a learned logit per query head that takes weight, and has no value.

With do the gradient of o, and all sums over what is visible:

    dp_tj = do_t . v_j          delta_t = sum_j p_tj dp_tj = do_t . o_t          dv_j = sum_t p_tj do_t
    ds_tj = p_tj (dp_tj - delta_t), times 1 - tanh^2 with softcap
    dq_t  = scale * sum_j ds_tj k_j          dk_j = scale * sum_t ds_tj q_t
    dsink = - sum_t p_t,sink delta_t

Two ways:

* Three Triton kernels, for heads of at most 256 in float32 or 16 bits. Scores exist in registers alone; query, key,
  value, output and the logarithm of each denominator are kept for backward. Forward goes through a tile of queries of
  one head and the keys it sees, with a running maximum. Backward computes the weights again, twice: once by tiles of
  queries, for dq, delta and dsink; then by tiles of keys, for dk and dv, which are summed over the query heads that
  share a key head. Every sum has one order: the same bits at every run.
* Torch operations: the CPU's way, float64's, and that of wider heads. Query, key and value are kept for backward, and
  at any time there are the scores of some rows of some documents: about five tensors of at most `_MOST_SCORES`
  elements in float32. Documents of about the same length go into one batch, since each batch costs some 50 launches.
  On an H200 with heads of 256 that takes 0.7 to 1.65 times the time of transformers' eager attention, and a tenth of
  its memory, which is several tensors of rows * heads * columns^2 in every layer.

Floor of the kernels, for V visible pairs, at the speed of matrix products: 2 * H * V * (D + E) operations forward and
2 * H * V * (3 D + 2 E) backward; 2 * H * V * (5 D + 3 E) are done backward, since two products are computed twice.

Precision: products take the dtype of the inputs, everything between them is float32 (float64 for float64). With
bfloat16 the kernels take the GPU's own tanh, good to 2^-11: stock rounds the scores to 2^-9 several times.

Sources: Dao, "FlashAttention-2" (2023), for the order of the loops; Milakov and Gimelshein, "Online normalizer
calculation for softmax" (2018).
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import launch, once_differentiable, register_op, use_triton

# Scores that exist at a time: 128 MiB in float32.
_MOST_SCORES = 1 << 25
# Rows of scores computed together: an eighth of a document, so that little is computed of what is not visible, and not
# fewer than these, below which launches cost more than what they leave out.
_ROWS = 128
# Documents share a batch where filling them up to the longest adds no more scores per head than these, or than a
# quarter: about what the launches of another batch cost a GPU.
_FILLING = 1 << 18


# ---------------------------------------------------------------------------------------------------- torch reference


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


def _reference_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    lengths: tuple[int, ...],
    options: _Options,
    output: torch.Tensor,
) -> None:
    """Fills `output`."""
    shared = query.shape[0] // key.shape[0]
    for batch in _batches(lengths, query.device):
        q, k, v = (batch.gather(each) for each in (query, key, value))
        q = q.unflatten(1, (-1, shared))
        o = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        for each in _rows_of(q, k, sinks, options, keep_tanh=False):
            weighted = each.weights.to(v.dtype).flatten(2, 3) @ v[:, :, each.keys]
            o[..., each.rows, :] = weighted.unflatten(2, (shared, -1))
        batch.scatter(o.flatten(1, 2), output)


def _reference_backward(
    do: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    lengths: tuple[int, ...],
    options: _Options,
    dquery: torch.Tensor,
    dkey: torch.Tensor,
    dvalue: torch.Tensor,
    dsinks: torch.Tensor,
) -> None:
    """Fills the last four."""
    scale, shared = options.scale, query.shape[0] // key.shape[0]
    wide = torch.promote_types(query.dtype, torch.float32)
    dsunk = torch.zeros(dsinks.shape, dtype=wide, device=dsinks.device)
    for batch in _batches(lengths, query.device):
        q, k, v, dout = (batch.gather(each) for each in (query, key, value, do.transpose(0, 1)))
        q, dout = q.unflatten(1, (-1, shared)), dout.unflatten(1, (-1, shared))
        dq = torch.empty_like(q)
        # Wide: they are sums over all rows that see a key.
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for each in _rows_of(q, k, sinks, options, keep_tanh=True):
            some_q, some_do = (x[..., each.rows, :].flatten(2, 3) for x in (q, dout))
            dv[:, :, each.keys] += each.weights.to(v.dtype).flatten(2, 3).transpose(-1, -2) @ some_do
            dweights = (some_do @ v[:, :, each.keys].transpose(-1, -2)).to(wide).view(each.weights.shape)
            delta = (each.weights * dweights).sum(-1, keepdim=True)
            if each.sunk is not None:
                dsunk -= (each.sunk * delta).sum((0, 3, 4)).flatten()
            dscores = dweights.sub_(delta).mul_(each.weights)
            if each.tanh is not None:
                dscores = dscores.mul_(1 - each.tanh.square())
            dscores = dscores.mul_(scale).to(q.dtype).flatten(2, 3)
            dq[..., each.rows, :] = (dscores @ k[:, :, each.keys]).unflatten(2, (shared, -1))
            dk[:, :, each.keys] += dscores.transpose(-1, -2) @ some_q
        batch.scatter(dq.flatten(1, 2), dquery)
        batch.scatter(dk, dkey)
        batch.scatter(dv, dvalue)
    dsinks.copy_(dsunk)


# ------------------------------------------------------------------------------------------------------------- Triton

# Positions, `first` and `row`s and `key`s are those within a document. Scores and the logarithm of their denominators
# are in units of log 2: one multiplication less before exp2.


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    """To about an ulp of float32, near zero too; FAST in one instruction, to 2^-11."""
    if FAST:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        square = x * x
        # A minimax fit of (tanh(x) / x - 1) / x^2 on |x| < 0.6: 3e-9 of tanh(x).
        series = -0.33333298563957214 + square * (
            0.13331958651542664
            + square * (-0.053786683827638626 + square * (0.02080538682639599 + square * -0.005905871279537678))
        )
        twice_log2_e: tl.constexpr = 2.8853900817779268
        outer = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * twice_log2_e) + 1.0)
        y = tl.where(tl.abs(x) < 0.6, x + x * square * series, tl.where(x < 0, -outer, outer))
    return y


@triton.jit
def _scores(products, factor, ceiling, CAPPED: tl.constexpr, FAST_TANH: tl.constexpr):
    """Scores, and the tanh in them (or whatever, without softcap)."""
    scaled = products * factor
    tanh = scaled
    if CAPPED:
        tanh = _tanh(scaled, FAST_TANH)
        scaled = tanh * ceiling
    return scaled, tanh


@triton.jit
def _is_visible(row, key, window, WINDOWED: tl.constexpr):
    visible = key <= row
    if WINDOWED:
        visible = visible & (row - key < window)
    return visible


@triton.jit
def _load(
    head_ptr,
    stride,
    first,
    stop,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """[COUNT, PADDED] from row `first` on; zeros behind WIDTH columns and, if MASKED, from row `stop` on."""
    row = tl.arange(0, COUNT)
    column = tl.arange(0, PADDED)
    pointers = head_ptr + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    in_rows = (first + row < stop)[:, None]
    in_columns = (column < WIDTH)[None, :]
    if MASKED and WIDTH < PADDED:
        tile = tl.load(pointers, mask=in_rows & in_columns, other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=in_rows, other=0.0)
    elif WIDTH < PADDED:
        tile = tl.load(pointers, mask=in_columns, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store(head_ptr, stride, first, stop, tile, COUNT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The rows of `tile` that are before `stop`, to row `first` and on."""
    row = tl.arange(0, COUNT)
    column = tl.arange(0, PADDED)
    pointers = head_ptr + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    mask = (first + row < stop)[:, None] & (column < WIDTH)[None, :]
    tl.store(pointers, tile.to(head_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    summed,
    total,
    peak,
    q,
    k_ptr,
    v_ptr,
    k_token,
    v_token,
    row,
    begin,
    end,
    length,
    window,
    factor,
    ceiling,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    FAST_TANH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the keys from `begin` to `end` to `summed` [ROWS, VALUE_PADDED] and `total` [ROWS], which are divided by
    2^peak. BOUNDED: peak stays 0, as no score can be too large."""
    for first in tl.range(begin, end, KEYS):
        k = _load(k_ptr, k_token, first, length, KEYS, WIDTH, PADDED, MASKED)
        v = _load(v_ptr, v_token, first, length, KEYS, VALUE_WIDTH, VALUE_PADDED, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores, _ = _scores(products, factor, ceiling, CAPPED, FAST_TANH)
        if MASKED:
            key = first + tl.arange(0, KEYS)
            scores = tl.where(_is_visible(row[:, None], key[None, :], window, WINDOWED), scores, float("-inf"))
        if BOUNDED:
            weights = tl.exp2(scores)
            total += tl.sum(weights, 1)
        else:
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2(peak - new_peak)
            weights = tl.exp2(scores - new_peak[:, None])
            total = total * shrink + tl.sum(weights, 1)
            summed = summed * shrink[:, None]
            peak = new_peak
        summed = tl.dot(weights.to(v.dtype), v, summed, input_precision="ieee")
    return summed, total, peak


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    o_ptr,
    lse_ptr,
    rest_ptr,
    tiles_ptr,
    tokens,
    heads,
    shared,
    q_head,
    q_token,
    k_head,
    k_token,
    v_head,
    v_token,
    window,
    factor,
    ceiling,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    FAST_TANH: tl.constexpr,
):
    """A tile of queries of a head per program; heads that share keys run side by side."""
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    length = tl.load(tiles_ptr + 3 * tile + 1)
    first = tl.load(tiles_ptr + 3 * tile + 2)
    wide_head = head.to(tl.int64)
    k_ptr += (head // shared).to(tl.int64) * k_head + start * k_token
    v_ptr += (head // shared).to(tl.int64) * v_head + start * v_token
    q = _load(q_ptr + wide_head * q_head + start * q_token, q_token, first, length, ROWS, WIDTH, PADDED)
    row = first + tl.arange(0, ROWS)
    summed = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    if BOUNDED:
        peak = tl.zeros([ROWS], tl.float32)
    else:
        # Not -inf: a row may see no key of the first that its tile sees, and -inf - -inf is no number.
        peak = tl.full([ROWS], -3.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
        total = tl.exp2(sink - peak)
    end = tl.minimum(first + ROWS, length)
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        unmasked = begin
    else:
        begin = 0
        # Up to here the first row sees all, and so does every row.
        unmasked = (first + 1) // KEYS * KEYS
        summed, total, peak = _attend(
            summed,
            total,
            peak,
            q,
            k_ptr,
            v_ptr,
            k_token,
            v_token,
            row,
            begin,
            unmasked,
            length,
            window,
            factor,
            ceiling,
            WIDTH,
            PADDED,
            VALUE_WIDTH,
            VALUE_PADDED,
            KEYS,
            CAPPED,
            WINDOWED,
            BOUNDED,
            FAST_TANH,
            MASKED=False,
        )
    summed, total, peak = _attend(
        summed,
        total,
        peak,
        q,
        k_ptr,
        v_ptr,
        k_token,
        v_token,
        row,
        unmasked,
        end,
        length,
        window,
        factor,
        ceiling,
        WIDTH,
        PADDED,
        VALUE_WIDTH,
        VALUE_PADDED,
        KEYS,
        CAPPED,
        WINDOWED,
        BOUNDED,
        FAST_TANH,
        MASKED=True,
    )
    o_token = heads * VALUE_WIDTH
    o_ptr += start * o_token + wide_head * VALUE_WIDTH
    _store(o_ptr, o_token, first, length, summed / total[:, None], ROWS, VALUE_WIDTH, VALUE_PADDED)
    lse = peak + tl.log2(total)
    statistics = wide_head * tokens + start + row
    tl.store(lse_ptr + statistics, lse, mask=row < length)
    if rest_ptr is not None:
        tl.store(rest_ptr + statistics, 1.0 / (tl.exp2(peak - lse) * total), mask=row < length)


@triton.jit
def _dquery_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    rest_ptr,
    dq_ptr,
    delta_ptr,
    dsinks_ptr,
    tiles_ptr,
    tokens,
    heads,
    shared,
    q_head,
    q_token,
    k_head,
    k_token,
    v_head,
    v_token,
    do_head,
    do_token,
    window,
    factor,
    ceiling,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    FAST_TANH: tl.constexpr,
    FEW: tl.constexpr,
):
    """A tile of queries of a head per program: dq and delta of these, and their part of dsink to dsinks_ptr
    [tiles, heads].

    delta is do . o, but for what the rounding of o does to it where few keys are seen: with 3 of them, in 16 bits,
    errors of dq were 1.2 times those of stock code. From 8 on they are smaller, as the weights are then.
    """
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    length = tl.load(tiles_ptr + 3 * tile + 1)
    first = tl.load(tiles_ptr + 3 * tile + 2)
    wide_head = head.to(tl.int64)
    k_ptr += (head // shared).to(tl.int64) * k_head + start * k_token
    v_ptr += (head // shared).to(tl.int64) * v_head + start * v_token
    o_token = heads * VALUE_WIDTH
    o_ptr += start * o_token + wide_head * VALUE_WIDTH
    do_ptr += start * do_token + wide_head * do_head
    row = first + tl.arange(0, ROWS)
    in_rows = row < length
    statistics = wide_head * tokens + start + row

    do = _load(do_ptr, do_token, first, length, ROWS, VALUE_WIDTH, VALUE_PADDED)
    o = _load(o_ptr, o_token, first, length, ROWS, VALUE_WIDTH, VALUE_PADDED)
    # Rows behind the document have weights of 0.
    lse = tl.load(lse_ptr + statistics, mask=in_rows, other=float("inf"))
    if rest_ptr is not None:
        rest = tl.load(rest_ptr + statistics, mask=in_rows, other=0.0)
    q = _load(q_ptr + wide_head * q_head + start * q_token, q_token, first, length, ROWS, WIDTH, PADDED)
    begin = 0
    end = tl.minimum(first + ROWS, length)
    most = end
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        most = tl.minimum(end, window)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if most <= FEW:
        delta = tl.zeros([ROWS], tl.float32)
        for block in tl.range(begin, end, KEYS):
            k = _load(k_ptr, k_token, block, length, KEYS, WIDTH, PADDED)
            v = _load(v_ptr, v_token, block, length, KEYS, VALUE_WIDTH, VALUE_PADDED)
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores, _ = _scores(products, factor, ceiling, CAPPED, FAST_TANH)
            key = block + tl.arange(0, KEYS)
            visible = _is_visible(row[:, None], key[None, :], window, WINDOWED)
            weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
            if rest_ptr is not None:
                weights *= rest[:, None]
            delta += tl.sum(weights * tl.dot(do, tl.trans(v), input_precision="ieee"), 1)
    tl.store(delta_ptr + statistics, delta, mask=in_rows)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        sunk = tl.exp2(sink - lse)
        if rest_ptr is not None:
            sunk *= rest
        tl.store(dsinks_ptr + tl.program_id(0), -tl.sum(sunk * delta, 0))

    dq = tl.zeros([ROWS, PADDED], tl.float32)
    for block in tl.range(begin, end, KEYS):
        k = _load(k_ptr, k_token, block, length, KEYS, WIDTH, PADDED)
        v = _load(v_ptr, v_token, block, length, KEYS, VALUE_WIDTH, VALUE_PADDED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores, tanh = _scores(products, factor, ceiling, CAPPED, FAST_TANH)
        key = block + tl.arange(0, KEYS)
        visible = _is_visible(row[:, None], key[None, :], window, WINDOWED)
        weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        if rest_ptr is not None:
            weights *= rest[:, None]
        dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        if CAPPED:
            dscores = dscores - dscores * tanh * tanh
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    dq_token = heads * WIDTH
    dq_ptr += start * dq_token + wide_head * WIDTH
    _store(dq_ptr, dq_token, first, length, dq * scale, ROWS, WIDTH, PADDED)


@triton.jit
def _dkey_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    rest_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    tokens,
    groups,
    shared,
    q_head,
    q_token,
    k_head,
    k_token,
    v_head,
    v_token,
    do_head,
    do_token,
    window,
    factor,
    ceiling,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    FAST_TANH: tl.constexpr,
):
    """A tile of keys of a key head per program: dk and dv, over all queries that see them. Scores are transposed here,
    [KEYS, ROWS], so that they are the left side of both sums."""
    tile = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    start = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    length = tl.load(tiles_ptr + 3 * tile + 1)
    first = tl.load(tiles_ptr + 3 * tile + 2)
    wide_group = group.to(tl.int64)
    k = _load(k_ptr + wide_group * k_head + start * k_token, k_token, first, length, KEYS, WIDTH, PADDED)
    v = _load(v_ptr + wide_group * v_head + start * v_token, v_token, first, length, KEYS, VALUE_WIDTH, VALUE_PADDED)
    q_ptr += start * q_token
    do_ptr += start * do_token
    key = first + tl.arange(0, KEYS)
    dk = tl.zeros([KEYS, PADDED], tl.float32)
    dv = tl.zeros([KEYS, VALUE_PADDED], tl.float32)
    end = length
    if WINDOWED:
        end = tl.minimum(length, first + KEYS - 1 + window)
    blocks = tl.cdiv(end - first, ROWS)
    # One loop over the heads and their rows: it fills its pipeline once.
    for step in tl.range(0, shared * blocks):
        head = (group * shared + step // blocks).to(tl.int64)
        block = first + step % blocks * ROWS
        row = block + tl.arange(0, ROWS)
        in_rows = row < length
        statistics = head * tokens + start + row
        q = _load(q_ptr + head * q_head, q_token, block, length, ROWS, WIDTH, PADDED)
        do = _load(do_ptr + head * do_head, do_token, block, length, ROWS, VALUE_WIDTH, VALUE_PADDED)
        lse = tl.load(lse_ptr + statistics, mask=in_rows, other=float("inf"))
        delta = tl.load(delta_ptr + statistics, mask=in_rows, other=0.0)
        products = tl.dot(k, tl.trans(q), input_precision="ieee")
        scores, tanh = _scores(products, factor, ceiling, CAPPED, FAST_TANH)
        visible = _is_visible(row[None, :], key[:, None], window, WINDOWED)
        weights = tl.where(visible, tl.exp2(scores - lse[None, :]), 0.0)
        if rest_ptr is not None:
            weights *= tl.load(rest_ptr + statistics, mask=in_rows, other=0.0)[None, :]
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
        dscores = weights * (dweights - delta[None, :])
        if CAPPED:
            dscores = dscores - dscores * tanh * tanh
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    dk_token = groups * WIDTH
    dv_token = groups * VALUE_WIDTH
    dk_ptr += start * dk_token + wide_group * WIDTH
    dv_ptr += start * dv_token + wide_group * VALUE_WIDTH
    _store(dk_ptr, dk_token, first, length, dk * scale, KEYS, WIDTH, PADDED)
    _store(dv_ptr, dv_token, first, length, dv, KEYS, VALUE_WIDTH, VALUE_PADDED)


class _Block(NamedTuple):
    """Queries and keys of a tile of scores, and how it is computed."""

    rows: int
    keys: int
    warps: int
    stages: int


class _Blocks(NamedTuple):
    forward: _Block
    dquery: _Block
    dkey: _Block


# By where they run and the width of heads: what fits into shared memory, and into registers (compiled for sm_90 and
# sm_89). "large" is for 16 bits on GPUs with 227 KiB of shared memory (capabilities 9 and 10), "small" for 16 bits
# elsewhere (99 KiB). float32 has no tensor cores, and takes one table everywhere. Large ones: the best of those tried
# on an H200, or near it; heads of 64 take 64 keys for the sake of windows (of 128 tokens: 376 us where 128 take 521).
_BLOCKS = {
    ("large", 64): _Blocks(_Block(128, 64, 8, 3), _Block(64, 64, 4, 2), _Block(32, 64, 4, 2)),
    ("large", 128): _Blocks(_Block(128, 64, 8, 3), _Block(128, 64, 8, 2), _Block(32, 128, 8, 2)),
    ("large", 256): _Blocks(_Block(128, 64, 8, 2), _Block(128, 32, 8, 2), _Block(32, 64, 8, 2)),
    ("small", 64): _Blocks(_Block(128, 64, 4, 2), _Block(64, 64, 4, 2), _Block(64, 64, 4, 2)),
    ("small", 128): _Blocks(_Block(128, 32, 8, 2), _Block(64, 32, 4, 2), _Block(32, 64, 4, 2)),
    ("small", 256): _Blocks(_Block(64, 32, 8, 1), _Block(32, 32, 4, 1), _Block(32, 32, 8, 1)),
    ("float32", 64): _Blocks(_Block(32, 32, 4, 1), _Block(32, 32, 8, 1), _Block(32, 32, 4, 1)),
    ("float32", 128): _Blocks(_Block(32, 32, 8, 1), _Block(32, 32, 8, 1), _Block(32, 32, 8, 1)),
    ("float32", 256): _Blocks(_Block(16, 32, 8, 1), _Block(16, 16, 8, 1), _Block(32, 16, 8, 1)),
}
_MOST_WIDTH = 256
# Scores of at most so many units of log 2 are summed as they are: 2^100 * 2^26 keys are a float32, and 2^-100 is.
_MOST_BOUND = 100.0
# Where queries see no more keys than these, delta is summed from the weights.
_FEW = 16
_LOG2_E = 1.4426950408889634


@functools.cache
def _has_large_shared_memory(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _blocks_for(query: torch.Tensor, value: torch.Tensor) -> _Blocks:
    where = "large" if _has_large_shared_memory(query.device) else "small"
    where = "float32" if query.dtype == torch.float32 else where
    width = max(query.shape[-1], value.shape[-1])
    return _BLOCKS[where, 64 if width <= 64 else 128 if width <= 128 else 256]


def _kernels_take(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernels compute it."""
    dtype = query.dtype
    is_one_of_theirs = dtype in (torch.float32, torch.bfloat16, torch.float16) and dtype == key.dtype == value.dtype
    return use_triton(query) and is_one_of_theirs and 0 < max(query.shape[-1], value.shape[-1]) <= _MOST_WIDTH


@functools.lru_cache(maxsize=8)  # the layers of a pass ask for the same
def _tiles(lengths: tuple[int, ...], blocks: _Blocks, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Tiles of queries for forward and for dq, and of keys: [n, 3] int32 each, with where its document starts, how long
    that is, and its first token therein. Those that see most, or are seen by most, come first."""
    of_length = torch.tensor(lengths)
    starts = torch.tensor([0, *itertools.accumulate(lengths)][:-1])
    tables = []
    for size, by_keys in ((blocks.forward.rows, False), (blocks.dquery.rows, False), (blocks.dkey.keys, True)):
        counts = (of_length + size - 1) // size
        document = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        first = (torch.arange(len(document)) - before) * size
        table = torch.stack([starts[document], of_length[document], first], 1).int()
        work = of_length[document] - first if by_keys else first
        tables.append(table[work.argsort(descending=True, stable=True)])
    together = torch.cat(tables).to(device, non_blocking=True)
    return together.split([len(table) for table in tables])


def _tiles_by_starts(starts: torch.Tensor, tokens: int, blocks: _Blocks) -> list[torch.Tensor]:
    """The same, made on the device; behind the tiles there are as many of no tokens as there might be more."""
    lengths, tables = starts.diff(), []
    for size, by_keys in ((blocks.forward.rows, False), (blocks.dquery.rows, False), (blocks.dkey.keys, True)):
        counts = (lengths + size - 1) // size
        ends = counts.cumsum(0)
        tile = torch.arange(tokens // size + len(lengths), device=starts.device)
        document = torch.searchsorted(ends, tile, right=True).clamp_(max=len(lengths) - 1)
        first = (tile - ends[document] + counts[document]) * size
        length = torch.where(tile < ends[-1], lengths[document], 0)
        first = torch.where(length > 0, first, 0)
        table = torch.stack([starts[document].long(), length.long(), first], 1).int()
        work = torch.where(length > 0, length - first if by_keys else first, -1)
        tables.append(table[work.argsort(descending=True, stable=True)])
    return tables


class _Known(NamedTuple):
    """Tables made of `starts`: all layers of a pass ask for the same.

    Attributes:
        state: of `starts` and of what is asked for. What a CUDA graph makes is made anew when it is replayed, and what
            was made outside of it is not.
    """

    starts: weakref.ref[torch.Tensor]
    state: tuple[int, _Blocks]
    tiles: list[torch.Tensor]


_KNOWN: dict[int, _Known] = {}  # by the id of `starts`, as long as it lives


def _is_recorded(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _tiles_for(
    lengths: tuple[int, ...], starts: torch.Tensor | None, tokens: int, blocks: _Blocks, device: torch.device
) -> Sequence[torch.Tensor]:
    if starts is None:
        return _tiles(lengths, blocks, device)
    if starts.is_inference():  # whether it is written to is not known
        return _tiles_by_starts(starts, tokens, blocks)
    key, state = id(starts), (-1 if _is_recorded(starts) else starts._version, blocks)
    known = _KNOWN.get(key)
    if known is None or known.starts() is not starts or known.state != state:
        reference = weakref.ref(starts, lambda _: _KNOWN.pop(key, None))
        known = _KNOWN[key] = _Known(reference, state, _tiles_by_starts(starts, tokens, blocks))
    return known.tiles


def _padded(width: int) -> int:
    """A power of two, and no less than a product takes."""
    return max(16, 1 << (width - 1).bit_length())


def _lse_and_rest(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logarithm of each denominator, [H, T], and what its rounding left of a weight of 1. That is needed in float32
    alone: it was half of the error of the gradients there."""
    return kept[0], kept[1] if len(kept) == 2 else None


class _Call(NamedTuple):
    """What all kernels are given alike.

    Attributes:
        factor, ceiling: scores are ceiling * tanh(factor * q . k), or factor * q . k, in units of log 2.
        window: 0 for none.
        constants: of the kernels.
    """

    factor: float
    ceiling: float
    window: int
    constants: dict[str, Any]


def _call_of(query: torch.Tensor, value: torch.Tensor, longest: int, options: _Options) -> _Call:
    scale, window, softcap = options
    window = 0 if window is None or window >= longest else window
    width, value_width = query.shape[-1], value.shape[-1]
    is_capped = softcap is not None
    # The instruction is NVIDIA's, and not known to the interpreter.
    fast_tanh = is_capped and query.dtype == torch.bfloat16 and torch.version.cuda is not None and query.is_cuda
    constants = {
        "WIDTH": width,
        "PADDED": _padded(width),
        "VALUE_WIDTH": value_width,
        "VALUE_PADDED": _padded(value_width),
        "CAPPED": is_capped,
        "WINDOWED": window > 0,
        "FAST_TANH": fast_tanh and not _launch.INTERPRET,
    }
    if softcap is None:
        return _Call(scale * _LOG2_E, 0.0, window, constants)
    return _Call(scale / softcap, softcap * _LOG2_E, window, constants)


# ---------------------------------------------------------------------------------------------------------------- ops


def _empty_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    lengths: Sequence[int],
    starts: torch.Tensor | None,
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, tokens, _ = query.shape
    # Torch operations keep no statistics.
    kept = 0 if not _kernels_take(query, key, value) else 2 if query.dtype == torch.float32 else 1
    output = query.new_empty(tokens, heads, value.shape[-1])
    return output, query.new_empty((kept, heads, tokens), dtype=torch.float32)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    lengths: Sequence[int],
    starts: torch.Tensor | None,
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths, options = tuple(lengths), _Options(scale, window, softcap)
    output, lse = _empty_forward(query, key, value, sinks, lengths, starts, longest, *options)
    if output.numel() == 0:
        return output, lse
    if not _kernels_take(query, key, value):
        _reference_forward(query, key, value, sinks, lengths, options, output)
        return output, lse
    heads, tokens, _ = query.shape
    blocks, call = _blocks_for(query, value), _call_of(query, value, longest, options)
    tiles, _, _ = _tiles_for(lengths, starts, tokens, blocks, query.device)
    statistics = _lse_and_rest(lse)
    is_bounded = sinks is None and query.dtype == torch.bfloat16 and 0 < call.ceiling <= _MOST_BOUND
    launch(
        _forward_kernel,
        (len(tiles) * heads,),
        query.device,
        query,
        key,
        value,
        None if sinks is None else sinks.contiguous(),
        output,
        *statistics,
        tiles,
        tokens,
        heads,
        heads // key.shape[0],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        call.window,
        call.factor,
        call.ceiling,
        ROWS=blocks.forward.rows,
        KEYS=blocks.forward.keys,
        BOUNDED=is_bounded,
        **call.constants,
        num_warps=blocks.forward.warps,
        num_stages=blocks.forward.stages,
    )
    return output, lse


def _empty_backward(
    do: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dquery, dkey, dvalue = (each.new_empty(each.transpose(0, 1).shape) for each in (query, key, value))
    return dquery, dkey, dvalue, query.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _backward(
    do: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    lengths: Sequence[int],
    starts: torch.Tensor | None,
    longest: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths, options = tuple(lengths), _Options(scale, window, softcap)
    dquery, dkey, dvalue, dsinks = gradients = _empty_backward(do, query, key, value, sinks)
    if output.numel() == 0:
        for each in gradients:
            each.zero_()
        return gradients
    if not _kernels_take(query, key, value):
        _reference_backward(do, query, key, value, sinks, lengths, options, *gradients)
        return gradients
    heads, tokens, _ = query.shape
    groups = key.shape[0]
    do = do.to(query.dtype)
    do = do if do.stride(-1) == 1 else do.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    blocks, call = _blocks_for(query, value), _call_of(query, value, longest, options)
    _, query_tiles, key_tiles = _tiles_for(lengths, starts, tokens, blocks, query.device)
    statistics = _lse_and_rest(lse)
    delta = torch.empty_like(statistics[0])
    partials = None if sinks is None else lse.new_empty(len(query_tiles), heads)
    strides = *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], do.stride(1), do.stride(0)
    numbers = call.window, call.factor, call.ceiling, scale
    launch(
        _dquery_kernel,
        (len(query_tiles) * heads,),
        query.device,
        query,
        key,
        value,
        sinks,
        output,
        do,
        *statistics,
        dquery,
        delta,
        partials,
        query_tiles,
        tokens,
        heads,
        heads // groups,
        *strides,
        *numbers,
        ROWS=blocks.dquery.rows,
        KEYS=blocks.dquery.keys,
        FEW=_FEW,
        **call.constants,
        num_warps=blocks.dquery.warps,
        num_stages=blocks.dquery.stages,
    )
    launch(
        _dkey_kernel,
        (len(key_tiles) * groups,),
        query.device,
        query,
        key,
        value,
        do,
        *statistics,
        delta,
        dkey,
        dvalue,
        key_tiles,
        tokens,
        groups,
        heads // groups,
        *strides,
        *numbers,
        ROWS=blocks.dkey.rows,
        KEYS=blocks.dkey.keys,
        **call.constants,
        num_warps=blocks.dkey.warps,
        num_stages=blocks.dkey.stages,
    )
    if partials is not None:
        dsinks.copy_(partials.sum(0))
    return gradients


_capped_attention = register_op(
    "capped_attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, int[] lengths, Tensor? starts, "
    "int longest, float scale, int? window, float? softcap) -> (Tensor, Tensor)",
    _forward,
    _empty_forward,
)
_capped_attention_backward = register_op(
    "capped_attention_backward(Tensor do, Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor output, "
    "Tensor lse, int[] lengths, Tensor? starts, int longest, float scale, int? window, float? softcap) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _empty_backward,
)


# ----------------------------------------------------------------------------------------------------------- autograd


class _CappedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        lengths: tuple[int, ...],
        starts: torch.Tensor | None,
        longest: int,
        options: _Options,
    ) -> torch.Tensor:
        output, lse = _capped_attention(query, key, value, sinks, lengths, starts, longest, *options)
        ctx.save_for_backward(query, key, value, sinks, output, lse, starts)
        ctx.lengths, ctx.longest, ctx.options = lengths, longest, options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, starts = ctx.saved_tensors  # a checkpoint unpacks them once
        *gradients, dsinks = _capped_attention_backward(do, *saved, ctx.lengths, starts, ctx.longest, *ctx.options)
        return *(each.transpose(0, 1) for each in gradients), None if saved[3] is None else dsinks, *(None,) * 4


def needs_lengths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the host has to know the lengths of documents: torch operations go by them."""
    return not _kernels_take(query, key, value)


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int] | None,
    *,
    scale: float,
    starts: torch.Tensor | None = None,
    longest: int = 0,
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
        lengths: of the documents in tokens, in order; they add up to T. None where the host does not know them: then
            `starts`, [documents + 1] int32 on the device, says where each begins and the last ends, and no document
            has more tokens than `longest`. Not for what torch operations compute. In a CUDA graph `starts` is needed.
        scale: of the scores.
        window: number of tokens that one sees, itself included; None for all.
        softcap: bound of the scores; None for none.
        sinks: [H], a logit per query head; None for none.
        through: calls the function that computes it, for who keeps its output for a second forward.

    Returns:
        [T, H, E], contiguous, in the dtype of `query`; under autocast in autocast's, as products are there.

    Raises:
        ValueError: a softcap that is not positive, sinks of another shape, or lengths that have to be known.
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
    if lengths is None and (starts is None or longest < 1 or needs_lengths(query, key, value)):
        raise ValueError("lengths=None needs starts, longest, and what the kernels take")
    # A CUDA graph would go on reading tables that nobody else holds: it makes its own.
    by_starts = starts is not None and _is_recorded(query) and not needs_lengths(query, key, value)
    if lengths is None or by_starts:
        lengths, longest = (), longest or max(lengths or (), default=0)
    else:
        lengths, starts, longest = tuple(lengths), None, max(lengths, default=0)
    # Copies are made here: what is kept for backward is what came in.
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        arguments = query, key, value, sinks, lengths, starts, longest, _Options(scale, window, softcap)
        output: torch.Tensor
        output = _CappedAttention.apply(*arguments) if through is None else through(_CappedAttention.apply, *arguments)
    return output
