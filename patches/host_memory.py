"""Tensors that wait in pinned host memory between forward and backward. Knows nothing of any host library.

`HostStore.put` starts copying a tensor out on a stream beside the computation; `HostStore.get` brings it back, and then
the one that was put before it, which a backward pass asks for next. Nothing depends on that guess but speed.

The host never waits for the device, so everything is ordered between streams:

* A tensor is let go when `staying` others have been put after it. The compute stream then waits for its copy, finished
  long since, so that the allocator, which reuses memory in the order of the compute stream, cannot reuse it too early.
  The last `staying` never leave before backward asks for them, and are handed out as they are.
* A returning tensor is allocated on the compute stream; the copy into it waits for what is queued there, whose memory
  it may have got, and the compute stream waits for the copy before it reads the tensor, or frees it unread.
* A host buffer is written again only after the last copy that reads it.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

STAYING = 2
# Forward runs on one thread, backward on one per device, finalizers on any. One lock for all stores: a finalizer of one
# may run while another's is held.
_LOCK = threading.RLock()

_GROUP = Path("/sys/fs/cgroup")


class Copies(Protocol):
    """How tensors of one device travel. Streams and events are opaque; None where there is nothing to wait for."""

    def stream(self) -> Any:
        """The stream that computes now."""

    def host_buffer(self, size: int) -> torch.Tensor:
        """New host memory, as bytes."""

    def leave(self, host: torch.Tensor, tensor: torch.Tensor, after: Any) -> Any:
        """Copies to the host beside the computation, after what is queued there and an event; returns an event."""

    def come_back(self, tensor: torch.Tensor, host: torch.Tensor, after: Any) -> Any:
        """Copies to the device, likewise."""

    def join(self, stream: Any, event: Any) -> None:
        """What is queued on `stream` from here on waits for the event."""

    def share(self, tensor: torch.Tensor, stream: Any) -> None:
        """The tensor will be used on a stream other than the one it was allocated on."""


class CudaCopies:
    """Pinned memory, and one stream for each direction of one device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def host_buffer(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def leave(self, host: torch.Tensor, tensor: torch.Tensor, after: Any) -> Any:
        return self._copy(self._out, host, tensor, after)

    def come_back(self, tensor: torch.Tensor, host: torch.Tensor, after: Any) -> Any:
        return self._copy(self._back, tensor, host, after)

    def _copy(self, side: torch.cuda.Stream, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        side.wait_stream(self.stream())
        if after is not None:
            side.wait_event(after)
        with torch.cuda.stream(side):
            destination.copy_(source, non_blocking=True)
            return side.record_event()

    def join(self, stream: torch.cuda.Stream, event: Any) -> None:
        stream.wait_event(event)

    def share(self, tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
        tensor.record_stream(stream)


@functools.cache
def link_speed(device: torch.device) -> float | None:
    """Bytes per second from a CUDA device to pinned host memory; None for other devices.

    Measured once: slots of 4 lanes and links of 8 GB/s to 400 GB/s are all in use, and nothing tells. Fastest of three
    copies of 64 MiB, some 30 ms in all.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        tensor = torch.empty(2**26, dtype=torch.uint8, device=device)
        host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
        milliseconds = []
        for _ in range(3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            host.copy_(tensor, non_blocking=True)
            end.record()
            end.synchronize()
            milliseconds.append(begin.elapsed_time(end))
    return 1e3 * tensor.numel() / min(milliseconds)


class _Buffer:
    def __init__(self, data: torch.Tensor):
        self.data = data
        self.last_copy: Any = None


class _Pool:
    """Host buffers, reused: never more than were in use at once.

    Sizes are powers of two, since that is what torch's allocator of pinned memory takes anyway; so batches of varying
    lengths share few sizes.
    """

    def __init__(self, budget: int):
        self._budget = budget
        self._free: list[_Buffer] = []
        self._returned: deque[_Buffer] = deque()
        self.bytes, self._warned = 0, False

    def take(self, size: int, make: Callable[[int], torch.Tensor]) -> _Buffer | None:
        """A buffer of at least `size` bytes, by `make` if none is free; None where the host has no more to give."""
        self._collect()
        fitting = [buffer for buffer in self._free if buffer.data.numel() >= size]
        if fitting:
            buffer = min(fitting, key=lambda buffer: buffer.data.numel())
            self._free.remove(buffer)
            return buffer
        size = 1 << (size - 1).bit_length()
        # For each larger buffer one that is too small goes, or as many as it takes.
        too_small = sorted(self._free, key=lambda buffer: buffer.data.numel())
        for count, buffer in enumerate(too_small):
            if count == 0 or self.bytes + size > self._budget:
                self._drop(buffer)
        if self.bytes + size > self._budget:
            self._warn(f"the {self._budget / 2**30:.1f} GiB of host memory it may pin are in use")
            return None
        try:
            buffer = _Buffer(make(size))
        except RuntimeError as error:
            self._budget = self.bytes  # asking again would take as long, for each layer of each step
            self._warn(f"the host pins no more memory ({error})")
            return None
        self.bytes += size
        return buffer

    def give_back(self, buffer: _Buffer) -> None:
        """Called by finalizers, even in the middle of `take`: an append is all that is safe."""
        self._returned.append(buffer)

    def trim(self) -> None:
        """Frees the buffers not in use."""
        self._collect()
        for buffer in list(self._free):
            self._drop(buffer)

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())

    def _drop(self, buffer: _Buffer) -> None:
        self._free.remove(buffer)
        self.bytes -= buffer.data.numel()

    def _warn(self, why: str) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"hf_turbo: some of what is kept for backward stays on the device: {why}", RuntimeWarning, stacklevel=2
        )


class Saved:
    """A tensor that was put: on the device, on the host, or both. Dropping it is how a graph says it needs it no more.

    Attributes:
        tensor: on the device, not let go yet.
        fetched: on the device again, or on its way.
        dropped: being finalized; a weak reference may still find it then.
    """

    __slots__ = (
        "__weakref__",
        "_arrival",
        "_buffer",
        "_copies",
        "_departure",
        "_flat",
        "_like",
        "_pool",
        "_stream",
        "_version",
        "dropped",
        "fetched",
        "previous",
        "tensor",
    )

    def __init__(self, tensor: torch.Tensor, buffer: _Buffer, copies: Copies, pool: _Pool):
        self.dropped = False
        self.tensor: torch.Tensor | None = tensor
        self.fetched: torch.Tensor | None = None
        self.previous: Callable[[], Saved | None] = lambda: None
        self._copies, self._pool, self._buffer = copies, pool, buffer
        self._like = tensor.dtype, tensor.device, tensor.shape, tensor.stride()
        self._version = tensor._version
        self._stream, self._arrival = copies.stream(), None
        flat = _flat(tensor)
        self._flat = buffer.data[: flat.numel() * flat.element_size()].view(flat.dtype)
        self._departure = buffer.last_copy = copies.leave(self._flat, flat, buffer.last_copy)

    @property
    def on_device(self) -> bool:
        return self.tensor is not None or self.fetched is not None

    def check(self) -> None:
        if self.tensor is not None and self.tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor kept for backward, {list(self.tensor.shape)}, is at version {self.tensor._version}; "
                f"expected version {self._version} instead"
            )

    def let_go(self) -> None:
        """Frees the tensor; the host has it. Not one that was changed in place: asking for that is an error."""
        if self.tensor is not None and self.tensor._version == self._version:
            self._copies.join(self._stream, self._departure)
            self.tensor = None

    def fetch(self) -> None:
        """Starts the way back."""
        dtype, device, shape, stride = self._like
        # On the compute stream, and kept with it: the allocator hands its memory out again in the order of that stream.
        self._stream = self._copies.stream()
        # Of the storage's size, whatever the strides.
        self.fetched = torch.empty(shape.numel(), dtype=dtype, device=device).as_strided(shape, stride)
        self._arrival = self._buffer.last_copy = self._copies.come_back(
            _flat(self.fetched), self._flat, self._departure
        )

    def arrive(self) -> torch.Tensor:
        """The fetched tensor, for the stream that computes now. From here on it is the caller's alone."""
        assert self.fetched is not None
        tensor, self.fetched = self.fetched, None
        stream = self._copies.stream()
        self._copies.join(stream, self._arrival)
        if stream != self._stream:
            self._copies.join(self._stream, self._arrival)
            self._copies.share(tensor, stream)
        return tensor

    def forget(self) -> None:
        """Drops what was fetched unasked."""
        if self.fetched is not None:
            self._copies.join(self._stream, self._arrival)
            self.fetched = None

    def __del__(self) -> None:
        if sys.is_finalizing() or not hasattr(self, "_departure"):
            return
        with _LOCK:
            self.dropped = True
            if self.tensor is not None:
                self._copies.join(self._stream, self._departure)
            self.forget()
            self._pool.give_back(self._buffer)


class HostStore:
    """Tensors of one model between forward and backward, on any number of devices.

    Args:
        make_copies: how tensors of a device travel.
        budget: bytes of host memory to use at most; what does not fit stays on the device.
        staying: of each device, how many tensors are on their way out, or stay, at a time.
    """

    def __init__(self, make_copies: Callable[[torch.device], Copies], budget: int, staying: int = STAYING):
        self._make_copies, self._pool, self._staying = make_copies, _Pool(budget), staying
        self._lanes: dict[torch.device, _Lane] = {}

    def put(self, tensor: torch.Tensor) -> Saved | torch.Tensor:
        """Takes a tensor that fills its storage; returns what `get` takes, the tensor itself where it stays."""
        with _LOCK:
            lane = self._lanes.get(tensor.device)
            if lane is None:
                lane = self._lanes[tensor.device] = _Lane(self._make_copies(tensor.device), self._pool, self._staying)
            return lane.put(tensor)

    def get(self, saved: Saved | torch.Tensor) -> torch.Tensor:
        """The tensor, on the device it was on, with the same strides and bits. As often as asked for."""
        if isinstance(saved, torch.Tensor):
            return saved
        with _LOCK:
            return self._lanes[saved._like[1]].get(saved)

    def trim(self) -> None:
        """Frees the host memory not in use."""
        with _LOCK:
            self._pool.trim()

    @property
    def bytes(self) -> int:
        """Host memory taken, in use or not."""
        return self._pool.bytes


class _Lane:
    """The tensors of one device."""

    def __init__(self, copies: Copies, pool: _Pool, staying: int):
        self._copies, self._pool, self._staying = copies, pool, staying
        # Weakly: what a graph has dropped must not stay for the sake of what comes after it.
        self._leaving: deque[weakref.ref[Saved]] = deque()
        self._last: Callable[[], Saved | None] = lambda: None
        self._ahead: Callable[[], Saved | None] = lambda: None

    def put(self, tensor: torch.Tensor) -> Saved | torch.Tensor:
        buffer = self._pool.take(tensor.untyped_storage().nbytes(), self._copies.host_buffer)
        if buffer is None:
            return tensor
        with torch.no_grad():
            saved = Saved(tensor, buffer, self._copies, self._pool)
        saved.previous, self._last = self._last, weakref.ref(saved)
        self._leaving.append(weakref.ref(saved))
        while len(self._leaving) > self._staying:
            leaving = self._leaving.popleft()()
            if leaving is not None:
                leaving.let_go()
        return saved

    def get(self, saved: Saved) -> torch.Tensor:
        with torch.no_grad():
            if saved.tensor is not None:
                saved.check()
                tensor = saved.tensor
            else:
                if saved.fetched is None:
                    saved.fetch()
                tensor = saved.arrive()
            self._fetch_ahead(saved.previous())
        return tensor

    def _fetch_ahead(self, saved: Saved | None) -> None:
        if saved is None or saved.dropped or saved.on_device:
            return
        ahead = self._ahead()
        if ahead is not None:
            ahead.forget()  # a wrong guess: one at a time may take memory
        saved.fetch()
        self._ahead = weakref.ref(saved)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The storage of a tensor that fills it, in order, whatever the tensor's strides."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def fills_its_storage(tensor: torch.Tensor) -> bool:
    """Whether freeing the tensor frees its storage's memory: it is no view of a part of something larger."""
    return (
        tensor.storage_offset() == 0
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        and not tensor.is_neg()
    )


def available() -> int:
    """Bytes that this host, or this container, can still give."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        # The page cache counts as used, but goes when memory is asked for.
        cache = int(statistics["active_file"]) + int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # no such group, or its limit is "max"
        return available
    return max(min(available, limit - used + cache), 0)
