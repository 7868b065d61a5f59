"""Attention within documents: against float64 by the plain formula, and without a trace of other documents."""

from __future__ import annotations

import pytest
import torch
from hf_turbo.kernels.varlen_attention import varlen_attention
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.helpers import assert_as_exact_as_stock, randn

LENGTHS = [[7], [5, 5, 5], [1, 9, 0, 4, 4, 13], [31, 1]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def visible(lengths, causal, window, device):
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    position = torch.arange(len(document), device=device)
    mask = document[:, None] == document[None, :]
    distance = position[:, None] - position[None, :]
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance < window
    return mask


def formula(query, key, value, mask, scale):
    groups = query.shape[0] // key.shape[0]
    key, value = (each.repeat_interleave(groups, 0) for each in (key, value))
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


def results(function, inputs, dy):
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 3), (True, 100)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_as_exact_as_one_masked_call(device, dtype, lengths, causal, window, heads):
    tokens, scale = sum(lengths), 0.3
    inputs = [
        randn(h, tokens, 16, device=device, dtype=dtype, seed=i) for i, h in enumerate((heads[0], *2 * heads[1:]))
    ]
    dy = randn(tokens, heads[0], 16, device=device, dtype=dtype, seed=9)
    mask = visible(lengths, causal, window, device)
    turbo = results(lambda *x: varlen_attention(*x, lengths, scale=scale, causal=causal, window=window), inputs, dy)

    def masked(query, key, value):
        y = scaled_dot_product_attention(
            *(each[None] for each in (query, key, value)), mask, scale=scale, enable_gqa=True
        )
        return y[0].transpose(0, 1)

    stock = results(masked, inputs, dy)
    exact = results(lambda *x: formula(*x, mask, scale), [each.double() for each in inputs], dy.double())
    for name, *tensors in zip(("y", "dq", "dk", "dv"), turbo, stock, exact, strict=True):
        assert_as_exact_as_stock(name, *tensors)
    assert turbo[0].is_contiguous()


def test_no_bit_of_a_document_depends_on_another(device):
    lengths = [5, 8, 8, 3]
    inputs = [randn(2, 24, 16, device=device, dtype=torch.float32, seed=i) for i in range(3)]
    dy = randn(24, 2, 16, device=device, dtype=torch.float32, seed=9)
    before = results(lambda *x: varlen_attention(*x, lengths), inputs, dy)
    changed = [each.clone() for each in inputs]
    for each in changed:
        each[:, 5:13] = 1e4
    dy[5:13] = -1e4
    after = results(lambda *x: varlen_attention(*x, lengths), changed, dy)
    others = torch.tensor([i for i in range(24) if not 5 <= i < 13])
    assert torch.equal(before[0][others], after[0][others])
    for old, new in zip(before[1:], after[1:], strict=True):
        assert torch.equal(old[:, others], new[:, others])


def test_dropout_drops_weights(device):
    value = torch.ones(1, 6000, 8, device=device)
    query = torch.zeros(1, 6000, 8, device=device)
    torch.manual_seed(0)
    y = varlen_attention(query, query, value, [60] * 100, causal=False, dropout=0.25)
    assert abs(y.mean().item() - 1) < 0.01
    assert y.std() > 0.01
    torch.manual_seed(0)
    assert torch.equal(y, varlen_attention(query, query, value, [60] * 100, causal=False, dropout=0.25))


def test_nothing_at_all(device):
    empty = torch.empty(2, 0, 16, device=device)
    assert varlen_attention(empty, empty, empty, []).shape == (0, 2, 16)
    assert varlen_attention(empty, empty, empty, [0, 0]).shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [3, 3]}, "6 tokens in all, but 7"),
        ({"lengths": [8, -1]}, "7 tokens in all"),
        ({"window": 0}, "window of 0"),
        ({"window": 2, "causal": False}, "needs causal"),
        ({"key": torch.zeros(3, 7, 16)}, "do not fit"),
        ({"key": torch.zeros(2, 7, 8)}, "do not fit"),
    ],
)
def test_bad_input(changes, message):
    arguments = {name: torch.zeros(4, 7, 16) for name in ("query", "key", "value")} | {"lengths": [7]}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**{**arguments, **changes})
