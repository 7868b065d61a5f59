"""States of paged optimizers, in memory that both the GPU and the host reach (CUDA's managed memory, of bitsandbytes).

Pages of it lie on the GPU while there is room, and the driver moves them to the host where torch asks for more. What a
kernel reads that is on the host the driver moves back, for which others have to go; a step that goes through all of
them finds none where it left it. On an H200, 3.75 GiB of states of which 1.5 GiB had room took 663 ms a step, 136 ms
if asked for tensor by tensor as bitsandbytes does, where the link takes 82 ms for all of them both ways.

So the GPU is told to read and write such pages where they are, over the link: 57 ms then, 97 ms where none has room.
They come back when they are asked for: at first, after somebody may have read them on the host (which moves them
there), and now and then, since torch may have asked for memory and given it back. To ask takes time even where
everything is in its place: 6 ms for these.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_STATES = ("state1", "state2")  # of an optimizer of bitsandbytes, those that page
_LEAST_PAGED = 100_000  # elements; smaller ones stay on the device
_FETCH_SECONDS = 300.0  # from one time of asking for everything to the next

_ACCESSED_BY = 5  # CU_MEM_ADVISE_SET_ACCESSED_BY of the driver


def is_paged(value: Any) -> bool:
    """Whether it is a tensor in managed memory, by bitsandbytes' note on it."""
    return getattr(value, "is_paged", False)


def zeros(optimizer: Any, param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A state in managed memory, of the shape of a parameter on a GPU. bitsandbytes fills floats and bytes alone."""
    from bitsandbytes import functional

    data = functional.get_paged(param.numel() * dtype.itemsize, dtype=torch.uint8, device=param.device)
    optimizer.page_mng.paged_tensors.append(data)
    state = data.view(dtype).view(param.shape)
    state.is_paged, state.page_deviceid = True, data.page_deviceid
    clear(state)
    return state


def clear(state: torch.Tensor) -> None:
    """Zeros, by the GPU, where the pages are; the host waits."""
    from bitsandbytes import functional

    data = state.view(-1).view(torch.uint8)
    data.is_paged = True  # type: ignore[attr-defined]
    functional.fill(data, 0)


_LATER = [0]  # how many such blocks are open


@contextmanager
def read_later() -> Iterator[None]:
    """Steps within are parts of one, and nobody reads states before the last."""
    _LATER[0] += 1
    try:
        yield
    finally:
        _LATER[0] -= 1


def wait_for(optimizer: Any) -> None:
    """What was launched on states in managed memory, which are CPU tensors: who reads them waits for no device."""
    if pages(optimizer) and not _LATER[0]:
        torch.cuda.synchronize(_first(optimizer).device)


def pages(optimizer: Any) -> bool:
    """Whether it has states in managed memory."""
    return getattr(optimizer, "is_paged", False) and _first(optimizer).is_cuda


def _first(optimizer: Any) -> torch.Tensor:
    return next(param for group in optimizer.param_groups for param in group["params"])


@torch.no_grad()
def page_states(optimizer: Any, apart: str) -> None:
    """Of states that were loaded into host memory: large ones into memory that pages, others to the device; but for
    those of the name `apart`, which wait.

    What bitsandbytes notes on a tensor in paged memory is saved with it, and stands on the loaded one, which is not: to
    fetch that ends the process.
    """
    paged = {buffer.data_ptr() for buffer in optimizer.page_mng.paged_tensors}
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if not torch.is_tensor(value) or value.data_ptr() in paged or name == apart:
                continue
            if name in _STATES and param.is_cuda and param.numel() >= _LEAST_PAGED:
                state[name] = optimizer.get_state_buffer(param, dtype=value.dtype).copy_(value)
            else:
                state[name] = value.detach().to(param.device)  # detached: without notes


class ManagedStates:
    """Those of one optimizer.

    Args:
        note: told where the driver gives the GPU no access to what is on the host.
    """

    def __init__(self, note: Callable[[str], None]):
        self._note = note
        self._tensors: list[torch.Tensor] = []
        self._reached: set[int] = set()  # addresses; this memory is never freed
        self._are_reached = True  # where they are, all of them
        self._next = 0.0  # when to ask for all of them again

    def hold(self, tensors: list[torch.Tensor]) -> None:
        """All that there are now."""
        self._tensors = tensors
        new = [tensor for tensor in tensors if tensor.data_ptr() not in self._reached]
        for tensor in new:
            self._reached.add(tensor.data_ptr())
            if not _let_reach(tensor):
                self._are_reached = False
                self._note("paged states: the driver lets the GPU reach none that is on the host; it moves them")
        if new:
            self.fetch_soon()

    def fetch_soon(self) -> None:
        """They may have been moved to the host."""
        self._next = 0.0

    def fetch_if_due(self) -> None:
        """Asks for them, in the order of the kernels that come after; the host does not wait."""
        now = time.monotonic()
        if not self._tensors or (now < self._next and self._are_reached):
            return
        from bitsandbytes import functional

        for tensor in self._tensors:
            functional.prefetch_tensor(tensor)
        self._next = now + _FETCH_SECONDS


def _let_reach(tensor: torch.Tensor) -> bool:
    advise = _advise()
    if advise is None:
        return False
    address, size = ctypes.c_uint64(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
    return advise(address, size, _ACCESSED_BY, tensor.page_deviceid) == 0  # type: ignore[attr-defined]


@functools.cache
def _advise() -> Callable[..., int] | None:
    """cuMemAdvise of the CUDA driver, which neither torch nor bitsandbytes passes on."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuMemAdvise
    except (OSError, AttributeError):  # no driver of that name (Windows, ROCm)
        return None
