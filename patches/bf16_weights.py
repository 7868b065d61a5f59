"""What bf16 weights are trained with: masters that lose no update, rounding by chance, or a count of what is lost.

An exact master is the weight and 16 bits more, which are one more state of the optimizer: saved with the others, so
that a resumed run is the same run. Averages are float32 beside it, as those of fp32 weights are. Stock loads such a
checkpoint: it casts states to the dtype of the weights and reads none that it does not know. A checkpoint of stock has
no remainders: masters begin as the weights are.

A remainder belongs to the weight that it was written with. Where somebody else has written the weight since, which its
version tells (but for writes to `weight.data`), the master is what was written.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from itertools import chain
from operator import attrgetter
from typing import Any, Literal

import torch

from . import managed_memory
from .engine import once

Choice = Literal["as_is", "exact_master", "stochastic_rounding"]

REMAINDER = "hf_turbo_remainder"
_AVERAGES = ("exp_avg", "exp_avg_sq")  # of torch; bitsandbytes keeps its own in 32 or 8 bits whatever the weights are

_SAMPLES = 1 << 16  # elements that lost updates are counted among
_WORTH_TELLING = 0.01
# Of the learning rate that a schedule starts from: less is a warm-up, which says nothing of the steps to come.
_PLAIN_RATE = 0.5


def has_bf16(optimizer: Any) -> bool:
    """Whether it trains a bf16 weight."""
    return any(param.dtype == torch.bfloat16 for group in optimizer.param_groups for param in group["params"])


# In managed memory, which is never freed: of each optimizer, by id of a weight.
_PAGED: weakref.WeakKeyDictionary[Any, dict[int, torch.Tensor]] = weakref.WeakKeyDictionary()


def _no_remainder(optimizer: Any, param: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """Zeros, where the other states are."""
    if not (managed_memory.pages(optimizer) and any(map(managed_memory.is_paged, state.values()))):
        return torch.zeros_like(param, dtype=torch.int16)
    mine = _PAGED.setdefault(optimizer, {})
    rest = mine.get(id(param))
    if rest is None or rest.shape != param.shape:
        rest = mine[id(param)] = managed_memory.zeros(optimizer, param, torch.int16)
    else:
        managed_memory.clear(rest)
    return rest


class Bf16Weights:
    """Those of one optimizer.

    Args:
        choice: what they are trained with.
        seed: of rounding by chance; the same in all processes that train the same weights.
        note: told, once each, of what is lost.
    """

    def __init__(self, choice: Choice, seed: int, note: Callable[[str], None]):
        self.choice, self.seed = choice, (seed ^ seed >> 31) & 0x7FFFFFFF
        self._tell = once(note)
        self._versions: dict[int, int] = {}  # by id of a weight: as the last step left it
        self._counted = choice != "as_is"
        # Of the step that is counted: weights by id, and of each part of it lost updates and all of them.
        self._sampled, self._losses = set[int](), list[torch.Tensor]()
        self._counted_at = 0, 0.0  # its number and its learning rate

    # ------------------------------------------------------------------------------------------------- exact masters

    @torch.no_grad()
    def make_states(self, optimizer: Any) -> None:
        """Of the weights that have states, after the optimizer has made its own; drops remainders not asked for."""
        for param, state in optimizer.state.items():
            if not (state and torch.is_tensor(param)):
                continue
            rest = state.get(REMAINDER)
            if self.choice != "exact_master" or param.dtype != torch.bfloat16:
                state.pop(REMAINDER, None)
                continue
            for name in _AVERAGES:
                if name in state:
                    state[name] = state[name].float()
            if rest is not None and rest.dtype != torch.int16:
                self._tell("bf16_weights: remainders that were loaded before the optimizer was prepared are lost")
            fits = rest is not None and rest.dtype == torch.int16 and rest.shape == param.shape
            in_place = fits and (rest.device == param.device or managed_memory.is_paged(rest))
            if not (in_place and rest.is_contiguous()):
                state[REMAINDER] = _no_remainder(optimizer, param, state)

    def begin_step(self, remaindered: list[tuple[torch.Tensor, dict[str, Any]]]) -> None:
        """Forgets remainders of weights that somebody else has written."""
        for param, state in remaindered:
            if self._versions.get(id(param), param._version) != param._version:
                rest = state[REMAINDER]
                managed_memory.clear(rest) if managed_memory.is_paged(rest) else rest.zero_()
                self._tell(
                    "bf16_weights: something else than the optimizer wrote weights between steps, be it the bits that "
                    "they had; their masters are what was written, and the 16 bits more are lost"
                )

    def end_step(self, remaindered: list[tuple[torch.Tensor, dict[str, Any]]]) -> None:
        for param, _ in remaindered:
            self._versions[id(param)] = param._version

    def restore(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        """Takes from a loaded `state_dict` what stock has cast to bf16."""
        self._versions.clear()
        if self.choice != "exact_master":
            return
        groups = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
        pairs = chain.from_iterable(zip(saved["params"], own["params"], strict=True) for saved, own in groups)
        for index, param in pairs:
            saved, state = state_dict["state"].get(index), optimizer.state.get(param)
            if not saved or not state or param.dtype != torch.bfloat16:
                continue
            for name, dtype in ((REMAINDER, torch.int16), *((name, torch.float32) for name in _AVERAGES)):
                value = saved.get(name)
                if not (torch.is_tensor(value) and value.dtype == dtype and value.shape == param.shape):
                    if name == REMAINDER:
                        state.pop(name, None)
                elif name == REMAINDER:
                    value = value.clone()  # it may be the very memory that is taken again
                    state[name] = _no_remainder(optimizer, param, state).copy_(value)
                else:
                    state[name] = value.to(param.device, copy=True)

    def give_back(self, optimizer: Any) -> bool:
        """States as stock makes them, for stock to go on; whether there were others."""
        self._versions.clear()
        changed = False
        if self.choice != "exact_master":
            return changed
        for param, state in optimizer.state.items():
            if isinstance(state, dict) and state.pop(REMAINDER, None) is not None:
                changed = True
                for name in _AVERAGES:
                    if name in state:
                        state[name] = state[name].to(param.dtype)
        return changed

    def give_way(self, optimizer: Any) -> None:
        """Before a step of stock."""
        if self.give_back(optimizer):
            self._tell("bf16_weights: a step of stock has rounded all weights and averages to bf16")

    # -------------------------------------------------------------------------------------------------- lost updates

    @torch.no_grad()
    def sample(self, optimizer: Any, params: list[torch.Tensor]) -> Callable[[int], None] | None:
        """In the first step whose learning rate is no warm-up's: what to call after it, to tell what was lost.

        A step that goes through weights as their gradients come has several calls, and is told of in the next one.
        """
        if self._counted:
            return None
        rate = max(group["lr"] for group in optimizer.param_groups)
        if not rate > 0 or rate < _PLAIN_RATE * max(g.get("initial_lr", g["lr"]) for g in optimizer.param_groups):
            return None
        weights = [param for param in params if param.dtype == torch.bfloat16]
        in_parts = any(param._post_accumulate_grad_hooks for param in weights)
        weights = [param for param in weights if param.grad is not None]
        self._counted = not in_parts or not self._sampled.isdisjoint(map(id, weights))
        if self._counted and self._losses:
            self._tell_lost()
            return None
        if not weights:
            return None
        stride = max(1, sum(map(torch.Tensor.numel, weights)) // _SAMPLES)

        def some(tensors: Any) -> torch.Tensor:
            return torch.cat([tensor.detach().view(-1)[::stride] for tensor in tensors])

        before, updated = some(weights), some(map(attrgetter("grad"), weights)) != 0

        def tell(step: int) -> None:
            lost = (updated & (some(weights) == before)).sum()
            self._losses.append(torch.stack([lost, updated.sum()]))
            self._sampled.update(map(id, weights))
            self._counted_at = step, rate
            if self._counted:
                self._tell_lost()

        return tell

    def _tell_lost(self) -> None:
        lost, count = torch.stack(self._losses).sum(0).tolist()
        step, rate = self._counted_at
        self._sampled.clear()
        self._losses.clear()
        if count and lost / count >= _WORTH_TELLING:
            text = (
                f"step {step}: {lost / count:.0%} of the updates of bf16 weights were lost at a learning rate of "
                f"{rate:.2g}: smaller than what a weight is rounded to. bf16_weights='exact_master' keeps them"
            )
            self._tell(text)
            warnings.warn(f"hf_turbo: {text}", RuntimeWarning, stacklevel=2)
