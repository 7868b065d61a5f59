"""Work on a second stream, beside what the first is given next."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def may_run_beside(tensor: torch.Tensor) -> bool:
    """Whether there are streams, and nothing records what they are given, or copies what is saved for backward."""
    return (
        tensor.is_cuda
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.cuda.is_current_stream_capturing()
    )


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Side:
    """The two streams of some work."""

    def __init__(self, device: torch.device):
        self._first, self.stream = torch.cuda.current_stream(device), _stream(device)

    def handed_over(self, results: Iterable[torch.Tensor]) -> torch.cuda.Event:
        """For the first stream to wait for, with `wait()`, before it reads the results."""
        for each in results:
            each.record_stream(self._first)
        return self.stream.record_event()


@contextmanager
def beside(used: list[torch.Tensor]) -> Iterator[Side]:
    """What is launched within runs on the second stream of a device, behind all that the current one was given.

    Args:
        used: all tensors of the first stream that it reads or writes. Their memory is not handed out again before that
            is done, even if it fails half-way.
    """
    side = Side(used[0].device)
    side.stream.wait_stream(torch.cuda.current_stream(used[0].device))
    for each in used:
        each.record_stream(side.stream)
    with torch.cuda.stream(side.stream):
        yield side
