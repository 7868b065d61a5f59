"""One `Trainer.train`: what is around its steps while it lasts."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch

    from hf_turbo.patches.engine import Finding, Patch
    from hf_turbo.patches.optimizer_choice import ChosenOptimizer
    from hf_turbo.patches.shadows import Shadows

    from .config import TurboConfig
    from .metrics import MetricsCallback
    from .reports import Report, Row

_ENDED = "ended:"  # begins the last line that a process has for the others
_FREED = "after freeing unused memory"  # where nothing else can be done, and it may be enough


def not_in_backward(reason: str) -> RuntimeError:
    """What to raise where optimizers do not step within backward."""
    return RuntimeError(
        f"hf_turbo: optimizer_in_backward=True was asked for but cannot be had: {reason}. Use "
        "optimizer_in_backward=False to go on without it"
    )


def not_by_name(named: str, reason: str) -> RuntimeError:
    """What to raise where an optimizer that is asked for by name cannot be had."""
    return RuntimeError(
        f"hf_turbo: optim={named!r} was asked for but cannot be had: {reason}. Use optim='auto' to go on without it"
    )


class Training:
    """A trainer that is training under hf_turbo.

    Attributes:
        meter: the callback that counts its tokens, if any.
        agreement: between its processes, where each gathers weights for the others and they have to act alike.
    """

    def __init__(self, trainer: Any, meter: MetricsCallback | None, config: TurboConfig, report: Report):
        from hf_turbo.patches import prefetch, retry
        from hf_turbo.patches import trainer as trainer_patches
        from hf_turbo.patches.agreement import Agreement, Board

        self._trainer, self.meter = trainer, meter
        several = trainer.accelerator.num_processes > 1
        self.agreement = Agreement() if several and getattr(trainer.accelerator, "is_fsdp2", False) else None
        self._board = Board() if several else None
        self._report = report
        self._config = config
        self._patched: defaultdict[str, weakref.WeakSet[nn.Module]] = defaultdict(weakref.WeakSet)  # models by role
        self._chosen: ChosenOptimizer | None = None
        self._masks_reference = trainer_patches.masks_reference(trainer)
        self._retry, self._retried = None, set[int]()
        self._shadows: Shadows | None = None
        self._patches: list[Patch] = []
        # On a CPU it would be in the way of the computation.
        acts = config.host is True or (config.host == "auto" and trainer.args.device.type != "cpu")
        self._prefetch = prefetch.Prefetch(trainer) if acts else None
        self._against: str | None = None  # why steps are not done again, where that is not the script's wish
        if config.memory != "as_is" and not trainer.args.auto_find_batch_size:
            self._against = retry.conflict(trainer)
            if self._against is None:
                self._retry = retry.Retry(trainer, self._make_room, self._tell)
        if meter is not None:
            meter.before_log = self._listen

    def begin(self, copies_fit: Callable[[int, float | None, torch.device], bool]) -> None:
        """After the patches of the process have been applied, which are there for longer.

        Args:
            copies_fit: whether memory for 16-bit copies of weights is plainly free.
        """
        from hf_turbo.patches import (
            accelerate,
            autocast,
            clipping,
            collectives,
            host_copies,
            optimizer_in_backward,
            optimizers,
            prefetch,
            shadows,
        )
        from hf_turbo.patches import trainer as trainer_patches

        if self._config.bf16_weights != "as_is" and getattr(self._trainer, "is_deepspeed_enabled", False):
            raise RuntimeError(
                f"hf_turbo: bf16_weights={self._config.bf16_weights!r} was asked for but cannot be had: DeepSpeed "
                "steps by itself, and keeps fp32 masters. Use bf16_weights='as_is' to go on without it"
            )
        if self._config.optimizer_in_backward:
            against = optimizer_in_backward.conflict(self._trainer)
            if against is not None:
                raise not_in_backward(against)
        self._choose_optimizer()
        if self._config.autocast is not False and autocast.conflict(self._trainer) is None:
            self._shadows = shadows.Shadows(copies_fit)
        self._patches.append(trainer_patches.step_patch(self._trainer, self._around_step))
        clip_patch = clipping.trainer_patch(self._trainer, optimizers.unwrapped)
        if clip_patch is not None:
            self._patches.append(clip_patch)
        if self._prefetch is not None and prefetch.patch().can_apply():
            self._patches.append(prefetch.patch())
        if self._prefetch is not None and host_copies.patch().can_apply():
            self._patches.append(host_copies.patch())
        if self._retry is not None or self._prefetch is not None:
            self._patches.append(accelerate.optimizer_patch(self._around_optimizer))
            if self._board is not None:
                self._patches.extend(collectives.patches())
        for patch in self._patches:
            patch.apply()

    def _choose_optimizer(self) -> None:
        """The one that is asked for by name, or, where states of the script's AdamW would not fit, its paged form.

        Raises:
            RuntimeError: what is asked for cannot be had.
        """
        from hf_turbo.patches import optimizer_choice, optimizers

        named, optim = self._config.optim, optimizer_choice.optim_of(self._trainer)
        if named == "auto":
            self._page_optimizer(optim)
            return
        made = self._trainer.optimizer if optimizer_choice.has_optimizer(self._trainer) else None
        if optimizer_choice.is_used(self._trainer, optimizers.unwrapped(made), named):
            return
        reason = optimizer_choice.conflict(self._trainer, named)
        if reason is None:
            self._chosen, reason = optimizer_choice.make(self._trainer, named, saved_alike=False)
        if self._chosen is None:
            raise not_by_name(named, reason)
        self._report.notes.append(f"optim={named!r} in the place of {optim}; checkpoints have its states")
        self._patches.append(self._chosen)

    def _page_optimizer(self, optim: str) -> None:
        from hf_turbo.patches import device_memory, host_memory, optimizer_choice

        from .policies import footprint, optimizers

        trainer, device = self._trainer, self._trainer.args.device
        if self._config.optimizer is False or self._config.memory == "as_is" or optim not in optimizers.PAGED_FORMS:
            return
        free = device_memory.free(device)
        if free is None or optimizer_choice.has_optimizer(trainer) or trainer.model is None:
            return
        trained = [footprint.Trained(*each) for each in optimizer_choice.trained(trainer.model)]
        exact = self._config.bf16_weights == "exact_master"
        states, _ = footprint.optimizer_bytes(optim, trained, exact)
        sizes = optimizer_choice.sizes_of_pass(trainer)
        weights = optimizer_choice.bytes_elsewhere(trainer.model, device)
        in_backward = self._config.optimizer_in_backward
        gradients = optimizers.standing_bytes(trained) if in_backward else footprint.gradient_bytes(trained)
        if optimizers.fits(states, gradients, optimizers.least_pass_bytes(*sizes), weights, free):
            return
        said = f"the states of {optim}, {states / 2**30:.1f} GiB, do not fit beside the rest"
        paged, reason = optimizers.paged_form(optim, trained, exact, host_memory.available())
        if trainer.accelerator.num_processes > 1:
            paged, reason = None, "each of several processes would decide by itself"
        if paged is not None:
            reason = optimizer_choice.conflict(trainer, paged) or ""
            if not reason:
                self._chosen, reason = optimizer_choice.make(trainer, paged, saved_alike=True)
        if self._chosen is None:
            self._report.notes.append(f"{said}, and are not paged: {reason}")
            return
        self._report.notes.append(f"{said}: {paged} stands in for it, with states as precise or more")
        self._patches.append(self._chosen)

    def optimizer_made(self, optimizer: Any) -> None:
        """The trainer is about to prepare an optimizer, as a rule its own.

        Raises:
            RuntimeError: its own is not the one that is asked for by name.
        """
        from hf_turbo.patches import optimizers

        if self._chosen is None or self._chosen.made(optimizer):
            return
        if self._config.optim != "auto" and optimizers.unwrapped(self._trainer.optimizer) is optimizer:
            raise not_by_name(self._config.optim, f"the trainer has made {type(optimizer).__name__}")

    def step_in_backward(self, optimizer: Any) -> Finding:
        """Has the trainer's optimizer, which is about to be prepared, step within backward.

        Raises:
            RuntimeError: it cannot be had.
        """
        from hf_turbo.patches import optimizer_in_backward

        from .policies import optimizers

        params = (each for group in optimizer.param_groups for each in group["params"] if each.requires_grad)
        size = optimizers.bucket_bytes(sum(each.nbytes for each in params))
        finding = optimizer_in_backward.find(self._trainer, optimizer, size, self._report.notes.append)
        if finding.reasons:
            raise not_in_backward(next(iter(finding.reasons)))
        for patch in finding.patches:
            patch.apply()
            self._patches.append(patch)
        return finding

    @property
    def models(self) -> list[nn.Module]:
        """The one that is trained, and the one that it is held against, if any."""
        models = (self._trainer.model, getattr(self._trainer, "ref_model", None))
        return [each for each in models if each is not None]

    def met(self, model: nn.Module, rows: list[Row]) -> list[Row]:
        """A model has been patched for this training; its rows, after all processes have agreed.

        They share passes all or none, and each has to be asked, whatever it found: one may have a callback of its own.
        """
        if self.agreement is not None:
            shares = any(row.role == "merging" and row.patched for row in rows)
            (another_does_not,) = self.agreement.most([not shares])
            if shares and another_does_not:
                reason = "another process shares no passes"
                rows = [
                    dataclasses.replace(row, patched=0, reason=reason) if row.role == "merging" else row for row in rows
                ]
        for row in rows:
            models = self._patched[row.role]
            models.add(model) if row.patched else models.discard(model)
        return rows

    def has_patched(self, role: str, model: nn.Module) -> bool:
        """Whether a role of a model was patched for this training, and not just for another one of the same model."""
        return model in self._patched[role]

    def _patched_models(self, role: str) -> list[nn.Module]:
        return [model for model in self.models if self.has_patched(role, model)]

    def _around_step(self, trainer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        from hf_turbo.patches import clipping, head, padding
        from hf_turbo.patches.engine import is_live

        if trainer is not self._trainer or not is_live():  # another one of the same class
            return call(*args, **kwargs)
        clipping.settle()  # where no step came
        with (
            nullcontext() if self._shadows is None else self._shadows.training_step(trainer.accelerator.sync_gradients),
            padding.training_step(self._patched_models("padding"), self._masks_reference),
            head.training_step(self._patched_models("loss")),
            self._others_told(),
        ):
            if self._retry is not None:
                return self._retry.run(call, args, kwargs)
            return self._explaining(lambda: call(*args, **kwargs))

    def _around_optimizer(self, optimizer: Any, compute: Callable[[], Any]) -> Any:
        from hf_turbo.patches import retry
        from hf_turbo.patches.engine import is_live

        def make_room(culprit: str) -> None:
            changes = "with less kept by the steps to come" if self._keep_less() else _FREED
            self._tell(f"out of memory in {culprit}: it is done again, {changes}")

        if optimizer is not self._trainer.optimizer or not is_live():
            return compute()
        with self._others_told():
            result = compute() if self._retry is None else retry.step_optimizer(optimizer, compute, make_room)
        if self._prefetch is not None:
            self._prefetch.fetch()
        return result

    def around_fetch(self) -> AbstractContextManager[None]:
        """What the micro-batches of the next optimizer step are fetched in."""
        return nullcontext() if self._prefetch is None else self._prefetch.watched()

    def _explaining(self, compute: Callable[[], Any]) -> Any:
        """Where a step is not done again: with an error that says why, and what would take less."""
        import torch

        from hf_turbo.patches import retry

        if self._against is None:
            return compute()
        try:
            return compute()
        except torch.OutOfMemoryError as error:
            retry.explain(self._trainer, error, self._against)
            raise

    @contextmanager
    def _others_told(self) -> Iterator[None]:
        """Of several processes one that ends says why to the others, whose own errors will be about connections."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            if self._board is not None:
                self._board.post(f"{_ENDED} {error}")
            raise
        except Exception as error:
            for rank, line in self._board.news() if self._board is not None else ():
                if line.startswith(_ENDED) and hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"hf_turbo: rank {rank} had ended: {line.removeprefix(_ENDED).strip()}")
            raise

    def begin_step(self) -> None:
        """The micro-batches of an optimizer step have been fetched."""
        if self._shadows is not None:
            self._shadows.end_step()
        if self._retry is not None:
            self._retry.begin_step()

    def _make_room(self, tries: int) -> str | None:
        """Less memory for the step that is done again, and for those to come; None where there is no way left."""
        from hf_turbo.patches import checkpointing

        model, changes = self._trainer.model, self._keep_less()
        if changes:
            return f"with {' and '.join(changes)}"
        if tries == 0:
            return _FREED
        if checkpointing.Added.can_apply(model):
            added = checkpointing.Added(model)
            added.apply()
            self._patches.append(added)
            return "with gradient checkpointing, for the rest of this training"
        return None

    def _keep_less(self) -> list[str]:
        """In the passes to come; what is different in them."""
        from hf_turbo.patches import checkpointing, expanded_weights, lora, padding

        changes = padding.begin_again(self.models)
        lora.forget_outputs()
        less = [expanded_weights.give_up(), checkpointing.tighten(self._trainer.model)]
        if self._shadows is not None:
            less.append(self._shadows.tighten())
        return [*changes, "less kept"] if any(less) else changes

    def _tell(self, event: str) -> None:
        """Into the report, the logs and to the user."""
        step = self._trainer.state.global_step + 1
        if self._board is not None:
            self._board.post(f"{step} {event}")
            event = f"rank {self._trainer.accelerator.process_index}: {event}"
        self._note(step, event)
        warnings.warn(f"hf_turbo: step {step}: {event}", RuntimeWarning, stacklevel=2)

    def _note(self, step: int, event: str) -> None:
        self._report.notes.append(f"step {step}: {event}")
        self._retried.add(step)
        if self.meter is not None:
            self.meter.retried_steps = len(self._retried)

    def _listen(self) -> None:
        """Notes what happened to the other processes."""
        for rank, line in self._board.news() if self._board is not None else ():
            step, _, event = line.partition(" ")
            if step.isdigit():
                self._note(int(step), f"rank {rank}: {event}")

    def revert(self) -> None:
        """Puts back what is around the steps."""
        from hf_turbo.patches import engine

        self._report.notes.extend(engine.revert_all(self._patches))

    def end(self) -> list[str]:
        """Puts everything back; what is worth a note in the report."""
        from hf_turbo.patches import checkpointing, clipping, padding, waiting

        # Where the script ended before a step. On a device that has failed, the error to see is the one that says so.
        with suppress(RuntimeError):
            clipping.settle()
        self.revert()
        self._listen()
        if self._retry is not None:
            self._retry.end()
        if self.agreement is not None:
            self.agreement.close()
        data = None if self._prefetch is None else self._prefetch.end()
        notes = [data, padding.end_training(self.models), checkpointing.end_training(self._trainer.model)]
        for model in self.models:
            waiting.end_training(model)
        if self._shadows is not None:
            notes.append(self._shadows.note())
            self._shadows = None
        return [note for note in notes if note]
