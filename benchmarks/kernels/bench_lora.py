"""LoRA layers of PEFT in bfloat16 autocast: groups of projections, one projection, gated MLPs.

The floor is the products with W plus the bytes in the docstrings of the kernels, which cover the low-rank products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKWARD, BOTH, FORWARD, Case

from tests.kernels import test_lora as linears
from tests.kernels import test_lora_mlp as mlps
from tests.kernels.test_lora import Layer, under_autocast

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LLAMA_8B = {"qkv": (4096, 1024, 1024), "o": (4096,), "mlp": (14336, 14336, 4096)}


def case(
    direction: str,
    tokens: int,
    inputs: int,
    outputs: Sequence[int],
    rank: int,
    dtype=BF16,
    adapter=FP32,
    *,
    name: str,
    dropout: float = 0.0,
) -> Case:
    """Projections of one input, with adapters in the dtype `adapter`."""
    layers = tuple(Layer(width, rank, dropout=dropout) for width in outputs)
    total = sum(outputs)
    elements = {FORWARD: inputs + 2 * total, BACKWARD: 3 * inputs + 2 * total}
    elements[BOTH] = elements[FORWARD] + elements[BACKWARD]
    products = {FORWARD: 1, BACKWARD: 1, BOTH: 2}[direction]
    return Case(
        op=f"lora_{name}",
        shape=f"{tokens}x{inputs}x{total}",
        dtype=dtype,
        direction=direction,
        note=f"rank {rank}" + f", dropout {dropout}" * (dropout > 0),
        bytes=tokens * elements[direction] * dtype.itemsize,
        operations=2 * tokens * inputs * total * products,
        inputs=lambda device: linears.inputs_of(layers, device, dtype, adapter, (tokens, inputs)),
        turbo=linears.turbo_of(layers, dtype),
        stock=_stock(layers, dtype, adapter),
        exact=linears.stock_of(layers),
    )


def mlp_case(
    direction: str,
    tokens: int,
    inputs: int,
    inner: int,
    rank: int,
    dtype=BF16,
    adapter=FP32,
    activation="silu",
    *,
    packed: bool = False,
) -> Case:
    """gate, up and down, the latter with as many outputs as gate has inputs."""
    hidden = (Layer(2 * inner, rank),) if packed else (Layer(inner, rank),) * 2
    layers = (*hidden, Layer(inputs, rank))
    elements = {FORWARD: inputs + 3 * inner + inner + 2 * inputs, BACKWARD: 3 * inputs + 11 * inner + 2 * inputs}
    elements[BOTH] = elements[FORWARD] + elements[BACKWARD]
    products = {FORWARD: 3, BACKWARD: 3, BOTH: 6}[direction]
    stock = mlps.stock_of(layers, activation)
    return Case(
        op="lora_mlp",
        shape=f"{tokens}x{inputs}x{inner}",
        dtype=dtype,
        direction=direction,
        note=f"rank {rank}" + f", {activation}" * (activation != "silu") + ", packed" * packed,
        bytes=tokens * elements[direction] * dtype.itemsize,
        operations=2 * tokens * inputs * inner * products,
        inputs=lambda device: mlps.inputs_of(layers, device, dtype, adapter, (tokens, inputs)),
        turbo=mlps.turbo_of(layers, activation, dtype),
        stock=stock if adapter == dtype else under_autocast(stock, dtype),
        exact=stock,
    )


def _stock(layers: Sequence[Layer], dtype: torch.dtype, adapter: torch.dtype):
    """PEFT's chain, under autocast where the adapters are wider; dropout draws its own masks."""

    def stock(x, **tensors):
        dropouts = [partial(F.dropout, p=layer.dropout) if layer.dropout else None for layer in layers]
        return tuple(
            linears.stock_projection(x, *linears.parts_of(tensors, i), layer.scaling, dropped=dropouts[i])
            for i, layer in enumerate(layers)
        )

    return stock if adapter == dtype else under_autocast(stock, dtype)


def cases(tiny: bool = False) -> list[Case]:
    if tiny:
        return [
            case(FORWARD, 8, 64, (64, 32, 32), 4, name="qkv"),
            case(BACKWARD, 8, 64, (64,), 4, name="o", dropout=0.1),
            mlp_case(BOTH, 8, 64, 96, 4),
            mlp_case(BACKWARD, 8, 64, 96, 4, packed=True),
        ]
    tokens, width, inner = 4096, 4096, LLAMA_8B["mlp"][0]
    directions = (FORWARD, BACKWARD)
    result = [
        case(direction, tokens, width, LLAMA_8B[name], rank, name=name)
        for name in ("qkv", "o")
        for rank in (16, 64)
        for direction in directions
    ]
    result += [case(direction, tokens, width, LLAMA_8B["qkv"], 16, name="qkv", dropout=0.1) for direction in directions]
    result += [mlp_case(direction, tokens, width, inner, rank) for rank in (16, 64) for direction in directions]
    return result + [mlp_case(direction, tokens, width, inner, 16, packed=True) for direction in directions]


def checks(tiny: bool = False) -> list[Case]:
    tokens, inputs, inner = (30, 64, 96) if tiny else (1000, 1024, 2816)
    dtypes = [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32)]
    result = [
        case(BOTH, tokens, inputs, (inputs, inputs // 4, inputs // 4), rank, dtype, adapter, name="qkv")
        for dtype, adapter in dtypes
        for rank in (16, 100)
    ]
    result += [
        mlp_case(BOTH, tokens, inputs, inner, rank, dtype, adapter, packed=packed)
        for dtype, adapter in dtypes
        for rank in (16, 100)
        for packed in (False, True)
    ]
    return result + [mlp_case(BOTH, tokens, inputs, inner, 16, BF16, FP32, name) for name in ("gelu_tanh", "gelu")]


@pytest.mark.parametrize("case", cases(not torch.cuda.is_available()), ids=str)
def test_lora(run_case, case):
    run_case(case)
