"""Trainer's entry points: where patches go in, and what keeps the loss patch out.

`Trainer.train` runs once per training, after all set-up of TRL and before Liger, checkpointing, data loaders, optimizer
and wrapping. Nothing is wrapped that trainers override.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

from . import deepspeed, module_walks
from .engine import AttributePatch, Patch, look_like

MODULE = "transformers.trainer"


def entry_patches(
    trainer_cls: Any,
    around_train: Callable[[Any], AbstractContextManager[Any]],
    model_made: Callable[[Any, Any], None],
    around_fetch: Callable[[Any], AbstractContextManager[Any]],
    batches_fetched: Callable[[Any, list[Any]], None],
) -> list[Patch]:
    """Patches of the Trainer class.

    Args:
        around_train: given the trainer, a context to run `train()` in.
        model_made: called with the trainer and a model that its `model_init` returned.
        around_fetch: given the trainer, a context to fetch the micro-batches of the next optimizer step in.
        batches_fetched: called with the trainer and these micro-batches.
    """
    stock_train, stock_init = trainer_cls.train, trainer_cls.call_model_init
    stock_samples, stock_operations = trainer_cls.get_batch_samples, trainer_cls.floating_point_ops

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        module_walks.COUNTS.forget()  # of a last training, whose model may have been another
        with around_train(self):
            return stock_train(self, *args, **kwargs)

    def call_model_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = stock_init(self, *args, **kwargs)
        model_made(self, model)
        return model

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        with around_fetch(self):
            result = stock_samples(self, *args, **kwargs)
        batches_fetched(self, result[0])
        return result

    def floating_point_ops(self: Any, inputs: Any) -> int:
        return module_walks.floating_point_ops(self, stock_operations, inputs)

    replacements = {
        "train": train,
        "call_model_init": call_model_init,
        "get_batch_samples": get_batch_samples,
        "floating_point_ops": floating_point_ops,
    }
    for name, replacement in replacements.items():
        look_like(replacement, getattr(trainer_cls, name))
    return [AttributePatch(f"trainer:{name}", trainer_cls, name, new) for name, new in replacements.items()]


def method_of(trainer: Any, name: str) -> Any:
    """A method as it is called: it may be set on the trainer itself."""
    return vars(trainer).get(name, getattr(type(trainer), name))


def _qualname(method: Any) -> str:
    """A callable object set on a trainer has no name of its own."""
    return str(getattr(method, "__qualname__", type(method).__qualname__))


def step_patch(trainer: Any, around_step: Callable[..., Any]) -> Patch:
    """The patch of the training step of a trainer's class, as outermost overridden, or of one set on the trainer.

    Args:
        around_step: called with a trainer, what computes its step, and the arguments for that, as a tuple and a dict;
            returns what that returns.
    """
    if "training_step" in vars(trainer):
        set_here = trainer.training_step

        def training_step_here(*args: Any, **kwargs: Any) -> Any:
            return around_step(trainer, set_here, args, kwargs)

        return AttributePatch("trainer:training_step", trainer, "training_step", training_step_here)
    owner = next(cls for cls in type(trainer).__mro__ if "training_step" in vars(cls))
    stock = owner.training_step  # type: ignore[attr-defined]

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around_step(self, functools.partial(stock, self), args, kwargs)

    look_like(training_step, stock)
    return AttributePatch("trainer:training_step", owner, "training_step", training_step)


# Whose losses go by the log-probabilities of real tokens alone, those of a reference model too.
_WITH_REFERENCE = {f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "grpo", "rloo")}


def masks_reference(trainer: Any) -> bool:
    """Whether what this trainer computes without gradients is of real tokens alone."""
    compute_loss = method_of(trainer, "compute_loss")
    return compute_loss.__module__ in _WITH_REFERENCE


def loss_conflict(trainer: Any) -> str | None:
    """Why this trainer's causal-LM loss stays stock, or None."""
    compute_loss = method_of(trainer, "compute_loss")
    package = compute_loss.__module__.partition(".")[0]
    if getattr(trainer, "label_smoother", None) is not None:
        return "label smoothing needs the logits"
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "compute_loss_func needs the logits"
    if package not in {"transformers", "trl"}:
        return f"compute_loss is overridden by {_qualname(compute_loss).partition('.')[0]} and may read the logits"
    if trainer.args.n_gpu > 1:
        return "nn.DataParallel gathers the logits; launch one process per device instead"
    return parallelism(trainer)


