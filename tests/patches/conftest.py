"""Fixtures that the tests of several patches share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hf_turbo.patches.kept_layers import Kept

from hf_turbo.lifecycle import _Activation


@pytest.fixture
def plan(monkeypatch) -> SimpleNamespace:
    """`plan.kept` is what a pass keeps; `plan.costs` are those that the last plan was given."""
    asked = SimpleNamespace(kept=Kept(), costs=[])

    def layers(costs, rest, device, before):
        asked.costs = costs
        return asked.kept

    monkeypatch.setattr(_Activation, "_memory_plan", lambda self: layers)
    return asked
