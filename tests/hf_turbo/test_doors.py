"""Every door into hf_turbo runs a whole script that does not know of it, and the report proves what was patched.

The scripts in tests/hosts/scripts/ are plain Trainer, TRL and Accelerate scripts; none imports hf_turbo. A script costs
a quarter of a minute: the callback is tested in test_lifecycle.py, `hf-turbo launch` in test_cli.py, the other spelling
of a config's section, and that nothing happens unasked, in test_autoload.py.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "hosts" / "scripts"
PROGRAMS = Path(sysconfig.get_path("scripts"))
ROLES = {"norms", "mlp", "layers", "rope", "loss", "padding"}


@pytest.fixture
def run(tmp_path):
    """Runs a command without the network, without the user's accelerate config and without HF_TURBO* of the caller."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_TURBO")}
    fixed = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def run(*command, **environment):
        done = subprocess.run(
            [str(part) for part in command],
            env=inherited | fixed | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "not enabled" not in done.stderr
        return done

    return run


@pytest.fixture
def config(tmp_path):
    """Makes a copy of a shipped accelerate config that runs on the CPU."""

    def config(name):
        keys = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(keys | {"use_cpu": True, "mixed_precision": "no"}))
        return path

    return config


def patched(path):
    """Rows of a report by role, of which at least one must have been patched."""
    report = json.loads(path.read_text())
    rows = {row["role"]: row for row in report["rows"]}
    assert sum(row["patched"] for row in rows.values()) > 0
    # The optimizer is met after the model, and in time for the file that is written at train begin.
    assert rows.pop("optimizer")["reason"] == "on cpu stock is as fast"
    host = rows.pop("host")
    assert 0 < host["found"] == host["patched"]
    return rows


def assert_all_patched(path, roles=ROLES, but=()):
    rows = patched(path)
    assert set(rows) == roles
    for role in but:
        row = rows.pop(role)
        assert row["patched"] == 0
        assert f"{role}=False" in row["reason"]
    for role, row in rows.items():
        assert 0 < row["found"] == row["patched"], (role, row)


def assert_loop_patched(path):
    """A plain loop keeps the stock loss and padding unless asked by name: it may read the logits after the step."""
    rows = patched(path)
    assert set(rows) == ROLES
    loss = rows.pop("loss")
    assert loss["patched"] == 0
    assert "after the step" in loss["reason"]
    padding = rows.pop("padding")
    assert padding["patched"] == 0
    assert "padding=True leaves it out" in padding["reason"]
    for role, row in rows.items():
        assert 0 < row["found"] == row["patched"], (role, row)


def report_of(folder):
    return folder / "hf_turbo_report.json"


def test_enable_called_before_everything(run, tmp_path):
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import hf_turbo; hf_turbo.enable()\n"
        "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run(sys.executable, wrapper, SCRIPTS / "trainer.py", tmp_path / "out")
    assert_all_patched(report_of(tmp_path / "out"))


def test_torchrun_m(run, tmp_path):
    report = tmp_path / "report.json"
    torchrun = (PROGRAMS / "torchrun", "--standalone", "--nproc_per_node", "1")
    run(*torchrun, "-m", "hf_turbo", SCRIPTS / "accelerate_loop.py", HF_TURBO_REPORT=str(report))
    assert_loop_patched(report)


def test_environment_with_options_on_a_trl_script(run, tmp_path):
    run(sys.executable, SCRIPTS / "sft.py", tmp_path / "out", HF_TURBO='{"rope": false}')
    assert_all_patched(report_of(tmp_path / "out"), ROLES | {"checkpointing", "memory"}, but={"rope"})  # TRL's default


def test_section_of_the_shipped_ddp_config_on_two_processes(run, config, tmp_path):
    run(PROGRAMS / "accelerate", "launch", "--config_file", config("ddp"), SCRIPTS / "trainer.py", tmp_path / "out")
    assert_all_patched(report_of(tmp_path / "out"))
