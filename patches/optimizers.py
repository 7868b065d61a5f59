"""AdamW of torch and of bitsandbytes: a few launches for all tensors.

The optimizer object keeps its states, its `state_dict()` and its hooks; only `step` is overridden, by the same swap of
classes as for modules. States are made by stock's own initialisers and have stock's format, so that a run can change
over at any step. A step that is not understood (a closure, sparse gradients, a tensor as learning rate) is stock's.
What bf16 weights have besides, if the user asks for it, is in bf16_weights.py.

Kernels write through addresses. Those of parameters and states are taken once and compared at every step: nobody is
kept from giving a tensor other memory, as offloading does. Torch makes gradients agree with their parameters in shape,
device and, by default, dtype.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from hf_turbo.kernels._multi_tensor import addresses_of, are_aligned, have_addresses
from hf_turbo.kernels.adamw import BlockStates, MultiTensorAdamW, Random, Rates
from torch.optim import Optimizer

from . import clipping, fingerprint, managed_memory, optimizer_choice
from .bf16_weights import REMAINDER, Bf16Weights, Choice, has_bf16
from .engine import (
    ClassSwap,
    Exactness,
    Finding,
    is_live,
    is_plain,
    look_like,
    once,
    same_name_subclass,
)

_BITSANDBYTES = {"AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"}
_STOCK_STEPS = {
    "torch.optim.adam:Adam.step",
    "torch.optim.sgd:SGD.step",
    "bitsandbytes.optim.optimizer:Optimizer8bit.step",
}
_WRAPPERS_OF_STEPS = {"torch.optim.optimizer", "torch.utils._contextlib"}  # of hooks; torch.no_grad()
_CELLS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}

# What is patched at present, with what is known of it. Not on the optimizers, whose attributes others read and copy.
_PATCHED: weakref.WeakKeyDictionary[Optimizer, _Stepper] = weakref.WeakKeyDictionary()


class _NotUnderstood(Exception):
    """Says why a step is stock's."""


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass
class _Bucket:
    """Tensors that one launch updates: alike in dtypes and in the kind of their states.

    Attributes:
        indices: their places among all parameters of the optimizer; None if they are all of them, in order.
        tables: what the kernel works with.
        counts: where the numbers of steps are: memory of CPU tensors, or states that hold an int; None: on the device.
    """

    indices: list[int] | None
    tables: MultiTensorAdamW
    counts: list[Any] | None

    def next_steps(self, given: list[bool] | None) -> list[float] | float | None:
        """The step that each tensor with a gradient makes, one number where it is the same for all."""
        if self.counts is None:
            return None
        steps = list(map(itemgetter("step") if self._in_states else attrgetter("value"), self.counts))
        if given is None and steps.count(steps[0]) == len(steps):
            return steps[0] + 1
        return [step + 1 for step in steps]

    def count(self, steps: list[float] | float | None, given: list[bool] | None) -> None:
        """Writes down that the steps are made."""
        if self.counts is None or steps is None:
            return
        for i, count in enumerate(self.counts):
            step = steps[i] if isinstance(steps, list) else steps
            if given is not None and not given[i]:
                continue
            if self._in_states:
                count["step"] = step
            else:
                count.value = step

    @property
    def _in_states(self) -> bool:
        return self.counts is not None and isinstance(self.counts[0], dict)


@dataclass
class _Plan:
    """The tables of an optimizer, and what they were made from."""

    params: list[torch.Tensor]  # of all groups
    dtypes: list[torch.dtype]  # theirs
    stateless: list[int]  # indices of those that have not had a gradient
    entries: list[dict[str, Any]]  # all of optimizer.state, in its order
    stateful: list[torch.Tensor]  # parameters that have states
    states: list[dict[str, Any]]  # theirs
    memory: list[tuple[str, list[Any], list[int]]]  # name of a state, whose, and addresses; "": parameters themselves
    step_counters: list[Any]  # tensors that count steps, one for each state
    buckets: list[_Bucket]
    remaindered: list[tuple[torch.Tensor, dict[str, Any]]]  # parameters that have remainders, and their states

    def is_current(self, optimizer: Optimizer, params: list[torch.Tensor]) -> bool:
        entries = optimizer.state.values()
        if len(params) != len(self.params) or len(entries) != len(self.entries):
            return False
        if not (all(map(is_, params, self.params)) and all(map(is_, entries, self.entries))):
            return False
        try:
            if self.step_counters and not all(map(is_, map(itemgetter("step"), self.states), self.step_counters)):
                return False
            return all(
                have_addresses(list(map(itemgetter(name), holders)) if name else holders, addresses)
                for name, holders, addresses in self.memory
            )
        except KeyError:
            return False


