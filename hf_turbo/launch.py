"""The door `python -m hf_turbo train.py ARGS`: enables hf_turbo, then runs the script as `python train.py ARGS` would.

The script sees its own `sys.argv`, `sys.path[0]` and `__main__`, so that classes defined in it can be pickled and
spawned workers find them; its tracebacks begin in its own code; its exit code is the process's.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Callable
from importlib.abc import InspectLoader
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from types import CodeType, ModuleType, TracebackType
from typing import NoReturn

from .autoload import enable_from_environment

USAGE = """\
usage: python -m hf_turbo [-h] (SCRIPT | -m MODULE) [ARGS ...]

Runs an unmodified training script (or module) with hf_turbo enabled, otherwise as `python SCRIPT ARGS` would.
Under a launcher:  accelerate launch -m hf_turbo SCRIPT ARGS
                   torchrun -m hf_turbo SCRIPT ARGS

Options come from the environment variable HF_TURBO:
  HF_TURBO='{"rope": false}'   a JSON object of the options of hf_turbo.enable()
  HF_TURBO=0                   off: run the script stock
"""


def main() -> None:
    """Runs the script or module named on the command line; what it raises or exits with is left to the interpreter."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    as_module = arguments[:1] == ["-m"] and len(arguments) > 1
    if not arguments or (arguments[0].startswith("-") and not as_module):
        _fail(f"{USAGE}\nhf_turbo: " + (f"unknown option {arguments[0]}" if arguments else "name a script"))
    _enable()
    module, load = _module(arguments[1]) if as_module else _script(arguments[0])
    sys.argv = [str(module.__file__), *arguments[2:]] if as_module else arguments
    _run(module, load)


def _enable() -> None:
    """Enables hf_turbo here and, through the environment, in the processes that the script starts."""
    if not os.environ.get("HF_TURBO"):
        os.environ["HF_TURBO"] = "1"
    try:
        enable_from_environment()
    except (TypeError, ValueError) as error:
        _fail(f"hf_turbo: {error}")


def _script(path: str) -> tuple[ModuleType, Callable[[], CodeType]]:
    """`__main__` for a script, and what compiles it; sets `sys.path[0]` to the script's folder."""
    file = os.path.join(os.getcwd(), path)
    try:
        with io.open_code(file) as stream:
            source = stream.read()
    except OSError as error:
        _fail(f"{sys.executable}: can't open file {file!r}: [Errno {error.errno}] {error.strerror}")
    module = ModuleType("__main__")
    module.__file__ = file
    module.__loader__ = SourceFileLoader("__main__", file)
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # under -P and -I Python adds no folder of its own
        sys.path[0] = os.path.dirname(os.path.realpath(file))
    return module, lambda: compile(source, file, "exec", dont_inherit=True)


def _module(name: str) -> tuple[ModuleType, Callable[[], CodeType]]:
    """`__main__` for a module or for the `__main__` of a package, and what compiles it."""
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = find_spec(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    if spec is None or not isinstance(spec.loader, InspectLoader):
        _fail(f"{sys.executable}: No module named {name}", code=1)
    loader = spec.loader
    module = ModuleType("__main__")
    module.__file__, module.__spec__, module.__loader__ = spec.origin, spec, loader
    module.__package__ = spec.parent

    def load() -> CodeType:
        code = loader.get_code(name)
        if code is None:
            _fail(f"{sys.executable}: No code object available for {name}", code=1)
        return code

    return module, load


def _run(module: ModuleType, load: Callable[[], CodeType]) -> None:
    """Runs the code as `__main__`; a traceback begins where the code does."""
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    code = None
    try:
        code = load()
        exec(code, module.__dict__)
    except BaseException as error:
        _hide_frames_above(error.__traceback__.tb_next if code and error.__traceback__ else None)
        raise


def _hide_frames_above(first: TracebackType | None) -> None:
    """Makes the interpreter report the exception on its way from `first` on, through whatever hook the script set."""
    report = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        report(kind, error.with_traceback(first), first)

    sys.excepthook = excepthook


def _fail(message: str, code: int = 2) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
