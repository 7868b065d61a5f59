"""Accelerator's entry points: where models of plain loops, reference models of TRL, and all optimizers are met.

`prepare` serves every strategy (FSDP2 and DeepSpeed go through it alone); `prepare_model` is called directly by some.
`prepare` hands optimizers to `prepare_optimizer`, except for DeepSpeed, which steps by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .engine import AttributePatch, Patch, look_like

MODULE = "accelerate.accelerator"


def entry_patches(
    accelerator_cls: Any, model_met: Callable[[nn.Module], None], optimizer_met: Callable[[Any, Any], None]
) -> list[Patch]:
    """Patches of the Accelerator class.

    Args:
        model_met: called with each model before it is prepared.
        optimizer_met: called with the accelerator and each optimizer before it is prepared.
    """

    def wrap(name: str) -> AttributePatch:
        stock = getattr(accelerator_cls, name)

        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, nn.Module):
                    model_met(argument)
            return stock(self, *args, **kwargs)

        look_like(replacement, stock)
        return AttributePatch(f"accelerate:{name}", accelerator_cls, name, replacement)

    stock_prepare_optimizer = accelerator_cls.prepare_optimizer

    def prepare_optimizer(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer_met(self, optimizer)
        return stock_prepare_optimizer(self, optimizer, *args, **kwargs)

    look_like(prepare_optimizer, stock_prepare_optimizer)
    return [
        wrap("prepare"),
        wrap("prepare_model"),
        AttributePatch("accelerate:prepare_optimizer", accelerator_cls, "prepare_optimizer", prepare_optimizer),
    ]


def method_patch(name: str, around: Callable[..., Any]) -> Patch:
    """The patch of a method of Accelerator.

    Args:
        around: called with the accelerator, what computes the method, and the arguments for that, as a tuple and a
            dict; returns what that returns.
    """
    from accelerate import Accelerator

    stock = getattr(Accelerator, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(self, functools.partial(stock, self), args, kwargs)

    look_like(method, stock)
    return AttributePatch(f"accelerate:{name}", Accelerator, name, method)


def optimizer_patch(around_step: Callable[[Any, Callable[[], Any]], Any]) -> Patch:
    """The patch of the step of optimizers that were prepared.

    Args:
        around_step: called with the prepared optimizer and what makes its step; returns what that returns.
    """
    from accelerate.optimizer import AcceleratedOptimizer

    stock = AcceleratedOptimizer.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around_step(self, lambda: stock(self, *args, **kwargs))

    look_like(step, stock)
    return AttributePatch("accelerate:optimizer_step", AcceleratedOptimizer, "step", step)
