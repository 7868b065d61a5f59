"""Clipping by norm in a few launches. In a step of Trainer the optimizer, which reads gradients anyway, scales them.

Gradients then stay in memory as backward left them, until they are set to None. So this is for the time from Trainer's
own clipping to its own step alone, where the optimizer takes all that is clipped, and nobody else's code runs until the
gradients are gone: no callback for these events, no hook of the optimizer. A step that does not take the scale after
all (stock's, say) has the gradients scaled first.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from hf_turbo.kernels._multi_tensor import addresses_of, have_addresses
from hf_turbo.kernels.clip_grad_norm import Gradients
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from .engine import AttributePatch, Patch, ProcessPatch, is_live, look_like
from .trainer import loop_conflict, norm_conflict, watches_gradients

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_CLIP = "_clip_grad_norm"  # of Trainer
# Schedulers set a `step` on optimizers, which notes that it was called; and so does what stands in for that.
_SCHEDULERS = ("torch.optim.lr_scheduler", "hf_turbo.patches.optimizers")

# Optimizers whose gradients are clipped here, and whether on the CPU too.
_OPTIMIZERS: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()


@dataclass
class Clipped:
    """Gradients that have just been clipped: the step after it need not examine them again.

    Attributes:
        scale: what the step has to multiply them by; None where that is done.
    """

    grads: list[torch.Tensor]
    dtypes: list[torch.dtype]
    addresses: list[int]
    scale: torch.Tensor | None

    def are(self, grads: Sequence[torch.Tensor | None]) -> bool:
        """Whether these are the gradients, one by one and where they were."""
        return (
            len(grads) == len(self.grads)
            and all(map(is_, grads, self.grads))
            and have_addresses(self.grads, self.addresses)  # or `.data =` has changed them since
        )

    def are_among(self, grads: list[torch.Tensor]) -> bool:
        """The same in any order."""
        is_same = self.grads is grads or set(map(id, grads)) == set(map(id, self.grads))
        return is_same and have_addresses(self.grads, self.addresses)


# For the next step. It keeps gradients alive that are dropped without a step, so unless that has to scale them they are
# small: where they are large, so is the update, and the host's time does not count.
_clipped: Clipped | None = None
_KEEP = 1 << 28  # bytes

_stepping: Optimizer | None = None  # in whose Trainer's clipping the host is


def for_step(grads: list[torch.Tensor]) -> Clipped | None:
    """What is known of the gradients of a step, of which these are all. Others that wait for a scale get it here."""
    if _clipped is not None and _clipped.scale is not None and not _clipped.are_among(grads):
        settle()
    return _clipped


def forget() -> None:
    """The step is made, or has to look for itself."""
    global _clipped
    _clipped = None


def settle() -> None:
    """Scales what waits for a step that is not to come."""
    clipped = _clipped
    forget()
    if clipped is not None and clipped.scale is not None:
        Gradients(clipped.grads).multiply(clipped.scale)
        torch.autograd.graph.increment_version(clipped.grads)


def modes_conflict(tensor: torch.Tensor) -> str | None:
    """Why kernels that write through addresses cannot stand in for operations on a tensor now, or None."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return "something watches the operations of the step"
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


# --------------------------------------------------------------------------------------------------------------- torch


@functools.cache
def patch() -> ProcessPatch:
    """Of `torch.nn.utils.clip_grad_norm_`, for all optimizers."""
    utils = torch.nn.utils
    return ProcessPatch("optimizer:clip_grad_norm_", utils, "clip_grad_norm_", _make_clip(utils.clip_grad_norm_))


