"""Import hooks: the callback runs once, after the module, and the machinery leaves no trace."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
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


def test_runs_at_the_end_of_an_import_that_has_begun(tmp_path, monkeypatch):
    """`import torch`, and with it the entry point, may run in the middle of importing the module to be patched."""
    hooks, seen = ImportHooks(), []
    (tmp_path / "half_module_of_the_tests.py").write_text("import halfway_of_the_tests\nVALUE = 1\n")
    (tmp_path / "halfway_of_the_tests.py").write_text("CALLBACK()\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def halfway():
        hooks.when_imported(
            "half_module_of_the_tests", lambda: seen.append(sys.modules["half_module_of_the_tests"].VALUE)
        )
        assert seen == []

    monkeypatch.setattr("builtins.CALLBACK", halfway, raising=False)
    module = importlib.import_module("half_module_of_the_tests")
    assert seen == [1]
    assert type(module.__spec__) is type(sys.__spec__)
    hooks.clear()
    for name in ("half_module_of_the_tests", "halfway_of_the_tests"):
        sys.modules.pop(name, None)


@pytest.mark.newest
def test_the_environment_door_works_whatever_is_imported_first():
    """transformers first: tests/hf_turbo/test_doors.py."""
    code = "from accelerate import Accelerator; print(Accelerator.prepare.__code__.co_filename)"
    environment = {**os.environ, "HF_TURBO": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "patches" in result.stdout
