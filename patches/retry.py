"""A step that ran out of memory is taken back and done again: same samples, same random numbers, nothing counted twice.

What a micro-batch leaves behind is gradients, random states, and what the trainer notes of it (metrics, counters,
buffers, generators of its own). All micro-batches of an optimizer step are done again, since the gradients of a failed
backward cannot be told from those that were there: at the beginning of a step there are none. What cannot be taken back
(weights, inputs or tensors of the trainer that have changed within the step, logs) is looked for first, and then the
error is the script's.

Of several processes under DDP each does it for itself (ddp.py).
"""

from __future__ import annotations

import copy
import gc
import random
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import optimizer_in_backward
from .advice import advice
from .random_numbers import RandomStates
from .trainer import gathers_weights, parallelism, step_conflict

if TYPE_CHECKING:
    from .ddp import Replica

_CONTAINERS = (dict, defaultdict, OrderedDict, list, set, deque)
# Of a longer list of numbers only the length is noted: a step adds to its end. Others as large are no notes of a step.
_MOST_COPIED = 256
_PLAIN = (int, float, complex, str, bytes, type(None))


# ------------------------------------------------------------------------------------------------------ what was noted


class _NotOurs(Exception):
    """Something that is not put back: it lives no more, or it is a container of more than numbers and names."""


def _noted(value: Any) -> Callable[[], Any]:
    """What brings an attribute's value back, and the contents that it has now if it is a container.

    Raises:
        _NotOurs: a container with tensors or other objects in it. To note it would be to keep them.
    """
    if type(value) in _CONTAINERS:
        return _noted_container(value)
    if isinstance(value, _PLAIN):
        return lambda: value
    set_back = _generator_state(value)
    if set_back is not None:
        return set_back
    try:
        reference = weakref.ref(value)
    except TypeError:
        raise _NotOurs from None

    def revived() -> Any:
        found = reference()
        if found is None:
            raise _NotOurs
        return found

    return revived


def _generator_state(value: Any) -> Callable[[], Any] | None:
    """What sets a generator of random numbers back, and returns it; None for anything else."""
    numpy = sys.modules.get("numpy")
    set_state: Callable[[Any], Any]
    state: Any
    if isinstance(value, torch.Generator):
        set_state, state = value.set_state, value.get_state()
    elif isinstance(value, random.Random):
        set_state, state = value.setstate, value.getstate()
    elif numpy is not None and isinstance(value, numpy.random.RandomState):
        set_state, state = value.set_state, value.get_state(legacy=False)
    elif numpy is not None and isinstance(value, numpy.random.Generator):
        set_state, state = partial(setattr, value.bit_generator, "state"), value.bit_generator.state
    else:
        return None

    def set_back() -> Any:
        set_state(state)
        return value

    return set_back


def _noted_element(value: Any) -> Callable[[], Any]:
    if isinstance(value, _PLAIN) or type(value) in _CONTAINERS:
        return _noted(value)
    set_back = _generator_state(value)
    if set_back is None:
        raise _NotOurs
    return set_back


def _mark(value: Any) -> Any:
    """Of a tensor, or a container that is not put back: which one it is, and what changes when it is written to.

    None for anything else.
    """
    if isinstance(value, torch.Tensor):
        return id(value), _versions([value])
    if type(value) not in _CONTAINERS:
        return None
    inside = value.values() if isinstance(value, dict) else value
    marks = [] if len(value) > _MOST_COPIED else [mark for each in inside if (mark := _mark(each)) is not None]
    return id(value), [len(value), marks]


def _noted_container(value: Any) -> Callable[[], Any]:
    length = len(value)
    if length > _MOST_COPIED:
        if type(value) is not list or not isinstance(value[0], _PLAIN):
            raise _NotOurs

        def shortened() -> Any:
            del value[length:]
            return value

        return shortened
    if isinstance(value, dict):
        items = [(key, _noted_element(each)) for key, each in value.items()]

        def filled() -> Any:
            contents = [(key, each()) for key, each in items]
            value.clear()
            value.update(contents)
            return value

        return filled
    elements = [_noted_element(each) for each in value]

    def refilled() -> Any:
        contents = [each() for each in elements]
        value.clear()
        value.update(contents) if isinstance(value, set) else value.extend(contents)
        return value

    return refilled


