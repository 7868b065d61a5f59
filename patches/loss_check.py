"""Trainer's check of each micro-batch's loss (`logging_nan_inf_filter`), without waiting for the backward pass.

After `training_step` Trainer asks whether the loss is NaN or infinite. On a GPU the answer is computed behind the
backward pass, so the host waits for all of it, and only then counts FLOP, clips, steps, zeroes gradients and fetches
data, while the device idles. Here the value is copied to the host when the backward pass begins, and the question
waits for that copy alone. The loss that `training_step` returns is the same tensor; it knows its value.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from typing import Any

import torch

from .engine import Exactness, Finding, ProcessPatch, is_live

TRAINER, ACCELERATOR = "transformers.trainer", "accelerate.accelerator"
DEVICES = {"cuda"}


class _Value:
    """The value of a loss, on its way to the host."""

    def __init__(self, loss: torch.Tensor):
        self.address = loss.data_ptr()
        self._copy = torch.empty_like(loss, device="cpu", pin_memory=loss.is_cuda)
        self._copy.copy_(loss, non_blocking=True)
        self._done = torch.cuda.Event() if loss.is_cuda else None
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(loss.device))

    def get(self) -> float:
        if self._done is not None:
            self._done.synchronize()
        return self._copy.item()


class _KnownLoss(torch.Tensor):
    """A loss whose value is known on the host. All but `isnan` and `isinf` sees a plain tensor, and returns them."""

    _value: _Value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.isnan, torch.isinf) and type(args[0]) is cls and not kwargs:
            return torch.tensor((math.isnan if func is torch.isnan else math.isinf)(args[0]._value.get()))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


class _Pending(threading.local):
    """The value of the loss whose backward pass this thread has begun last."""

    value: _Value | None = None


_PENDING = _Pending()


@functools.cache
def _patches(trainer_cls: Any, accelerator_cls: Any) -> tuple[ProcessPatch, ProcessPatch]:
    stock_backward, stock_step = accelerator_cls.backward, trainer_cls.training_step

    def backward(self: Any, loss: Any, **kwargs: Any) -> Any:
        plain = type(loss) is torch.Tensor and loss.numel() == 1 and loss.device.type in DEVICES
        _PENDING.value = _Value(loss.detach()) if plain and is_live() else None
        return stock_backward(self, loss, **kwargs)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        _PENDING.value = None
        loss = stock_step(self, *args, **kwargs)
        value, _PENDING.value = _PENDING.value, None
        if value is None or type(loss) is not torch.Tensor or loss.data_ptr() != value.address:
            return loss
        known = loss.as_subclass(_KnownLoss)
        known._value = value
        return known

    return (
        ProcessPatch("loss_check:backward", accelerator_cls, "backward", backward),
        ProcessPatch("loss_check:training_step", trainer_cls, "training_step", training_step),
    )


def find() -> Finding:
    """Patches of Trainer and Accelerator, where they are imported."""
    finding = Finding("host", "copy of the loss", Exactness.EXACT)
    trainer_cls = getattr(sys.modules.get(TRAINER), "Trainer", None)
    accelerator_cls = getattr(sys.modules.get(ACCELERATOR), "Accelerator", None)
    if trainer_cls is None or accelerator_cls is None:
        return finding
    finding.found = 1
    patches = _patches(trainer_cls, accelerator_cls)
    if all(patch.can_apply() for patch in patches):
        finding.patched, finding.patches = 1, list(patches)
    else:
        finding.refuse("Trainer.training_step or Accelerator.backward was replaced")
    return finding
