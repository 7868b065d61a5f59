"""Gated MLPs by tiles of rows: as exact as stock, in any size of tile, and computed once each way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import _launch, lora
from hf_turbo.kernels import tiled_mlp as module
from hf_turbo.kernels.glu import ACTIVATIONS
from hf_turbo.kernels.lora_mlp import lora_gated_mlp
from hf_turbo.kernels.tiled_mlp import Tile, tiled_lora_mlp_of, tiled_mlp
from hf_turbo.patches.sums import full_sums
from torch.utils.checkpoint import checkpoint

from tests.kernels.helpers import (
    Inputs,
    assert_same_bits,
    check_against_stock,
    outputs_and_gradients,
    randn,
    relative_error,
)
from tests.kernels.test_glu import STOCK_ACTIVATIONS
from tests.kernels.test_lora import projections_of, saved_by, storages, under_autocast
from tests.kernels.test_lora_mlp import (
    BOTH,
    INPUTS,
    PACKED,
    SEPARATE,
    SHAPE,
    inputs_of,
    layers_for,
    shape_for,
    stock_of,
    with_biases,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# 70 rows (1,400 on a GPU): tiles that do not divide them, as many as rows, and one that holds them all.
TILES = pytest.mark.parametrize("rows", [16, 33, 1, 70, 4096])


@pytest.fixture(params=["torch", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Without the interpreter, which is slow: the kernels are those of glu.py and lora_mlp.py."""
    if request.param == "cuda" and (not torch.cuda.is_available() or _launch.INTERPRET):
        pytest.skip("needs a CUDA device and no TRITON_INTERPRET")
    if request.param == "torch":
        monkeypatch.setattr(_launch, "INTERPRET", False)
        yield torch.device("cpu")
        return
    with full_sums():
        yield torch.device("cuda", torch.cuda.current_device())


def tiled_lora(layers, activation="silu", low=None, out=None, rows=16, keep=False):
    def turbo(x, **tensors):
        projections = projections_of(layers, tensors)
        return tiled_lora_mlp_of(x.shape[-1], x.dtype, projections, activation, low, out)(x, Tile(rows, keep))

    return turbo


def dense_inputs(device, dtype=BF16, packed=False, bias=True, frozen=False, weight=None, shape=SHAPE) -> Inputs:
    inner, outputs = (2816, 1000) if device.type == "cuda" else (69, 40)
    shapes = [(2 * inner, shape[-1]), (outputs, inner)] if packed else [(inner, shape[-1])] * 2 + [(outputs, inner)]
    tensors: dict[str, Any] = {"x": randn(*shape, device=device, dtype=dtype, scale=2.0).requires_grad_()}
    for i, (rows, columns) in enumerate(shapes):
        values = randn(rows, columns, device=device, dtype=weight or dtype, seed=10 * i + 1, scale=columns**-0.5)
        tensors[f"weight{i}"] = values.requires_grad_(not frozen)
        if bias:
            values = randn(rows, device=device, dtype=weight or dtype, seed=10 * i + 2)
            tensors[f"bias{i}"] = values.requires_grad_(not frozen)
    return tensors


def stock_dense(activation="silu"):
    """LlamaMLP and Phi3MLP."""

    def stock(x, **tensors):
        weights = [tensors[name] for name in sorted(tensors) if name.startswith("weight")]
        biases = [tensors.get(f"bias{i}") for i in range(len(weights))]
        hidden = [F.linear(x, *each) for each in zip(weights[:-1], biases[:-1], strict=True)]
        gate, up = hidden if len(hidden) == 2 else hidden[0].chunk(2, dim=-1)
        return F.linear(STOCK_ACTIVATIONS[activation](gate) * up, weights[-1], biases[-1])

    return stock


def tiled_dense(activation="silu", rows=16, keep=False):
    def turbo(x, **tensors):
        weights = [tensors[name] for name in sorted(tensors) if name.startswith("weight")]
        biases = [tensors.get(f"bias{i}") for i in range(len(weights))]
        return tiled_mlp(x, weights, biases, activation, Tile(rows, keep))

    return turbo


@BOTH
@TILES
def test_tiles_with_adapters(device, rows, layers):
    layers = with_biases(layers_for(device, layers))
    inputs = inputs_of(layers, device, shape=shape_for(device))
    check_against_stock(tiled_lora(layers, rows=rows), stock_of(layers), stock_of(layers), inputs)


@BOTH
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "low"), [(BF16, FP32), (FP16, FP16), (FP32, FP32)])
def test_dtypes_with_adapters(device, dtype, low, activation, layers):
    layers = layers_for(device, layers)
    inputs = inputs_of(layers, device, dtype, low, shape_for(device))
    turbo = tiled_lora(layers, activation, low)
    check_against_stock(turbo, stock_of(layers, activation), stock_of(layers, activation), inputs)


