"""The `torch.backends` entry point and the accelerate shim behind it. Whole runs through them are in test_doors.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import config_args

from hf_turbo import autoload

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CONFIG = {"distributed_type": "NO", "num_processes": 1, "mixed_precision": "no", "use_cpu": True}


def python(code, **environment):
    """Runs `code` in a fresh interpreter whose environment has the given variables and no other of hf_turbo's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_TURBO")}
    return subprocess.run([sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True)


@pytest.fixture
def launcher(monkeypatch):
    """This process as an accelerate launcher: the config loader reads the section; all is undone afterwards."""
    monkeypatch.setenv("HF_TURBO", "")
    monkeypatch.setattr(config_args.BaseConfig, "process_config", config_args.BaseConfig.process_config)
    autoload.read_section_of_accelerate_config()


def write(path, **keys):
    path.write_text(yaml.safe_dump(CONFIG | keys) if path.suffix == ".yaml" else json.dumps(CONFIG | keys))
    return str(path)


@pytest.mark.parametrize("value", ["maybe", '{"rop": false}'])
def test_a_bad_value_warns_in_one_line_and_leaves_torch_usable(value):
    run = python("import torch, sys; print('torch' in sys.modules, 'transformers' in sys.modules)", HF_TURBO=value)
    assert run.returncode == 0
    assert run.stdout == "True False\n"
    (warning,) = run.stderr.strip().splitlines()
    assert warning.startswith("hf_turbo: not enabled, training goes on stock: ")
    assert "correct or unset HF_TURBO" in warning


def test_an_error_inside_enable_never_reaches_torch(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such hook")

    monkeypatch.setenv("HF_TURBO", "1")
    monkeypatch.setattr(autoload, "enable_from_environment", broken)
    autoload.autoload()
    assert "no such hook" in capsys.readouterr().err


def test_options_given_in_the_program_win():
    code = (
        "import hf_turbo; report = hf_turbo.enable(rope=False)\n"
        "import torch; print(report.options['rope'], report.live, report is hf_turbo.report())"
    )
    run = python(code, HF_TURBO='{"rope": true}')
    assert (run.stdout, run.stderr) == ("False True True\n", "")


@pytest.mark.parametrize("value", [None, "0"])
def test_off_and_unset_do_not_load_the_engine(value):
    code = "import torch, sys; print([m for m in sys.modules if m.startswith('hf_turbo.') and 'autoload' not in m])"
    run = python(code, **({} if value is None else {"HF_TURBO": value}))
    assert "lifecycle" not in run.stdout
    assert "patches" not in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["/usr/bin/accelerate", "launch", "train.py"], [], True),
        (["accelerate-launch", "train.py"], [], True),
        (["accelerate.exe", "launch"], [], True),
        (["trl", "sft"], [], True),
        (["-m", "train.py"], ["python", "-u", "-m", "accelerate.commands.launch", "train.py"], True),
        (["accelerate", "config", "update"], [], False),
        (["train.py", "launch"], ["python", "train.py", "launch"], False),
        (["train.py", "accelerate"], ["python", "train.py", "accelerate"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_launchers_read_the_config(monkeypatch, argv, orig_argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert autoload.is_launcher() is expected


@pytest.mark.parametrize(
    ("section", "environment"),
    [
        (True, "1"),
        (False, "0"),
        (None, "1"),
        ("on", "on"),
        ({"loss": True, "rope": False}, '{"loss": true, "rope": false}'),
        ({}, "{}"),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.usefixtures("launcher")
def test_the_section_becomes_the_workers_environment(tmp_path, section, environment, suffix, portable):
    keys = {"mpirun_config": {"hf_turbo": section}} if portable else {"hf_turbo": section}
    config = config_args.load_config_from_file(write(tmp_path / f"config{suffix}", **keys))
    assert os.environ["HF_TURBO"] == environment
    assert not hasattr(config, "hf_turbo")
    assert config.mpirun_config == {}


@pytest.mark.usefixtures("launcher")
def test_the_users_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TURBO", "0")
    config_args.load_config_from_file(write(tmp_path / "config.yaml", hf_turbo={"rope": False}))
    assert os.environ["HF_TURBO"] == "0"


@pytest.mark.usefixtures("launcher")
def test_a_config_without_the_section_sets_nothing(tmp_path):
    config_args.load_config_from_file(write(tmp_path / "config.yaml"))
    assert os.environ["HF_TURBO"] == ""


@pytest.mark.parametrize("section", [{"rop": False}, {"rope": "sometimes"}, ["rope"], 7])
@pytest.mark.usefixtures("launcher")
def test_a_wrong_section_stops_the_launch(tmp_path, section):
    """What the user asked for by name and cannot be had raises, in the launcher, before anything is started."""
    with pytest.raises((TypeError, ValueError), match=r"HF_TURBO|rope"):
        config_args.load_config_from_file(write(tmp_path / "config.yaml", hf_turbo=section))


@pytest.mark.usefixtures("launcher")
def test_other_unknown_keys_are_still_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown keys"):
        config_args.load_config_from_file(write(tmp_path / "config.yaml", hf_turbo=True, nonsense=1))


@pytest.mark.usefixtures("launcher")
def test_wrapping_twice_wraps_once():
    before = config_args.BaseConfig.process_config
    autoload.read_section_of_accelerate_config()
    assert config_args.BaseConfig.process_config is before


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("launcher")
def test_shipped_configs_load(path):
    config = config_args.load_config_from_file(str(path))
    assert os.environ["HF_TURBO"] == "1"
    assert (
        config.to_dict()["distributed_type"]
        == {
            "single": "NO",
            "ddp": "MULTI_GPU",
            "fsdp2": "FSDP",
            "deepspeed_zero3": "DEEPSPEED",
        }[path.stem]
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_portable_spelling_loads_in_stock_accelerate(path, tmp_path):
    keys = yaml.safe_load(path.read_text())
    refused = tmp_path / "refused.yaml"
    refused.write_text(yaml.safe_dump(keys))
    with pytest.raises(ValueError, match=r"unknown keys .*hf_turbo"):
        config_args.load_config_from_file(str(refused))
    portable = tmp_path / "portable.yaml"
    del keys["hf_turbo"]
    portable.write_text(yaml.safe_dump(keys | {"mpirun_config": {"hf_turbo": True}}))
    assert config_args.load_config_from_file(str(portable)).mpirun_config == {"hf_turbo": True}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_name_options_that_accelerate_launch_knows(path):
    """accelerate takes any key of a nested section silently; a misspelt one would have no effect."""
    from accelerate.commands.launch import launch_command_parser

    known = vars(launch_command_parser().parse_args(["train.py"]))
    for section, options in yaml.safe_load(path.read_text()).items():
        if isinstance(options, dict):
            assert section in ("fsdp_config", "deepspeed_config")
            assert set(options) <= set(known)
