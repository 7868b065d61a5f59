"""TurboCallback: hf_turbo for one trainer, as a callback."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from . import lifecycle
from .config import TurboConfig


class TurboCallback(TrainerCallback):
    """Runs the trainer that carries it under hf_turbo; everything else in the process stays stock.

        Trainer(..., callbacks=[TurboCallback()])

    The same features as `enable()`, from the entry of `trainer.train()` to its end, when all is put back. A callback is
    given no trainer, so making one hooks `Trainer.train`, which acts only for trainers that carry a TurboCallback.

    Args:
        **options: see TurboConfig.
    """

    def __init__(self, **options: Any):
        self.config = TurboConfig.from_options(**options)
        lifecycle.hook_trainer()
