"""Norms of queries and keys and their rotary embedding, as projections give them: heads inside the sequence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import BACKWARD, FORWARD, Case

from tests.kernels.test_qk_norm_rope import inputs_of, stock_of, turbo_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(direction: str, tokens: int, heads=(32, 8), head_dim=128, dtype=BF16, *, kind="qwen3", frozen=False) -> Case:
    """The default is the attention of Qwen3-4B and 8B."""
    elements, angles = tokens * sum(heads) * head_dim, 2 * tokens * head_dim
    return Case(
        op="qk_norm_rope",
        shape=f"{tokens}x{heads[0]}+{heads[1]}x{head_dim}",
        dtype=dtype,
        direction=direction,
        note=kind + ", frozen weights" * frozen,
        bytes=(elements * (2 if direction == FORWARD else 3) + angles) * dtype.itemsize,
        inputs=partial(inputs_of, dtype=dtype, heads=heads, tokens=tokens, head_dim=head_dim, batch=1, frozen=frozen),
        turbo=turbo_of(kind),
        stock=stock_of(kind),
        exact=stock_of(kind),
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case(direction, 8, (2, 1), 16) for direction in (FORWARD, BACKWARD)]
    result = [case(direction, tokens) for tokens in (4096, 16384) for direction in (FORWARD, BACKWARD)]
    for options in ({"heads": (8, 4), "head_dim": 256, "kind": "gemma3"}, {"frozen": True}):
        result += [case(direction, 8192, **options) for direction in (FORWARD, BACKWARD)]
    return result


def checks(tiny: bool = False) -> list[Case]:
    sizes = {"heads": (2, 1), "head_dim": 16} if tiny else {}
    tokens = 10 if tiny else 1000
    return [
        case(BACKWARD, tokens, dtype=dtype, kind=kind, **sizes)
        for dtype in (BF16, FP32)
        for kind in ("qwen3", "gemma3")
    ]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_qk_norm_rope(run_case, case):
    run_case(case)
