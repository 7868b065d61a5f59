"""How kernels are timed: against the modelling code they replace, and against the floor.

The floor of a case is bytes / copy bandwidth + operations / speed of a bfloat16 matrix product, both measured on the
spot. On a GPU, times are those of CUDA events around calls that were all queued before the first ran, so that they hold
no host time; host time is a figure of its own. Inputs rotate over sets that exceed the L2 cache several times.

    pytest benchmarks/kernels                    every case, with pytest-benchmark's table, and ours after it
    python benchmarks/kernels/summary.py         the same numbers quickly, as one table and JSON
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_turbo.patches.sums import full_sums

# For tests.kernels, which holds the stock functions and the rule of exactness. Last, so that an installed hf_turbo goes
# before the source folder of that name.
sys.path.append(str(Path(__file__).parents[2]))

from tests.kernels.helpers import Inputs, check_against_stock

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"


@dataclass(frozen=True)
class Case:
    """One op at one shape, as hf_turbo and as stock compute it."""

    op: str
    shape: str
    dtype: torch.dtype
    direction: str
    bytes: int  # the fewest that device memory can see
    inputs: Callable[[torch.device], Inputs]  # those that require a gradient are differentiated
    turbo: Callable[..., Any]
    stock: Callable[..., Any]
    exact: Callable[..., Any]  # for float64 inputs
    operations: int = 0  # of matrix products
    note: str = ""

    def __str__(self) -> str:
        parts = (self.op, self.shape, str(self.dtype).removeprefix("torch."), self.direction, self.note)
        return ", ".join(part for part in parts if part)

    def check(self, device: torch.device) -> None:
        """Raises AssertionError unless turbo is as exact as stock, outputs and gradients."""
        with full_sums():
            check_against_stock(self.turbo, self.stock, self.exact, self.inputs(device))


@dataclass(frozen=True)
class Result:
    op: str
    shape: str
    dtype: str
    direction: str
    note: str
    ms: float
    gb_per_s: float
    percent_of_floor: float
    host_us: float
    stock_ms: float
    stock_host_us: float
    ratio: float  # stock over turbo
    extra_gib: float  # the most memory that a call takes beyond its inputs; 0 on a CPU
    stock_extra_gib: float

    HEADER = (
        f"{'op':<12} {'shape':<22} {'dtype':<9} {'direction':<19} {'ms':>8} {'GB/s':>6} {'% floor':>7} {'host us':>7}"
        f" {'stock ms':>8} {'ratio':>6} {'GiB':>5} {'stock':>5}  note"
    )

    def __str__(self) -> str:
        return (
            f"{self.op:<12} {self.shape:<22} {self.dtype:<9} {self.direction:<19} {self.ms:>8.4f} {self.gb_per_s:>6.0f}"
            f" {self.percent_of_floor:>7.1f} {self.host_us:>7.0f} {self.stock_ms:>8.4f} {self.ratio:>6.2f}"
            f" {self.extra_gib:>5.2f} {self.stock_extra_gib:>5.2f}  {self.note}"
        )


def default_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------- timing


def host_us(function: Callable[[], Any], calls: int = 10) -> float:
    """Host time of a call while the device's queue has room, in microseconds."""
    function()
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    elapsed = time.perf_counter() - start
    _synchronize()
    return elapsed / calls * 1e6


def time_ms(function: Callable[[], Any], calls: int = 20, repetitions: int = 7) -> float:
    """Median time of a call in milliseconds; on a GPU that of the device alone."""
    for _ in range(3):
        function()
    _synchronize()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repetitions):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    # While the device sleeps, the host queues all calls, so that nothing waits for the host between the events.
    # The clock of an H200 runs at less than 2 GHz: the sleep is no shorter than asked for.
    sleep_cycles = int((host_us(function) * calls * 1.5 + 200) * 2000)
    times = []
    for _ in range(repetitions):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(sleep_cycles)
        start_event.record()
        for _ in range(calls):
            function()
        end_event.record()
        torch.cuda.synchronize()
        times.append(start_event.elapsed_time(end_event) / calls)
    return statistics.median(times)


