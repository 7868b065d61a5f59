"""Attention with capped scores and sinks: gradients by finite differences, and no worse than transformers' eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_turbo.kernels import _launch, capped_attention
from hf_turbo.kernels.varlen_attention import varlen_attention

from tests.kernels.helpers import assert_as_exact_as_stock, randn
from tests.kernels.test_varlen_attention import visible

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "dq", "dk", "dv", "dsinks")


@pytest.fixture(params=["one batch", "blocks of two rows"])
def blocks(request, monkeypatch):
    """The second splits documents and parts batches as only long documents would be, and has tiles of 16."""
    if request.param != "one batch":
        monkeypatch.setattr(capped_attention, "_ROWS", 2)
        monkeypatch.setattr(capped_attention, "_FILLING", 0)
        # In 16 bits tensor cores take 64 rows.
        small_tiles(monkeypatch, 16 if _launch.INTERPRET else 64)
    capped_attention._batches.cache_clear()
    yield request.param
    capped_attention._batches.cache_clear()


def small_tiles(monkeypatch, size):
    block = capped_attention._Block(size, size, 4, 1)
    tables = dict.fromkeys(capped_attention._BLOCKS, capped_attention._Blocks(block, block, block))
    monkeypatch.setattr(capped_attention, "_BLOCKS", tables)


def is_interpreted(device):
    return device.type == "cpu" and _launch.INTERPRET


def formula(query, key, value, sinks, mask, scale, softcap):
    """As modelling code computes it: rounded to the dtype after each step, softmax in float32 or wider."""
    groups = query.shape[0] // key.shape[0]
    key, value = (each.repeat_interleave(groups, 0) for each in (key, value))
    scores = query @ key.transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:2], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (weights[..., : mask.shape[1]] @ value).transpose(0, 1)


def results(function, inputs, dy):
    leaves = [None if each is None else each.detach().clone().requires_grad_() for each in inputs]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def inputs_of(tokens: int, dtype: Any, device: Any, with_sinks: bool = True, heads: int = 4) -> list[Any]:
    query, key, value = (
        randn(count, tokens, width, device=device, dtype=dtype, seed=i)
        for i, (count, width) in enumerate(((heads, 16), (heads // 2, 16), (heads // 2, 8)))
    )
    return [query, key, value, randn(heads, device=device, dtype=dtype, seed=5) if with_sinks else None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1, 9, 0, 4, 4, 13], [140, 50]])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(1.5, False), (None, True), (1.5, True)])
def test_as_exact_as_modelling_code(device, blocks, dtype, lengths, window, softcap, with_sinks):
    if blocks != "one batch" and sum(lengths) > 100:
        pytest.skip("parted by itself")
    is_both = softcap is not None and with_sinks
    if is_interpreted(device) and not (
        is_both and dtype != torch.float32 if sum(lengths) > 100 or dtype == torch.float16 else blocks != "one batch"
    ):
        pytest.skip("interpreting takes seconds: all of it runs on GPUs")
    tokens, scale = sum(lengths), 0.5
    heads = 4 if is_interpreted(device) else 16  # luck decides on a dsinks of few elements
    inputs = inputs_of(tokens, dtype, device, with_sinks, heads)
    dy = randn(tokens, heads, 8, device=device, dtype=dtype, seed=9)
    mask = visible(lengths, True, window, device)

    def ours(query, key, value, sinks):
        options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        return varlen_attention(query, key, value, lengths, **options)

    turbo = results(ours, inputs, dy)
    stock = results(lambda *x: formula(*x, mask, scale, softcap), inputs, dy)
    wide = [None if each is None else each.double() for each in inputs]
    exact = results(lambda *x: formula(*x, mask, scale, softcap), wide, dy.double())
    for name, *tensors in zip(NAMES, turbo, stock, exact, strict=False):
        assert_as_exact_as_stock(name, *tensors)
    assert turbo[0].is_contiguous()


@pytest.mark.parametrize(("window", "softcap", "with_sinks"), [(None, 2.0, True), (3, None, True), (2, 1.5, False)])
def test_gradients(blocks, window, softcap, with_sinks):
    lengths = [5, 3, 0, 7]
    leaves = [each.requires_grad_() for each in inputs_of(15, torch.float64, "cpu", with_sinks) if each is not None]

    def function(query, key, value, sinks=None):
        return varlen_attention(query, key, value, lengths, window=window, softcap=softcap, sinks=sinks)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_no_bit_of_a_document_depends_on_another(device):
    lengths = [5, 8, 8, 3]
    inputs, dy = inputs_of(24, torch.float32, device), randn(24, 4, 8, device=device, dtype=torch.float32, seed=9)

    def ours(query, key, value, sinks):
        return varlen_attention(query, key, value, lengths, softcap=2.0, sinks=sinks)

    before = results(ours, inputs, dy)
    for each in inputs[:3]:
        each[:, 5:13] = torch.inf
    after = results(ours, inputs, dy)
    others = torch.tensor([i for i in range(24) if not 5 <= i < 13])
    assert torch.equal(before[0][others], after[0][others])
    for old, new in zip(before[1:4], after[1:4], strict=True):
        assert torch.equal(old[:, others], new[:, others])


def test_inputs_of_any_shape_and_strides(device, monkeypatch):
    """Widths that are no power of two, one query head for each key head, and heads between tokens in memory."""
    small_tiles(monkeypatch, 16 if device.type == "cpu" else 64)
    lengths, tokens, dtype = [13, 0, 1, 20], 34, torch.bfloat16
    for heads, groups, width, value_width in ((2, 2, 80, 80), (4, 1, 24, 3)):
        shapes = ((heads, width), (groups, width), (groups, value_width))
        dense = [randn(tokens, *shape, device=device, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
        strided = [*(each.transpose(0, 1) for each in dense), None]
        strided[1] = strided[1].transpose(1, 2).contiguous().transpose(1, 2)  # tokens innermost
        strided[2] = torch.cat([strided[2], strided[2]], -1)[..., :value_width]
        dy = randn(tokens, heads, value_width, device=device, dtype=dtype, seed=9)

        def ours(query, key, value, sinks, lengths=lengths):
            return capped_attention.capped_attention(query, key, value, lengths, scale=0.2, softcap=3.0, window=14)

        mask = visible(lengths, True, 14, device)
        leaves = [each.requires_grad_() for each in strided[:3]]
        y = ours(*leaves, None)
        # Widened: as expanded as what comes from a sum, and of another dtype.
        turbo = [y.detach(), *torch.autograd.grad(y, leaves, dy.float())]
        stock = results(lambda *x, mask=mask: formula(*x, mask, 0.2, 3.0), strided, dy)
        wide = [None if each is None else each.detach().double() for each in strided]
        exact = results(lambda *x, mask=mask: formula(*x, mask, 0.2, 3.0), wide, dy.double())
        for name, *tensors in zip(NAMES, turbo, stock, exact, strict=False):
            assert_as_exact_as_stock(name, *tensors)
        (dquery,) = torch.autograd.grad(ours(*leaves, None).sum(), leaves[:1])  # a gradient of strides 0
        assert dquery.isfinite().all()


def test_the_same_bits_at_every_run(device, monkeypatch):
    small_tiles(monkeypatch, 16 if device.type == "cpu" else 64)
    lengths = [37, 11]
    inputs, dy = inputs_of(48, torch.bfloat16, device), randn(48, 4, 8, device=device, dtype=torch.bfloat16, seed=9)
    first, second = (results(lambda *x: attend(*x, lengths, softcap=2.0, window=20), inputs, dy) for _ in range(2))
    for old, new in zip(first, second, strict=True):
        assert torch.equal(old, new)


def attend(query, key, value, sinks, lengths, **options):
    return varlen_attention(query, key, value, lengths, sinks=sinks, **options)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [1, 1, 0]])
def test_no_tokens_and_single_ones(device, lengths):
    tokens = sum(lengths)
    inputs = inputs_of(tokens, torch.float32, device)
    dy = randn(tokens, 4, 8, device=device, dtype=torch.float32, seed=9)
    y, dquery, *_, dsinks = results(lambda *x: attend(*x, lengths, softcap=2.0), inputs, dy)
    assert y.shape == (tokens, 4, 8)
    assert dquery.shape == (4, tokens, 16)
    assert dsinks.isfinite().all()


def test_which_way(device, monkeypatch):
    """The kernels take heads of up to 256 in float32 and 16 bits."""
    calls = []
    monkeypatch.setattr(capped_attention, "_reference_forward", lambda *_: calls.append("torch"))
    monkeypatch.setattr(capped_attention, "launch", lambda *_, **__: calls.append("kernel"))
    kernel = "kernel" if _launch.INTERPRET or device.type == "cuda" else "torch"
    expected = {(torch.float32, 256): kernel, (torch.bfloat16, 16): kernel, (torch.float64, 16): "torch"}
    for (dtype, width), way in (expected | {(torch.float32, 272): "torch"}).items():
        query = torch.zeros(1, 3, width, dtype=dtype, device=device)
        varlen_attention(query, query, query, [3], softcap=1.0)
        assert calls.pop() == way


@pytest.mark.parametrize("lengths", [[1, 9, 0, 12]])
def test_lengths_that_the_device_alone_knows(device, monkeypatch, lengths):
    """As in a CUDA graph: the same bits, with room for more documents, and anew when `starts` is written to."""
    if not capped_attention.use_triton(torch.empty(0, device=device)):
        pytest.skip("torch operations go by lengths")
    small_tiles(monkeypatch, 16)
    tokens, options = sum(lengths), {"window": 12, "softcap": 2.0}
    inputs = inputs_of(tokens, torch.float32, device)[:3]
    heads, width = inputs[0].shape[0], inputs[2].shape[-1]
    dy = randn(tokens, heads, width, device=device, dtype=torch.float32, seed=9)
    starts = torch.full((len(lengths) + 3,), tokens, dtype=torch.int32, device=device)

    def by_starts(query, key, value):
        return varlen_attention(query, key, value, None, starts=starts, longest=48, **options)

    starts[: len(lengths)] = torch.tensor([0, *lengths]).cumsum(0)[:-1].to(device)
    expected = results(lambda *x: varlen_attention(*x, lengths, **options), inputs, dy)
    for ours, theirs in zip(results(by_starts, inputs, dy), expected, strict=True):
        assert torch.equal(ours, theirs)
    starts[1:] = tokens
    expected = results(lambda *x: varlen_attention(*x, [tokens], **options), inputs, dy)
    for ours, theirs in zip(results(by_starts, inputs, dy), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_tiles_that_see_most_come_first():
    block = capped_attention._Block(16, 8, 4, 1)
    tiles = capped_attention._tiles((20, 0, 33), capped_attention._Blocks(block, block, block), torch.device("cpu"))
    expected = [[20, 33, 32], [0, 20, 16], [20, 33, 16], [0, 20, 0], [20, 33, 0]]
    assert tiles[0].tolist() == tiles[1].tolist() == expected
    assert tiles[2].tolist()[:3] == [[20, 33, 0], [20, 33, 8], [0, 20, 0]]
    assert tiles[2].tolist()[-1] == [20, 33, 32]


def test_what_is_kept_for_backward(device):
    """What came in, the output and two numbers for each of its heads: nothing that a second forward makes again."""
    inputs = [each.requires_grad_() for each in inputs_of(24, torch.float32, device)]
    kept = []

    def through(operator, *args):
        with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
            return operator(*args)

    y = varlen_attention(*inputs[:3], [24], sinks=inputs[3], through=through)
    others = [each for each in kept if each.data_ptr() not in {x.data_ptr() for x in (*inputs, y)}]
    assert len(kept) == 6
    assert sum(each.numel() for each in others) <= 2 * 4 * 24


def test_few_scores_at_a_time(monkeypatch):
    """No tensor is larger than the bound, however long the documents are."""
    seen, softmax = [], torch.softmax
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(capped_attention, "_MOST_SCORES", 4 * 1000 * 10)
    monkeypatch.setattr(torch, "softmax", lambda x, dim: seen.append(x.numel()) or softmax(x, dim))
    varlen_attention(*inputs_of(1000, torch.float32, "cpu")[:3], [1000], softcap=2.0)
    assert len(seen) >= 100
    assert max(seen) <= 4 * 1000 * 10


def test_documents_of_about_one_length_share_a_batch():
    batches = capped_attention._batches((2000, 10, 1990, 12, 0, 900, 2000), torch.device("cpu"))
    assert [(each.documents, each.longest) for each in batches] == [(3, 2000), (1, 900), (2, 12)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softcap": 0.0}, "not positive"),
        ({"sinks": torch.zeros(3)}, r"sinks \[3\] of 4"),
        ({"softcap": 1.0, "causal": False}, "need causal"),
        ({"softcap": 1.0, "dropout": 0.1}, "no dropout"),
        ({"softcap": 1.0, "lengths": None}, "lengths=None"),
    ],
)
def test_bad_input(changes, message):
    arguments = {name: torch.zeros(4, 7, 16) for name in ("query", "key", "value")} | {"lengths": [7]}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**{**arguments, **changes})
