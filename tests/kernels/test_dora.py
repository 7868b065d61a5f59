from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import dora as module
from hf_turbo.kernels.dora import dora_linears, dora_norms
from hf_turbo.kernels.lora import Projection
from torch.utils.checkpoint import checkpoint

from tests.kernels.helpers import (
    assert_as_exact_as_stock,
    assert_same_bits,
    check_against_stock,
    outputs_and_gradients,
    randn,
    relative_error,
)
from tests.kernels.test_lora import BF16, FP16, FP32, FP64, INPUTS, SHAPE, Layer, parts_of, shape_for, tensors_of

ONE = (Layer(133, 16),)
QKV = (Layer(133, 16, 2.0, "trained"), Layer(40, 4, 0.5, "frozen"), Layer(40, 17, -1.25))


# ------------------------------------------------------------------------------------------- stock, turbo, and inputs


def stock_norms(weight, a, b, scaling):
    """`DoraLinearLayer.get_lora_weight` and `get_weight_norm` of PEFT."""
    eye = torch.eye(a.shape[1], device=a.device, dtype=a.dtype)
    adapter = F.linear(F.linear(eye, a), b).T.to(weight.dtype)
    adapted = weight + scaling * adapter
    return torch.linalg.norm(adapted, dim=1).to(adapted.dtype)


def stock_projection(x, weight, bias, a, b, m, scaling, out=None):
    """`lora.Linear.forward` and `DoraLinearLayer.forward` of PEFT; the base layer's result is in `out` if 4-bit."""
    result = F.linear(x, weight, bias)
    result = result.to(out or result.dtype)
    dtype = result.dtype
    if a is None:
        return result
    x = x.to(a.dtype)
    low = F.linear(F.linear(x, a), b)
    if m is None:
        return (result + low * scaling).to(dtype)
    scale = (m / stock_norms(weight.to(x.dtype), a.detach(), b.detach(), scaling)).view(1, -1)
    base = result if bias is None else result - bias
    return (result + ((scale - 1) * base + scale * low * scaling)).to(dtype)


def stock_of(layers, out=None):
    def stock(x, **tensors):
        return tuple(
            stock_projection(x, *parts_of(tensors, i), tensors.get(f"m{i}"), layer.scaling, out)
            for i, layer in enumerate(layers)
        )

    return stock


def turbo_of(layers, low=None, out=None, expand=None):
    def turbo(x, **tensors):
        projections = [Projection(*parts_of(tensors, i), layer.scaling, 0.0, expand) for i, layer in enumerate(layers)]
        return dora_linears(x, projections, [tensors.get(f"m{i}") for i in range(len(layers))], low, out)

    return turbo


def inputs_of(layers, device, dtype=BF16, low=None, shape=SHAPE, weight=None, m=None, plain=()) -> dict[str, Any]:
    """`low`: dtype of the adapters; `m`: that of magnitudes; `plain`: layers without them."""
    tensors = {"x": randn(*shape, device=device, dtype=dtype).requires_grad_()}
    for i, layer in enumerate(layers):
        tensors |= tensors_of(layer, i, shape[-1], device, weight or dtype, low or dtype)
        if i not in plain:
            # Near the norms of the weights, which are about 1, and not at them.
            magnitude = 1 + randn(layer.outputs, device=device, dtype=FP32, seed=10 * i + 5, scale=0.2)
            tensors[f"m{i}"] = magnitude.to(m or low or dtype).requires_grad_()
    return tensors


def check(layers, inputs, low=None, out=None):
    return check_against_stock(turbo_of(layers, low, out), stock_of(layers, out), stock_of(layers), inputs)


# --------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_one_dtype(device, dtype, layers):
    """Everything in one dtype, magnitudes too, as PEFT has it with autocast_adapter_dtype=False."""
    check(layers, inputs_of(layers, device, dtype, shape=shape_for(device)))


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_adapters_in_float32(device, dtype, layers):
    """PEFT without autocast: adapters and magnitudes in float32."""
    run = check(layers, inputs_of(layers, device, dtype, FP32, shape_for(device)), FP32)
    assert run["y0"].dtype == run["dx"].dtype == dtype
    assert run["da0"].dtype == run["db0"].dtype == run["dm0"].dtype == FP32


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
@pytest.mark.parametrize(("x", "weight", "adapter"), [(BF16, BF16, FP32), (FP32, FP32, FP32), (FP32, BF16, BF16)])
@pytest.mark.parametrize("compute", [BF16, FP16])
def test_autocast(device, compute, x, weight, adapter, layers):
    """Products in the dtype of autocast, magnitudes in float32."""
    inputs = inputs_of(layers, device, x, adapter, shape_for(device), weight, FP32)
    turbo, stock = turbo_of(layers, compute), stock_of(layers)

    def under_autocast(x, **tensors):
        with torch.autocast(device.type, compute):
            return stock(x, **tensors)

    def turbo_under_autocast(x, **tensors):
        with torch.autocast(device.type, compute):
            return turbo(x.to(compute), **tensors)

    run = check_against_stock(turbo_under_autocast, under_autocast, stock, inputs)
    assert run["y0"].dtype == compute
    assert (run["dx"].dtype, run["da0"].dtype, run["dm0"].dtype) == (x, adapter, FP32)


