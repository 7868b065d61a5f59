"""`hf-turbo doctor`: what a report of a problem needs, in the shape of `trl env`, and what is wrong if something is.

Prints no tokens, no user names and no paths of the user's.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING

from .config import TurboConfig

if TYPE_CHECKING:
    from .selftest import Result

# Distribution -> first and last minor release that the tests run against.
TESTED = {
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.17", "5.23"),
    "accelerate": ("1.15", "1.15"),
    "trl": ("1.15", "1.16"),
    "peft": ("0.21", "0.21"),
    "bitsandbytes": ("0.50", "0.50"),
    "datasets": ("4.8", "5.2"),
}
REQUIRED = ("torch", "triton", "transformers", "accelerate")

# Distributions that change how a model computes; hf_turbo leaves to them what they have patched.
KERNEL_LIBRARIES = ("flash-attn", "flash-attn-3", "kernels")
PATCHERS = ("liger_kernel", "unsloth", "unsloth_zoo", "axolotl")

VARIABLES = (
    "HF_TURBO",
    "HF_TURBO_REPORT",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "USE_HUB_KERNELS",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
)
PATH_VARIABLES = ("HF_TURBO_REPORT", "TRITON_CACHE_DIR")  # shown as set or unset only


class Environment:
    """The facts, in the order they are printed, and the problems found while collecting them."""

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}
        self.problems: list[str] = []
        self._add_versions()
        self._add_devices()
        self._add_libraries()
        self._add_variables()
        self._add_doors()
        self._add_triton_cache()

    def _add_versions(self) -> None:
        self.facts["Platform"] = platform.platform()
        self.facts["Python version"] = platform.python_version()
        self.facts["hf_turbo version"] = _version("hf_turbo") or "not installed (running from a source tree)"
        for name, tested in TESTED.items():
            installed = _version(name)
            fact, problem = judge_version(name, installed, tested)
            self.facts[f"{name} version"] = fact
            if problem:
                self.problems.append(problem)

    def _add_devices(self) -> None:
        try:
            import torch
        except Exception as error:  # a broken torch raises OSError or RuntimeError too
            self.facts["Accelerators"] = "unknown"
            self.problems.append(f"`import torch` fails: {_redact(str(error))}")
            return
        self.facts["torch build"] = f"CUDA {torch.version.cuda}, HIP {torch.version.hip}"
        devices = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            devices.append(f"{properties.name} (capability {properties.major}.{properties.minor}, {memory:.1f} GiB)")
        self.facts["Accelerators"] = ", ".join(devices) or "none: training and the self-test run on the CPU"
        if devices:
            self.facts["NVIDIA driver"] = _driver_version()

    def _add_libraries(self) -> None:
        for name in KERNEL_LIBRARIES:
            self.facts[name] = _version(name) or "not installed"
        for name in PATCHERS:
            installed = _version(name)
            loaded = ", loaded in this process" if name in sys.modules else ""
            self.facts[name] = f"{installed}{loaded} (rival patcher)" if installed else "not installed"

    def _add_variables(self) -> None:
        for name in VARIABLES:
            value = os.environ.get(name)
            self.facts[name] = "unset" if value is None else "set" if name in PATH_VARIABLES else value or "empty"
        for name in sorted(os.environ):
            if name.startswith("HF_TURBO") and name not in VARIABLES:
                self.facts[name] = "set"
                self.problems.append(f"hf_turbo reads no environment variable {name}: unset it or correct its name")
        try:
            TurboConfig.from_env(os.environ.get("HF_TURBO"))
        except (TypeError, ValueError) as error:
            self.problems.append(str(error))

    def _add_doors(self) -> None:
        registered = any(entry.name == "hf_turbo" for entry in entry_points(group="torch.backends"))
        off = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0"
        fact = "torch.backends entry point " + ("registered" if registered else "not registered")
        self.facts["Autoload"] = fact + (", turned off by TORCH_DEVICE_BACKEND_AUTOLOAD=0" if off else "")
        if not registered or off:
            remedy = "unset TORCH_DEVICE_BACKEND_AUTOLOAD" if registered else "install hf_turbo with pip"
            self.problems.append(f"HF_TURBO=1 and the section of an accelerate config have no effect: {remedy}")

    def _add_triton_cache(self) -> None:
        home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
        folder = os.path.abspath(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        try:
            with tempfile.TemporaryFile(dir=folder):
                self.facts["Triton cache"] = "writable"
        except OSError:
            self.facts["Triton cache"] = "not writable"
            self.problems.append("the Triton cache is not writable: set TRITON_CACHE_DIR to a folder that is")


def judge_version(name: str, installed: str | None, tested: tuple[str, str]) -> tuple[str, str | None]:
    """How a version is printed, and the problem with it. Newer than tested is no problem: features probe for what
    they need and stay stock where they do not find it."""
    from packaging.version import Version

    first, last = tested
    span = first if first == last else f"{first} to {last}"
    if installed is None:
        needed = name in REQUIRED and (name != "triton" or platform.system() == "Linux")
        return "not installed", f"{name} is not installed: install {span}" if needed else None
    release = Version(installed).release[:2]
    if release < Version(first).release:
        return f"{installed} (older than tested: {span})", f"{name} {installed} is too old: install {span}"
    if release > Version(last).release:
        return f"{installed} (newer than tested: {span})", None
    return f"{installed} (tested: {span})", None


def run(*, as_json: bool = False) -> int:
    """Prints the report; returns 0 if all is well and 1 if something needs attention."""
    environment = Environment()
    facts = {key: _redact(value) for key, value in environment.facts.items()}
    if not as_json:
        print("\nCopy-paste the following information when reporting an issue:\n")
        print("\n".join(f"- {key}: {value}" for key, value in facts.items()), flush=True)
    tests = []
    for result in _self_test():
        tests.append({"op": result.op, "passed": result.passed, "detail": _redact(result.detail)})
        if not as_json:
            print(
                f"- Self-test {result.op}: {'ok' if result.passed else 'FAILED'}, {_redact(result.detail)}", flush=True
            )
    problems = [_redact(problem) for problem in environment.problems]
    problems += [
        f"the self-test of {test['op']} failed: training with it may give wrong numbers"
        for test in tests
        if not test["passed"]
    ]
    if as_json:
        print(json.dumps({"environment": facts, "self_test": tests, "problems": problems}, indent=2))
    else:
        print(
            "\n".join(
                ["\nProblems:", *(f"- {problem}" for problem in problems)] if problems else ["\nNo problem found."]
            )
        )
    return 1 if problems else 0


def _self_test() -> Iterator[Result]:
    if "torch" in sys.modules:  # its absence or failure is a problem already named
        from . import selftest

        yield from selftest.run()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi does not answer)"
    return output.split("\n")[0].strip()


def _redact(text: str) -> str:
    """Takes the user's name and home folder out of a text."""
    home = os.path.expanduser("~").rstrip("/")
    if not home:
        return text
    text = text.replace(home, "~")
    return re.sub(rf"(?<=/){re.escape(os.path.basename(home))}(?=/|$)", "<user>", text)