class _Notes:
    """What a trainer's attributes are at one time: numbers and names, also inside lists, dicts and the like."""

    def __init__(self, trainer: Any):
        self._attributes = []
        self._marks: dict[str, Any] = {}  # of what is not put back
        self._logs = len(trainer.state.log_history)
        for name, value in vars(trainer).items():
            try:
                self._attributes.append((name, _noted(value)))
            except _NotOurs:
                self._marks[name] = _mark(value)
            if isinstance(value, torch.Tensor):
                self._marks[name] = _mark(value)
        # Its history of logs is long, and not written within a step.
        self._counters = {name: value for name, value in vars(trainer.state).items() if isinstance(value, (int, float))}

    def lasting(self, trainer: Any) -> str | None:
        """What has been done since and cannot be taken back, or None."""
        if len(trainer.state.log_history) != self._logs:
            return "the loss has logged"
        for name, mark in self._marks.items():
            now = _mark(vars(trainer).get(name))
            # Another object in its place is one that the step has made, and makes again.
            if mark is not None and now is not None and now[0] == mark[0] and now != mark:
                return f"the loss has written to {name!r} of the trainer"
        return None

    def restore(self, trainer: Any) -> None:
        attributes = vars(trainer)
        for name, noted in self._attributes:
            with suppress(_NotOurs):
                attributes[name] = noted()
        vars(trainer.state).update(self._counters)


class _MicroBatch:
    """A call of the training step that can be made again, with the inputs that it was first made with."""

    def __init__(self, trainer: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.notes, self._call = _Notes(trainer), call
        self._gradients, self._is_last = trainer.accelerator.gradient_state, trainer.accelerator.sync_gradients
        self._args, self._kwargs = _unshared(args), _unshared(kwargs)
        self._versions = _versions(_tensors((args, kwargs)))

    @property
    def is_as_before(self) -> bool:
        """Whether the tensors that it is called with have not been written to."""
        return _versions(_tensors((self._args, self._kwargs))) == self._versions

    def again(self) -> Any:
        self._gradients._set_sync_gradients(self._is_last)  # which some losses look at
        return self._call(*_unshared(self._args), **_unshared(self._kwargs))


def _unshared(value: Any) -> Any:
    """Copies of tuples and mappings, to whatever depth, of the same leaves."""
    if type(value) is tuple:
        return tuple(map(_unshared, value))
    if isinstance(value, Mapping):
        value = copy.copy(value)
        for name in list(value):
            if isinstance(value[name], Mapping):
                value[name] = _unshared(value[name])
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)


def _versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    tensors = list(tensors)
    try:
        return [each._version for each in tensors]
    except RuntimeError:  # there are tensors of inference mode, which have none
        return [0 if each.is_inference() else each._version for each in tensors]


# -------------------------------------------------------------------------------------------------------------- a step