@BOTH
def test_autocast_with_adapters(device, layers):
    layers = layers_for(device, layers)
    inputs = inputs_of(layers, device, FP32, FP32, shape_for(device), FP32)
    turbo = tiled_lora(layers, low=BF16)
    stock = stock_of(layers)
    run = check_against_stock(lambda x, **t: turbo(x.to(BF16), **t), under_autocast(stock), stock, inputs)
    assert (run["y"].dtype, run["dx"].dtype, run["da0"].dtype) == (BF16, FP32, FP32)


@pytest.mark.skipif(not _launch.INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("adapted", [True, False])
def test_interpreted(adapted):
    """A tile's parts of larger tensors, as the kernels read them."""
    cpu = torch.device("cpu")
    if adapted:
        inputs = inputs_of(SEPARATE, cpu)
        check_against_stock(tiled_lora(SEPARATE, rows=33), stock_of(SEPARATE), stock_of(SEPARATE), inputs)
    else:
        check_against_stock(tiled_dense(rows=33), stock_dense(), stock_dense(), dense_inputs(cpu, packed=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("rows", [16, 70])
def test_dense(device, rows, dtype, packed):
    inputs = dense_inputs(device, dtype, packed, shape=shape_for(device))
    check_against_stock(tiled_dense(rows=rows), stock_dense(), stock_dense(), inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("x", "weight"), [(FP32, FP32), (BF16, FP32)])
def test_dense_under_autocast(device, x, weight, packed):
    inputs = dense_inputs(device, x, packed, weight=weight, shape=shape_for(device))
    run = check_against_stock(under_autocast(tiled_dense()), under_autocast(stock_dense()), stock_dense(), inputs)
    assert (run["y"].dtype, run["dx"].dtype, run["dweight0"].dtype) == (BF16, x, weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", ["x", "weight0", "weight1 bias2", "weight2"])
def test_dense_partly_trained(device, trained, bias):
    inputs = dense_inputs(device, bias=bias, frozen=True)
    inputs["x"].requires_grad_("x" in trained)
    for name in inputs.keys() & set(trained.split()):
        inputs[name].requires_grad_()
    check_against_stock(tiled_dense(), stock_dense(), stock_dense(), inputs)


@BOTH
@pytest.mark.parametrize("trained", ["x", "a0 b0", "b1"])
def test_adapters_partly_trained(device, trained, layers):
    inputs = inputs_of(layers, device)
    for name, value in inputs.items():
        value.requires_grad_(name in trained.split())
    check_against_stock(tiled_lora(layers), stock_of(layers), stock_of(layers), inputs)


def test_gradients_are_added_up_in_float32(device):
    """A sum of many tiles that is rounded at each of them loses the digits that a rounding at the end leaves."""
    inputs = dense_inputs(device, frozen=True, bias=False)
    inputs["weight1"].requires_grad_()
    wide = {name: each.detach().double().requires_grad_(each.requires_grad) for name, each in inputs.items()}
    exact = outputs_and_gradients(stock_dense(), wide)["dweight1"]
    error = relative_error(outputs_and_gradients(tiled_dense(rows=1), inputs)["dweight1"], exact)
    at_once = relative_error(outputs_and_gradients(tiled_dense(rows=4096), inputs)["dweight1"], exact)
    assert error < 1.05 * at_once


@pytest.mark.parametrize("rows", [16, 33])
def test_what_is_kept_changes_no_bit(device, rows):
    dense, adapted = dense_inputs(device), inputs_of(SEPARATE, device)
    for make, inputs in ((tiled_dense, dense), (lambda **kwargs: tiled_lora(SEPARATE, **kwargs), adapted)):
        runs = [outputs_and_gradients(make(rows=rows, keep=keep), inputs) for keep in (False, True)]
        assert_same_bits(*runs)


def test_float64_rows_are_those_of_the_whole(device):
    inputs = inputs_of(SEPARATE, device, FP64)
    runs = [
        outputs_and_gradients(function, inputs)
        for function in (tiled_lora(SEPARATE), lambda x, **t: lora_gated_mlp(x, projections_of(SEPARATE, t), "silu"))
    ]
    for name, value in runs[0].items():
        assert relative_error(value, runs[1][name]) < 2e-15, name


def dropping(layers):
    return tuple(layer._replace(dropout=dropout) for layer, dropout in zip(layers, (0.3, 0.0, 0.6), strict=False))


@BOTH
@pytest.mark.parametrize("low", [BF16, FP32])
def test_dropout(device, low, layers, monkeypatch):
    """Gradients are those of the masks that forward drew, tile by tile."""
    layers = dropping(layers)
    masks: dict[tuple[int, int], torch.Tensor] = {}
    inputs = inputs_of(layers, device, FP32, low=FP32)
    shape, rows = SHAPE[:-1], 33
    drawn: list[torch.Tensor] = []
    stock_dropout = lora._lora_dropout

    def watched(x, dropout, seed):
        kept = stock_dropout(torch.ones_like(x), dropout, seed)
        drawn.append(kept)
        return stock_dropout(x, dropout, seed)

    torch.manual_seed(3)
    with monkeypatch.context() as patch:
        patch.setattr(lora, "_lora_dropout", watched)
        run = outputs_and_gradients(tiled_lora(layers, rows=rows, low=FP32), inputs)
    torch.manual_seed(3)
    assert_same_bits(run, outputs_and_gradients(tiled_lora(layers, rows=rows, low=FP32, keep=True), inputs))
    # In forward, by tile, first those of x and then that of h.
    tiles, each = -(-shape[0] * shape[1] // rows), sum(layer.dropout > 0 for layer in layers)
    forward = drawn[: tiles * each]
    assert len({mask.sum().item() for mask in forward}) > 1
    places = [i for i, layer in enumerate(layers) if layer.dropout]
    for place, i in enumerate(places):
        masks[i] = torch.cat(forward[place::each])

    def stock(x, **tensors):
        def part(x, i):
            weight, bias, a, b = (tensors.get(f"{name}{i}") for name in ("weight", "bias", "a", "b"))
            dropped = x * masks[i].to(x.dtype).view(x.shape) if i in masks else x
            return F.linear(x, weight, bias) + F.linear(F.linear(dropped, a), b) * layers[i].scaling

        hidden = [part(x, i) for i in range(len(layers) - 1)]
        gate, up = hidden if len(hidden) == 2 else hidden[0].chunk(2, dim=-1)
        return part(F.silu(gate) * up, len(layers) - 1)

    wide = {name: each.detach().double().requires_grad_(each.requires_grad) for name, each in inputs.items()}
    exact = outputs_and_gradients(stock, wide)
    for name, value in run.items():
        assert relative_error(value, exact[name]) < 1e-5, name


@BOTH
def test_saves_its_input_alone(device, layers):
    inputs = inputs_of(layers, device)
    x = inputs["x"]
    saved = saved_by(lambda: tiled_lora(layers)(**inputs))
    own = storages(inputs.values())
    extra = [each for each in saved if each.untyped_storage().data_ptr() not in own]
    assert sum(each.numel() for each in extra) <= sum(v.numel() for n, v in inputs.items() if n[0] in "ab")
    assert any(each.data_ptr() == x.data_ptr() for each in saved)


@pytest.mark.parametrize("dense", [True, False])
def test_runs_once_each_way_under_checkpointing(device, dense, monkeypatch):
    """Products with gate and up: one of each tile in forward and one in backward; none in recomputation."""
    counts = {"forward": 0, "hidden": 0}
    cls = module._Dense if dense else module._WithAdapters
    stock_hidden, stock_forward = cls.hidden, module._forward

    def hidden(self, *args):
        counts["hidden"] += 1
        return stock_hidden(self, *args)

    def forward(*args):
        counts["forward"] += 1
        return stock_forward(*args)

    monkeypatch.setattr(cls, "hidden", hidden)
    monkeypatch.setattr(module, "_forward", forward)
    inputs = dense_inputs(device) if dense else inputs_of(SEPARATE, device)
    function = tiled_dense(rows=16) if dense else tiled_lora(SEPARATE, rows=16)

    def layer(x, tensors):
        y = function(x.sin(), **tensors)
        return y + x.sum()

    tensors = {name: each for name, each in inputs.items() if name != "x"}
    checkpoint(layer, inputs["x"], tensors, use_reentrant=False).sum().backward()
    tiles = -(-SHAPE[0] * SHAPE[1] // 16)
    assert counts == {"forward": 1, "hidden": 2 * tiles}


def test_expands_each_weight_once_each_way(device):
    inputs = inputs_of(SEPARATE, device)
    calls: list[bool] = []

    def expand(weight, dtype, backward):
        calls.append(backward)
        return weight.to(dtype)

    def turbo(x, **tensors):
        projections = projections_of(SEPARATE, tensors, expand)
        return tiled_lora_mlp_of(INPUTS, BF16, projections, "silu", None, None)(x, Tile(16))

    outputs_and_gradients(turbo, inputs)
    assert calls == [False] * 3 + [True] * 3


@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, INPUTS)])
def test_no_rows(device, shape):
    for function, inputs in (
        (tiled_lora(PACKED), inputs_of(PACKED, device, shape=shape)),
        (tiled_dense(), dense_inputs(device, shape=shape)),
    ):
        run = outputs_and_gradients(function, inputs)
        assert run["y"].shape == (*shape[:-1], len(inputs["weight2" if "weight2" in inputs else "weight1"]))
        assert all(not value.any() for value in run.values())


def test_a_frozen_weight_changed_before_backward_is_an_error(device):
    inputs = inputs_of(SEPARATE, device)
    y = tiled_lora(SEPARATE)(**inputs)
    with torch.no_grad():
        inputs["weight1"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_bad_arguments(device):
    inputs = dense_inputs(device)
    x, weights = inputs["x"], [inputs[f"weight{i}"] for i in range(3)]
    for arguments, error in (
        ((x, weights, [None] * 3, "relu"), ValueError),
        ((x, weights[:1], [None], "silu"), ValueError),
        ((x, weights[::-1], [None] * 3, "silu"), ValueError),
        ((x.float(), weights, [None] * 3, "silu"), TypeError),
    ):
        with pytest.raises(error):
            tiled_mlp(*arguments, Tile(16))
