"""One `Trainer.train`: what is around its steps while it lasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .metrics import MetricsCallback


class Training:
    """A trainer that is training under hf_turbo.

    Attributes:
        meter: the callback that counts its tokens, if any.
        agreement: between its processes, where each gathers weights for the others and they have to act alike.
    """

    def __init__(self, trainer: Any, meter: MetricsCallback | None):
        from hf_turbo.patches import trainer as trainer_patches
        from hf_turbo.patches.agreement import Agreement

        self._trainer, self.meter = trainer, meter
        is_sharded = getattr(trainer.accelerator, "is_fsdp2", False) and trainer.accelerator.num_processes > 1
        self.agreement = Agreement() if is_sharded else None
        self._patch = trainer_patches.step_patch(trainer, self._around_step)
        self._patch.apply()

    @property
    def models(self) -> list[nn.Module]:
        """The one that is trained, and the one that it is held against, if any."""
        models = (self._trainer.model, getattr(self._trainer, "ref_model", None))
        return [each for each in models if each is not None]

    def _around_step(self, trainer: Any, compute: Callable[[], Any]) -> Any:
        from hf_turbo.patches import padding

        if trainer is not self._trainer:  # another one of the same class
            return compute()
        with padding.training_step(self.models):
            return compute()

    def end(self) -> list[str]:
        """Puts the training step back; what is worth a note in the report."""
        from hf_turbo.patches import checkpointing, padding

        if self.agreement is not None:
            self.agreement.close()
        notes = [padding.end_training(self.models), checkpointing.end_training(self._trainer.model)]
        if not self._patch.revert():
            notes.append(f"{self._patch.id} was changed by something else since; left as it is, acting as stock")
        return [note for note in notes if note]