class Retry:
    """The micro-batches of one trainer's optimizer step.

    Args:
        make_room: frees memory and makes the passes to come smaller. Given the number of earlier tries of the step;
            returns what it did, or None where nothing is left to do.
        tell: told what ran out of memory, and what was done.
    """

    def __init__(self, trainer: Any, make_room: Callable[[int], str | None], tell: Callable[[str], None]):
        self._trainer, self._make_room, self._tell = trainer, make_room, tell
        self._buffers: list[tuple[torch.Tensor, int]] | None = None  # of the model, and their versions at the beginning
        self._copies: dict[int, torch.Tensor] = {}  # of those that steps write to
        self._replica: Replica | None = None  # where there are several processes
        self.begin_step()

    def begin_step(self) -> None:
        """The next micro-batch is the first of a step: there are no gradients."""
        self._done: list[_MicroBatch] = []
        self._lasting: str | None = None  # what has been done in the step that cannot be taken back
        self._tries = 0

    def end(self) -> None:
        """The training is over."""
        if self._replica is not None:
            self._replica.end()

    def _begin(self, model: Any) -> None:
        """Notes what the step begins with."""
        self.begin_step()
        if self._trainer.accelerator.num_processes > 1:
            from .ddp import Replica  # not every torch can be distributed

            if self._replica is None or self._replica.model is not model:
                self.end()
                self._replica = Replica(model)
            self._replica.begin_step()
        self._random, self._global_step = RandomStates(self._trainer.args.device), self._trainer.state.global_step
        # Those of the optimizer: a walk over the model takes longer.
        groups = getattr(self._trainer.optimizer, "param_groups", ())
        self._parameters = [each for group in groups for each in group["params"]]
        self._weights = _versions(self._parameters)
        self._in_backward = optimizer_in_backward.step_of(self._parameters) is not None
        if self._in_backward:
            self._states, self._counts = set(self._trainer.optimizer.state), _progress(self._trainer.optimizer)
        known = list(self._trainer.model.buffers()) if self._buffers is None else [each for each, _ in self._buffers]
        moved = {id(each) for each, version in self._buffers or () if each._version != version} | self._copies.keys()
        self._buffers = [(each, each._version) for each in known]
        self._copies = {id(each): each.clone() for each in known if id(each) in moved}

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `call` returns, for one micro-batch: its loss.

        Raises:
            torch.OutOfMemoryError: there is no room for it in any way known, or it cannot be taken back.
        """
        if not self._done or self._trainer.state.global_step != self._global_step:
            self._begin(args[0] if args else kwargs.get("model"))
        elif self._replica is not None:
            self._replica.go_on()
        self._done.append(_MicroBatch(self._trainer, call, args, kwargs))
        work: Callable[[], Any] = lambda: call(*args, **kwargs)  # noqa: E731
        replica = self._replica
        while True:
            try:
                with nullcontext() if replica is None else replica.tape.running():
                    result = work()
                self._lasting = self._lasting or self._done[-1].notes.lasting(self._trainer)
                return result
            except torch.OutOfMemoryError as error:
                # Not the error itself: it holds the frames that failed, and these the tensors of the pass.
                message, culprit = str(error), _culprit(error, self._trainer.model, self._trainer.args.device)
                if replica is not None:
                    replica.fails([frame.f_code for frame in _frames(error)])
            against = self._conflict()
            action = None if against else self._make_room(self._tries)
            if action is None:
                raise torch.OutOfMemoryError(
                    f"{message}\nhf_turbo: memory ran out in {culprit}, and "
                    f"{against or 'nothing is left that would take less'}. {advice(self._trainer)}"
                )
            self._tries += 1
            self._tell(f"out of memory in {culprit}: the step was taken back and is done again, {action}")
            work = self._again

    def _conflict(self) -> str | None:
        """Why the step cannot be taken back, or None."""
        if self._in_backward and self._has_stepped():
            return "the optimizer had begun to step within backward: resume from the last checkpoint"
        if _versions(self._parameters) != self._weights:
            return "weights have changed within the step"
        if any(map(optimizer_in_backward.foreign_hooks, self._parameters)):
            return "weights may have changed as their gradients came"
        if any(each._version != version and id(each) not in self._copies for each, version in self._buffers or ()):
            return "the model has written to its buffers"
        if not all(each.is_as_before for each in self._done):
            return "the inputs of the step have changed"
        lasting = self._lasting or self._done[-1].notes.lasting(self._trainer)
        if lasting is not None:
            return lasting
        if len({each.device for each in self._parameters}) > 1:
            return "the model is on several devices"
        return None if self._replica is None else self._replica.conflict()

    def _has_stepped(self) -> bool:
        """Whether an optimizer that steps within backward has changed weights or states; drops what it has begun."""
        _forget_begun(self._trainer.optimizer, self._states)
        return _progress(self._trainer.optimizer) != self._counts

    def _again(self) -> Any:
        """All micro-batches of the step so far; what the last of them returns."""
        trainer, replica = self._trainer, self._replica
        if replica is not None:
            replica.take_back()
        for parameter in (*self._parameters, *trainer.model.parameters()):
            parameter.grad = None
        for buffer, _ in self._buffers or ():
            if id(buffer) in self._copies:
                buffer.copy_(self._copies[id(buffer)])
        _free()
        self._random.restore()
        result = None
        for each in self._done:
            each.notes.restore(trainer)
            with nullcontext() if replica is None else replica.again(is_last=each is self._done[-1]):
                result = each.again()
        if replica is not None:
            replica.settle()
        return result


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def conflict(trainer: Any) -> str | None:
    """Why no step of this trainer is done again, or None."""
    if trainer.args.auto_find_batch_size:
        return "auto_find_batch_size is on"
    kind = gathers_weights(trainer) or (trainer.accelerator.num_processes > 1 and parallelism(trainer))
    return f"{kind}: other processes take part in every pass" if kind else step_conflict(trainer)


def explain(trainer: Any, error: torch.OutOfMemoryError, against: str) -> None:
    """Has the error of a step that is not done again say so, and what would take less."""
    culprit = _culprit(error, trainer.model, trainer.args.device)
    reason = f"hf_turbo: memory ran out in {culprit}, and the step is not done again ({against})"
    error.args = (f"{error}\n{reason}. {advice(trainer)}",)


# ------------------------------------------------------------------------------------------------------- the optimizer


def step_optimizer(optimizer: Any, compute: Callable[[], Any], make_room: Callable[[str], None]) -> Any:
    """An optimizer's step, once more where memory ran out before it changed anything.

    Args:
        optimizer: of torch or bitsandbytes, prepared by accelerate: others may change weights unnoticed.
        make_room: frees memory, and tells that it had to.

    Raises:
        torch.OutOfMemoryError: there is no room for it, or some weights have been updated and others have not.
    """
    module = type(getattr(optimizer, "optimizer", optimizer)).__module__
    if module.partition(".")[0] not in {"torch", "bitsandbytes"} or module.startswith("torch.distributed"):
        return compute()
    before, known = _progress(optimizer), set(optimizer.state)
    instead = "optim='paged_adamw_8bit' keeps its states where there is room"
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        message = str(error)
    _forget_begun(optimizer, known)
    if _progress(optimizer) != before:
        raise torch.OutOfMemoryError(
            f"{message}\nhf_turbo: memory ran out within the optimizer's step, when some weights were updated "
            f"and others were not. Resume from the last checkpoint; {instead}"
        )
    make_room("the optimizer's step")
    _free()
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        message = str(error)
    raise torch.OutOfMemoryError(f"{message}\nhf_turbo: there is no room for the optimizer's step; {instead}")


def _forget_begun(optimizer: Any, known: set[Any]) -> None:
    """Drops states that a failed step has begun to make, and maybe not to the end: of others than the known ones."""
    for parameter in set(optimizer.state) - known:
        if not _steps(optimizer.state[parameter]):
            del optimizer.state[parameter]


def _progress(optimizer: Any) -> list[tuple[int, Any]]:
    """How often each weight was written to, and how many steps its state counts."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return [(each._version, _steps(optimizer.state.get(each, {}))) for each in parameters]


