"""LayerNorm: Cohere's body on hidden states and on heads."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import BACKWARD, FORWARD, Case

from tests.kernels.test_layer_norm import cohere, exact, inputs_of, turbo

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(direction: str, shape: tuple[int, ...], dtype=BF16, *, trained=True, heads=False) -> Case:
    elements, rows = torch.Size(shape).numel(), torch.Size(shape[:-1]).numel()
    notes = [] if direction == FORWARD else ["trained weight" if trained else "frozen weight"]
    return Case(
        op="layer_norm",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        direction=direction,
        note=", ".join(notes + ["weight per head"] * heads),
        bytes=(2 if direction == FORWARD else 3) * elements * dtype.itemsize + 8 * rows,
        inputs=partial(inputs_of, shape, dtype=dtype, heads=shape[-2] if heads else None, frozen=not trained),
        turbo=turbo,
        stock=cohere,
        exact=exact,
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case(FORWARD, (32, 64)), case(BACKWARD, (32, 64)), case(BACKWARD, (8, 2, 16), heads=True)]
    directions = ((FORWARD, True), (BACKWARD, False), (BACKWARD, True))
    result = [case(d, (8192, width), trained=trained) for width in (4096, 8192) for d, trained in directions]
    result += [case(d, (8192, 4096), FP32, trained=trained) for d, trained in directions]
    return result + [case(d, (2, 4096, 32, 128), trained=trained, heads=True) for d, trained in directions]


def checks(tiny: bool = False) -> list[Case]:
    rows, heads = ((30, 64), (2, 5, 3, 16)) if tiny else ((1000, 2048), (2, 500, 16, 128))
    return [
        case(BACKWARD, shape, dtype, heads=shape is heads) for dtype in (BF16, FP16, FP32) for shape in (rows, heads)
    ]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_layer_norm(run_case, case):
    run_case(case)