class Registered(Patch):
    """Has the gradients of an optimizer clipped here.

    Args:
        on_cpu: on the CPU too.
    """

    id = "optimizer:clipping"

    def __init__(self, optimizer: Optimizer, on_cpu: bool):
        self._optimizer, self._on_cpu = weakref.ref(optimizer), on_cpu

    def apply(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            _OPTIMIZERS[optimizer] = self._on_cpu

    def revert(self) -> bool:
        settle()
        optimizer = self._optimizer()
        if optimizer is not None:
            _OPTIMIZERS.pop(optimizer, None)
        return True


def _make_clip(stock: Callable[..., Any]) -> Callable[..., Any]:
    def clip_grad_norm_(
        parameters: torch.Tensor | Iterable[torch.Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        settle()  # what was clipped before, and never stepped
        if is_live() and norm_type == 2 and not error_if_nonfinite and foreach is None:
            norm = _clip(parameters, max_norm)
            if norm is not None:
                return norm
        if is_generator and not parameters:
            parameters = (parameter for parameter in parameters)  # stock warns of that
        return stock(parameters, max_norm, norm_type, error_if_nonfinite, foreach)

    return clip_grad_norm_


def _clip(parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor | None:
    """The norm, or None where clipping is stock's."""
    global _clipped
    grads: list[Any] = list(map(attrgetter("grad"), parameters))
    classes = set(map(type, grads))
    if type(None) in classes:
        classes.remove(type(None))
        grads = [grad for grad in grads if grad is not None]
    if classes != {torch.Tensor}:
        return None
    optimizer = _optimizer_of(next(parameter for parameter in parameters if parameter.grad is not None))
    if optimizer is None or not (grads[0].is_cuda or _OPTIMIZERS[optimizer]):
        return None
    dtypes = list(map(attrgetter("dtype"), grads))
    distinct = set(dtypes)
    if distinct - DTYPES or len(set(map(torch.Tensor.get_device, grads))) > 1:
        return None
    if not all(map(torch.Tensor.is_contiguous, grads)):  # sparse ones are not either
        return None
    addresses = addresses_of(grads)
    if len(set(addresses)) < len(addresses):  # stock scales a gradient that is given twice twice
        return None
    if modes_conflict(grads[0]) is not None:
        return None
    numels = list(map(torch.Tensor.numel, grads))
    of_all = dtypes[0] if len(distinct) == 1 else dtypes
    gradients = Gradients(grads, dtypes=of_all, numels=numels, addresses=addresses)
    norm, scale = gradients.norm_and_scale(float(max_norm))
    if optimizer is _stepping and _takes_all(optimizer, grads):
        _clipped = Clipped(grads, dtypes, addresses, scale)
        return norm
    gradients.multiply(scale)
    torch.autograd.graph.increment_version(grads)
    if 4 * sum(numels) <= _KEEP:
        _clipped = Clipped(grads, dtypes, addresses, None)
    return norm


def _optimizer_of(parameter: torch.Tensor) -> Optimizer | None:
    """The one here that trains the parameter."""
    for optimizer in _OPTIMIZERS:
        if any(parameter is one for group in optimizer.param_groups for one in group["params"]):
            return optimizer
    return None


def _takes_all(optimizer: Any, grads: list[torch.Tensor]) -> bool:
    """Whether the optimizer's parameters have these gradients and no others, and nothing around its step could look at
    them."""
    step = vars(optimizer).get("step")
    if (
        (step is not None and not _is_of(step, *_SCHEDULERS))
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    ):
        return False
    theirs = {id(each.grad) for group in optimizer.param_groups for each in group["params"]} - {id(None)}
    return theirs == set(map(id, grads))


# ------------------------------------------------------------------------------------------------------------- Trainer


def trainer_patch(trainer: Any, optimizer_of: Callable[[Any], Any]) -> Patch | None:
    """That of a trainer's clipping, where between it and the end of the step there is only what is known.

    Args:
        optimizer_of: the optimizer inside those of accelerate.
    """
    if norm_conflict(trainer) is not None or loop_conflict(trainer) is not None or _CLIP in vars(trainer):
        return None
    owner = next(cls for cls in type(trainer).__mro__ if _CLIP in vars(cls))
    stock = vars(owner)[_CLIP]

    def _clip_grad_norm(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not trainer or watches_gradients(self) is not None or _is_wrapped(self):
            return stock(self, *args, **kwargs)
        with _left_to_step_of(optimizer_of(self.optimizer)):
            return stock(self, *args, **kwargs)

    look_like(_clip_grad_norm, stock)
    return AttributePatch("trainer:clip", owner, _CLIP, _clip_grad_norm)


def _is_wrapped(trainer: Any) -> bool:
    """Whether the step is another than accelerate's of the optimizer alone: scaled gradients, or the script's own."""
    step = vars(trainer.optimizer).get("step")
    return (
        trainer.accelerator.scaler is not None
        or (step is not None and not _is_of(step, *_SCHEDULERS))
        or not _is_of(type(trainer.optimizer).step, "accelerate.optimizer", "hf_turbo.patches.accelerate")
    )


def _is_of(function: Any, *modules: str) -> bool:
    """Whether a function was written in one of these; what wraps another takes over its names."""
    return getattr(function, "__globals__", {}).get("__name__") in modules


@contextmanager
def _left_to_step_of(optimizer: Any) -> Iterator[None]:
    global _stepping
    _stepping = optimizer
    try:
        yield
    finally:
        _stepping = None