class _Stepper:
    """Steps one optimizer.

    Attributes:
        on_cpu: act on CPU tensors too, where stock is as fast.
        weights: what its bf16 weights are trained with.
        note: told, once each, why steps were left to stock.
    """

    def __init__(self, on_cpu: bool, note: Callable[[str], None], weights: Bf16Weights):
        self.on_cpu, self._tell, self.weights = on_cpu, once(note), weights
        self.managed = managed_memory.ManagedStates(self._tell)
        self._plan: _Plan | None = None

    def step(self, optimizer: Optimizer, closure: Any) -> bool:
        """One step, or False where it is stock's.

        Raises:
            RuntimeError: it would be, and bf16 weights are trained with something that stock has not.
        """
        try:
            if closure is not None:
                raise _NotUnderstood("it is given a closure")
            self._step(optimizer)
        except _NotUnderstood as error:
            clipping.settle()
            reason = str(error)
            if self.weights.choice != "as_is" and has_bf16(optimizer):
                raise RuntimeError(
                    f"hf_turbo: bf16_weights={self.weights.choice!r} was asked for but a step of "
                    f"{type(optimizer).__name__} cannot have it: {reason}. Use bf16_weights='as_is' to go on without it"
                ) from None
            self._tell(f"{type(optimizer).__name__}: stock for a step or more: {reason}", of=reason)
            return False
        return True

    def _step(self, optimizer: Optimizer) -> None:
        is_bitsandbytes = is_of_bitsandbytes(type(optimizer))
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if not params or not (params[0].is_cuda or self.on_cpu):
            raise _NotUnderstood(f"parameters on {params[0].device.type if params else 'no device'}")
        reason = clipping.modes_conflict(params[0])
        if reason is not None:
            raise _NotUnderstood(reason)
        if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
            raise _NotUnderstood("a GradScaler hands its scale to the step")
        if is_bitsandbytes:
            _refuse_overrides(optimizer)
        rates = [_rates(group, is_bitsandbytes and params[0].is_cuda) for group in optimizer.param_groups]

        grads: list[Any] = list(map(attrgetter("grad"), params))
        classes = set(map(type, grads))
        given: list[torch.Tensor] = grads
        if type(None) in classes:
            classes.remove(type(None))
            given = [grad for grad in grads if grad is not None]
        if not given:
            managed_memory.wait_for(optimizer)
            return
        if classes != {torch.Tensor}:
            raise _NotUnderstood(f"gradients are {', '.join(sorted(cls.__name__ for cls in classes))}")

        plan = self._plan
        if plan is None or not plan.is_current(optimizer, params) or any(grads[i] is not None for i in plan.stateless):
            self._plan = None  # frees the old tables first
            plan = self._plan = _make_plan(optimizer, params, is_bitsandbytes, self.weights)
            if managed_memory.pages(optimizer):
                self.managed.hold(
                    [value for state in plan.states for value in state.values() if managed_memory.is_paged(value)]
                )
        clipped = clipping.for_step(given)
        addresses = self._addresses(plan, grads, given, clipped)
        tell_lost = self.weights.sample(optimizer, params)
        self.weights.begin_step(plan.remaindered)

        self.managed.fetch_if_due()
        for bucket in plan.buckets:
            if bucket.indices is None:
                some, some_addresses = grads, addresses
            else:
                some = [grads[i] for i in bucket.indices]
                some_addresses = [addresses[i] for i in bucket.indices]
            with_grad = None if len(given) == len(grads) else [grad is not None for grad in some]
            steps = bucket.next_steps(with_grad)
            bucket.tables.update(some, rates, steps, some_addresses, None if clipped is None else clipped.scale)
            # Bucket by bucket: where memory runs out in a later one, versions say that the step has begun (retry.py).
            # States belong to no graph.
            indices = range(len(params)) if bucket.indices is None else bucket.indices
            torch.autograd.graph.increment_version([params[i] for i in indices if grads[i] is not None])
            bucket.count(steps, with_grad)
        clipping.forget()
        self.weights.end_step(plan.remaindered)
        if tell_lost is not None:
            tell_lost(int(max(float(state["step"]) for state in plan.states)))
        managed_memory.wait_for(optimizer)

    def _addresses(
        self, plan: _Plan, grads: list[torch.Tensor | None], given: list[torch.Tensor], clipped: clipping.Clipped | None
    ) -> list[int]:
        """Addresses of gradients that fit their parameters, 0 where there is none."""
        complete, dtypes = len(given) == len(grads), plan.dtypes
        if clipped is not None and clipped.dtypes == dtypes and clipped.are(grads):
            return clipped.addresses
        if not complete:
            dtypes = [dtype for dtype, grad in zip(dtypes, grads, strict=True) if grad is not None]
        if list(map(attrgetter("dtype"), given)) != dtypes:
            raise _NotUnderstood("gradients of other dtypes than their parameters")
        if not all(map(torch.Tensor.is_contiguous, given)):
            raise _NotUnderstood("gradients that are sparse or not contiguous")
        addresses = addresses_of(given)
        if complete:
            return addresses
        remaining = iter(addresses)
        return [0 if grad is None else next(remaining) for grad in grads]


