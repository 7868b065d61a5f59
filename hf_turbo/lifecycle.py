"""The one live state: what is on, what was patched, how it is undone.

`enable()` hooks the entry points of Trainer and Accelerate, now or when they are imported. A model is patched when it
is met there. Patches are applied in order and reverted in reverse.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import TurboConfig
from .reports import Report, Row

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_turbo.patches import kept_layers
    from hf_turbo.patches.agreement import Agreement
    from hf_turbo.patches.engine import Finding, Patch
    from hf_turbo.patches.imports import ImportHooks
    from hf_turbo.patches.tiling import Tiling

    from .metrics import MetricsCallback
    from .training import Training


class _Activation:
    """One span of time during which patches act, under one config: an enable(), or one train() of a TurboCallback."""

    def __init__(self, config: TurboConfig, report: Report):
        self.config, self.report = config, report
        self._patches: list[Patch] = []
        self._met: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._of_role: weakref.WeakKeyDictionary[nn.Module, dict[str, list[Patch]]] = weakref.WeakKeyDictionary()
        self.training: dict[Any, Training] = {}  # by trainer, while inside train()
        report.options = asdict(config)

    def change(self, config: TurboConfig) -> None:
        """Takes other options, as long as no model has been patched by the old ones (a script run under HF_TURBO=1)."""
        if self.report.models:
            raise RuntimeError(f"hf_turbo has patched models with {self.config}; call hf_turbo.disable() first")
        self.config, self.report.options = config, asdict(config)

    def start(self) -> None:
        from hf_turbo.patches import engine

        engine.switch(True)
        self.report.live = True

    def stop(self) -> None:
        """The switch first: it holds even for references that were captured and cannot be restored.

        But before it what has begun is finished: the backward pass of micro-batches that share one.
        """
        from hf_turbo.patches import engine

        if not self.report.live:
            return
        self.report.live = False
        padding = sys.modules.get("hf_turbo.patches.padding")
        try:
            if padding is not None:
                padding.finish_steps()
        finally:
            engine.switch(False)
            for training in self.training.values():
                training.revert()
            _revert(self._patches, self.report)

    def meet(self, model: nn.Module, trainer: Any = None, by_loop: bool = False) -> None:
        """Patches a model (again, if it has grown modules since) and records its rows.

        Args:
            trainer: the Trainer that is about to train it.
            by_loop: it was met at `Accelerator.prepare`: the loop is unknown, and so is what the model is for.
        """
        from hf_turbo.patches import (
            autocast,
            checkpointing,
            conflicts,
            decoder_layers,
            deepspeed,
            embeddings,
            head,
            lora,
            mlp,
            norms,
            padding,
            rope,
        )
        from hf_turbo.patches import trainer as trainer_patches
        from hf_turbo.patches import trl as trl_patches

        self._meet_host()
        conflict = conflicts.model_conflict(model)
        loss_conflict = None
        if by_loop and self.config.loss == "auto":
            loss_conflict = "a loop of your own may read outputs.logits after the step; loss=True fuses the loss"
        # What "auto" may do is judged by the loss of a trainer, and so for its training steps alone.
        fused_everywhere = self.config.loss is True or trainer is None
        find_loss: Callable[[], Finding] = lambda: head.find(model, fused_everywhere)  # noqa: E731
        if trainer is not None:
            conflict = conflict or trainer_patches.model_conflict(trainer)
            if trainer_patches.uses_fused_head(trainer):
                find_loss = lambda: trl_patches.find(trainer)  # noqa: E731
            else:
                loss_conflict = trainer_patches.loss_conflict(trainer)
        roles: dict[str, tuple[Callable[[], Finding], str | None]] = {
            "norms": (lambda: norms.find(model), conflict),
            "mlp": (lambda: mlp.find(model, self._tiling()), conflict),
            "layers": (lambda: decoder_layers.find(model, self.config.norms is not False), conflict),
            "rope": (lambda: rope.find(model, self.config.norms is not False), conflict),
            "loss": (find_loss, conflict or loss_conflict),
        }
        scarce = self.config.memory == "min_memory"
        if self.config.lora is True or lora.concerns(model):
            expands = self._keeps_expanded(model, trainer, by_loop)
            roles["lora"] = (lambda: lora.find(model, expands, may_wait=not scarce), conflict)
        is_reference = model is getattr(trainer, "ref_model", None)
        if self.config.embeddings is True or (not is_reference and embeddings.tied(model) is not None):
            roles["embeddings"] = (lambda: embeddings.find(model), conflict or embeddings.conflict(trainer))
        is_cast = trainer is not None and not is_reference and autocast.concerns(model, trainer)
        if self.config.autocast is True or is_cast:
            roles["autocast"] = (lambda: autocast.find(model), conflict or autocast.conflict(trainer))
        if self.config.padding is True or (self.config.padding and padding.backbones(model)):
            device = _training_device(model, trainer, by_loop)
            against = None
            if self.config.padding == "auto" and trainer is None:
                against = "a loop of your own may use what is computed of padding; padding=True leaves it out"
            elif self.config.padding == "auto":
                against = trainer_patches.padding_conflict(trainer, model)
            everywhere = self.config.padding is True
            roles["padding"] = (
                lambda: padding.find(model, device_type=device.type, everywhere=everywhere),
                conflict or against,
            )
            accumulates = trainer is not None and trainer.args.gradient_accumulation_steps > 1
            if accumulates or self.config.merging is True:
                roles["merging"] = (
                    lambda: padding.find_merging(model),
                    conflict or self._sharing_conflict("merging", model, trainer),
                )
        asked = None if trainer is None else checkpointing.trainer_asks(trainer)
        if scarce and not asked and not is_reference:
            self._add_checkpointing(model, conflict or (trainer and checkpointing.trainer_conflict(trainer)))
        is_on = any(layer.gradient_checkpointing for layer in checkpointing.layers_of(model).values())
        if not is_reference and (asked or is_on or self.config.checkpointing is True):
            against = checkpointing.recomputation_conflict(trainer) if trainer is not None else None
            roles["checkpointing"] = (lambda: checkpointing.find(model, asked=asked), conflict or against)
            plan = self._memory_plan()
            roles["memory"] = (
                lambda: checkpointing.find_memory(model, plan),
                conflict or self._memory_conflict(trainer),
            )
        offload = self._offload(model, trainer, asked, is_on, by_loop)
        if offload is not None:
            roles["offload"] = (offload[0], conflict or offload[1])
        # Last: what is recorded rests on all the others.
        if "padding" in roles and (device.type == "cuda" or self.config.graphs is True):
            against = self._sharing_conflict("graphs", model, trainer)
            if trainer is not None and deepspeed.is_used(trainer):
                against = against or "DeepSpeed reduces gradients by hooks, which no recording has"
            if self.config.optimizer_in_backward:
                against = against or "optimizer_in_backward: backward is gone through twice where gradients are clipped"
            if self.config.graphs == "auto" and (self.config.memory_budget is not None or scarce):
                given = "memory='min_memory'" if scarce else "memory_budget is given"
                against = against or f"recordings hold memory for good, and {given}"
            roles["graphs"] = (
                lambda: padding.find_graphs(model, device_type=device.type, checkpointed=asked),
                conflict or against,
            )
        name = _model_name(model)
        rows = [self._apply(model, name, role, find(), reason) for role, (find, reason) in roles.items()]
        training = self.training.get(trainer)
        if training is not None:
            rows = training.met(model, rows)
        for row in rows:
            if getattr(self.config, row.role) is True and row.patched == 0 and not by_loop:
                raise RuntimeError(
                    f"hf_turbo: {row.role}=True was asked for but cannot be had on {name}: "
                    f"{row.reason or 'the model has no such part'}. Use {row.role}='auto' to go on without it"
                )
        if "lora" in roles and expands and self.config.expanded_weights == "auto":
            size = lora.expanded_bytes(model) / 2**30
            self.report.notes.append(f"{name}: 4-bit weights stay expanded, in {size:.1f} GiB of what is free")
        self.report.models[id(model)] = rows
        self._met.add(model)

    def _keeps_expanded(self, model: nn.Module, trainer: Any, by_loop: bool) -> bool:
        """Whether the 4-bit weights of a model stay expanded."""
        from hf_turbo.patches import device_memory, lora
        from hf_turbo.patches import trainer as trainer_patches

        from .policies import memory

        config = self.config
        if config.expanded_weights != "auto":
            return config.expanded_weights
        if config.memory_budget is not None or (trainer is not None and trainer_patches.gathers_weights(trainer)):
            return False
        free = device_memory.free(_training_device(model, trainer, by_loop))
        return memory.keeps_expanded(lora.expanded_bytes(model), free, config.memory)

    def _add_checkpointing(self, model: nn.Module, against: str | None) -> None:
        """In little memory the layers of a model are recomputed, whether the script says so or not."""
        from hf_turbo.patches.checkpointing import Added, layers_of

        if any(layer.gradient_checkpointing for layer in layers_of(model).values()):
            return
        name = _model_name(model)
        if against is None and not Added.can_apply(model):
            against = "transformers does not checkpoint this model"
        if against is not None:
            self.report.notes.append(f"memory='min_memory': no gradient checkpointing of {name}: {against}")
            return
        added = Added(model)
        added.apply()
        self._patches.append(added)
        self.report.notes.append(
            f"memory='min_memory': gradient checkpointing of {name}, which the script did not ask for"
        )

    def _tiling(self) -> Tiling:
        """Which passes have their MLPs computed by tiles of rows."""
        from hf_turbo.patches.tiling import Tiling

        from .policies import tiling

        choice, notes = self.config.memory, self.report.notes
        plan = lambda tokens, width, recomputed: tiling.rows(tokens, width, recomputed, choice)  # noqa: E731
        tell = lambda note: None if note in notes else notes.append(note)  # noqa: E731
        return Tiling(plan, by_calls=choice == "min_memory", tell=tell)

    def _sharing_conflict(self, role: str, model: nn.Module, trainer: Any) -> str | None:
        """Why micro-batches do not share work in this training, or None."""
        from hf_turbo.patches import trainer as trainer_patches

        if trainer is None:
            return "no Trainer"
        against = trainer_patches.merging_conflict(trainer)
        if getattr(self.config, role) == "auto":
            against = against or trainer_patches.padding_conflict(trainer, model)
        return against

    def _memory_conflict(self, trainer: Any) -> str | None:
        """Why checkpointed layers are recomputed whatever memory is free, or None."""
        from hf_turbo.patches import trainer as trainer_patches

        if self.config.memory in ("as_is", "min_memory"):
            return f"memory={self.config.memory!r}"
        kind = trainer_patches.gathers_weights(trainer)
        return kind and f"{kind} gathers weights at every pass"

    def _memory_plan(self) -> kept_layers.Plan:
        """What the layers of a pass keep."""
        import torch

        from hf_turbo.patches import device_memory, host_memory, kept_layers

        from .policies import memory

        choice, budget = self.config.memory, self.config.memory_budget
        share = memory.SHARE_OF_FREE_MEMORY.get(choice, 0.0)

        def plan(
            costs: list[kept_layers.Costs], rest: float | None, device: torch.device, before: kept_layers.Kept
        ) -> kept_layers.Kept:
            free, allocated = device_memory.free(device), device_memory.allocated(device)
            if free is None or allocated is None:  # a CPU, which other processes train on, too
                room = 0.0 if budget is not None else share * host_memory.available() / _processes_on_host()
            elif rest is None:
                room = 0.0
            else:
                room = memory.room(free, rest, choice)
                if budget is not None:
                    total = torch.cuda.get_device_properties(device).total_memory
                    room = min(room, memory.budget_bytes(budget, total) - allocated - rest)
            return kept_layers.Kept(*memory.what_to_keep([memory.layer(*each) for each in costs], room, before))

        return plan

    def shadow_plan(self) -> Callable[[int, float | None, torch.device], bool]:
        """Whether a step may keep 16-bit copies of weights of so many bytes."""
        import torch

        from hf_turbo.patches import device_memory, host_memory

        from .policies import memory

        budget = self.config.memory_budget

        def fits(size: int, rest: float | None, device: torch.device) -> bool:
            if self.config.memory == "min_memory":
                return False
            free, allocated = device_memory.free(device), device_memory.allocated(device)
            if free is None or allocated is None:
                return budget is None and memory.copies_fit(size, host_memory.available() / _processes_on_host(), 0.0)
            if rest is None or not memory.copies_fit(size, free, rest):
                return False
            total = torch.cuda.get_device_properties(device).total_memory
            return budget is None or size + allocated + rest <= memory.budget_bytes(budget, total)

        return fits

    def _offload(
        self, model: nn.Module, trainer: Any, asked: bool | None, is_on: bool, by_loop: bool
    ) -> tuple[Callable[[], Finding], str | None] | None:
        """How to find layers to offload, and what is against it; None where there is nothing to offload from."""
        from hf_turbo.patches import checkpointing, host_memory, mlp

        from .metrics import peak_flops
        from .policies.checkpointing import host_budget, keep_on_device_reason, layers_that_leave

        device = _training_device(model, trainer, by_loop)
        choice, can_copy = self.config.offload, device.type in checkpointing.COPIES
        if not (can_copy or choice is True) or model is getattr(trainer, "ref_model", None):
            return None

        def speeds() -> tuple[float | None, float | None]:
            return peak_flops(device), host_memory.link_speed(device)

        def why_not(bytes_per_token: int, flops_per_token: float) -> str | None:
            if choice != "auto" or self.config.memory == "min_memory":
                return None
            return keep_on_device_reason(bytes_per_token, flops_per_token, *speeds())

        def choose(bytes_per_token: list[int], flops_per_token: list[float]) -> list[bool]:
            return layers_that_leave(bytes_per_token, flops_per_token, *speeds())

        def find() -> Finding:
            budget = host_budget(host_memory.available(), _processes_on_host())
            if choice is True and asked is False and not is_on:
                return mlp.find_offload(model, choose, budget)
            return checkpointing.find_offload(model, asked=asked, why_not=why_not, budget=budget)

        conflict = None if can_copy else f"nothing to offload from: training on {device.type}"
        return find, conflict or (checkpointing.offload_conflict(trainer) if trainer is not None else None)

    def passes(
        self, model: nn.Module, agreement: Agreement | None, first_alone: bool = False
    ) -> Callable[[list[int], int, float | None, bool], list[int]]:
        """How many micro-batches of a step share a pass through this model.

        Args:
            agreement: between processes that have to compute the same passes; None where each may have its own.
            first_alone: whether the first micro-batch of a step has to have a pass of its own.
        """
        from hf_turbo.patches import device_memory

        from .policies import batching

        fixed = self.config.max_tokens_per_pass

        def plan(tokens: list[int], worst: int, kept_per_token: float | None, may_share: bool) -> list[int]:
            limit = worst if fixed is None and self.config.memory == "min_memory" else fixed
            if limit is None:
                free = None if kept_per_token is None else device_memory.free(_training_device(model, None, False))
                limit = batching.token_limit(worst, kept_per_token, free, gathers=agreement is not None)
            if agreement is not None:
                may_not, negative, *tokens = agreement.most([not may_share, -limit, *tokens])
                may_share, limit = not may_not, -negative
            alone = tokens[:1] if first_alone else []
            return [1] * len(alone) + batching.passes(tokens[len(alone) :], limit) if may_share else [1] * len(tokens)

        return plan

    def meet_optimizer(self, optimizer: Any, accelerator: Any) -> None:
        """Patches an optimizer that is about to be prepared, and records its row."""
        from hf_turbo.patches import optimizer_choice, optimizers

        from .training import not_by_name

        weights = self.config.bf16_weights
        asked: dict[str, tuple[Any, str]] = {} if weights == "as_is" else {"bf16_weights": (weights, "as_is")}
        asked |= {"optimizer": (True, "auto")} if self.config.optimizer is True else {}
        optimizer, on_cpu = optimizers.unwrapped(optimizer), bool(asked)
        found = (trainer for trainer in self.training if getattr(trainer, "accelerator", None) is accelerator)
        trainer = next(found, None)
        if trainer is not None:
            self.training[trainer].optimizer_made(optimizer)
        elif self.config.optim != "auto":
            raise not_by_name(self.config.optim, "a loop of your own makes its optimizer")
        if self.config.optim != "auto" and optimizer_choice.stand_in_of(optimizer) is not None:
            asked |= {"optim": (self.config.optim, "auto")}  # without a patch it would load no states of others
            on_cpu = True
        conflict = optimizers.conflict(optimizer, accelerator, on_cpu)
        name = type(optimizer).__name__
        finding = optimizers.find(optimizer, self.report.notes.append, on_cpu, weights, self._seed(accelerator))
        row = self._apply(optimizer, name, "optimizer", finding, conflict)
        if asked and row.patched == 0:
            option, (value, other) = next(iter(asked.items()))
            raise RuntimeError(
                f"hf_turbo: {option}={value!r} was asked for but cannot be had of {name}: {row.reason}. "
                f"Use {option}={other!r} to go on without it"
            )
        self.report.models[id(optimizer)] = [row]
        is_trained = trainer is None or optimizers.unwrapped(trainer.optimizer) is optimizer
        if self.config.optimizer_in_backward and is_trained:
            training = None if trainer is None else self.training[trainer]
            self.report.models[id(optimizer)].append(_step_in_backward(training, optimizer, name))

    def _seed(self, accelerator: Any) -> int:
        """Of what is drawn for weights, which all processes have to draw alike."""
        import torch

        for trainer in self.training:
            if getattr(trainer, "accelerator", None) is accelerator:
                return int(trainer.args.seed)
        return torch.initial_seed() if accelerator.num_processes == 1 else 0

    def _meet_host(self) -> None:
        """Patches what the host does between steps, when the first model is met, and records the rows."""
        from torch import nn

        from hf_turbo.patches import loss_check, module_walks

        if self.report.process:
            return
        for finding in (module_walks.find(), loss_check.find()):
            if finding.found:
                self.report.process.append(self._apply(nn.Module, "any", "host", finding, None))
        if self.config.host is True and not any(row.patched for row in self.report.process):
            reasons = "; ".join(row.reason for row in self.report.process)
            raise RuntimeError(f"hf_turbo: host=True was asked for but cannot be had: {reasons}")

    def has_met(self, model: nn.Module) -> bool:
        """Whether this model, or one that it wraps, was patched here already."""
        return any(module in self._met for module in model.modules())

    def _apply(self, model: Any, model_name: str, role: str, finding: Finding, conflict: str | None) -> Row:
        choice = getattr(self.config, role)
        if choice is False:
            conflict = f"switched off: {role}=False"
        if conflict is None:
            for patch in finding.patches:
                patch.apply()
                self._patches.append(patch)
                self._of_role.setdefault(model, {}).setdefault(role, []).append(patch)
            reason = "; ".join(f"{count} x {why}" if count > 1 else why for why, count in finding.reasons.items())
            patched = finding.patched
        else:
            reason, patched = conflict, 0
            # An earlier training of this model may have had no such conflict.
            earlier = self._of_role.get(model, {}).pop(role, [])
            for patch in earlier:  # one at a time: patches of the process are there once for each of their users
                self._patches.remove(patch)
            _revert(earlier, self.report)
        return Row(model_name, role, finding.found, patched, finding.kernel, finding.exactness.value, reason)


def _step_in_backward(training: Training | None, optimizer: Any, name: str) -> Row:
    """Has an optimizer step within backward, which is asked for by name.

    Raises:
        RuntimeError: it cannot be had.
    """
    from .training import not_in_backward

    if training is None:
        raise not_in_backward("a loop of your own may look at gradients, or go backward more than once a step")
    finding = training.step_in_backward(optimizer)
    return Row(name, finding.role, finding.found, finding.patched, finding.kernel, finding.exactness.value)


def _processes_on_host() -> int:
    """Training processes that share this host's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


