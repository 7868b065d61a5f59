"""Accelerator's entry points: where models of plain loops, and reference models of TRL, are met.

`prepare` serves every strategy (FSDP2 and DeepSpeed go through it alone); `prepare_model` is called directly by some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .engine import AttributePatch, Patch, look_like

MODULE = "accelerate.accelerator"


def entry_patches(accelerator_cls: Any, model_met: Callable[[nn.Module], None]) -> list[Patch]:
    """Patches of the Accelerator class; `model_met` is called with each model before it is prepared."""

    def wrap(name: str) -> AttributePatch:
        stock = getattr(accelerator_cls, name)

        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, nn.Module):
                    model_met(argument)
            return stock(self, *args, **kwargs)

        look_like(replacement, stock)
        return AttributePatch(f"accelerate:{name}", accelerator_cls, name, replacement)

    return [wrap("prepare"), wrap("prepare_model")]
