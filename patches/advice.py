"""What would take less memory, for the error of a step that cannot be done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .checkpointing import trainer_asks
from .optimizer_choice import optim_of


def advice(trainer: Any) -> str:
    """Settings that are not made yet; those that keep every number of the training first."""
    settings = [*_of_fsdp(trainer), *_of_deepspeed(trainer)]
    others = f"What would take less: {', '.join(_of_any(trainer))}"
    if not settings:
        return others
    return f"What would fit, in the accelerate config, in this order: {'; '.join(settings)}. {others}"


def _of_any(trainer: Any) -> Iterator[str]:
    args, model = trainer.args, trainer.model
    if args.per_device_train_batch_size > 1:
        yield "a smaller per_device_train_batch_size with more gradient_accumulation_steps"
    yield "a smaller max_length"
    optim = optim_of(trainer)
    if optim.startswith("adamw") and not optim.endswith(("8bit", "4bit")):
        yield "optim='adamw_8bit'"
    # Weights of 8 bits take more than QLoRA's; other quantised ones do not.
    in_8_bits = getattr(model, "is_loaded_in_8bit", False)
    if in_8_bits or not (getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False)):
        yield "QLoRA"


def _of_fsdp(trainer: Any) -> Iterator[str]:
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    shards, offload = plugin.reshard_after_forward, plugin.cpu_offload
    if shards is False or getattr(shards, "name", "FULL_SHARD") != "FULL_SHARD":
        yield f"fsdp_reshard_after_forward: {'true' if shards is False else 'FULL_SHARD'}"
    if not plugin.activation_checkpointing and not trainer_asks(trainer):
        yield "fsdp_activation_checkpointing: true"
    if not (type(offload).__name__ == "CPUOffloadPolicy" or getattr(offload, "offload_params", False)):
        yield "fsdp_offload_params: true"


def _of_deepspeed(trainer: Any) -> Iterator[str]:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    if plugin.zero_stage < 3:
        yield "zero_stage: 3"
    if plugin.offload_optimizer_device in (None, "none"):
        yield "offload_optimizer_device: cpu"
    if plugin.offload_param_device in (None, "none"):
        yield f"offload_param_device: cpu{'' if plugin.zero_stage == 3 else ' (with zero_stage: 3)'}"