def extra_gib(function: Callable[[], Any], device: torch.device) -> float:
    """Peak device memory of a call above what was held before it, results included."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before) / 2**30


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus written per second by a large copy."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (time_ms(lambda: target.copy_(source)) * 1e-3)


@cache
def matrix_speed(device: torch.device) -> float:
    """Operations per second of a large bfloat16 matrix product on random numbers."""
    size = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / (time_ms(lambda: left @ right, calls=5) * 1e-3)


# -------------------------------------------------------------------------------------------------------------- cases


def prepare(case: Case, function: Callable[..., Any], device: torch.device) -> Callable[[], Any]:
    """A call of the timed direction, each time on the next of enough input sets to exceed the L2 cache."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    # A case without bytes is one of matrix products, far larger than the cache.
    count = min(16, max(2, -(-4 * cache_bytes // case.bytes))) if case.bytes else 1
    calls = [_one_call(case, function, device) for _ in range(count)]
    # Results are kept for a round, or the next call would write where this one's still lie in the cache.
    kept: list[Any] = [None] * count
    indices = cycle(range(count))

    def call() -> None:
        index = next(indices)
        kept[index] = calls[index]()

    return call


def _one_call(case: Case, function: Callable[..., Any], device: torch.device) -> Callable[[], Any]:
    inputs = case.inputs(device)
    if case.direction == FORWARD:
        return partial(function, **inputs)
    differentiated = [value for value in inputs.values() if value is not None and value.requires_grad]

    def forward() -> list[torch.Tensor]:
        result = function(**inputs)
        outputs = [result] if torch.is_tensor(result) else [y for y in result if y is not None]
        return [y for y in outputs if y.requires_grad]

    outputs = forward()
    starts = [torch.randn_like(y) for y in outputs]
    if case.direction == BACKWARD:
        return partial(torch.autograd.grad, outputs, differentiated, starts, retain_graph=True)
    del outputs
    return lambda: torch.autograd.grad(forward(), differentiated, starts)


def measure(case: Case, device: torch.device, **timing: int) -> Result:
    """Times turbo and stock one after the other, so that each has the memory to itself."""
    turbo = prepare(case, case.turbo, device)
    ms, turbo_host, extra = time_ms(turbo, **timing), host_us(turbo), extra_gib(turbo, device)
    del turbo
    stock = prepare(case, case.stock, device)
    stock_ms, stock_host, stock_extra = time_ms(stock, **timing), host_us(stock), extra_gib(stock, device)
    floor_ms = (case.bytes / copy_bandwidth(device) + case.operations / matrix_speed(device)) * 1e3
    return Result(
        op=case.op,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        direction=case.direction,
        note=case.note,
        ms=ms,
        gb_per_s=case.bytes / ms * 1e-6,
        percent_of_floor=100 * floor_ms / ms,
        host_us=turbo_host,
        stock_ms=stock_ms,
        stock_host_us=stock_host,
        ratio=stock_ms / ms,
        extra_gib=extra,
        stock_extra_gib=stock_extra,
    )


# ------------------------------------------------------------------------------------------------------------- pytest

_RESULTS: list[Result] = []


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """bench_*.py, unless pytest takes it anyway: named on the command line, or by python_files."""
    taken = parent.session.isinitpath(file_path) or any(map(file_path.match, parent.config.getini("python_files")))
    if file_path.match("bench_*.py") and not taken:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture
def run_case(benchmark: Any) -> Iterator[Callable[[Case], None]]:
    """Measures a case: device time for our table, synchronised calls for that of pytest-benchmark."""

    def run(case: Case) -> None:
        device = default_device()
        result = measure(case, device)
        _RESULTS.append(result)
        benchmark.extra_info.update(vars(result))
        turbo = prepare(case, case.turbo, device)

        def synchronised() -> None:
            turbo()
            _synchronize()

        benchmark.pedantic(synchronised, rounds=10, warmup_rounds=2)

    yield run
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _RESULTS:
        return
    device = default_device()
    terminalreporter.section("kernels")
    terminalreporter.write_line(
        f"copy {copy_bandwidth(device) * 1e-9:.0f} GB/s, bfloat16 product {matrix_speed(device) * 1e-12:.1f} TFLOP/s"
    )
    for line in (Result.HEADER, *map(str, _RESULTS)):
        terminalreporter.write_line(line)
