"""DeepSpeed's ZeRO, and passes that several micro-batches share.

accelerate calls the engine's `backward` for each micro-batch, and its `step` after the last one. Gradients are reduced
by hooks on the parameters, in ZeRO-2 and 3 at every backward. So all processes have to go backward through the same
parameters at the same micro-batch, which they agree on (agreement.py).

ZeRO-2 makes room for the gradients of a backward when the first of them comes, and fails where none does. Of adapters
none does but in the last micro-batch of a pass: the others give zeros to one parameter.

ZeRO-3 copies the gradients of a step's first backward over those of the step before, and adds those of the others. What
the first one does not come to would be added to what is left of the last step. So the first micro-batch of a step has a
pass of its own there. ZeRO-3 gathers each module by itself: nothing is to be called for the sake of another
(sharded.py).
"""

from __future__ import annotations

from typing import Any

# Of `zero_optimization`. What else there is keeps gradients in other places, or makes other gradients of them, and has
# not been tried.
_KNOWN = {
    *("stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions"),
    *("allgather_bucket_size", "round_robin_gradients", "sub_group_size", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_gather_16bit_weights_on_model_save", "offload_optimizer", "offload_param"),
}

# Where ZeRO's hooks are from; the second module wraps them.
_OF_HOOKS = ("deepspeed.runtime.", "deepspeed.utils.nvtx")


def _config(trainer: Any) -> dict[str, Any] | None:
    """DeepSpeed's config of a trainer; None where it does not use DeepSpeed."""
    kind = getattr(trainer.accelerator, "distributed_type", None)
    if getattr(kind, "value", kind) != "DEEPSPEED":
        return None
    config: dict[str, Any] = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    return config


def _stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def is_used(trainer: Any) -> bool:
    return _config(trainer) is not None


def merging_conflict(trainer: Any) -> str | None:
    """Why micro-batches do not share passes under this DeepSpeed, or None."""
    config = _config(trainer)
    if config is None:
        return None
    if _stage(config) not in (1, 2, 3):
        return "DeepSpeed without ZeRO: passes that micro-batches share have not been tried"
    zero = config["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") not in (None, "none"):
            return f"{name} of DeepSpeed: passes that micro-batches share have not been tried"
    unknown = sorted(zero.keys() - _KNOWN)
    if unknown:
        return f"{unknown[0]} of DeepSpeed: passes that micro-batches share have not been tried"
    if config.get("compile", {}).get("deepcompile"):
        return "DeepCompile is on"
    return None


def overwrites_gradients(trainer: Any) -> bool:
    """Whether the first backward of a step has to come to all parameters."""
    config = _config(trainer)
    return config is not None and _stage(config) == 3


def needs_gradients(trainer: Any) -> bool:
    """Whether every backward has to come to a parameter."""
    config = _config(trainer)
    return config is not None and _stage(config) == 2


def needs_agreement(trainer: Any) -> bool:
    """Whether all processes have to compute the same passes."""
    return is_used(trainer) and trainer.accelerator.num_processes > 1


def is_of_zero(hook: Any) -> bool:
    """Whether a hook is one by which ZeRO gathers weights or reduces gradients, when and in what shapes they come."""
    return (getattr(hook, "__module__", None) or "").startswith(_OF_HOOKS)