class _State:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.report = Report()
        self.enabled: _Activation | None = None
        self.scoped: list[_Activation] = []
        self.entries: list[Patch] = []
        self.imports: ImportHooks | None = None
        self.report_at_exit = False

    @property
    def activations(self) -> list[_Activation]:
        return [*([self.enabled] if self.enabled else []), *self.scoped]


_STATE = _State()


def enable(**options: Any) -> Report:
    """Switches hf_turbo on for every Trainer, TRL trainer and Accelerate loop of this process.

    Call it anywhere before `trainer.train()`, in any import order, before or after the model exists. Imports nothing
    heavier than torch. A second call returns the same report; it changes nothing, except options while no model has
    been patched.

    Args:
        **options: see TurboConfig.

    Returns:
        The report, a live view: it fills as models are met.

    Raises:
        TypeError, ValueError: an unknown or impossible option.
        RuntimeError: models were patched with other options already; call `disable()` first.
    """
    config = TurboConfig.from_options(**options)
    with _STATE.lock:
        if _STATE.enabled is not None:
            if options and config != _STATE.enabled.config:
                _STATE.enabled.change(config)
            return _STATE.report
        _STATE.report = Report()
        _STATE.enabled = _Activation(config, _STATE.report)
        _STATE.enabled.start()
        _hook_entries()
        _write_report_at_exit()
        return _STATE.report