def parallelism(trainer: Any) -> str | None:
    """The kind in which several processes compute one pass together, or None."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    for name, title in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        if config is not None and (getattr(config, f"{name}_size", 1) or 1) > 1:
            return f"{title} parallelism"
    return None


_LIBRARIES = {"transformers", "trl", "peft", "accelerate", "hf_turbo"}
# Whose losses leave padding out, labels being -100 there; and what is read of the last token, which is none.
_HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForSequenceClassification")


def padding_conflict(trainer: Any, model: Any) -> str | None:
    """Why a loss of this trainer might use what is computed of padding, or None."""
    compute_loss = method_of(trainer, "compute_loss")
    if compute_loss.__module__.partition(".")[0] not in {"transformers", "trl"}:
        return f"{_qualname(compute_loss)} may use what is computed of padding"
    if callable(getattr(trainer, "compute_loss_func", None)):  # TRL 1.15 puts a string there, to other ends
        return "compute_loss_func may use what is computed of padding"
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    cls = type(inner)
    if not cls.__module__.startswith("transformers.") or not cls.__name__.endswith(_HEADS):
        return f"{cls.__name__} may use what is computed of padding"
    loss_function = getattr(inner, "loss_function", None)
    if loss_function is not None and not loss_function.__module__.startswith("transformers."):
        return "a loss function of your own may use what is computed of padding"
    return None


def gathers_weights(trainer: Any) -> str | None:
    """The kind of distributed training, where it makes weights whole as each pass comes to them.

    Args:
        trainer: None for a loop of the script's own, whose Accelerator is there already.
    """
    if trainer is None:
        state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
        found = "NO" if state is None else state._shared_state.get("distributed_type", "NO")
    else:
        found = trainer.accelerator.distributed_type
    kind = str(getattr(found, "value", found))
    return None if kind in {"NO", "MULTI_CPU", "MULTI_GPU"} else kind.lower()


def step_conflict(trainer: Any) -> str | None:
    """Why what this trainer's training step does is not known, or None."""
    training_step = method_of(trainer, "training_step")
    if training_step.__module__.partition(".")[0] not in {"transformers", "trl"}:
        return f"training_step is overridden by {_qualname(training_step).partition('.')[0]}"
    if trainer.args.n_gpu > 1:
        return "nn.DataParallel; launch one process per device instead"
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in optim or "layerwise" in optim:
        return f"{optim} steps at every backward"
    return None


def watches_substeps(trainer: Any) -> str | None:
    """Which callback may act between the micro-batches of an optimizer step, or None."""
    return _acts_at(trainer, "on_substep_end")


def watches_gradients(trainer: Any) -> str | None:
    """Which callback may act when the gradients of a step are whole, or None."""
    # PEFT has one that weighs parameters by their gradients.
    known = _LIBRARIES - {"peft"}
    return _acts_at(trainer, "on_pre_optimizer_step", known) or _acts_at(trainer, "on_optimizer_step", known)


def norm_conflict(trainer: Any) -> str | None:
    """Why what this trainer does for the norm of its gradients is not known, or None."""
    reason = next(_overridden(trainer, "_clip_grad_norm", "_get_grad_norm"), None)
    return reason and f"{reason}, or unknown"


def loop_conflict(trainer: Any) -> str | None:
    """Which part of the training loop is the script's own, or None."""
    # Not every transformers has both.
    there = (name for name in ("_inner_training_loop", "_run_epoch") if hasattr(trainer, name))
    return next(_overridden(trainer, *there), None)


def _overridden(trainer: Any, *names: str) -> Iterator[str]:
    """Which of these methods are the script's own, or not there."""
    for name in names:
        method = vars(trainer).get(name, getattr(type(trainer), name, None))
        if str(getattr(method, "__module__", "")).partition(".")[0] not in {"transformers", "trl"}:
            yield f"{name} is overridden by {type(trainer).__name__}"


def _acts_at(trainer: Any, event: str, known: Collection[str] = _LIBRARIES) -> str | None:
    for callback in trainer.callback_handler.callbacks:
        method = getattr(callback, event)
        if str(getattr(method, "__module__", None)).partition(".")[0] not in known:
            return f"{_qualname(method)} may look at gradients or change weights"
    return None


def merging_conflict(trainer: Any) -> str | None:
    """Why each micro-batch of this trainer is a pass of its own, or None.

    Backward of a pass runs with the last of its micro-batches: what acts at every backward would miss the others.
    """
    args, against = trainer.args, step_conflict(trainer)
    if against is not None:
        return against
    kind = gathers_weights(trainer)
    if kind is not None and not (getattr(trainer.accelerator, "is_fsdp2", False) or deepspeed.is_used(trainer)):
        return f"{kind} gathers weights at every pass"
    against = deepspeed.merging_conflict(trainer)
    if against is not None:
        return against
    if trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return "sync_each_batch is on"
    if getattr(args, "activation_offloading", False):
        return "activation_offloading is on: TRL offloads at every pass"
    if getattr(args, "torch_compile", False):
        return "torch_compile is on"
    against = watches_substeps(trainer)
    if against is not None:
        return against
    handler = getattr(trainer.accelerator, "ddp_handler", None)
    if getattr(handler, "static_graph", False):
        return "static_graph is on: every backward has to be the same"
    return None


def model_conflict(trainer: Any) -> str | None:
    """Why this trainer's whole model stays stock, or None."""
    if getattr(trainer.args, "use_liger_kernel", False):
        return "use_liger_kernel is on: Liger-Kernel patches the model"
    return None


def uses_fused_head(trainer: Any) -> bool:
    """Whether this is a TRL trainer whose loss goes through TRL's fused language-model head."""
    return any(
        cls.__module__.startswith("trl.") and hasattr(sys.modules.get(cls.__module__), "add_fused_lm_head")
        for cls in type(trainer).__mro__
    )
