"""Copies that happen as late as streams allow: only when something waits for them. What CUDA may do, on CPU tensors.

Whoever reads, frees or overwrites memory without waiting for the copy that uses it gets wrong bits or an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class _Weak:
    """A tensor whose memory is not kept: copies queued on a device keep nothing alive either."""

    def __init__(self, tensor: torch.Tensor):
        self._storage, self._like = StorageWeakRef(tensor.untyped_storage()), (tensor.dtype, tensor.shape)

    def get(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        assert storage is not None, "device memory was freed before the copy that uses it was waited for"
        dtype, shape = self._like
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


@dataclass
class _Copy:
    """An event, too: being done is what it is waited for."""

    kind: str
    number: int
    device: _Weak
    host: torch.Tensor
    after: Any
    done: bool = False


@dataclass
class LateCopies:
    """Stands for the copies of every device.

    Attributes:
        log: what was queued ("out 0", "back 3": numbers by order of leaving).
        waits: what a computing stream waited for.
        after: what each copy was told to wait for, beside its own stream and the computing one.
        current: the stream that computes.
        shared: how many tensors were used on another stream than the one they were allocated on.
    """

    log: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    after: dict[str, str | None] = field(default_factory=dict)
    current: str = "compute"
    shared: int = 0

    def __post_init__(self) -> None:
        self._queues: dict[str, list[_Copy]] = {"out": [], "back": []}
        self._numbers: dict[int, int] = {}

    def stream(self) -> str:
        return self.current

    def host_buffer(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0x5A, dtype=torch.uint8)

    def leave(self, host: torch.Tensor, tensor: torch.Tensor, after: Any) -> _Copy:
        number = self._numbers[host.data_ptr()] = sum(entry.startswith("out") for entry in self.log)
        return self._queue("out", number, host, tensor, after)

    def come_back(self, tensor: torch.Tensor, host: torch.Tensor, after: Any) -> _Copy:
        tensor.fill_(float("nan"))
        return self._queue("back", self._numbers[host.data_ptr()], host, tensor, after)

    def _queue(self, kind: str, number: int, host: torch.Tensor, tensor: torch.Tensor, after: Any) -> _Copy:
        copy = _Copy(kind, number, _Weak(tensor), host, after)
        self._queues[kind].append(copy)
        self.log.append(f"{kind} {number}")
        self.after[f"{kind} {number}"] = after and f"{after.kind} {after.number}"
        return copy

    def join(self, stream: str, event: _Copy) -> None:
        self.waits.append(f"{event.kind} {event.number}")
        self._run(event)

    def share(self, tensor: torch.Tensor, stream: str) -> None:
        self.shared += 1

    def _run(self, last: _Copy) -> None:
        """Runs a queue in order up to a copy, and what that waits for."""
        queue = self._queues[last.kind]
        while not last.done:
            copy = queue.pop(0)
            if copy.after is not None:
                self._run(copy.after)
            if copy.kind == "out":
                copy.host.copy_(copy.device.get())
            else:
                copy.device.get().copy_(copy.host)
            copy.done = True

    def settle(self) -> None:
        """Runs all that is queued, in the order most likely to show a mistake."""
        for kind in ("out", "back"):
            while self._queues[kind]:
                self._run(self._queues[kind][-1])