@pytest.mark.parametrize(("dtype", "low", "out"), [(BF16, BF16, FP32), (FP16, FP32, FP32), (FP32, FP32, BF16)])
def test_other_output_dtype(device, dtype, low, out):
    """4-bit layers under autocast give float32, with magnitudes of float32."""
    run = check(QKV, inputs_of(QKV, device, dtype, low, shape_for(device), m=FP32), low, out)
    assert run["y0"].dtype == out


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
def test_float64(device, layers):
    """Stock is the reference here, so that its own rounding is not known: a few ulp."""
    inputs = inputs_of(layers, device, FP64)
    turbo, stock = (outputs_and_gradients(f(layers), inputs) for f in (turbo_of, stock_of))
    for name, value in turbo.items():
        assert relative_error(value, stock[name]) < 1e-14, name


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("rank", [1, 16, 17, 64, 100])
def test_ranks(device, rank, dtype):
    layers = (Layer(133, rank),)
    check(layers, inputs_of(layers, device, dtype, shape=shape_for(device)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (2, 1, 5, 33), (64, 128), (65, 129), (130, 16)])
def test_shapes(device, shape):
    layers = (Layer(1, 3), Layer(128, 16, bias="trained"), Layer(129, 1))
    check(layers, inputs_of(layers, device, shape=shape))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize(("dtype", "low"), [(BF16, BF16), (BF16, FP32), (FP32, FP32), (FP16, FP16)])
@pytest.mark.parametrize("shape", [(4096, 4096), (3, 1001, 2048)])
def test_real_shapes(cuda, shape, dtype, low, rank):
    layers = (Layer(4096, rank), Layer(1024, rank, bias="trained"), Layer(1024, rank))
    check(layers, inputs_of(layers, cuda, dtype, low, shape, m=FP32), low)


@pytest.mark.gpu
@pytest.mark.parametrize("low", [BF16, FP32])
def test_wide_layer(cuda, low):
    """More columns than all programs of the backward kernel have tiles."""
    layers = (Layer(14336, 16),)
    check(layers, inputs_of(layers, cuda, BF16, low, (515, 4096), m=FP32), low)


@pytest.mark.parametrize("plain", [(0,), (1, 2)], ids=str)
def test_with_plain_lora_beside(device, plain):
    check(QKV, inputs_of(QKV, device, FP32, plain=plain))


def test_beside_a_layer_without_adapter(device):
    layers = (Layer(133, 16), Layer(40, 0, bias="frozen"))
    check(layers, inputs_of(layers, device, plain=(1,)))


# --------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize(("weight", "low"), [(BF16, BF16), (BF16, FP32), (FP32, FP32), (FP16, FP32), (FP32, BF16)])
@pytest.mark.parametrize("rank", [1, 16, 40, 100])
@pytest.mark.parametrize("shape", [(133, 75), (70, 300), (64, 16)])
def test_norms(device, shape, rank, weight, low):
    outputs, width = shape
    w = randn(outputs, width, device=device, dtype=weight, seed=1)
    a = randn(rank, width, device=device, dtype=low, seed=2)
    b = randn(outputs, rank, device=device, dtype=low, seed=3)
    exact = stock_norms(w.double(), a.double(), b.double(), 0.7)
    stock = stock_norms(w.to(FP32), a.float(), b.float(), 0.7)
    assert_as_exact_as_stock("n", dora_norms(w, a, b, 0.7), stock, exact)


