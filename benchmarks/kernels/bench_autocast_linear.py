"""Query, key and value of one float32 input under bf16 autocast: the casts and additions around their products."""

from __future__ import annotations

import pytest
import torch
from conftest import BOTH, Case

from tests.kernels.test_autocast_linear import exact, inputs_of, stock_of, turbo_of

BF16 = torch.bfloat16


def case(tokens: int, width: int) -> Case:
    """Floor: one cast of the input, one gradient of it in float32, casts of the weights, and the products."""
    weights = width * (width + width // 2)
    return Case(
        op="autocast_linear",
        shape=f"{tokens}x{width}",
        dtype=BF16,
        direction=BOTH,
        note="q, k, v; weights cast in the call",
        bytes=tokens * width * (6 + 4) + weights * (6 + 4),
        operations=6 * tokens * weights,
        inputs=lambda device: inputs_of(tokens, width, device),
        turbo=turbo_of(BF16),
        stock=stock_of(BF16),
        exact=exact,
    )


def cases(tiny: bool = False) -> list[Case]:
    return [case(16, 32)] if tiny else [case(8192, 2048), case(8192, 4096)]


def checks(tiny: bool = False) -> list[Case]:
    return [case(16, 32)] if tiny else [case(1000, 1024)]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_autocast_linear(run_case, case):
    run_case(case)
