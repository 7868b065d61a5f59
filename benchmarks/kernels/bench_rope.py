"""Rotary embedding of queries and keys as projections give them: heads inside the sequence, seen transposed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import BACKWARD, FORWARD, Case
from hf_turbo.kernels.rope import rope

from tests.kernels.test_rope import BODIES, heads_first, inputs_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(direction: str, tokens: int, heads=(32, 8), head_dim=128, dtype=BF16, *, body="llama", cos_dtype=None) -> Case:
    """The default is the attention of Llama-3-8B, hidden size 4096."""
    cos_dtype = cos_dtype or dtype
    stock, options, width = BODIES[body]
    out_dtype = dtype if options.get("keep_dtype") else torch.promote_types(dtype, cos_dtype)
    elements, angles = tokens * sum(heads) * head_dim, 2 * tokens * int(head_dim * width)
    return Case(
        op="rope",
        shape=f"{tokens}x{heads[0]}+{heads[1]}x{head_dim}",
        dtype=dtype,
        direction=direction,
        note=body + ", float32 cos" * (cos_dtype != dtype),
        bytes=elements * (dtype.itemsize + out_dtype.itemsize) + angles * cos_dtype.itemsize,
        inputs=partial(
            inputs_of,
            dtype=dtype,
            cos_dtype=cos_dtype,
            heads=heads,
            tokens=tokens,
            head_dim=head_dim,
            batch=1,
            width=width,
        ),
        turbo=heads_first(rope, **options),
        stock=heads_first(stock),
        exact=heads_first(stock),
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case(direction, 8, (2, 1), 16) for direction in (FORWARD, BACKWARD)]
    both = (FORWARD, BACKWARD)
    result = [case(direction, tokens) for tokens in (4096, 8192, 16384) for direction in both]
    for options in (
        {"heads": (16, 8)},  # Qwen3-0.6B, hidden size 1024
        {"heads": (32, 8), "head_dim": 64},  # Llama-3.2-1B, hidden size 2048
        {"cos_dtype": FP32},
        {"body": "olmo2", "cos_dtype": FP32},
        {"body": "glm", "heads": (32, 2)},
        {"body": "gpt_oss", "heads": (64, 8), "head_dim": 64},
        {"dtype": FP32},
    ):
        result += [case(direction, 8192, **options) for direction in both]
    return result


def checks(tiny: bool = False) -> list[Case]:
    sizes = {"heads": (2, 1), "head_dim": 16} if tiny else {}
    tokens = 10 if tiny else 1000
    return [case(BACKWARD, tokens, dtype=dtype, body=body, **sizes) for dtype in (BF16, FP16, FP32) for body in BODIES]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_rope(run_case, case):
    run_case(case)
