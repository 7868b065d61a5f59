"""DoRA layers of PEFT in bfloat16 autocast: a group of projections, one projection.

The floor is the products with W plus the bytes in the docstring of kernels/dora.py and of the low-rank products.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import BACKWARD, BOTH, FORWARD, Case

from tests.kernels import test_dora as dora
from tests.kernels.test_lora import Layer, under_autocast

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(
    direction: str, tokens: int, inputs: int, outputs: Sequence[int], rank: int, dtype=BF16, adapter=FP32, *, name: str
) -> Case:
    """Projections of one input, with adapters and magnitudes in the dtype `adapter`."""
    layers = tuple(Layer(width, rank) for width in outputs)
    total = sum(outputs)
    elements = {
        FORWARD: tokens * (inputs + 2 * total) + inputs * total,
        BACKWARD: tokens * (3 * inputs + 4 * total),
    }
    elements[BOTH] = elements[FORWARD] + elements[BACKWARD]
    products = {FORWARD: 1, BACKWARD: 1, BOTH: 2}[direction]
    stock = dora.stock_of(layers)
    return Case(
        op=f"dora_{name}",
        shape=f"{tokens}x{inputs}x{total}",
        dtype=dtype,
        direction=direction,
        note=f"rank {rank}",
        bytes=elements[direction] * dtype.itemsize,
        operations=2 * tokens * inputs * total * products,
        inputs=lambda device: dora.inputs_of(layers, device, dtype, adapter, (tokens, inputs), m=adapter),
        turbo=dora.turbo_of(layers, dtype),
        stock=stock if adapter == dtype else under_autocast(stock, dtype),
        exact=stock,
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case(FORWARD, 8, 64, (64, 32, 32), 4, name="qkv"), case(BACKWARD, 8, 64, (64,), 4, name="o")]
    widths = {"qkv": (4096, 1024, 1024), "o": (4096,), "up": (14336,)}
    return [
        case(direction, 4096, 4096, outputs, rank, name=name)
        for name, outputs in widths.items()
        for rank in (16, 64)
        for direction in (FORWARD, BACKWARD)
    ]


def checks(tiny: bool = False) -> list[Case]:
    tokens, inputs = (30, 64) if tiny else (1000, 1024)
    return [
        case(BOTH, tokens, inputs, (inputs, inputs // 4, inputs // 4), rank, dtype, adapter, name="qkv")
        for dtype, adapter in [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32)]
        for rank in (16, 100)
    ]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_dora(run_case, case):
    run_case(case)
