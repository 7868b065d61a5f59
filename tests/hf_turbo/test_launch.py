"""`python -m hf_turbo train.py ARGS` behaves as `python train.py ARGS`: every case runs both and compares.

These cases run with HF_TURBO=0, which keeps the launcher and leaves out the heavy imports; test_doors.py trains.
"""

import os
import subprocess
import sys
import textwrap

import pytest

INSPECT = """
import json, sys
import __main__

class Picklable:
    pass

print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "file": __file__,
    "package": __package__,
    "spec": getattr(__spec__, "name", None),
    "loader": type(__loader__).__name__,
    "builtins": type(__builtins__).__name__,
    "is_main": __main__.Picklable is Picklable,
    "module_of_class": Picklable.__module__,
}))
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of scripts, which is also the working directory."""

    def write(name, source):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))

    write("inspect_main.py", INSPECT)
    write("package/__init__.py", "")
    write("package/__main__.py", INSPECT)
    write("package/module.py", INSPECT)
    write("scripts/beside.py", "import neighbour; print(neighbour.__file__)")
    write("scripts/neighbour.py", "")
    (tmp_path / "link.py").symlink_to(tmp_path / "scripts" / "beside.py")
    write(
        "nested_error.py",
        "def f():\n    raise ValueError('inner')\ntry:\n    f()\nexcept ValueError as e:\n    g = 1 / 0\n",
    )
    write("syntax_error.py", "print('never')\nx = = 1\n")
    write("interrupted.py", "raise KeyboardInterrupt\n")
    write("exit_code.py", "import sys; print('out'); sys.exit(7)\n")
    write("exit_message.py", "import sys; sys.exit('reason')\n")
    write("exit_late.py", "import atexit\natexit.register(print, 'at exit')\nraise SystemExit\n")
    write("own_hook.py", "import sys\nsys.excepthook = lambda *e: print(e[0], e[2].tb_frame.f_code.co_name)\n1 / 0\n")
    write("bad_import.py", "import no_such_module_anywhere\n")
    write(
        "workers.py",
        """
        import torch

        class Numbers(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return Pair(index)

        class Pair:
            def __init__(self, index):
                self.index = index

        def first(batch):
            return batch[0]

        if __name__ == "__main__":
            for context in ("fork", "spawn"):
                loader = torch.utils.data.DataLoader(
                    Numbers(), num_workers=1, collate_fn=first, multiprocessing_context=context
                )
                print([(type(pair) is Pair, pair.index) for pair in loader])
        """,
    )
    return tmp_path


def python(folder, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_TURBO")}
    environment = inherited | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [
        "inspect_main.py",
        "inspect_main.py -m --lr 3 a",
        "./inspect_main.py -h",
        "link.py",
        "-m package",
        "-m package.module x",
        "nested_error.py",
        "syntax_error.py",
        "interrupted.py",
        "exit_code.py",
        "exit_message.py",
        "exit_late.py",
        "own_hook.py",
        "bad_import.py",
        "missing.py",
        "-m package.missing",
        "workers.py",
    ],
)
def test_as_if_run_directly(folder, command):
    direct = python(folder, *command.split())
    launched = python(folder, "-m", "hf_turbo", *command.split(), HF_TURBO="0")
    assert launched.stdout == direct.stdout
    assert launched.returncode == direct.returncode
    assert _without_runpy(launched.stderr) == _without_runpy(direct.stderr)


def _without_runpy(stderr):
    """Python itself shows its module runner above a module's own frames; hf_turbo shows only the module's."""
    return "\n".join(line for line in stderr.splitlines() if "<frozen runpy>" not in line)


def test_traceback_of_a_module_begins_in_the_module(folder):
    (folder / "package" / "failing.py").write_text("1 / 0\n")
    launched = python(folder, "-m", "hf_turbo", "-m", "package.failing", HF_TURBO="0")
    assert launched.stderr.splitlines()[1] == f'  File "{folder}/package/failing.py", line 1, in <module>'


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is new in Python 3.11")
def test_safe_path_is_respected(folder):
    """Under -P Python puts no folder on sys.path; a launcher must not put the script's there, nor remove another."""
    direct = python(folder, "-P", "inspect_main.py")
    launched = python(folder, "-P", "-m", "hf_turbo", "inspect_main.py", HF_TURBO="0")
    assert launched.stdout == direct.stdout


def test_missing_module_names_it_and_fails(folder):
    launched = python(folder, "-m", "hf_turbo", "-m", "no.such.module", HF_TURBO="0")
    assert launched.returncode == 1
    assert "No module named no.such.module" in launched.stderr
    assert "Traceback" not in launched.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(folder, flag):
    shown = python(folder, "-m", "hf_turbo", flag)
    assert shown.returncode == 0
    assert "python -m hf_turbo" in shown.stdout
    assert "HF_TURBO" in shown.stdout


@pytest.mark.parametrize("arguments", [[], ["--fast", "train.py"], ["-m"]])
def test_wrong_usage(folder, arguments):
    shown = python(folder, "-m", "hf_turbo", *arguments)
    assert shown.returncode == 2
    assert "usage:" in shown.stderr


def test_a_wrong_option_stops_before_the_script_runs(folder):
    """Here the user names hf_turbo on the command line, so what cannot be had is an error, not a warning."""
    shown = python(folder, "-m", "hf_turbo", "exit_code.py", HF_TURBO='{"rop": false}')
    assert shown.returncode == 2
    assert "Did you mean 'rope'?" in shown.stderr
    assert shown.stdout == ""


def test_processes_started_by_the_script_are_enabled_too(folder):
    (folder / "environment.py").write_text("import os; print(os.environ['HF_TURBO'])")
    assert python(folder, "-m", "hf_turbo", "environment.py").stdout == "1\n"
    assert python(folder, "-m", "hf_turbo", "environment.py", HF_TURBO="0").stdout == "0\n"
