"""TurboCallback: hf_turbo for one trainer, as a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from . import lifecycle
from .config import TurboConfig


class TurboCallback(TrainerCallback):
    """Runs the trainer that carries it under hf_turbo; other trainers of the process stay stock.

        Trainer(..., callbacks=[TurboCallback()])

    The same features as `enable()`, from the entry of `trainer.train()` to its end, when the model is put back. A
    callback is given no trainer, so making one hooks `Trainer.train`, which acts only for trainers that carry a
    TurboCallback; `hf_turbo.disable()` removes the hook.

    Args:
        **options: see TurboConfig.
    """

    def __init__(self, **options: Any):
        self.config = TurboConfig.from_options(**options)
        lifecycle.hook_trainer()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lifecycle.hook_trainer()  # again, if disable() was called in between


class AtTrainBegin(TrainerCallback):
    """Calls `action` once, when everything is prepared and the first step is next."""

    def __init__(self, action: Callable[[], None]):
        self._action: Callable[[], None] | None = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()