def _refuse_overrides(optimizer: Any) -> None:
    """bitsandbytes' settings of single parameters; that of 32-bit states acts when they are made, by stock."""
    manager, args = optimizer.mng, optimizer.args
    for config in (*manager.index2config.values(), *manager.pid2config.values()):
        if config.keys() - {"optim_bits"}:
            raise _NotUnderstood("GlobalOptimManager overrides more than optim_bits")
    if getattr(args, "max_unorm", 0.0) > 0 or getattr(args, "skip_zeros", False):
        raise _NotUnderstood("max_unorm or skip_zeros")
    if getattr(args, "percentile_clipping", 100) < 100 or not getattr(args, "block_wise", True):
        raise _NotUnderstood("percentile_clipping, or states that are not block-wise")


def _rates(group: dict[str, Any], in_float32: bool) -> Rates:
    """bitsandbytes computes with betas of float32 on a GPU; beside 1 - beta its rounding counts."""
    if any(group.get(flag) for flag in ("amsgrad", "maximize", "capturable", "differentiable")):
        raise _NotUnderstood("amsgrad, maximize, capturable or differentiable")
    beta1, beta2 = group["betas"][:2]
    rates = Rates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
    if not all(isinstance(rate, (float, int)) for rate in rates):
        raise _NotUnderstood("a learning rate, beta or the like that is a tensor")
    if in_float32:
        return rates._replace(beta1=ctypes.c_float(beta1).value, beta2=ctypes.c_float(beta2).value)
    return rates


