"""The door that needs no change to a script: entry point `torch.backends`, called at the end of every `import torch`.

Two things can happen here, and both are gated:

- ``HF_TURBO`` is set in the environment: `hf_turbo.enable()` with its options. Unset costs one look-up.
- the process is an accelerate launcher: the section ``hf_turbo:`` of its YAML becomes ``HF_TURBO`` of the workers.

torch turns an exception raised here into a failing `import torch`, so `autoload` never raises: it says in one line on
stderr what to do, and training goes on stock.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from typing import Any

_CONFIG_MODULE = "accelerate.commands.config.config_args"
_LAUNCHERS = {"accelerate", "accelerate-launch", "trl"}
_LAUNCHER_MODULES = {"accelerate.commands.accelerate_cli", "accelerate.commands.launch", "trl", "trl.cli.main"}


def autoload() -> None:
    """Enables hf_turbo in this process if its environment asks for it. Never raises."""
    try:
        if os.environ.get("HF_TURBO"):
            enable_from_environment()
        if is_launcher():
            read_section_of_accelerate_config()
    except Exception as error:
        print(
            f"hf_turbo: not enabled, training goes on stock: {error} "
            "(correct or unset HF_TURBO; `hf-turbo doctor` shows the environment)",
            file=sys.stderr,
        )


def enable_from_environment() -> None:
    """Calls `enable` with the options in ``HF_TURBO``; does nothing where that says off, or where the program has
    called `enable` already (its own options win).

    Raises:
        TypeError, ValueError: as `TurboConfig.from_env`.
    """
    from .config import TurboConfig

    config = TurboConfig.from_env(os.environ.get("HF_TURBO"))
    if config is not None:
        from dataclasses import asdict

        from .lifecycle import enable, report

        if not report().options:
            enable(**asdict(config))


def is_launcher() -> bool:
    """Whether this process is `accelerate launch` (or `trl`, which runs it in-process), by its command line.

    `accelerate config` is excepted: it writes the file back, and without the section. Stock refuses the unknown key.
    """
    program, *arguments = getattr(sys, "argv", None) or [""]
    named = os.path.basename(program).removesuffix(".exe") in _LAUNCHERS
    command = getattr(sys, "orig_argv", [])
    as_module = any(flag == "-m" and module in _LAUNCHER_MODULES for flag, module in pairwise(command))
    return (named or as_module) and arguments[:1] != ["config"]


def read_section_of_accelerate_config() -> None:
    """Makes accelerate's config loader take the section ``hf_turbo``, now or when the loader is imported."""
    from .patches.imports import ImportHooks

    ImportHooks().when_imported(_CONFIG_MODULE, _wrap_config_loader)


def _wrap_config_loader() -> None:
    """Wraps `BaseConfig.process_config`, which every YAML and JSON config passes before unknown keys are refused."""
    base = getattr(sys.modules[_CONFIG_MODULE], "BaseConfig", None)
    process_config = getattr(base, "process_config", None)
    if process_config is None or hasattr(process_config, "reads_hf_turbo"):  # unknown accelerate, or done already
        return

    def process_config_with_section(config: dict[str, Any]) -> dict[str, Any]:
        _take_section(config)
        return process_config(config)

    process_config_with_section.reads_hf_turbo = True  # type: ignore[attr-defined]
    base.process_config = staticmethod(process_config_with_section)  # type: ignore[union-attr]


def _take_section(config: dict[str, Any]) -> None:
    """Pops the section and puts it where the workers find it, unless the user has set ``HF_TURBO``, which wins.

    Two spellings: ``hf_turbo: ...`` at the top, and ``mpirun_config: {hf_turbo: ...}``, which an accelerate without
    hf_turbo accepts and ignores.

    Raises:
        TypeError, ValueError: an unknown or impossible option, as `TurboConfig.from_env`.
    """
    portable = config.get("mpirun_config")
    holders = [holder for holder in (config, portable) if isinstance(holder, dict) and "hf_turbo" in holder]
    sections = [holder.pop("hf_turbo") for holder in holders]
    if not sections or os.environ.get("HF_TURBO"):
        return
    from .config import TurboConfig

    value = _as_environment(sections[0])
    TurboConfig.from_env(value)
    os.environ["HF_TURBO"] = value


def _as_environment(section: Any) -> str:
    """The value of ``HF_TURBO`` for a section: a switch, or a mapping of options (empty: all defaults)."""
    import json

    if section is None:
        return "1"
    if isinstance(section, bool):
        return "1" if section else "0"
    return json.dumps(section) if isinstance(section, dict) else str(section)