@pytest.mark.parametrize("low", [BF16, FP32])
def test_norms_where_the_adapter_undoes_the_weight(device, low):
    """|W + BA| a thousandth of |W|: what its expansion into |W|^2 and two more terms would lose in float32."""
    b = randn(40, 8, device=device, dtype=BF16, seed=1)
    a = randn(8, 96, device=device, dtype=BF16, seed=2)
    weight = (-(b.double() @ a.double()) * 1.001).float()
    exact = torch.linalg.vector_norm(weight.double() + b.double() @ a.double(), dim=1)
    stock = stock_norms(weight, a.float(), b.float(), 1.0)
    assert_as_exact_as_stock("n", dora_norms(weight, a.to(low), b.to(low), 1.0), stock, exact)


def test_rows_of_zeros_are_as_in_stock(device):
    """A norm of zero: 0/0 and m/0, as PEFT has it."""
    inputs = inputs_of(ONE, device, FP32)
    with torch.no_grad():
        inputs["weight0"][5], inputs["b0"][5] = 0, 0
    turbo, stock = turbo_of(ONE)(**inputs)[0], stock_of(ONE)(**inputs)[0]
    assert torch.equal(turbo.isnan(), stock.isnan())
    assert turbo[..., 5].isnan().all()


def test_norms_are_constants(device):
    """A adapter of zero rank in effect: with B zero, A gets no gradient, as the norm depends on it no more."""
    inputs = inputs_of(ONE, device, FP32)
    inputs["b0"] = torch.zeros_like(inputs["b0"]).requires_grad_()
    run = check(ONE, inputs)
    assert not run["da0"].any()
    assert run["db0"].any()


def test_no_matrix_of_the_weights_size(device, monkeypatch):
    """Packed weights are expanded once forward, for norms and product together, and once backward."""
    inputs = inputs_of(ONE, device)
    weight, calls = inputs["weight0"], []

    def expand(packed, dtype, backward):
        calls.append(backward)
        return weight.to(dtype)

    inputs["weight0"] = torch.zeros(7, dtype=torch.uint8, device=device)
    packed = outputs_and_gradients(turbo_of(ONE, expand=expand), inputs)
    assert calls == [False, True]
    assert_same_bits(packed, outputs_and_gradients(turbo_of(ONE), inputs | {"weight0": weight}))


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(
    "trained",
    [("x",), ("m0",), ("a0",), ("b0",), ("bias0",), ("m0", "m2"), ("a0", "b2", "m1"), ("x", "bias0", "m0")],
    ids="+".join,
)
@pytest.mark.parametrize("low", [BF16, FP32])
def test_partly_trained(device, low, trained):
    inputs = inputs_of(QKV, device, BF16, low)
    for name, value in inputs.items():
        value.requires_grad_(name in trained)
    run = check(QKV, inputs, low)
    assert run.keys() == {"y0", "y1", "y2"} | {"d" + name for name in trained}


def test_nothing_trained(device):
    inputs = {name: value.detach() for name, value in inputs_of(QKV, device).items()}
    assert not any(y.requires_grad for y in turbo_of(QKV)(**inputs))
    check(QKV, inputs)


@pytest.mark.parametrize("used", [(0,), (2,), (0, 1)])
def test_unused_outputs(device, used):
    """What stock leaves without a gradient has none."""
    inputs = inputs_of(QKV, device, FP32)
    differentiated = [name for name, value in inputs.items() if value.requires_grad]

    def gradients(function):
        outputs = [function(**inputs)[i] for i in used]
        leaves = [inputs[name] for name in differentiated]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)

    for name, actual, expected in zip(differentiated, gradients(turbo_of(QKV)), gradients(stock_of(QKV)), strict=True):
        assert (actual is None) == (expected is None), name
        if expected is not None:
            assert relative_error(actual, expected.double()) < 1e-5, name


def test_expanded_output_gradients(device):
    """As those of a sum are: of strides zero."""
    inputs = inputs_of(ONE, device, FP32)
    expanded = outputs_and_gradients(turbo_of(ONE), inputs, lambda i, y: y.new_ones(()).expand_as(y))
    assert_same_bits(expanded, outputs_and_gradients(turbo_of(ONE), inputs))


@pytest.mark.parametrize("low", [BF16, FP32])
@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, INPUTS)])
def test_no_rows(device, shape, low):
    run = outputs_and_gradients(turbo_of(QKV, low), inputs_of(QKV, device, low=low, shape=shape))
    assert run["dx"].shape == shape
    for i, layer in enumerate(QKV):
        assert run[f"y{i}"].shape == (*shape[:-1], layer.outputs)
        assert not any(run[f"d{name}{i}"].any() for name in ("a", "b", "m"))