def _steps(state: dict[str, Any]) -> Any:
    step = state.get("step", 0)
    return step._version if isinstance(step, torch.Tensor) else step


# --------------------------------------------------------------------------------------------------------- what to say


def _frames(error: BaseException) -> Iterator[Any]:
    """That an error went through, without the one that caught it: looking at a frame's names keeps what they hold."""
    link = error.__traceback__ and error.__traceback__.tb_next
    while link is not None:
        yield link.tb_frame
        link = link.tb_next


def _culprit(error: BaseException, model: nn.Module, device: torch.device) -> str:
    """Where memory ran out, and what of it is free but of no use."""
    names = {module: name for name, module in model.named_modules()}
    where, is_backward = "the step", False
    for frame in _frames(error):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(owner):
            where = names[owner]
        is_backward = is_backward or "backward" in frame.f_code.co_name
        if frame.f_code.co_filename.endswith("linear_cross_entropy.py"):
            where = "the head and the loss"
    if is_backward:
        where = "backward" if where == "the step" else f"backward, at {where}"
    if device.type != "cuda":
        return where
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    gib = 2**30
    return (
        f"{where} ({allocated / gib:.1f} GiB in tensors, {(reserved - allocated) / gib:.1f} GiB held in pieces, "
        f"{max(total - free - reserved, 0) / gib:.1f} GiB by other processes and the driver)"
    )
