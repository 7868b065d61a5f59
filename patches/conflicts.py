"""Recognises other patchers and wrappers, to which hf_turbo yields."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from .engine import is_swapped


def model_conflict(model: nn.Module) -> str | None:
    """Why a whole model stays stock, or None."""
    for module in model.modules():
        if getattr(module, "_use_kernels", False):
            return "use_kernels is on: hub kernels replace the modules' forwards"
        if type(module).__module__.partition(".")[0] in {"unsloth", "unsloth_zoo"} or _owner(module) == "unsloth":
            return "the model is patched by Unsloth"
        if _owner(module) == "liger_kernel":
            return "the model is patched by Liger-Kernel"
        if isinstance(module, nn.DataParallel):
            return "nn.DataParallel replicates the model; launch one process per device instead"
    return None


def module_conflict(module: nn.Module) -> str | None:
    """Why one module stays stock, or None. Modules already patched by hf_turbo are no conflict."""
    if "_hf_hook" in module.__dict__ or "_old_forward" in module.__dict__:
        return "accelerate device hooks"
    if "forward" in module.__dict__:
        owner = _owner(module)
        return f"forward replaced on the instance{f' by {owner}' if owner else ''}"
    if any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
        return "parameters are DTensors (tensor parallel or already sharded)"
    if type(module).__name__.startswith("FSDP") and not is_swapped(module):
        return "already wrapped by FSDP"
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
        return "parameters are partitioned (ZeRO-3)"
    return None


def _owner(module: nn.Module) -> str | None:
    """Top-level package of an instance forward, None where there is no such forward."""
    forward = module.__dict__.get("forward")
    function = getattr(forward, "__func__", forward)
    name = getattr(function, "__module__", None)
    return name.partition(".")[0] if isinstance(name, str) else None
