"""Import hooks: the callback runs once, after the module, and the machinery leaves no trace."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
from hf_turbo.patches.imports import ImportHooks


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "late_module_of_the_tests.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "late_module_of_the_tests"
    sys.modules.pop("late_module_of_the_tests", None)


def test_runs_after_the_import_and_once(module):
    hooks, seen = ImportHooks(), []
    hooks.when_imported(module, lambda: seen.append(sys.modules[module].VALUE))
    assert seen == []
    loaded = importlib.import_module(module)
    assert seen == [1]
    importlib.reload(loaded)
    assert seen == [1]
    hooks.clear()


def test_runs_now_if_imported_already():
    hooks, seen = ImportHooks(), []
    hooks.when_imported("json", lambda: seen.append(1))
    assert seen == [1]
    assert hooks not in sys.meta_path


def test_leaves_the_loader_and_the_path_as_they_were(module):
    before = list(sys.meta_path)
    hooks = ImportHooks()
    hooks.when_imported(module, lambda: None)
    loaded = importlib.import_module(module)
    hooks.clear()
    assert sys.meta_path == before
    stock = importlib.util.spec_from_file_location("other", loaded.__file__)
    assert type(loaded.__loader__) is type(stock.loader)
    assert type(loaded.__spec__.loader) is type(stock.loader)


def test_clear_forgets(module):
    hooks, seen = ImportHooks(), []
    hooks.when_imported(module, lambda: seen.append(1))
    hooks.clear()
    importlib.import_module(module)
    assert seen == []
