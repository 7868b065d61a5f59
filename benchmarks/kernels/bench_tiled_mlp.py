"""Gated MLPs of long passes by tiles of rows, against the same MLP recomputed whole in backward.

The floor is the products: three in forward, gate and up again, and three in backward; six where weights are trained.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import BOTH, Case
from torch.utils.checkpoint import checkpoint

from tests.kernels import test_tiled_mlp as tiles
from tests.kernels.test_lora import Layer, under_autocast
from tests.kernels.test_lora_mlp import inputs_of, stock_of

BF16, FP32 = torch.bfloat16, torch.float32


def _recomputed(function):
    """Under checkpointing, as a decoder layer is."""
    return lambda x, **tensors: checkpoint(partial(function, **tensors), x, use_reentrant=False)


def case(tokens: int, width: int, inner: int, rows: int, *, rank: int = 0, dtype=BF16) -> Case:
    """Rank 0: all weights are trained."""
    layers = (Layer(inner, rank), Layer(inner, rank), Layer(width, rank))
    make, tiled = partial(inputs_of, layers, dtype=dtype, low=FP32, shape=(tokens, width)), tiles.tiled_lora
    stock, turbo = under_autocast(stock_of(layers), dtype), partial(tiled, layers, low=dtype)
    exact = stock_of(layers)
    if not rank:

        def make(device):
            inputs = inputs_of(layers, device, dtype, shape=(tokens, width))
            return {name: value.requires_grad_() for name, value in inputs.items()}

        stock = exact = tiles.stock_dense()
        turbo = tiles.tiled_dense
    return Case(
        op="tiled_mlp",
        shape=f"{tokens}x{width}x{inner}",
        dtype=dtype,
        direction=BOTH,
        note=(f"rank {rank}" if rank else "trained weights") + f", {rows} rows",
        bytes=4 * tokens * width * dtype.itemsize,
        operations=2 * tokens * width * inner * (8 if rank else 11),
        inputs=make,
        turbo=turbo(rows=rows),
        stock=_recomputed(stock),
        exact=exact,
    )


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [case(40, 64, 96, 16, rank=4), case(40, 64, 96, 16)]
    sizes = 32_768, 4096, 14_336
    result = [case(*sizes, rows, rank=rank) for rank in (16, 0) for rows in (2048, 4096, 8192, 16_384)]
    return [*result, *(case(32_768, 2048, 8192, rows, rank=16) for rows in (4096, 8192, 16_384))]


def checks(tiny: bool = False) -> list[Case]:
    sizes = (50, 64, 96, 16) if tiny else (1000, 1024, 2816, 384)
    return [case(*sizes, rank=rank) for rank in (16, 0)]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_tiled_mlp(run_case, case):
    run_case(case)
