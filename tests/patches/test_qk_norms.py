"""Norms of queries and keys that the rotary embedding does: never left out, whatever happens in between.

That all gradients of all families are no further from fp64 than stock's is tested in test_parity.py.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from hf_turbo.patches import qk_norms, rope

import hf_turbo
from tests.models import batch, loss_and_gradients, switch_on, tiny_model

FAMILIES = ["qwen3", "gemma3", "qwen3-moe"]


@pytest.fixture(autouse=True)
def off_again():
    yield
    hf_turbo.disable()
    assert qk_norms._HERE.attention is None
    assert not qk_norms._HERE.waiting


@pytest.fixture
def calls(monkeypatch):
    """Calls of the op that does both."""
    made, op = [], rope.qk_norm_rope
    monkeypatch.setattr(rope, "qk_norm_rope", lambda *args, **kw: made.append(kw["unsqueeze_dim"]) or op(*args, **kw))
    return made


def assert_as_stock(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointed", [None, "torch", "reentrant"])
def test_both_in_one_call(family, checkpointed, calls):
    model = tiny_model(family)
    if checkpointed:
        switch_on(model, reentrant=checkpointed == "reentrant")
    expected = loss_and_gradients(model, batch())
    report = hf_turbo.patch_model(model)
    row = next(row for row in report.rows if row.role == "rope")
    assert row.kernel == "qk_norm_rope"
    assert_as_stock(loss_and_gradients(model, batch()), expected)
    assert len(calls) == len(model.model.layers) * (2 if checkpointed else 1)
    with torch.no_grad():
        model.eval()(**batch())
    hf_turbo.disable()
    calls.clear()
    model.train()
    assert_as_stock(loss_and_gradients(model, batch()), expected)
    assert calls == []


@pytest.mark.parametrize("options", [{"norms": False}, {"rope": False}])
def test_switched_off(options, calls):
    model = tiny_model("qwen3")
    expected = loss_and_gradients(model, batch())
    hf_turbo.patch_model(model, **options)
    assert_as_stock(loss_and_gradients(model, batch()), expected)
    assert calls == []


@pytest.mark.parametrize("which", ["q_norm", "k_norm"])
def test_a_norm_with_a_hook_is_called_as_in_stock(which, calls):
    """And sees what stock would give it; the other one waits in vain, and is normed by itself."""
    model = tiny_model("qwen3")
    seen: list[torch.Tensor] = []
    getattr(model.model.layers[0].self_attn, which).register_forward_hook(lambda *args: seen.append(args[2].detach()))
    expected = loss_and_gradients(model, batch())
    hf_turbo.patch_model(model)
    assert_as_stock(loss_and_gradients(model, batch()), expected)
    assert len(calls) == len(model.model.layers) - 1
    torch.testing.assert_close(seen[1], seen[0])


def by_lambda(stock: Any) -> Any:
    return lambda *args, **kwargs: stock(*args, **kwargs)


def by_wraps_of_copies(stock: Any) -> Any:
    """Looks like ours in every attribute, and hands on tensors of its own."""
    return functools.wraps(stock)(lambda q, k, *args, **kwargs: stock(q.clone(), k.clone(), *args, **kwargs))


@pytest.mark.parametrize("wrap", [by_lambda, by_wraps_of_copies])
def test_the_function_behind_was_replaced_since(wrap, calls, monkeypatch):
    model = tiny_model("qwen3")
    expected = loss_and_gradients(model, batch())
    module = sys.modules[type(model).__module__]
    hf_turbo.patch_model(model)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", wrap(module.apply_rotary_pos_emb))
    assert_as_stock(loss_and_gradients(model, batch()), expected)
    assert calls == []


def test_the_forward_of_the_layer_was_replaced_since(calls, monkeypatch):
    model = tiny_model("qwen3")
    expected = loss_and_gradients(model, batch())
    stock = sys.modules[type(model).__module__].Qwen3Attention
    seen, forward = [], stock.forward
    hf_turbo.patch_model(model)
    monkeypatch.setattr(stock, "forward", lambda self, *args, **kw: seen.append(1) or forward(self, *args, **kw))
    assert_as_stock(loss_and_gradients(model, batch()), expected)
    assert calls == []
    assert len(seen) == len(model.model.layers)


def test_a_norm_that_is_called_elsewhere_norms():
    model = tiny_model("qwen3")
    norm = model.model.layers[0].self_attn.q_norm
    x = torch.randn(1, 2, 3, norm.weight.numel())
    expected = norm(x)
    hf_turbo.patch_model(model)
    torch.testing.assert_close(norm(x), expected)


def test_a_norm_that_is_left_out_is_an_error(calls, monkeypatch):
    model = tiny_model("qwen3")
    hf_turbo.patch_model(model)
    monkeypatch.setattr(qk_norms, "_is_view", lambda *args: False)
    with pytest.raises(RuntimeError, match=r"q_norm, k_norm of Qwen3Attention waited.*rope=False"):
        model(**batch())


def test_what_cannot_be_rotated_here_is_normed_first(calls, monkeypatch):
    model = tiny_model("gemma3")
    expected = loss_and_gradients(model, batch())
    hf_turbo.patch_model(model)
    monkeypatch.setattr(rope, "_usable", lambda *args: False)
    assert_as_stock(loss_and_gradients(model, batch()), expected)
    assert calls == []


def test_a_layer_that_failed_in_between_leaves_nothing_behind(calls):
    """Not even the tensors of the pass, by which memory would stay taken."""
    model = tiny_model("qwen3")
    expected = loss_and_gradients(model, batch())
    hf_turbo.patch_model(model)
    attention = model.model.layers[0].self_attn
    handle = attention.v_proj.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        model(**batch())
    assert not qk_norms._HERE.waiting
    handle.remove()
    assert_as_stock(loss_and_gradients(model, batch()), expected)
