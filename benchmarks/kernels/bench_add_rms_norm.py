"""Residual addition and RMSNorm: Llama's body, in one dtype and as under autocast; and the linear layers behind it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import BACKWARD, BOTH, FORWARD, Case

from tests.kernels import test_linears
from tests.kernels.test_add_rms_norm import inputs_of, stock_sum_of, turbo_of
from tests.kernels.test_rms_norm import exact_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(direction: str, shape: tuple[int, ...], dtypes=(BF16,) * 3, *, branch=True, trained=True, low=None) -> Case:
    """`dtypes`: of residual, branch and weight; `low`: that y is asked for in."""
    elements, rows = torch.Size(shape).numel(), torch.Size(shape[:-1]).numel()
    residual, added = dtypes[0].itemsize, dtypes[1].itemsize
    y = (low or torch.promote_types(dtypes[0], dtypes[2])).itemsize
    if direction == FORWARD:
        moved = residual + y + (added + residual if branch else 0)
    else:  # dh, dy and h, and the gradients, one where their dtypes are one
        moved = 2 * residual + y + residual + (added if branch and added != residual else 0)
    notes = ["with branch" if branch else "norm alone"]
    notes += [] if direction == FORWARD else ["trained weight" if trained else "frozen weight"]
    notes += ["autocast"] * (low is not None)
    return Case(
        op="add_rms_norm",
        shape="x".join(map(str, shape)),
        dtype=dtypes[0],
        direction=direction,
        note=", ".join(notes),
        bytes=moved * elements + 4 * rows,
        inputs=partial(inputs_of, shape, dtypes=dtypes, branch=branch, frozen=not trained),
        turbo=turbo_of("llama", low),
        stock=stock_sum_of("llama", dtype=low),
        exact=stock_sum_of("llama", exact_of),
    )


def linears_case(rows: tuple[int, ...], width: int, outputs: tuple[int, ...], trained: bool = True) -> Case:
    """The norm and its linear layers together, forward and backward; bytes are those of the norm and of y again."""
    tokens = torch.Size(rows).numel()
    frozen = () if trained else tuple(f"weight{i}" for i in range(len(outputs)))
    products = 3 if trained else 2
    return Case(
        op="linears",
        shape=f"{tokens}x{width}x{'+'.join(map(str, outputs))}",
        dtype=BF16,
        direction=BOTH,
        note="trained" if trained else "frozen",
        bytes=(2 + 4 + (2 if trained else 0)) * tokens * width * 2,
        operations=products * 2 * tokens * width * sum(outputs),
        inputs=partial(test_linears.inputs_of, dtype=BF16, rows=rows, width=width, outputs=outputs, frozen=frozen),
        turbo=test_linears.turbo,
        stock=test_linears.by_torch,
        exact=test_linears.by_torch,
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case(FORWARD, (32, 64)), case(BACKWARD, (32, 64), trained=False), linears_case((2, 16), 64, (64, 32))]
    result = []
    for shape in ((8192, 2048), (4096, 4096), (8192, 4096)):
        result += [case(FORWARD, shape), case(FORWARD, shape, branch=False)]
        result += [case(BACKWARD, shape, trained=trained) for trained in (False, True)]
    result += [case(direction, (8192, 2048), (FP32, BF16, FP32), low=BF16) for direction in (FORWARD, BACKWARD)]
    result += [linears_case((4, 2048), 2048, outputs) for outputs in ((2048, 512, 512), (8192, 8192))]
    result += [linears_case((2, 2048), 4096, (4096, 1024, 1024), trained) for trained in (True, False)]
    return result


def checks(tiny: bool = False) -> list[Case]:
    shapes = ((30, 64),) if tiny else ((1000, 2048), (2, 500, 4096))
    every = [case(BACKWARD, shape, (dtype,) * 3) for dtype in (BF16, FP16, FP32) for shape in shapes]
    every += [case(BACKWARD, shape, (FP32, BF16, FP32), low=BF16) for shape in shapes]
    return [*every, linears_case((2, 16), 64, (64, 32)) if tiny else linears_case((4, 500), 2048, (2048, 512, 512))]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_add_rms_norm(run_case, case):
    run_case(case)
