"""RMSNorm: Llama's body on hidden states and on heads (query and key norm)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import BACKWARD, FORWARD, Case

from tests.kernels.test_rms_norm import BODIES, exact_of, inputs_of, stock_of, turbo_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(
    direction: str, shape: tuple[int, ...], dtype=BF16, *, weight_dtype=None, trained=True, heads_first=False
) -> Case:
    weight_dtype = weight_dtype or dtype
    elements, rows = torch.Size(shape).numel(), torch.Size(shape[:-1]).numel()
    moved = 2 if direction == FORWARD else 3
    body = BODIES["llama"]

    def on_heads(function):
        """Gemma 3 normalises queries and keys after the transpose."""
        return (lambda x, weight: function(x.transpose(1, 2), weight)) if heads_first else function

    notes = [] if direction == FORWARD else ["trained weight" if trained else "frozen weight"]
    notes += ["heads first"] * heads_first + ["float32 weight"] * (weight_dtype != dtype)
    # Stock gives promote(weight, x), which is what the wider weight costs.
    wider = elements * (torch.promote_types(dtype, weight_dtype).itemsize - dtype.itemsize)
    return Case(
        op="rms_norm",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        direction=direction,
        note=", ".join(notes),
        bytes=moved * elements * dtype.itemsize + wider + 4 * rows,
        inputs=partial(inputs_of, shape, x_dtype=dtype, weight_dtype=weight_dtype, frozen=not trained),
        turbo=on_heads(turbo_of(body)),
        stock=on_heads(stock_of(body)),
        exact=on_heads(exact_of(body)),
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case(FORWARD, (32, 64)), case(BACKWARD, (32, 64)), case(BACKWARD, (32, 64), trained=False)]
    result = [
        case(direction, (tokens, width), trained=trained)
        for width in (1024, 2048, 4096)
        for tokens in (4096, 8192, 16384)
        for direction, trained in ((FORWARD, True), (BACKWARD, False), (BACKWARD, True))
    ]
    for shape, options in (
        ((8192, 4096), {"dtype": FP32}),
        ((8192, 4096), {"weight_dtype": FP32}),
        ((8192, 8192), {}),
        ((2, 4096, 32, 128), {}),
        ((2, 4096, 32, 128), {"heads_first": True}),
    ):
        result += [case(FORWARD, shape, **options)]
        result += [case(BACKWARD, shape, **options, trained=trained) for trained in (False, True)]
    return result


def checks(tiny: bool = False) -> list[Case]:
    shapes = ((30, 64), (2, 5, 3, 16)) if tiny else ((1000, 2048), (2, 500, 16, 128))
    return [case(BACKWARD, shape, dtype) for dtype in (BF16, FP16, FP32) for shape in shapes]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_rms_norm(run_case, case):
    run_case(case)
