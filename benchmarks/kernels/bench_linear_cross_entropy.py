"""Head and loss in one op, against full logits and transformers' loss."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import BOTH, Case
from hf_turbo.kernels.linear_cross_entropy import linear_cross_entropy

from tests.kernels.helpers import randn
from tests.kernels.test_linear_cross_entropy import stock_loss

BF16, FP32 = torch.bfloat16, torch.float32


def labels_of(tokens: int, vocabulary: int, masked: float, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < masked] = -100
    return labels.to(device)


def turbo_of(labels: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, labels.to(hidden.device))


def stock_of(labels: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return stock_loss(labels.to(hidden.device), None, 1.0, None)(hidden, weight, None)


def case(tokens: int, vocabulary: int, width: int, dtype=BF16, *, trained: bool, masked: float = 0.0) -> Case:
    """Floor: the matrix products of the labelled rows, two or three."""
    labels = labels_of(tokens, vocabulary, masked, torch.device("cpu"))
    rows = int((labels != -100).sum())
    return Case(
        op="linear_ce",
        shape=f"{tokens}x{vocabulary}x{width}",
        dtype=dtype,
        direction=BOTH,
        note=("trained" if trained else "frozen") + (f", {masked:.0%} masked" if masked else ""),
        bytes=0,
        operations=2 * rows * vocabulary * width * (3 if trained else 2),
        inputs=lambda device: {
            "hidden": randn(tokens, width, device=device, dtype=dtype).requires_grad_(),
            # Logits with a standard deviation of 2: of nearly equal ones all rows would round alike, by luck.
            "weight": randn(vocabulary, width, device=device, dtype=dtype, seed=1, scale=2 / width**0.5).requires_grad_(
                trained
            ),
        },
        turbo=partial(turbo_of, labels),
        stock=partial(stock_of, labels),
        exact=partial(stock_of, labels),
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case(40, 500, 32, trained=trained) for trained in (False, True)]
    result = [case(4096, 128_256, 4096, trained=trained) for trained in (False, True)]
    result += [case(4096, 128_256, 4096, trained=False, masked=0.6), case(8192, 128_256, 2048, trained=True)]
    return [*result, case(8192, 151_936, 1024, trained=True), case(8192, 262_144, 1152, trained=False)]


def checks(tiny: bool = False) -> list[Case]:
    shape = (60, 500, 32) if tiny else (1000, 32_000, 1024)
    return [case(*shape, dtype, trained=trained) for dtype in (BF16, FP32) for trained in (False, True)]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_linear_cross_entropy(run_case, case):
    run_case(case)
