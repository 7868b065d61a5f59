"""A step that ran out of memory is taken back and done again: same samples, same random numbers, nothing counted twice.

What a micro-batch leaves behind is gradients, random states, and what the trainer notes of it (metrics, counters,
buffers). All micro-batches of an optimizer step are done again, since the gradients of a failed backward cannot be told
from those that were there: at the beginning of a step there are none.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .recomputation import random_states, set_random_states

# Containers with more in them are a dataset, or something of its size: not what a step notes.
_MOST_ELEMENTS = 10_000


class _TooLarge(Exception):
    pass


class _Notes:
    """What a trainer's attributes are at one time, those inside lists, dicts and the like included."""

    def __init__(self, trainer: Any, ignored: set[str]):
        self._attributes: dict[str, tuple[Any, Any]] = {}
        for name, value in vars(trainer).items():
            if name in ignored:
                continue
            try:
                self._attributes[name] = value, _copied(value, [_MOST_ELEMENTS])
            except _TooLarge:
                ignored.add(name)
        # Its history of logs is long, and not written within a step.
        self._counters = {name: value for name, value in vars(trainer.state).items() if isinstance(value, (int, float))}

    def restore(self, trainer: Any) -> None:
        attributes = vars(trainer)
        for name, (value, copied) in self._attributes.items():
            attributes[name] = _put_back(value, copied)
        vars(trainer.state).update(self._counters)


def _copied(value: Any, room: list[int]) -> Any:
    """The contents of containers; nothing of other values, which are put back as they are."""
    if not isinstance(value, (dict, list, set, deque)):
        return None
    room[0] -= len(value)
    if room[0] < 0:
        raise _TooLarge
    if isinstance(value, dict):
        return {key: (each, _copied(each, room)) for key, each in value.items()}
    return [(each, _copied(each, room)) for each in value]


def _put_back(value: Any, copied: Any) -> Any:
    """The same container with the contents that it had."""
    if copied is None:
        return value
    if isinstance(value, dict):
        contents: Any = {key: _put_back(each, inside) for key, (each, inside) in copied.items()}
        value.clear()
        value.update(contents)
    else:
        contents = [_put_back(each, inside) for each, inside in copied]
        value.clear()
        value.update(contents) if isinstance(value, set) else value.extend(contents)
    return value


class Retry:
    """The micro-batches of one trainer's optimizer step.

    Args:
        make_room: frees memory and makes the passes to come smaller. Given the number of earlier tries of the step;
            returns what it did, or None where nothing is left to do.
        tell: told what ran out of memory, and what was done.

    Attributes:
        count: of steps that were taken back.
    """

    def __init__(self, trainer: Any, make_room: Callable[[int], str | None], tell: Callable[[str], None]):
        self._trainer, self._make_room, self._tell = trainer, make_room, tell
        self._ignored: set[str] = set()
        self.count = 0
        self.begin_step()

    def begin_step(self) -> None:
        """The next micro-batch is the first of a step: there are no gradients."""
        self._done: list[tuple[_Notes, Callable[[], Any]]] = []
        self._random: list[torch.Tensor] = []
        self._tries = 0

    def run(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, for one micro-batch: its loss.

        Raises:
            torch.OutOfMemoryError: there is no room for it in any way known.
        """
        device = self._trainer.args.device
        if not self._done:
            self._random = random_states(device)
        self._done.append((_Notes(self._trainer, self._ignored), compute))
        work = compute
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                # Not the error itself: it holds the frames that failed, and these the tensors of the pass.
                message, culprit = str(error), _culprit(error, self._trainer.model, device)
            action = self._make_room(self._tries)
            if action is None:
                raise torch.OutOfMemoryError(
                    f"{message}\nhf_turbo: memory ran out in {culprit}, and nothing is left that would take less. "
                    "What would: a smaller per_device_train_batch_size with more gradient_accumulation_steps, a "
                    "smaller max_length, optim='adamw_8bit', or QLoRA"
                )
            self._tries += 1
            self.count += self._tries == 1
            self._tell(f"out of memory in {culprit}: the step was taken back and is done again, with {action}")
            work = self._again

    def _again(self) -> Any:
        """All micro-batches of the step so far; what the last of them returns."""
        device = self._trainer.args.device
        for parameter in self._trainer.model.parameters():
            parameter.grad = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        set_random_states(self._random, device)
        result = None
        for notes, compute in self._done:
            notes.restore(self._trainer)
            result = compute()
        return result


def step_optimizer(optimizer: Any, compute: Callable[[], Any], make_room: Callable[[str], None]) -> Any:
    """An optimizer's step, once more where memory ran out before it changed anything.

    Args:
        make_room: frees memory, and tells that it had to.

    Raises:
        torch.OutOfMemoryError: there is no room for it, or some weights have been updated and others have not.
    """
    before = _progress(optimizer)
    advice = "optim='paged_adamw_8bit' keeps its states where there is room"
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        message = str(error)
    if _progress(optimizer) != before:
        raise torch.OutOfMemoryError(
            f"{message}\nhf_turbo: memory ran out within the optimizer's step, when some weights were updated "
            f"and others were not. Resume from the last checkpoint; {advice}"
        )
    make_room("the optimizer's step")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        message = str(error)
    raise torch.OutOfMemoryError(f"{message}\nhf_turbo: there is no room for the optimizer's step; {advice}")


def _progress(optimizer: Any) -> list[tuple[int, Any]]:
    """How often each weight was written to, and how many steps its state counts."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step", 0)
            found.append((parameter._version, step._version if isinstance(step, torch.Tensor) else step))
    return found


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


def conflict(trainer: Any) -> str | None:
    """Why a step of this trainer is not done again, or None."""
    if trainer.args.auto_find_batch_size:
        return "auto_find_batch_size is on"
    if trainer.accelerator.num_processes > 1 or trainer.args.n_gpu > 1:
        return "several processes would have to do it together"
    return None
