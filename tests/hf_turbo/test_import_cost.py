"""Importing hf_turbo is light, and an environment that has it installed is not slower where it is not used."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = ["transformers", "triton", "accelerate", "trl", "peft", "rich"]


def measure(code, **environment):
    """Runs `code` in a fresh interpreter; returns the JSON it prints last."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_TURBO")}
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys, time\n{code}"],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return json.loads(done.stdout.splitlines()[-1])


def loaded(code, **environment):
    return measure(f"{code}\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))", **environment)


def test_import_after_torch_is_fast():
    code = (
        "import torch; start = time.process_time(); import hf_turbo, hf_turbo.config\n"
        "print(time.process_time() - start)"
    )
    assert measure(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") < 0.3


def test_import_without_torch_loads_nothing_heavy():
    code = (
        "import hf_turbo; hf_turbo.TurboConfig; print(json.dumps([m for m in ['torch', 'numpy'] if m in sys.modules]))"
    )
    assert measure(code) == []
    assert loaded("import hf_turbo; hf_turbo.TurboConfig") == []


def test_a_submodule_does_not_hide_a_function_of_the_api():
    """Importing `package.name` sets the attribute `name` of the package, over a function of that name."""
    code = (
        "import hf_turbo\n"
        "names = ['enable', 'disable', 'session', 'patch_model', 'report']\n"
        "hf_turbo.enable()\n"
        "print(json.dumps([name for name in names if not callable(getattr(hf_turbo, name))]))"
    )
    assert measure(code) == []


def test_enable_loads_no_host_library():
    assert loaded("import hf_turbo; hf_turbo.enable()") == []


def test_entry_point_costs_nothing_when_unset():
    """Under 1 % of `import torch` itself, timed inside one process: two runs of that import differ by more."""
    code = (
        "start = time.process_time(); import torch; middle = time.process_time()\n"
        "import hf_turbo.autoload; hf_turbo.autoload.autoload()\n"
        "print((time.process_time() - middle) / (middle - start))"
    )
    assert min(measure(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") for _ in range(2)) < 0.01


@pytest.mark.parametrize("environment", [{}, {"HF_TURBO": "1"}, {"HF_TURBO": '{"rope": false}'}])
def test_import_torch_loads_no_host_library(environment):
    assert loaded("import torch", **environment) == []


def test_environment_enables_during_import_torch():
    assert measure("import torch, hf_turbo; print(json.dumps(hf_turbo.report().live))", HF_TURBO="1") is True
    assert measure("import torch, hf_turbo; print(json.dumps(hf_turbo.report().live))") is False
