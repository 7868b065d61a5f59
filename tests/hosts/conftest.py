"""Fixtures of the tests that run whole trainings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import hf_turbo
from tests.training import fused_head_on_cpu, one_thread


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """TRL's fused head runs on the CPU, sums add up in one order, and turbo is off in the end."""
    with one_thread(), fused_head_on_cpu():
        yield
        hf_turbo.disable()
