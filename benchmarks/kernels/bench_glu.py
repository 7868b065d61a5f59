"""Gated linear units, alone and with the down projection."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import BACKWARD, BOTH, FORWARD, Case
from hf_turbo.kernels.glu import glu, glu_packed

from tests.kernels.test_glu import (
    exact_of,
    inputs_of,
    linear_inputs_of,
    packed_of,
    stock_linear_of,
    stock_of,
    stock_packed_of,
    turbo_linear_of,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(direction: str, shape: tuple[int, int], dtype=BF16, activation="silu", *, packed=False) -> Case:
    tensors = {FORWARD: 3, BACKWARD: 5}[direction]
    return Case(
        op="glu",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        direction=direction,
        note=activation + ", packed" * packed,
        bytes=tensors * shape[0] * shape[1] * dtype.itemsize,
        inputs=lambda device: (packed_of if packed else dict)(inputs_of(shape, device, dtype)),
        turbo=partial(glu_packed if packed else glu, activation=activation),
        stock=(stock_packed_of if packed else stock_of)(activation),
        exact=(stock_packed_of if packed else exact_of)(activation),
    )


def linear_case(tokens: int, inner: int, outer: int, dtype=BF16, *, trained: bool) -> Case:
    """Floor: the bytes of the two element-wise passes, one more tensor where h is made again, and the products."""
    elements = tokens * inner * dtype.itemsize
    return Case(
        op="glu_linear",
        shape=f"{tokens}x{inner}x{outer}",
        dtype=dtype,
        direction=BOTH,
        note="trained weight" if trained else "frozen weight",
        bytes=elements * (3 + (6 if trained else 5)),
        operations=2 * tokens * inner * outer * (3 if trained else 2),
        inputs=lambda device: linear_inputs_of((tokens, inner), outer, device, dtype, bias=False, frozen=not trained),
        turbo=turbo_linear_of("silu"),
        stock=stock_linear_of("silu"),
        exact=stock_linear_of("silu"),
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case(FORWARD, (8, 64)), case(BACKWARD, (8, 64), packed=True), linear_case(8, 64, 32, trained=True)]
    shapes = [(8192, 3072), (8192, 8192), (4096, 14336), (8192, 14336), (16384, 14336)]
    result = [case(direction, shape) for shape in shapes for direction in (FORWARD, BACKWARD)]
    for options in ({"activation": "gelu_tanh"}, {"activation": "gelu"}, {"packed": True}, {"dtype": FP32}):
        result += [case(direction, (8192, 8192), **options) for direction in (FORWARD, BACKWARD)]
    return result + [linear_case(8192, 14336, 4096, trained=trained) for trained in (False, True)]


def checks(tiny: bool = False) -> list[Case]:
    tokens, inner, outer = (30, 64, 32) if tiny else (1000, 2816, 1024)
    result = [
        case(BACKWARD, (tokens, inner), dtype, activation, packed=packed)
        for dtype in (BF16, FP16, FP32)
        for activation in ("silu", "gelu_tanh", "gelu")
        for packed in (False, True)
    ]
    return result + [linear_case(tokens, inner, outer, dtype, trained=True) for dtype in (BF16, FP16, FP32)]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_glu(run_case, case):
    run_case(case)
