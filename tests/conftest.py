"""Shared by all tests: offline, and hf_turbo off again after each test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.training")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    """What is imported now stays: nothing of it has to be looked at by each garbage collection, of which every training
    makes one, at half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def hf_turbo_off() -> Iterator[None]:
    yield
    import sys

    lifecycle = sys.modules.get("hf_turbo.lifecycle")
    if lifecycle is not None:
        lifecycle.disable()
