"""What the processes of a training agree on before they do it: on the host, without waiting for a device."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

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


class Board:
    """Where the processes of a training leave lines for each other, without anyone waiting: the store they met at.

    To be made by all of them at the beginning, and read whenever one cares to.
    """

    _KEY = "hf_turbo/board"

    def __init__(self) -> None:
        store: Any = distributed.distributed_c10d._get_default_store() if distributed.is_initialized() else None
        self._store = store if store is not None and store.has_extended_api() else None
        self._rank = distributed.get_rank() if distributed.is_initialized() else 0
        self._seen = len(self._text())

    def post(self, line: str) -> None:
        """For the others."""
        if self._store is not None:
            with suppress(RuntimeError):  # the process that keeps the store may have ended
                self._store.append(self._KEY, f"{self._rank} {' '.join(line.split())}\n")

    def news(self) -> list[tuple[int, str]]:
        """What others have posted since this was asked last: their ranks, and their lines."""
        text = self._text()
        new, self._seen = text[self._seen :], len(text)
        lines = (line.partition(" ") for line in new.splitlines())
        return [(int(rank), line) for rank, _, line in lines if int(rank) != self._rank]

    def _text(self) -> str:
        if self._store is not None:
            with suppress(RuntimeError):
                return self._store.get(self._KEY).decode() if self._store.check([self._KEY]) else ""
        return ""
