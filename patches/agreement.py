"""What the processes of a training agree on before they do it: on the host, without waiting for a device."""

from __future__ import annotations

import torch
from torch import distributed


class Agreement:
    """Numbers that all processes of the default group have to go by.

    To be made, and asked, by all of them at the same points of their training.
    """

    def __init__(self) -> None:
        self._group = distributed.new_group(backend="gloo")

    def most(self, values: list[int]) -> list[int]:
        """The largest of all processes, place by place; every process gives as many values."""
        found = torch.tensor(values, dtype=torch.int64)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self._group)
        return [int(each) for each in found.tolist()]

    def close(self) -> None:
        """Ends the group, unless all of them have ended already."""
        if distributed.is_initialized():
            distributed.destroy_process_group(self._group)
