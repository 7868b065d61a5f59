"""The console script `hf-turbo`: its help, its errors, and `launch` up to the worker's environment."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from hf_turbo import cli

PROGRAM = Path(sysconfig.get_path("scripts")) / "hf-turbo"
WORKER = "import os, sys; print('worker', os.environ['HF_TURBO'], sys.argv[1:])"


def hf_turbo(folder, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_TURBO")}
    environment = inherited | {"HF_HOME": str(folder / "home")} | environment
    return subprocess.run([PROGRAM, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "config.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\nhf_turbo: {rope: false}\n")
    return tmp_path


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "doctor" in shown
    assert "launch" in shown


def test_help_of_doctor(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", "--help"])
    assert left.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["doctor", "--fast"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage: hf-turbo" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from hf_turbo import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'accelerate', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (["--cpu"], {}, "1"),
        (["--config_file", "config.yaml"], {}, '{"rope": false}'),
        (["--config_file", "config.yaml"], {"HF_TURBO": "0"}, "0"),
    ],
)
def test_launch_sets_the_environment_of_the_worker(worker, options, environment, expected):
    done = hf_turbo(worker, "launch", *options, "worker.py", "--lr", "1", **environment)
    assert done.returncode == 0, done.stderr
    assert f"worker {expected} ['--lr', '1']" in done.stdout


def test_launch_help_is_that_of_accelerate(worker):
    done = hf_turbo(worker, "launch", "--help")
    assert done.returncode == 0
    assert "usage: hf-turbo launch" in done.stdout
    assert "--num_processes" in done.stdout


def test_a_failing_worker_fails_the_launch(worker):
    (worker / "worker.py").write_text("raise SystemExit(3)")
    assert hf_turbo(worker, "launch", "--cpu", "worker.py").returncode != 0
