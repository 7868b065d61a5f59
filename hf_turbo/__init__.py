"""hf_turbo: one call makes an unmodified Hugging Face fine-tuning script faster and leaner, one call undoes it.

    import hf_turbo
    hf_turbo.enable()        # anywhere before trainer.train()

Importing this package is light on purpose: it runs inside `import torch` (entry point `torch.backends`) in every
process of an environment it is installed in, so everything below is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import TurboCallback
    from .config import TurboConfig
    from .lifecycle import disable, enable, patch_model, report, session

__version__ = "0.1.0"
__all__ = ["TurboCallback", "TurboConfig", "disable", "enable", "patch_model", "report", "session"]

_HOMES = {
    "enable": "lifecycle",
    "disable": "lifecycle",
    "session": "lifecycle",
    "patch_model": "lifecycle",
    "report": "lifecycle",
    "TurboCallback": "callback",
    "TurboConfig": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
