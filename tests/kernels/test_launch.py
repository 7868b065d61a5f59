"""The look-up of compiled kernels that replaces Triton's on a GPU: here with a kernel that records its launches."""

from typing import Any

import pytest
import torch
from hf_turbo.kernels import _launch

GPU = torch.device("cuda", 0)


class Kernel:
    """Compiles once for all arguments of a signature that the look-up thinks are alike."""

    arg_names = ("x", "count", "factor", "BLOCK", "EXACT")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.runs: list[tuple[int, tuple[int, ...], tuple[Any, ...], int]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(*args: Any, enable_fp_fusion: bool, **meta: Any) -> Any:
            assert enable_fp_fusion
            self.compiled.append((grid, args, meta))
            return Compiled(self, len(self.compiled) - 1)

        return compile_and_run


class Compiled:
    def __init__(self, kernel: Kernel, number: int):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, stream: self.kernel.runs.append((self.number, grid, args, stream))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7 + index, raising=False)
    monkeypatch.setattr(_launch, "_COMPILED", {})
    return Kernel()


def launch(kernel: Kernel, x: Any, count: int, factor: float = 0.5, grid: tuple[int, ...] = (3,), block: int = 64):
    # Constants in another order than the kernel's parameters.
    _launch.launch(kernel, grid, GPU, x, count, factor, EXACT=False, BLOCK=block, num_warps=4)


def test_the_second_launch_finds_what_the_first_compiled(kernel):
    x = torch.empty(8)
    for factor in (0.5, 0.25, 1.0):
        launch(kernel, x, 4096, factor)
    assert len(kernel.compiled) == 1
    assert kernel.runs == [(0, (3, 1, 1), (x, 4096, factor, 64, False), 7) for factor in (0.25, 1.0)]


def test_every_grid_is_launched_as_it_is(kernel):
    x = torch.empty(8)
    for grid in ((3,), (5,), (3, 2), (5,)):
        launch(kernel, x, 4096, grid=grid)
    assert [run[1] for run in kernel.runs] == [(5, 1, 1), (3, 2, 1), (5, 1, 1)]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ((torch.empty(8), 4096), (torch.empty(8), 8192), True),
        ((torch.empty(8), 4097), (torch.empty(8), 8191), True),
        ((torch.empty(8), 4096), (torch.empty(8), 4097), False),
        ((torch.empty(8), 0), (torch.empty(8), 16), True),
        ((torch.empty(8), 1), (torch.empty(8), 3), False),
        ((torch.empty(8), 2**31 - 1), (torch.empty(8), 2**31 + 1), False),
        ((torch.empty(8), -(2**31)), (torch.empty(8), -(2**31) - 16), True),
        ((torch.empty(8), 16), (torch.empty(8, dtype=torch.float16), 16), False),
        ((torch.empty(8), 16), (torch.empty(9)[1:], 16), False),
        ((torch.empty(8), 16), (None, 16), False),
        ((torch.empty(8), 16), (torch.nn.Parameter(torch.empty(8)), 16), True),
    ],
)
def test_what_triton_compiles_for_is_told_apart(kernel, one, other, alike):
    launch(kernel, *one)
    launch(kernel, *other)
    assert len(kernel.compiled) == (1 if alike else 2)
    launch(kernel, *other)
    assert len(kernel.compiled) == (1 if alike else 2)
    assert kernel.runs[-1][0] == len(kernel.compiled) - 1


def test_other_constants_and_kernels_are_told_apart(kernel):
    x, other = torch.empty(8), Kernel()
    launch(kernel, x, 16)
    launch(kernel, x, 16, block=128)
    launch(other, x, 16)
    assert (len(kernel.compiled), len(other.compiled)) == (2, 1)


def test_changing_sizes_and_seeds_do_not_pile_up(kernel, monkeypatch):
    monkeypatch.setattr(_launch, "_MOST_RUNNERS", 4)
    monkeypatch.setattr(_launch._IntegerKinds, "_MOST", 8)
    x = torch.empty(8)
    for count in range(17, 117, 2):
        launch(kernel, x, count, grid=(count,))
    assert len(kernel.compiled) == 1
    assert [run[1][0] for run in kernel.runs] == list(range(19, 117, 2))
    (compiled,) = _launch._COMPILED.values()
    assert len(compiled.runners) <= 4
    assert len(_launch._INTEGER_KINDS) <= 8