def disable() -> None:
    """Switches hf_turbo off and puts everything back: classes, registries, globals and methods, by identity.

    Works at any time, during training too. What something else has replaced since is left alone, with a note in the
    report; it is stock all the same, since every replacement looks at a switch that is off now.
    """
    with _STATE.lock:
        activations = _STATE.activations
        _STATE.enabled, _STATE.scoped = None, []
        for activation in reversed(activations):
            activation.stop()
        _revert(_STATE.entries, _STATE.report)
        if _STATE.imports is not None:
            _STATE.imports.clear()
            _STATE.imports = None


@contextmanager
def session(**options: Any) -> Iterator[Report]:
    """`enable()` for the length of a `with` block; inside an enabled process it changes nothing."""
    TurboConfig.from_options(**options)
    with _STATE.lock:
        outer = _STATE.enabled is not None
        report_ = _STATE.report if outer else enable(**options)
    try:
        yield report_
    finally:
        if not outer:
            disable()


def patch_model(model: nn.Module, **options: Any) -> Report:
    """Patches one model now, for loops that use neither Trainer nor Accelerator; switches hf_turbo on if it is off.

    Args:
        model: any module; the parts that are understood are patched.
        **options: see TurboConfig; must agree with the options of an earlier `enable()`.

    Returns:
        The report.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: a feature asked for by name cannot be had on this model.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"patch_model needs a torch.nn.Module, got {type(model).__name__}")
    with _STATE.lock:
        report_ = enable(**options)
        assert _STATE.enabled is not None
        _STATE.enabled.meet(model)
        return report_


def report() -> Report:
    """The report of the present or the last activation."""
    return _STATE.report


def hook_trainer() -> None:
    """Hooks the entry points without switching anything on: what making a TurboCallback does."""
    with _STATE.lock:
        _hook_entries()


def _hook_entries() -> None:
    from hf_turbo.patches import accelerate as accelerate_patches
    from hf_turbo.patches import trainer as trainer_patches
    from hf_turbo.patches.imports import ImportHooks

    if _STATE.imports is not None:
        return
    _STATE.imports = ImportHooks()

    def hook(patches: list[Patch]) -> None:
        for patch in patches:
            patch.apply()
            _STATE.entries.append(patch)

    def hook_trainer_class() -> None:
        cls = _loaded(trainer_patches.MODULE).Trainer
        hook(trainer_patches.entry_patches(cls, _around_train, _model_made, _around_fetch, _batches_fetched))

    def hook_accelerator_class() -> None:
        cls = _loaded(accelerate_patches.MODULE).Accelerator
        hook(accelerate_patches.entry_patches(cls, _model_prepared, _optimizer_prepared))

    _STATE.imports.when_imported(trainer_patches.MODULE, hook_trainer_class)
    _STATE.imports.when_imported(accelerate_patches.MODULE, hook_accelerator_class)


def _activation_for(trainer: Any) -> tuple[_Activation | None, bool]:
    """The activation a trainer runs under, and whether it is its own (to be stopped after training)."""
    from .callback import TurboCallback

    with _STATE.lock:
        if _STATE.enabled is not None:
            return _STATE.enabled, False
        callback = next((c for c in trainer.callback_handler.callbacks if isinstance(c, TurboCallback)), None)
        if callback is None:
            return None, False
        _STATE.report = Report()
        scoped = _Activation(callback.config, _STATE.report)
        _STATE.scoped.append(scoped)
        scoped.start()
        _write_report_at_exit()
        return scoped, True


@contextmanager
def _around_train(trainer: Any) -> Iterator[None]:
    """What `Trainer.train` runs in."""
    activation, own = _activation_for(trainer)
    if activation is None or trainer in activation.training:
        yield
        return
    from hf_turbo.patches import deepspeed
    from hf_turbo.patches.agreement import Agreement

    from .training import Training

    meter = table = training = None
    noted = len(activation.report.notes)
    try:
        meter = _make_meter(trainer) if activation.config.metrics else None
        table = _make_table(trainer, activation.report) if activation.config.report else None
        training = activation.training[trainer] = Training(trainer, meter, activation.config, activation.report)
        if training.agreement is None and deepspeed.needs_agreement(trainer):
            training.agreement = Agreement()
        with _STATE.lock:
            for model in training.models:
                activation.meet(model, trainer)
        training.begin(activation.shadow_plan())
        yield
    finally:
        from hf_turbo.patches import lora
        from hf_turbo.patches import trl as trl_patches

        trl_patches.end_training(trainer)
        if training is not None:
            activation.report.notes.extend(training.end())
            if activation.config.report and len(activation.report.notes) > noted:  # also such as came with the steps
                _write(trainer, activation.report)
        lora.end_training()
        activation.training.pop(trainer, None)
        for callback in (meter, table):
            if callback is not None and callback in trainer.callback_handler.callbacks:
                trainer.callback_handler.callbacks.remove(callback)
        with _STATE.lock:
            if own and activation in _STATE.scoped:
                _STATE.scoped.remove(activation)
                activation.stop()


def _make_meter(trainer: Any) -> MetricsCallback:
    """The callback that adds turbo/* figures to the logs. First of all callbacks, so that reporters see them."""
    from .metrics import MetricsCallback

    meter = MetricsCallback(trainer.args.device)
    trainer.callback_handler.callbacks.insert(0, meter)
    return meter


def _make_table(trainer: Any, report_: Report) -> Any:
    """The callback that shows the report at train begin: before the progress bar, and after the optimizer was met."""
    from .callback import AtTrainBegin

    table = AtTrainBegin(lambda: _show(trainer, report_))
    trainer.callback_handler.callbacks.insert(0, table)
    return table


def _model_made(trainer: Any, model: nn.Module) -> None:
    """`train()` has replaced its model by one that `model_init` returned; in `__init__` it is too early to judge."""
    with _STATE.lock:
        for activation in _STATE.activations:
            if trainer in activation.training:
                activation.meet(model, trainer)


def _around_fetch(trainer: Any) -> AbstractContextManager[Any]:
    """What the batches of a step are fetched in."""
    trainings = (activation.training[trainer] for activation in _STATE.activations if trainer in activation.training)
    training = next(trainings, None)
    return nullcontext() if training is None else training.around_fetch()


def _batches_fetched(trainer: Any, batches: list[Any]) -> None:
    from hf_turbo.patches import deepspeed, labelled_rows, padding

    for activation in _STATE.activations:
        if trainer in activation.training:
            training = activation.training[trainer]
            training.begin_step()
            labelled_rows.note(batches)
            model, *references = training.models
            plan = None
            if training.has_patched("merging", model):
                plan = activation.passes(model, training.agreement, deepspeed.overwrites_gradients(trainer))
            anchored = deepspeed.needs_gradients(trainer)
            is_collective = training.agreement is not None
            known = padding.batches_fetched(model, batches, plan, is_collective, references, anchored)
            if training.meter is not None:
                training.meter.count(batches, [None if each is None else each.lengths for each in known])


def _model_prepared(model: nn.Module) -> None:
    with _STATE.lock:
        activation = _STATE.enabled
        if activation is not None and not activation.has_met(model):
            activation.meet(model, by_loop=True)


def _optimizer_prepared(accelerator: Any, optimizer: Any) -> None:
    with _STATE.lock:
        # A TurboCallback acts for the trainer that carries it, and so for that trainer's accelerator.
        of_trainer = (
            activation
            for activation in _STATE.activations
            if any(getattr(trainer, "accelerator", None) is accelerator for trainer in activation.training)
        )
        activation = next(of_trainer, _STATE.enabled)
        if activation is not None:
            activation.meet_optimizer(optimizer, accelerator)


def _show(trainer: Any, report_: Report) -> None:
    """Prints the table and writes the file, on the main process."""
    if not trainer.is_world_process_zero():
        return
    from rich.console import Console

    Console(stderr=True).print(report_)
    _write(trainer, report_)


def _write(trainer: Any, report_: Report) -> None:
    """Writes the file, on the main process."""
    if trainer.is_world_process_zero() and trainer.args.output_dir:
        try:
            report_.write(Path(trainer.args.output_dir) / "hf_turbo_report.json")
        except OSError as error:  # a folder that cannot be written must not end a training that writes nothing
            report_.notes.append(f"hf_turbo_report.json was not written: {error}")


def _write_report_at_exit() -> None:
    """With HF_TURBO_REPORT=PATH, the main process leaves the report there when it ends: for loops without a Trainer."""
    path = os.environ.get("HF_TURBO_REPORT")
    if path and os.environ.get("RANK", "0") == "0" and not _STATE.report_at_exit:
        _STATE.report_at_exit = True
        atexit.register(lambda: _STATE.report.write(Path(path)))


def _revert(patches: list[Patch], report_: Report) -> None:
    """Reverts in reverse order and empties the list."""
    from hf_turbo.patches import engine

    report_.notes.extend(engine.revert_all(patches))


def _training_device(model: nn.Module, trainer: Any, by_loop: bool) -> Any:
    """Where a model will compute; it may not have been moved there yet."""
    import torch

    if trainer is not None:
        return trainer.args.device
    if by_loop:
        return _loaded("accelerate.state").PartialState().device
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _model_name(model: nn.Module) -> str:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return type(inner).__name__


def _loaded(name: str) -> Any:
    return sys.modules[name]
