"""The states of all generators that a training step, a dataset or a collator may draw from."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from .recomputation import random_states, set_random_states


class RandomStates:
    """Of torch, for the CPU and one more device, of Python and of numpy, as they are now; equal if all are."""

    def __init__(self, device: torch.device):
        self._device, self._torch, self._python = device, random_states(device), random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state(legacy=False)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RandomStates)
            and all(map(torch.equal, self._torch, other._torch))
            and self._python == other._python
            and _plain(self._numpy) == _plain(other._numpy)
        )

    __hash__ = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Sets all generators to these states."""
        set_random_states(self._torch, self._device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