VIEWS = {
    "columns": lambda x: x[..., 8:40],
    "rows": lambda x: x[:, 1:],
    "transposed": lambda x: x.transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
def test_views(device, view):
    width = view(torch.empty(SHAPE)).shape[-1]
    inputs = inputs_of(QKV, device, FP32, shape=(1, width))
    inputs["x"] = randn(*SHAPE, device=device, dtype=FP32).requires_grad_()
    turbo, stock = turbo_of(QKV), stock_of(QKV)
    check_against_stock(
        lambda x, **tensors: turbo(view(x), **tensors),
        lambda x, **tensors: stock(view(x), **tensors),
        lambda x, **tensors: stock(view(x), **tensors),
        inputs,
    )


# ----------------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("low", [BF16, FP32])
def test_same_bits_every_time(device, low):
    shape = (700, 1000) if device.type == "cuda" else (200, INPUTS)
    inputs = inputs_of(QKV, device, BF16, low, shape, m=FP32)
    first = outputs_and_gradients(turbo_of(QKV, low), inputs)
    for _ in range(3 if device.type == "cuda" else 1):
        assert_same_bits(outputs_and_gradients(turbo_of(QKV, low), inputs), first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(device, use_reentrant):
    inputs = inputs_of(QKV, device)
    plain = outputs_and_gradients(turbo_of(QKV), inputs)

    def recomputed(x, **tensors):
        names = list(tensors)
        call = lambda x, *values: turbo_of(QKV)(x, **dict(zip(names, values, strict=True)))  # noqa: E731
        return checkpoint(call, x, *tensors.values(), use_reentrant=use_reentrant)

    assert_same_bits(outputs_and_gradients(recomputed, inputs), plain)


def test_changed_between_forward_and_backward(device):
    """Autograd notices what is written on what backward needs."""
    inputs = inputs_of(ONE, device, FP32)
    (y,) = turbo_of(ONE)(**inputs)
    with torch.no_grad():
        inputs["m0"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_magnitudes_need_no_copies(device):
    inputs = inputs_of(ONE, device, FP32)
    strided = torch.empty(133, 2, device=device)
    strided[:, 0] = inputs["m0"].detach()
    inputs["m0"] = strided[:, 0].requires_grad_()
    check(ONE, inputs)


def test_ops_are_registered_right(device):
    inputs = {name: value.detach() for name, value in inputs_of(ONE, device, FP32).items()}
    weight, a, b, m = (inputs[name] for name in ("weight0", "a0", "b0", "m0"))
    n = dora_norms(weight, a, b, 2.0)
    base, s = randn(9, 133, device=device, dtype=FP32), randn(9, 16, device=device, dtype=FP32)
    ops = torch.ops.hf_turbo
    for op, arguments in (
        (ops.dora_norms, (weight, a, b, 2.0)),
        (ops.dora, (base, s, b, m, n, m, BF16)),
        (ops.dora, (base, s, b, m, n, None, FP32)),
        (ops.dora_backward, (base, base, s, b, m, n, BF16, FP32)),
        (ops.dora_backward, (base, base, s, b, m, n, None, None)),
        (ops.dora_backward, (base, None, s, b, m, n, FP32, None)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"m0": (40,)}, ValueError, "magnitude must be"),
        ({"a0": None, "b0": None}, ValueError, "needs an adapter"),
        ({"b0": (133, 4)}, ValueError, "must be"),
    ],
)
def test_what_does_not_fit_is_refused(device, change, error, message):
    inputs = inputs_of(ONE, device)
    for name, shape in change.items():
        inputs[name] = None if shape is None else torch.zeros(shape, device=device, dtype=BF16)
    with pytest.raises(error, match=message):
        turbo_of(ONE)(**inputs)


def test_dropout_is_refused(device):
    inputs = inputs_of(ONE, device)
    projection = Projection(*parts_of(inputs, 0), 1.0, 0.1)
    with pytest.raises(ValueError, match="dropout"):
        dora_linears(inputs["x"], [projection], [inputs["m0"]])
    with pytest.raises(ValueError, match="1 projections and 2"):
        dora_linears(inputs["x"], [projection], [inputs["m0"]] * 2)


def test_kernels_run(device, monkeypatch):
    """All three, where Triton is used."""
    launched = []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda kernel, *args, **meta: launched.append(1) or launch(kernel, *args, **meta)
    )
    outputs_and_gradients(turbo_of(ONE), inputs_of(ONE, device))
    assert len(launched) == (0 if device.type == "cpu" and not module.use_triton(torch.empty(1)) else 3)
