"""The optimizer's step inside backward: a gradient is used and let go of as soon as it is whole.

Autograd calls a hook when it has added up the gradient of a parameter, which it does once for each backward pass,
however often the parameter was used. Gradients wait until they are a bucket; then the optimizer makes its step with
these gradients alone, as it does where other parameters have none, and they are let go of. What is no whole bucket is
left to the step after backward. An optimizer here treats each tensor by itself, so weights, states and counts are those
of one step, to the last bit.

Until the step after backward nothing may want the gradients that are gone, and nothing may add to them. What is known
to is looked for before the training and before each backward; then gradients stand, as in stock. Gradients that come
when their weights have changed already are an error, as a wrong step cannot be taken back.

Trainer logs the norm of all gradients. Those of single tensors are noted as they go, and the norm is made of them, by
the same operations. (It has no second use with `max_grad_norm=0`, but for one: where it is infinite or NaN, stock
multiplies all gradients by NaN. Here the weights become NaN that the bad gradients belong to, and with them the rest in
the next step.)

Clipping needs that norm before the first gradient is used. So backward is gone through twice: the first time gradients
are let go of as soon as their norms are known, the second time they are scaled, and used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from . import accelerate, checkpointing, managed_memory, optimizers
from .engine import Exactness, Finding, Patch, is_live, is_plain, once, stock_class
from .trainer import gathers_weights, norm_conflict, parallelism, step_conflict, watches_gradients

_BY_TENSOR = (AdamW, Adam, SGD)  # and bitsandbytes' AdamW


class _Clipped(NamedTuple):
    """What the gradients of a step were clipped to, their norm before, and what scales them."""

    max_norm: float
    norm: torch.Tensor
    scale: torch.Tensor


class StepInBackward(Patch):
    """That of one trainer. It is itself the hook on the parameters.

    Args:
        optimizer: the inner one.
        bucket_bytes: gradients of so many bytes make a step.
        note: told, once each, why gradients stood until the step after backward.
    """

    id = "optimizer:in_backward"

    def __init__(self, trainer: Any, optimizer: Optimizer, bucket_bytes: int, note: Callable[[str], None]):
        self._trainer, self._optimizer, self._bucket_bytes, self._tell = trainer, optimizer, bucket_bytes, once(note)
        self._handles: list[Any] = []
        self._is_on = False  # in the one backward of a step
        self._waiting: dict[int, torch.Tensor] = {}  # parameters, by id
        self._bytes = 0  # of their gradients
        self._norms: dict[int, torch.Tensor] = {}  # of the gradients that are gone, by id of the parameter
        self._step = -1  # of the trainer, of which these are
        self._looks = False  # at norms alone, of gradients that come again
        self._clipped: _Clipped | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [each for group in self._optimizer.param_groups for each in group["params"]]

    def apply(self) -> None:
        for each in self.parameters:
            self._hook(each)

    def revert(self) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return True

    def _hook(self, parameter: torch.Tensor) -> None:
        if parameter.requires_grad and self not in (parameter._post_accumulate_grad_hooks or {}).values():
            self._handles.append(parameter.register_post_accumulate_grad_hook(self))

    def __call__(self, parameter: torch.Tensor) -> None:
        """Its gradient is there."""
        if not (self._is_on and is_live()):
            return
        key = id(parameter)
        if key in self._norms:
            raise RuntimeError(
                "hf_turbo: optimizer_in_backward: a gradient came in several parts (reentrant checkpointing of shared "
                "weights?), and the first was used and let go of. Use optimizer_in_backward=False"
            )
        if key not in self._waiting and parameter.grad is not None:
            self._waiting[key] = parameter
            self._bytes += parameter.grad.nbytes
        if self._bytes >= self._bucket_bytes:
            self._look_at_bucket() if self._looks else self._step_bucket()

    @torch.no_grad()
    def _step_bucket(self) -> None:
        grads = self._gradients_of(self._waiting.values())
        # Once they are clipped nobody asks for the norms of single ones.
        norms = torch._foreach_norm(grads, 2.0) if self._clipped is None else [self._clipped.norm] * len(grads)
        if self._clipped is not None:
            torch._foreach_mul_(grads, self._clipped.scale)
        with managed_memory.read_later():
            type(self._optimizer).step(self._optimizer)
        self._let_go(norms)

    @torch.no_grad()
    def _look_at_bucket(self) -> None:
        if self._waiting:
            self._let_go(torch._foreach_norm(self._gradients_of(self._waiting.values()), 2.0, dtype=torch.float32))

    @staticmethod
    def _gradients_of(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [each.grad for each in parameters if each.grad is not None]

    def _let_go(self, norms: Iterable[torch.Tensor]) -> None:
        for each in self._waiting.values():
            each.grad = None
        self._norms.update(zip(self._waiting, norms, strict=True))
        self._forget_waiting()

    def _forget_waiting(self) -> None:
        self._waiting.clear()
        self._bytes = 0

    # ------------------------------------------------------------------------------------------------- around Trainer

    def around_backward(self, accelerator: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Of `Accelerator.backward`: gradients that come in any other backward stand."""
        if accelerator is not self._trainer.accelerator or not is_live():
            return call(*args, **kwargs)
        step = self._trainer.state.global_step
        if self._norms and self._step == step:
            raise RuntimeError(
                "hf_turbo: optimizer_in_backward: a second backward in one step, and the weights were changed by the "
                "first. Use optimizer_in_backward=False"
            )
        self._forget_waiting()
        self._norms.clear()
        self._clipped = None
        self._step = step
        reason = "backward has options" if kwargs else self._why_not()
        if reason is not None:
            self._tell(f"optimizer_in_backward: all gradients stood in step {step + 1} or more: {reason}", of=reason)
            return call(*args, **kwargs)
        max_norm = self._trainer.args.max_grad_norm
        if max_norm:
            self._clipped = self._clipped_to(float(max_norm), call, args)
        result = self._within(lambda: call(*args))
        if not self._norms:  # all gradients stand: what comes now is stock's
            self._clipped = None
        standing = self._gradients_of(self.parameters)
        if self._clipped is not None and standing:
            torch._foreach_mul_(standing, self._clipped.scale)
        return result

    def _within(self, backward: Callable[[], Any]) -> Any:
        self._is_on = True
        try:
            return backward()
        finally:
            self._is_on = False
            self._forget_waiting()

    @torch.no_grad()
    def _clipped_to(self, max_norm: float, call: Callable[..., Any], args: Any) -> _Clipped:
        """Goes backward for the norm of all gradients, as torch has it but for rounding those of single ones."""

        def backward() -> None:
            with torch.enable_grad():
                call(*args, retain_graph=True)
            self._look_at_bucket()

        self._looks = True
        try:
            self._within(backward)
            found = dict(self._norms)
        finally:
            self._looks = False
            self._norms.clear()  # nothing was used
        norms = [found[id(each)] for each in self._trainer.model.parameters() if id(each) in found]
        wide = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        dtype = functools.reduce(torch.promote_types, {each.dtype for each in self.parameters})
        return _Clipped(max_norm, wide.to(dtype), (max_norm / (wide + 1e-6)).clamp(max=1.0))

    def around_clip(self, accelerator: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Of `Accelerator.clip_grad_norm_`, by which Trainer has the norm."""

        def norm_of(parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2) -> Any:
            parameters = list(parameters)
            if self._clipped is not None and (max_norm, norm_type) == (self._clipped.max_norm, 2):
                return self._clipped.norm
            if not any(id(each) in self._norms for each in parameters):
                return call(parameters, max_norm, norm_type)
            if max_norm != math.inf or norm_type != 2:
                raise RuntimeError(
                    "hf_turbo: optimizer_in_backward: gradients were used before they were to be clipped"
                )
            norms = [self._norms.get(id(each), each.grad) for each in parameters]
            return torch.nn.utils.get_total_norm([each for each in norms if each is not None])

        is_of_step = accelerator is self._trainer.accelerator and self._step == self._trainer.state.global_step
        return (norm_of if is_of_step and is_live() else call)(*args, **kwargs)

    def _why_not(self) -> str | None:
        """Why the gradients of this backward have to stand, or None."""
        reason = _conflict_of_step(self._trainer) or _hooks_of(self._optimizer)
        reason = reason or _clips_others(self._trainer, self.parameters)
        if reason is not None:
            return reason
        for each in self.parameters:
            if each.grad is not None:
                return "there were gradients before backward"
            if each._backward_hooks or foreign_hooks(each):
                return "hooks on gradients"
            self._hook(each)
        return None


# --------------------------------------------------------------------------------------------------- asked by others


def foreign_hooks(parameter: torch.Tensor) -> bool:
    """Whether somebody else acts when the gradient of a parameter is there."""
    hooks = parameter._post_accumulate_grad_hooks
    return bool(hooks) and not all(isinstance(hook, StepInBackward) for hook in hooks.values())


def step_of(parameters: Iterable[torch.Tensor]) -> StepInBackward | None:
    """What steps these within backward."""
    found = (hook for each in parameters for hook in (each._post_accumulate_grad_hooks or {}).values())
    return next((hook for hook in found if isinstance(hook, StepInBackward)), None)


# ---------------------------------------------------------------------------------------------------------------- find


def conflict(trainer: Any) -> str | None:
    """Why no optimizer of this trainer may step within backward, or None."""
    accelerator = trainer.accelerator
    reason = step_conflict(trainer) or norm_conflict(trainer)
    if reason is not None:
        return reason
    kind = gathers_weights(trainer) or parallelism(trainer)
    if kind is not None or accelerator.num_processes > 1:
        return f"{kind or 'several processes'}: gradients are added up after backward"
    if getattr(accelerator, "scaler", None) is not None:
        return "fp16: gradients are unscaled, and looked at, after backward; use bf16"
    if trainer.args.torch_compile:
        return "torch_compile is on: a compiled backward gives all gradients at once"
    if trainer.args.auto_find_batch_size:
        return "auto_find_batch_size begins again with weights that a failed step may have changed"
    if getattr(trainer.args, "activation_offloading", False) and trainer.args.max_grad_norm:
        return "activation_offloading is on: TRL hands out once what backward needs twice; max_grad_norm=0 is once"
    if checkpointing.is_reentrant(trainer):
        return "use_reentrant=True: gradients of shared weights come in parts; use use_reentrant=False"
    return _conflict_of_step(trainer)


def _conflict_of_step(trainer: Any) -> str | None:
    """The same, of what may change in the course of a training."""
    if trainer.args.gradient_accumulation_steps > 1:
        return "gradient_accumulation_steps > 1: gradients stand until the last micro-batch"
    return watches_gradients(trainer)


def _clips_others(trainer: Any, parameters: list[torch.Tensor]) -> str | None:
    """Gradients of other parameters would be added up when backward is gone through twice."""
    known = set(map(id, parameters))
    if trainer.args.max_grad_norm and any(
        each.requires_grad and id(each) not in known for each in trainer.model.parameters()
    ):
        return "a trained weight that the optimizer does not have is clipped, too; max_grad_norm=0 switches that off"
    return None


def _hooks_of(optimizer: Optimizer) -> str | None:
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    return "hooks on the optimizer's step" if any(hooks) else None


def _conflict_of_optimizer(optimizer: Any, model: torch.nn.Module) -> str | None:
    cls = stock_class(optimizer)
    if cls not in _BY_TENSOR and not optimizers.is_of_bitsandbytes(cls):
        return f"{cls.__name__} is not known to treat each tensor by itself: AdamW, Adam and SGD are"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "differentiable"
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if not is_plain(*parameters):
        return "parameters are tensor subclasses or partitioned"
    if len({each.device for each in parameters}) > 1:
        return "parameters on several devices"
    # A weight that is another's memory may be needed when the other's gradient is there.
    everything = {id(each): each for each in (*parameters, *model.parameters(), *model.buffers()) if each.numel()}
    if len({each.data_ptr() for each in everything.values() if is_plain(each)}) < sum(
        map(is_plain, everything.values())
    ):
        return "parameters share memory"
    return optimizers.replaced_step(optimizer) or _hooks_of(optimizer)


def find(trainer: Any, optimizer: Any, bucket_bytes: int, note: Callable[[str], None]) -> Finding:
    """The patches of a trainer's optimizer.

    Args:
        optimizer: the inner one.
        bucket_bytes: gradients of so many bytes make a step.
        note: told, once each, why gradients stood until the step after backward.
    """
    trained = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
    finding = Finding("optimizer_in_backward", "steps by buckets", Exactness.EXACT, found=len(trained))
    reason = conflict(trainer) or _conflict_of_optimizer(optimizer, trainer.model) or _clips_others(trainer, trained)
    if reason is not None:
        finding.refuse(reason)
        return finding
    step = StepInBackward(trainer, optimizer, bucket_bytes, note)
    finding.patched = len(trained)
    if trainer.args.max_grad_norm:  # stock has norm and scale in the dtype of the gradients
        finding.exactness = Exactness.REASSOCIATED
    finding.patches = [
        step,
        accelerate.method_patch("backward", step.around_backward),
        accelerate.method_patch("clip_grad_norm_", step.around_clip),
    ]
    return finding
