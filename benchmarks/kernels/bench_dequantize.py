"""Quantized weights expanded: NF4 with nested scales as QLoRA trains them, plain NF4, int8.

Stock is bitsandbytes, or the formula in eager torch where it is not installed.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import FORWARD, Case
from hf_turbo.kernels.dequantize import dequantize_int8

from tests.kernels.test_dequantize import (
    HAS_BITSANDBYTES,
    bitsandbytes_of,
    exact_int8,
    exact_of,
    int8_inputs_of,
    random_4bit,
    stock_int8_of,
    turbo_of,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(
    shape: tuple[int, int], dtype=BF16, quant_type="nf4", blocksize=64, *, nested: bool = True, pitch: int | None = None
) -> Case:
    """With `pitch`, into rows that lie so far apart; stock has no such option and copies."""
    n, nested_blocksize = shape[0] * shape[1], 256 if nested else None
    blocks = n // blocksize
    scale_bytes = blocks + 4 * -(-blocks // 256) if nested else 4 * blocks

    def out_of(device: torch.device) -> torch.Tensor:
        return torch.empty(shape[0], pitch or shape[1], dtype=dtype, device=device)[:, : shape[1]]

    stock_name = "bitsandbytes" if HAS_BITSANDBYTES else "eager torch"
    stock = (
        bitsandbytes_of(shape, dtype, blocksize, quant_type)
        if HAS_BITSANDBYTES
        else exact_of(shape, blocksize, dtype=dtype)
    )

    def stock_copied(packed, **tensors):
        return out_of(packed.device).copy_(stock(packed, **tensors))

    notes = (quant_type, f"blocks of {blocksize}", "nested" * nested, f"pitch {pitch}" if pitch else "", stock_name)
    return Case(
        op="dequantize",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        direction=FORWARD,
        note=", ".join(filter(None, notes)),
        bytes=n // 2 + n * dtype.itemsize + scale_bytes,
        inputs=partial(
            random_4bit, shape, blocksize=blocksize, quant_type=quant_type, nested_blocksize=nested_blocksize
        ),
        turbo=turbo_of(shape, dtype, blocksize, out=out_of if pitch else None),
        stock=stock_copied if pitch else stock,
        exact=exact_of(shape, blocksize),
    )


def int8_case(shape: tuple[int, int], dtype=BF16) -> Case:
    n = shape[0] * shape[1]
    return Case(
        op="dequantize",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        direction=FORWARD,
        note="int8, as in backward",
        bytes=n + n * dtype.itemsize + 4 * shape[0],
        inputs=partial(int8_inputs_of, shape),
        turbo=partial(dequantize_int8, dtype=dtype),
        stock=stock_int8_of(dtype),
        exact=exact_int8,
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case((8, 256)), case((8, 256), pitch=272), case((8, 256), nested=False), int8_case((8, 256))]
    result = [case(shape) for shape in ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096), (8192, 28672))]
    large = (14336, 4096)
    result += [case(large, pitch=4096 + 64), case(large, pitch=4096 + 8)]
    result += [case(large, nested=False), case(large, quant_type="fp4"), case(large, blocksize=128)]
    result += [case(large, FP16), case(large, FP32)]
    return result + [int8_case(shape) for shape in (large, (4096, 4096))] + [int8_case(large, FP16)]


def checks(tiny: bool = False) -> list[Case]:
    shape = (8, 256) if tiny else (1024, 2816)
    result = [
        case(shape, dtype, quant_type, nested=nested, pitch=pitch)
        for dtype in (BF16, FP16, FP32)
        for quant_type in ("nf4", "fp4")
        for nested in (False, True)
        for pitch in (None, shape[1] + 16)
    ]
    return result + [int8_case(shape, dtype) for dtype in (BF16, FP16, FP32)]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_dequantize(run_case, case):
    run_case(case)
