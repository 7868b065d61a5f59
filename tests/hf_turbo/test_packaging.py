"""The wheel: what it holds, that it works installed, and that the folder `kernels/` of a checkout harms nobody."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, cwd, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_TURBO", "PYTHONPATH")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build writes into the source tree, and would pick up what an earlier build left there."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_turbo", "kernels", "patches"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if find_spec("setuptools") else []
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "-w", target, source, cwd=target)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A fresh environment with the wheel installed; the other packages come from the environment of the tests.

    They come through a `.pth` line, which does not read the `.pth` files there: an editable install stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "host_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_one_top_level_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"hf_turbo", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    for folder, package in (("hf_turbo", "hf_turbo"), ("kernels", "hf_turbo/kernels"), ("patches", "hf_turbo/patches")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert "hf_turbo/py.typed" in names


def test_the_wheel_declares_its_doors(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    declared = archive.read(entry_points).decode()
    assert "[console_scripts]\nhf-turbo = hf_turbo.cli:main" in declared
    assert "[torch.backends]\nhf_turbo = hf_turbo.autoload:autoload" in declared


def test_the_wheel_carries_no_pth_file(wheel):
    """Nothing may run at interpreter start: such files are a known way to smuggle code in, and scanners flag them."""
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".pth") or "customize" in name]


def test_installed_package_imports_from_where_it_is_installed(environment):
    code = (
        "import hf_turbo, hf_turbo.kernels, hf_turbo.patches.imports, importlib.util as u\n"
        "print(hf_turbo.__file__, hf_turbo.kernels.__file__, hf_turbo.patches.__file__, sep='\\n')\n"
        "print(u.find_spec('patches'), u.find_spec('kernels') and u.find_spec('kernels').origin)"
    )
    *homes, top_level = run(environment / "bin" / "python", "-c", code, cwd=environment).splitlines()
    assert all(str(environment) in home for home in homes), homes
    patches, kernels = top_level.split(" ", 1)
    assert patches == "None"
    assert str(ROOT / "kernels") not in kernels


def test_installed_doors_are_live(environment):
    code = "import torch, hf_turbo; print(hf_turbo.report().live, hf_turbo.__file__)"
    on = run(environment / "bin" / "python", "-c", code, cwd=environment, HF_TURBO="1")
    assert on.startswith(f"True {environment}")
    off = run(environment / "bin" / "python", "-c", code, cwd=environment)
    assert off.startswith(f"False {environment}")
    assert "doctor" in run(environment / "bin" / "hf-turbo", "--help", cwd=environment)


def test_host_libraries_import_in_a_checkout(environment):
    """With the repository root as working directory its `kernels/` is importable under the name of another package."""
    code = (
        "import transformers, peft, bitsandbytes\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, Trainer\n"
        "from transformers.utils import is_kernels_available\n"
        "import kernels; print(kernels.__file__)"
    )
    shown = run(environment / "bin" / "python", "-c", code, cwd=ROOT)
    assert shown.strip() == str(ROOT / "kernels" / "__init__.py")


def test_top_level_kernels_defines_no_op():
    """transformers imports whatever is called `kernels` to learn its version: our ops must not be registered twice."""
    code = "import sys, kernels; print([m for m in sys.modules if m.startswith('kernels.') or m == 'torch'])"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"
