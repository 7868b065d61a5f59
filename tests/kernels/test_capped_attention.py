"""Attention with capped scores and sinks: gradients by finite differences, and no worse than transformers' eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_turbo.kernels import capped_attention
from hf_turbo.kernels.varlen_attention import varlen_attention

from tests.kernels.helpers import assert_as_exact_as_stock, randn
from tests.kernels.test_varlen_attention import visible

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "dq", "dk", "dv", "dsinks")


@pytest.fixture(params=["one batch", "blocks of two rows"])
def blocks(request, monkeypatch):
    """The second splits documents and parts batches as only long documents would be."""
    if request.param != "one batch":
        monkeypatch.setattr(capped_attention, "_ROWS", 2)
        monkeypatch.setattr(capped_attention, "_FILLING", 0)
    capped_attention._batches.cache_clear()
    yield request.param
    capped_attention._batches.cache_clear()


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


def inputs_of(tokens: int, dtype: Any, device: Any, with_sinks: bool = True) -> list[Any]:
    query, key, value = (
        randn(heads, tokens, width, device=device, dtype=dtype, seed=i)
        for i, (heads, width) in enumerate(((6, 16), (2, 16), (2, 8)))
    )
    return [query, key, value, randn(6, device=device, dtype=dtype, seed=5) if with_sinks else None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1, 9, 0, 4, 4, 13], [150, 140, 20]])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(1.5, False), (None, True), (1.5, True)])
def test_as_exact_as_modelling_code(device, blocks, dtype, lengths, window, softcap, with_sinks):
    if blocks != "one batch" and sum(lengths) > 100:
        pytest.skip("parted by itself")
    tokens, scale = sum(lengths), 0.5
    inputs = inputs_of(tokens, dtype, device, with_sinks)
    dy = randn(tokens, 6, 8, device=device, dtype=dtype, seed=9)
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
    inputs, dy = inputs_of(24, torch.float32, device), randn(24, 6, 8, device=device, dtype=torch.float32, seed=9)

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


def test_few_scores_at_a_time(monkeypatch):
    """No tensor is larger than the bound, however long the documents are."""
    seen, softmax = [], torch.softmax
    monkeypatch.setattr(capped_attention, "_MOST_SCORES", 6 * 1000 * 10)
    monkeypatch.setattr(torch, "softmax", lambda x, dim: seen.append(x.numel()) or softmax(x, dim))
    varlen_attention(*inputs_of(1000, torch.float32, "cpu")[:3], [1000], softcap=2.0)
    assert len(seen) >= 100
    assert max(seen) <= 6 * 1000 * 10


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
