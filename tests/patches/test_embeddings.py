"""A trained weight that is embedding and head: the same bits as two gradients, added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_turbo.kernels import tied_embedding
from hf_turbo.patches.engine import is_swapped
from torch import nn

import hf_turbo
from tests.models import batch, switch_on, switched_off, tiny_model

ROLES = switched_off("loss", "embeddings")
TIED = {"tie_word_embeddings": True, "vocab_size": 997}  # more rows than tokens


@pytest.fixture
def left(monkeypatch):
    """How often a head's gradient was left with the embedding."""
    calls, give = [], tied_embedding._Waiting.give

    def counted(self: Any, gradient: torch.Tensor) -> bool:
        calls.append(give(self, gradient))
        return calls[-1]

    monkeypatch.setattr(tied_embedding._Waiting, "give", counted)
    return calls


def results(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of two micro-batches."""
    model.zero_grad()
    for seed in (0, 1):
        model(**batch(seed=seed)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def patched(model: Any, **options: Any) -> Any:
    report = hf_turbo.patch_model(model, **{**ROLES, **options})
    return next((row for row in report.rows if row.role == "embeddings"), None)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gemma3", torch.bfloat16)])
def test_the_bits_of_two_gradients(left, family, dtype, reentrant):
    """With a vocabulary that has grown, and with checkpointing."""

    def model() -> Any:
        made = tiny_model(family, dtype, **TIED)
        made.resize_token_embeddings(1003)
        return made if reentrant is None else switch_on(made, reentrant)

    without = model()
    assert patched(without, embeddings=False).patched == 0
    expected = results(without)
    assert not left
    hf_turbo.disable()
    with_it = model()
    row = patched(with_it)
    assert (row.found, row.patched, row.exactness) == (1, 1, "exact")
    found = results(with_it)
    assert left == [True, True]
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    hf_turbo.disable()
    assert not is_swapped(with_it.model.embed_tokens)
    results(with_it)
    assert len(left) == 2


@pytest.mark.parametrize("what", ["untied", "frozen"])
def test_there_is_no_row_where_nothing_is_shared(what):
    model = tiny_model("llama", **{**TIED, "tie_word_embeddings": what != "untied"})
    if what == "frozen":
        model.model.embed_tokens.requires_grad_(False)
    assert patched(model) is None
    hf_turbo.disable()
    with pytest.raises(RuntimeError, match="embeddings=True was asked for"):
        patched(model, embeddings=True)


class Normed(nn.Embedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) / 2


def test_an_embedding_of_another_kind_stays_stock():
    model = tiny_model("llama", **TIED)
    model.model.embed_tokens.__class__ = Normed
    row = patched(model)
    assert (row.found, row.patched) == (1, 0)
    assert "unknown forward of Normed" in row.reason


def test_frozen_and_trained_in_turns(left):
    """Asked for at every call."""
    model = tiny_model("llama", **TIED)
    assert patched(model).patched == 1
    model.model.embed_tokens.requires_grad_(False)
    results(model)
    assert not left
    model.model.embed_tokens.requires_grad_(True)
    results(model)
    assert left == [True, True]
    model.model.embed_tokens.max_norm = 1.0
    results(model)
    assert len(left) == 2


def test_the_weight_may_be_swapped():
    """torch.utils.swap_tensors refuses tensors that something refers to weakly; and no gradient waits for ever."""
    model = tiny_model("llama", **TIED)
    patched(model)
    results(model)
    assert not tied_embedding._LAST
    weight = model.model.embed_tokens.weight
    other = nn.Parameter(weight.detach() + 1)
    torch.utils.swap_tensors(weight, other)
    assert torch.equal(model.lm_head.weight, other + 1)
