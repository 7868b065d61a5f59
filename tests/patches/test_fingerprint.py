"""Fingerprints recognise a computation, whatever the names, and nothing else."""

from __future__ import annotations

import functools

import pytest
import torch
from hf_turbo.patches.fingerprint import fingerprint
from transformers.models.llama import modeling_llama
from transformers.utils.generic import can_return_tuple

import hf_turbo
from tests.models import batch, loss_and_gradients, tiny_model


def stock(hidden_states, scale=2):
    """Documented."""
    total = hidden_states.sum()
    return hidden_states * scale + total


def renamed(x, factor: int = 3) -> int:
    t: int = x.sum()
    return x * factor + t


def changed(hidden_states, scale=2):
    total = hidden_states.sum()
    return hidden_states * scale - total


def other_attribute(hidden_states, scale=2):
    total = hidden_states.mean()
    return hidden_states * scale + total


def swapped_names(scale, hidden_states):
    total = hidden_states.sum()
    return hidden_states * scale + total


def test_names_annotations_defaults_and_docstrings_do_not_matter():
    assert fingerprint(stock) == fingerprint(renamed)


def test_the_computation_matters():
    assert len({fingerprint(f) for f in (stock, changed, other_attribute, swapped_names)}) == 4


def test_it_does_not_depend_on_the_python_version():
    """A literal: `ast.dump` changed in 3.9, 3.12 and 3.13, the fingerprint must not."""
    assert fingerprint(stock) == "47099be76188"


def test_no_source_no_fingerprint():
    assert fingerprint(len) is None
    assert fingerprint(eval("lambda x: x")) is None


# ------------------------------------------------------------------------------------------------------------ wrappers


def scaled(function):
    """As a script wraps a stock forward: it may compute anything."""

    @functools.wraps(function)
    def wrapper(x):
        return function(2 * x)

    return wrapper


def test_wrappers_of_transformers_are_looked_through():
    assert fingerprint(can_return_tuple(stock)) == fingerprint(stock)


@pytest.mark.parametrize("wrap", [scaled, torch.no_grad(), torch.autocast("cpu", enabled=False)])
def test_others_may_compute_anything(wrap):
    assert fingerprint(wrap(stock)) is None
    assert fingerprint(can_return_tuple(wrap(stock))) is None


def test_a_decorated_forward_is_not_the_stock_one():
    """A subclass with the stock body and no gradients: hf_turbo gave it some."""

    class FrozenMLP(modeling_llama.LlamaMLP):
        @torch.no_grad()
        def forward(self, x):
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return down_proj

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = FrozenMLP
    _, expected = loss_and_gradients(model, batch())
    report = hf_turbo.patch_model(model)
    _, gradients = loss_and_gradients(model, batch())
    hf_turbo.disable()
    assert next(row.reason for row in report.rows if row.role == "mlp") == "2 x unknown forward of FrozenMLP"
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("name", ["RMSNorm", "DecoderLayer", "MLP"])
def test_a_stock_forward_that_was_wrapped_is_called(name, monkeypatch):
    """On its class, for all models."""
    cls = getattr(modeling_llama, f"Llama{name}")
    calls, forward = [], cls.forward

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(cls, "forward", wrapped)
    model = tiny_model("llama")
    hf_turbo.patch_model(model)
    loss_and_gradients(model, batch())
    hf_turbo.disable()
    assert len(calls) == (5 if name == "RMSNorm" else 2)
