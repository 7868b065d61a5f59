"""`hf-turbo doctor`: shape of the report, exit code, privacy, and a self-test that finds a wrong kernel."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from hf_turbo import doctor, selftest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture
def no_self_test(monkeypatch):
    """For cases about the environment alone."""
    monkeypatch.setattr(selftest, "run", lambda: iter([selftest.Result("rms_norm", True, "fine")]))


def report(capsys):
    code = doctor.run(as_json=True)
    return code, json.loads(capsys.readouterr().out)


def test_all_is_well_here(capsys):
    """The kernels pass on the device the tests run on, and the environment of the tests is a tested one."""
    code, found = report(capsys)
    assert found["problems"] == []
    assert code == 0
    assert {test["op"] for test in found["self_test"]} == set(selftest._CASES)
    assert all(test["passed"] for test in found["self_test"])


@pytest.mark.usefixtures("no_self_test")
def test_markdown_has_the_shape_of_trl_env(capsys):
    assert doctor.run() == 0
    shown = capsys.readouterr().out
    first, *lines = shown.strip().splitlines()
    assert first == "Copy-paste the following information when reporting an issue:"
    facts = [line for line in lines if line.startswith("- ")]
    assert all(re.fullmatch(r"- [\w .()*-]+: \S.*", line) for line in facts), facts
    assert f"- torch version: {torch.__version__} (tested: 2.11 to 2.13)" in facts
    assert "- Self-test rms_norm: ok, fine" in facts
    assert lines[-1] == "No problem found."


@pytest.mark.usefixtures("no_self_test")
def test_json_and_markdown_say_the_same(capsys):
    _, found = report(capsys)
    doctor.run()
    shown = capsys.readouterr().out
    for key, value in found["environment"].items():
        assert f"- {key}: {value}\n" in shown


@pytest.mark.parametrize(
    ("installed", "fact", "problem"),
    [
        ("5.17.0", "5.17.0 (tested: 5.17 to 5.23)", None),
        ("5.23.9", "5.23.9 (tested: 5.17 to 5.23)", None),
        ("5.23.0.dev0", "5.23.0.dev0 (tested: 5.17 to 5.23)", None),
        ("5.24.0", "5.24.0 (newer than tested: 5.17 to 5.23)", None),
        ("6.0", "6.0 (newer than tested: 5.17 to 5.23)", None),
        ("4.57.1", "4.57.1 (older than tested: 5.17 to 5.23)", "too old: install 5.17 to 5.23"),
        (None, "not installed", "not installed: install 5.17 to 5.23"),
    ],
)
def test_versions(installed, fact, problem):
    shown, found = doctor.judge_version("transformers", installed, ("5.17", "5.23"))
    assert shown == fact
    assert (found is None) if problem is None else problem in found


def test_optional_package_may_be_missing():
    assert doctor.judge_version("trl", None, ("1.15", "1.16")) == ("not installed", None)


def test_tested_ranges_agree_with_the_declared_dependencies():
    lowest = dict(re.findall(r"\"(\w+)>=([\d.]+)", (ROOT / "pyproject.toml").read_text()))
    for name, (first, _) in doctor.TESTED.items():
        assert lowest[name] == first, name


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("HF_TURBO", "perhaps", "use 1, 0 or a JSON object"),
        ("HF_TURBO", '{"rop": true}', "Did you mean 'rope'?"),
        ("HF_TURBO_ROPE", "0", "no environment variable HF_TURBO_ROPE"),
        ("TORCH_DEVICE_BACKEND_AUTOLOAD", "0", "unset TORCH_DEVICE_BACKEND_AUTOLOAD"),
        ("TRITON_CACHE_DIR", "/proc/no/such/folder", "Triton cache is not writable"),
    ],
)
@pytest.mark.usefixtures("no_self_test")
def test_an_environment_that_needs_attention(monkeypatch, capsys, name, value, problem):
    monkeypatch.setenv(name, value)
    code, found = report(capsys)
    assert code == 1
    assert any(problem in line for line in found["problems"])


@pytest.mark.usefixtures("no_self_test")
def test_entry_point_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    code, found = report(capsys)
    assert code == 1
    assert "not registered" in found["environment"]["Autoload"]


@pytest.mark.usefixtures("no_self_test")
def test_every_variable_is_listed(monkeypatch, capsys):
    monkeypatch.setenv("HF_TURBO", '{"rope": false}')
    monkeypatch.setenv("USE_HUB_KERNELS", "0")
    _, found = report(capsys)
    for name in doctor.VARIABLES:
        assert name in found["environment"]
    assert found["environment"]["HF_TURBO"] == '{"rope": false}'
    assert found["environment"]["USE_HUB_KERNELS"] == "0"


def test_every_variable_that_hf_turbo_reads_is_listed():
    sources = [
        path.read_text() for folder in ("hf_turbo", "kernels", "patches") for path in ROOT.glob(f"{folder}/*.py")
    ]
    read = {name for source in sources for name in re.findall(r"\"(HF_TURBO\w*)\"", source)}
    assert "HF_TURBO_REPORT" in read
    assert read <= set(doctor.VARIABLES)


@pytest.mark.usefixtures("no_self_test")
def test_no_token_user_or_home_is_shown(monkeypatch, capsys, tmp_path):
    home = tmp_path / "home" / "marygold"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_TURBO_REPORT", str(home / "report.json"))
    monkeypatch.setenv("HF_TURBO_TYPO", "hf_secret")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"snapshot:{home}/x,/scratch/marygold/y")
    failed = selftest.Result("rope", False, f"ImportError: cannot import name ({home}/lib/x.py)")
    monkeypatch.setattr(selftest, "run", lambda: iter([failed]))
    for as_json in (True, False):
        assert doctor.run(as_json=as_json) == 1
        shown = capsys.readouterr().out
        assert "marygold" not in shown
        assert "hf_secret" not in shown
        assert "~/lib/x.py" in shown


@pytest.mark.usefixtures("no_self_test")
def test_rival_patcher_loaded_in_this_process(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "unsloth", sys)
    monkeypatch.setattr(doctor, "_version", lambda name: "2026.10.9" if name == "unsloth" else "5.20")
    _, found = report(capsys)
    assert found["environment"]["unsloth"] == "2026.10.9, loaded in this process (rival patcher)"


@pytest.fixture
def self_test(monkeypatch):
    """The self-test of one op."""

    def self_test(op):
        monkeypatch.setattr(selftest, "_CASES", {op: selftest._CASES[op]})
        (result,) = selftest.run()
        return result

    return self_test


def test_self_test_finds_a_gradient_that_is_slightly_wrong(monkeypatch, self_test):
    from hf_turbo.kernels import layer_norm

    def wrong(x, weight, bias, eps):
        return torch.nn.functional.layer_norm(x + 1e-3 * (x - x.detach()), weight.shape, weight, bias, eps)

    monkeypatch.setattr(layer_norm, "layer_norm", wrong)
    result = self_test("layer_norm")
    assert not result.passed
    assert "d_x of affine in float32" in result.detail


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_self_test_finds_values_that_are_not_finite(monkeypatch, self_test, value):
    from hf_turbo.kernels import glu

    monkeypatch.setattr(glu, "glu", lambda gate, up, activation: gate * up * value)
    assert not self_test("glu").passed


def test_self_test_shows_a_kernel_that_cannot_be_imported(monkeypatch, self_test):
    monkeypatch.setitem(sys.modules, "hf_turbo.kernels.rope", None)
    result = self_test("rope")
    assert not result.passed
    assert result.detail.startswith("ModuleNotFoundError: ")