@torch.no_grad()
def _make_plan(optimizer: Any, params: list[torch.Tensor], is_bitsandbytes: bool, weights: Bf16Weights) -> _Plan:
    """Has stock make the states that are missing, and takes all addresses."""
    device = params[0].device
    for param in params:
        if not is_plain(param) or param.dtype not in clipping.DTYPES or not param.is_contiguous():
            raise _NotUnderstood(f"a parameter that is {param.dtype}, not contiguous or of a tensor subclass")
        if param.device != device:
            raise _NotUnderstood(f"parameters on {device} and on {param.device}")
        if param.grad is not None and param.grad.layout != torch.strided:
            raise _NotUnderstood("sparse gradients")
    if is_bitsandbytes:
        _init_bitsandbytes(optimizer)
    else:
        for group in optimizer.param_groups:
            optimizer._init_group(group, [], [], [], [], [], [])
    weights.make_states(optimizer)
    index_of = {id(param): i for i, param in enumerate(params)}
    if len(index_of) < len(params) or not all(id(param) in index_of for param in optimizer.state):
        raise _NotUnderstood("a parameter more than once, or states of one that is in no group")
    names = ("state1", "state2") if is_bitsandbytes else ("exp_avg", "exp_avg_sq")
    stateful = [param for param, state in optimizer.state.items() if state]
    states = [state for state in optimizer.state.values() if state]
    for param, state in zip(stateful, states, strict=True):
        _check_state(param, state, names)

    group_of = [g for g, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    members: dict[Any, list[int]] = {}
    for param in stateful:
        members.setdefault(_bucket_key(param, optimizer.state[param], names), []).append(index_of[id(param)])
    buckets = []
    for key in members:
        indices = sorted(members[key])
        some = [optimizer.state[params[i]] for i in indices]
        buckets.append(
            _make_bucket(
                [params[i] for i in indices],
                some,
                names,
                [group_of[i] for i in indices],
                None if indices == list(range(len(params))) else indices,
                decay_last=is_bitsandbytes and device.type == "cuda",
                random=Random(weights.seed, indices) if weights.choice == "stochastic_rounding" else None,
            )
        )
    remaindered = [(param, state) for param, state in zip(stateful, states, strict=True) if REMAINDER in state]
    holders = dict.fromkeys(names, states) | {REMAINDER: [state for _, state in remaindered]}
    memory: list[tuple[str, list[Any], list[int]]] = [("", stateful, addresses_of(stateful))]
    memory += [(name, some, addresses_of([s[name] for s in some])) for name, some in holders.items() if some]
    counters = [] if is_bitsandbytes else [state["step"] for state in states]
    return _Plan(
        params,
        [param.dtype for param in params],
        [i for i, param in enumerate(params) if not optimizer.state.get(param)],
        list(optimizer.state.values()),
        stateful,
        states,
        memory,
        counters,
        buckets,
        remaindered,
    )


def _init_bitsandbytes(optimizer: Any) -> None:
    if not optimizer.initialized:
        optimizer.check_overrides()
        _refuse_overrides(optimizer)
        optimizer.to_gpu()
        optimizer.initialized = True
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            if param.grad is not None and not optimizer.state.get(param):
                optimizer.state.pop(param, None)
                optimizer.init_state(group, param, group_index, index)


def _check_state(param: torch.Tensor, state: dict[str, Any], names: tuple[str, str]) -> None:
    tensors = [state.get(name) for name in names]
    if tensors[0] is not None and tensors[0].dtype == torch.uint8:
        tensors += [state.get(name) for name in ("absmax1", "absmax2", "qmap1", "qmap2")]
        if any(t is None or t.dtype != torch.float32 for t in tensors[2:]):
            raise _NotUnderstood("8-bit states without float32 absmax and qmap")
        if any(t.numel() != -(-param.numel() // 256) for t in tensors[2:4]):  # type: ignore[union-attr]
            raise _NotUnderstood("8-bit states of other blocks than 256")
    for tensor in tensors:
        if type(tensor) is not torch.Tensor or not tensor.is_contiguous():
            raise _NotUnderstood("states that are missing, not contiguous or of a tensor subclass")
        if tensor.device != param.device and not managed_memory.is_paged(tensor):
            raise _NotUnderstood(f"parameters on {param.device} with states on {tensor.device}")
    if any(t.shape != param.shape or t.dtype not in clipping.DTYPES | {torch.uint8} for t in tensors[:2]):  # type: ignore[union-attr]
        raise _NotUnderstood("states that do not fit their parameters")
    step = state.get("step")
    if torch.is_tensor(step):
        known = step.device == param.device if step.is_cuda else step.dtype in _CELLS
        if step.ndim or not known or (step.is_cuda and step.dtype != torch.float32):
            raise _NotUnderstood("a step that is no 0-dim float")
    elif type(step) is not int:
        raise _NotUnderstood("states without a step")


def _bucket_key(param: torch.Tensor, state: dict[str, Any], names: tuple[str, str]) -> Any:
    first, second, step = state[names[0]], state[names[1]], state["step"]
    rest = state[REMAINDER].data_ptr() if REMAINDER in state else 0
    aligned = are_aligned([param.data_ptr(), first.data_ptr(), second.data_ptr(), param.numel(), rest])
    return param.dtype, first.dtype, second.dtype, aligned, torch.is_tensor(step) and step.is_cuda


def _make_bucket(
    params: list[torch.Tensor],
    states: list[dict[str, Any]],
    names: tuple[str, str],
    groups: list[int],
    indices: list[int] | None,
    decay_last: bool,
    random: Random | None,
) -> _Bucket:
    is_bf16 = params[0].dtype == torch.bfloat16
    blocks = steps = None
    counts: list[Any] | None = None
    if states[0][names[0]].dtype == torch.uint8:
        maps = []
        for name in ("qmap1", "qmap2"):
            of_all = [state[name] for state in states]
            if any(one is not of_all[0] for one in of_all) and not bool((torch.stack(of_all) == of_all[0]).all()):
                raise _NotUnderstood("8-bit states with several maps")
            maps.append(of_all[0])
        blocks = BlockStates([s["absmax1"] for s in states], [s["absmax2"] for s in states], *maps)
    counters = [state["step"] for state in states]
    if not torch.is_tensor(counters[0]):
        counts = states
    elif counters[0].is_cuda:
        steps = counters
    else:
        # torch counts in a CPU tensor for each parameter, and an op on each costs more than the whole update.
        counts = [_CELLS[step.dtype].from_address(step.data_ptr()) for step in counters]
    try:
        tables = MultiTensorAdamW(
            params,
            [state[names[0]] for state in states],
            [state[names[1]] for state in states],
            groups,
            steps=steps,
            blocks=blocks,
            decay_last=decay_last,
            remainders=[state[REMAINDER] for state in states] if REMAINDER in states[0] else None,
            random=random if is_bf16 else None,
        )
    except (TypeError, ValueError) as error:
        raise _NotUnderstood(str(error)) from error
    return _Bucket(indices, tables, counts)


# ---------------------------------------------------------------------------------------------------------------- step


def _stock_step(cls: type) -> Callable[..., Any]:
    """The step of an optimizer class without the wrapper that runs hooks; for a class of ours, the stock one."""
    step = getattr(cls, "_hf_turbo_stock_step", None) or cls.step  # type: ignore[attr-defined]
    return step.__wrapped__ if getattr(step, "hooked", False) else step


@functools.cache
def _same_name_subclass(base: type) -> type:
    """A subclass of an optimizer class that differs in `step`, and in loading what bf16 weights have besides; one that
    stands in for another saves and loads as that does. Hooks run as in stock: once, around either step.
    """
    stock, stock_load = _stock_step(base), base.load_state_dict  # type: ignore[attr-defined]
    stock_state_dict = base.state_dict  # type: ignore[attr-defined]

    def step(self: Any, closure: Any = None) -> Any:
        stepper = _PATCHED.get(self)
        if stepper is not None:
            if is_live() and stepper.step(self, closure):
                return None
            stepper.weights.give_way(self)
        return stock(self, closure)

    def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        stand_in = optimizer_choice.stand_in_of(self)
        if stand_in is not None:
            state_dict = stand_in.to_load(self, state_dict)
        if getattr(self, "is_paged", False) and not args and not kwargs:
            # Stock moves all states to the device, where they stay.
            result = stock_load(self, state_dict, move_to_device=False)
            managed_memory.page_states(self, REMAINDER)
        else:
            result = stock_load(self, state_dict, *args, **kwargs)
        stepper = _PATCHED.get(self)
        if stepper is not None:
            stepper.weights.restore(self, state_dict)
            stepper.managed.fetch_soon()
        return result

    def state_dict(self: Any) -> Any:
        stand_in, stepper = optimizer_choice.stand_in_of(self), _PATCHED.get(self)
        managed_memory.wait_for(self)
        if stepper is not None:
            stepper.managed.fetch_soon()
        return stock_state_dict(self) if stand_in is None else stand_in.saved(self, stock_state_dict(self))

    look_like(load_state_dict, stock_load)
    look_like(state_dict, stock_state_dict)

    look_like(step, stock)
    hooked = Optimizer.profile_hook_step(step)
    hooked.hooked = True  # type: ignore[attr-defined]

    stock_step = base.step  # type: ignore[attr-defined]
    return same_name_subclass(
        base, step=hooked, load_state_dict=load_state_dict, state_dict=state_dict, _hf_turbo_stock_step=stock_step
    )


class _StepPatch(ClassSwap):
    """Swaps the class of an optimizer and, where a learning-rate scheduler has wrapped its `step`, has the wrapper call
    the step of the class.
    """

    def __init__(self, optimizer: Optimizer, stepper: _Stepper):
        super().__init__("optimizer:step", optimizer, _same_name_subclass(type(optimizer)))  # type: ignore[arg-type]
        self._stepper, self._scheduled = stepper, vars(optimizer).get("step")
        self._wrapper: Callable[..., Any] | None = None

    def apply(self) -> None:
        super().apply()
        optimizer = self._module()
        if optimizer is None:
            return
        _PATCHED[optimizer] = self._stepper
        if self._scheduled is not None:
            self._wrapper = optimizer.step = _scheduled_step(optimizer, self._scheduled)

    def revert(self) -> bool:
        optimizer = self._module()
        if optimizer is not None:
            _PATCHED.pop(optimizer, None)
            self._stepper.weights.give_back(optimizer)
            if self._wrapper is not None and vars(optimizer).get("step") is self._wrapper:
                optimizer.step = self._scheduled
        return super().revert()


def _scheduled_step(optimizer: Optimizer, scheduled: Any) -> Callable[..., Any]:
    """As the wrapper that torch's learning-rate schedulers put on an optimizer, but for whichever class it has."""
    reference = weakref.ref(optimizer)

    @functools.wraps(scheduled.__wrapped__)
    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer: Any = reference()
        optimizer._opt_called = True
        return type(optimizer).step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step


# ---------------------------------------------------------------------------------------------------------------- find


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside those of accelerate."""
    while type(optimizer).__module__ == "accelerate.optimizer" and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def conflict(optimizer: Any, accelerator: Any, on_cpu: bool) -> str | None:
    """Why an optimizer that an Accelerator prepares stays stock, or None."""
    if getattr(accelerator, "is_fsdp2", False):
        return "FSDP2 shards parameters as DTensors"
    if getattr(accelerator, "scaler", None) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        return "with fp16 the fused step of torch unscales gradients"
    if accelerator.device.type != "cuda" and not on_cpu:
        return f"on {accelerator.device.type} stock is as fast"
    return None


def find(
    optimizer: Any,
    note: Callable[[str], None],
    on_cpu: bool = False,
    bf16_weights: Choice = "as_is",
    seed: int = 0,
) -> Finding:
    """Patches for an AdamW of torch or bitsandbytes, and for clipping the gradients of its parameters.

    Args:
        note: told, once each, why steps of a patched optimizer were left to stock, and of updates that are lost.
        on_cpu: patch on the CPU too.
        bf16_weights: what they are trained with.
        seed: of rounding by chance; the same in all processes that train the same weights.
    """
    finding = Finding("optimizer", "adamw, clip_grad_norm", Exactness.REASSOCIATED, found=1)
    stand_in = optimizer_choice.stand_in_of(optimizer)
    if stand_in is not None:
        finding.kernel = f"adamw ({stand_in.used} for {stand_in.optim}), clip_grad_norm"
    if bf16_weights != "as_is":
        if has_bf16(optimizer):
            finding.kernel = finding.kernel.replace("adamw", f"adamw, {bf16_weights}", 1)
            if bf16_weights == "stochastic_rounding":
                finding.exactness = Exactness.REDRAWN
        elif optimizer not in _PATCHED:
            note(f"bf16_weights={bf16_weights!r}: {type(optimizer).__name__} trains no bf16 weights")
    if stand_in is not None and stand_in.is_less_precise:
        finding.exactness = Exactness.APPROXIMATE
    if optimizer in _PATCHED:
        finding.patched = 1
        return finding
    reason = _why_stock(optimizer)
    if reason is not None:
        finding.refuse(reason)
        return finding
    finding.patched = 1
    finding.patches = [_StepPatch(optimizer, _Stepper(on_cpu, note, Bf16Weights(bf16_weights, seed, note)))]
    if clipping.patch().can_apply():
        finding.patches += [clipping.patch(), clipping.Registered(optimizer, on_cpu)]
    else:
        note("torch.nn.utils.clip_grad_norm_ was replaced, and clips as it does")
    return finding


def _why_stock(optimizer: Any) -> str | None:
    cls = type(optimizer)
    if not (cls is torch.optim.AdamW or is_of_bitsandbytes(cls)):
        return f"{cls.__name__} is not an AdamW of torch or bitsandbytes"
    reason = replaced_step(optimizer)
    if reason is not None:
        return reason
    try:
        for group in optimizer.param_groups:
            _rates(group, False)
        if is_of_bitsandbytes(cls):
            _refuse_overrides(optimizer)
    except _NotUnderstood as error:
        return str(error)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not is_plain(*params):
        return "parameters are tensor subclasses or partitioned"
    if len({param.device for param in params}) > 1:
        return "parameters on several devices"
    return None


def replaced_step(optimizer: Any) -> str | None:
    """Where the step of an optimizer is somebody else's than its library's, or None."""
    if optimizer in _PATCHED:
        return None
    cls = type(optimizer)
    step = fingerprint.unwrapped(cls.step, _WRAPPERS_OF_STEPS)
    if step is None or f"{step.__module__}:{step.__qualname__}" not in _STOCK_STEPS:
        return f"{cls.__name__}.step was replaced"
    own = vars(optimizer).get("step")
    if own is not None and not (hasattr(own, "_wrapped_by_lr_sched") and getattr(own, "__wrapped__", None) is cls.step):
        return "step was replaced on the optimizer"
    return None


def is_of_bitsandbytes(cls: type) -> bool:
    """Whether this is exactly one of its AdamW classes, or ours of it."""
    module = sys.modules.get("bitsandbytes.optim.adamw")
    stock = cls.__mro__[1] if "_hf_turbo_stock_step" in vars(cls) else cls
    return module is not None and stock.__name__ in _BITSANDBYTES and getattr(module, stock.__name__, None) is stock
