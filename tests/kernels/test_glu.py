from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import glu as module
from hf_turbo.kernels.glu import ACTIVATIONS, glu, glu_linear, glu_packed, glu_packed_linear
from transformers.activations import ACT2FN

from tests.kernels.helpers import (
    assert_same_bits,
    assert_same_specials,
    check_against_stock,
    outputs_and_gradients,
    randn,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The activation modules that the MLPs of transformers hold.
STOCK_ACTIVATIONS = {"silu": ACT2FN["silu"], "gelu_tanh": ACT2FN["gelu_pytorch_tanh"], "gelu": ACT2FN["gelu"]}


def stock_of(activation):
    """act_fn(gate_proj(x)) * up_proj(x), as in LlamaMLP, from gate and up."""
    return lambda gate, up: STOCK_ACTIVATIONS[activation](gate) * up


def stock_packed_of(activation):
    """As in GlmMLP and Phi3MLP."""

    def stock(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return up * STOCK_ACTIVATIONS[activation](gate)

    return stock


def stock_linear_of(activation):
    return lambda gate, up, weight, bias=None: F.linear(STOCK_ACTIVATIONS[activation](gate) * up, weight, bias)


def exact_of(activation):
    """The same in float64, where the activations of torch are exact enough."""
    return stock_of(activation)


def inputs_of(shape, device, dtype=BF16, scale=2.0) -> dict[str, Any]:
    return {
        "gate": randn(*shape, device=device, dtype=dtype, scale=scale).requires_grad_(),
        "up": randn(*shape, device=device, dtype=dtype, seed=1).requires_grad_(),
    }


def packed_of(inputs):
    return {"gate_up": torch.cat([inputs["gate"], inputs["up"]], -1).detach().requires_grad_()}


def linear_inputs_of(shape, outputs, device, dtype=BF16, weight_dtype=None, *, bias=True, frozen=False):
    inputs = inputs_of(shape, device, dtype)
    weight = randn(outputs, shape[-1], device=device, dtype=weight_dtype or dtype, seed=2) / shape[-1] ** 0.5
    inputs["weight"] = weight.requires_grad_(not frozen)
    if bias:
        values = randn(outputs, device=device, dtype=weight_dtype or dtype, seed=3)
        inputs["bias"] = values.requires_grad_(not frozen)
    return inputs


def turbo_linear_of(activation):
    return lambda gate, up, weight, bias=None: glu_linear(gate, up, weight, bias, activation)


def shape_for(device):
    return (2, 700, 1408) if device.type == "cuda" else (2, 7, 300)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_separate(device, activation, dtype):
    inputs = inputs_of(shape_for(device), device, dtype)
    check_against_stock(lambda gate, up: glu(gate, up, activation), stock_of(activation), exact_of(activation), inputs)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed(device, activation, dtype):
    inputs = packed_of(inputs_of(shape_for(device), device, dtype))
    stock = stock_packed_of(activation)
    check_against_stock(lambda gate_up: glu_packed(gate_up, activation), stock, stock, inputs)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 100), (2, 2049), (9,)])
def test_shapes(device, shape):
    inputs = inputs_of(shape, device)
    check_against_stock(lambda gate, up: glu(gate, up, "silu"), stock_of("silu"), exact_of("silu"), inputs)
    packed, stock = packed_of(inputs), stock_packed_of("silu")
    check_against_stock(lambda gate_up: glu_packed(gate_up, "silu"), stock, stock, packed)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 14336), (8192, 3072), (2, 1000, 5461)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_real_shapes(cuda, shape, activation):
    inputs = inputs_of(shape, cuda)
    check_against_stock(lambda gate, up: glu(gate, up, activation), stock_of(activation), exact_of(activation), inputs)


def test_mixed_dtypes(device):
    inputs = inputs_of((5, 33), device)
    inputs["up"] = inputs["up"].detach().float().requires_grad_()
    check_against_stock(lambda gate, up: glu(gate, up, "silu"), stock_of("silu"), exact_of("silu"), inputs)


@pytest.mark.parametrize("differentiated", ["gate", "up"])
def test_one_of_two(device, differentiated):
    inputs = inputs_of((5, 33), device)
    for name, value in inputs.items():
        value.requires_grad_(name == differentiated)
    run = check_against_stock(lambda gate, up: glu(gate, up, "silu"), stock_of("silu"), exact_of("silu"), inputs)
    assert run.keys() == {"y", "d" + differentiated}


VIEWS = {
    "columns": lambda x: x[..., 8:40],
    "rows": lambda x: x[:, 1:],
    "transposed": lambda x: x.transpose(0, 1),
    "columns, transposed": lambda x: x[..., 8:40].transpose(0, 1),
    "every second element": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("up_view", ["same", "contiguous"])
@pytest.mark.parametrize("view", VIEWS)
def test_layouts(device, view, up_view):
    """Any views give the bits of their contiguous copies."""
    view_of = VIEWS[view]

    def on_view(gate, up):
        up = view_of(up)
        return glu(view_of(gate), up if up_view == "same" else up.contiguous(), "silu")

    def on_copy(gate, up):
        return glu(view_of(gate).contiguous(), view_of(up).contiguous(), "silu")

    inputs = inputs_of((3, 2, 64), device)
    assert_same_bits(outputs_and_gradients(on_view, inputs), outputs_and_gradients(on_copy, inputs))
    packed = packed_of(inputs)
    actual = outputs_and_gradients(lambda gate_up: glu_packed(view_of(gate_up), "silu"), packed)
    expected = outputs_and_gradients(lambda gate_up: glu_packed(view_of(gate_up).contiguous(), "silu"), packed)
    if view != "expanded":  # a sum of gradients, in another order
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("start", ["expanded", "transposed", "strided"])
def test_incoming_gradient_layouts(device, start, packed):
    inputs = inputs_of((3, 2, 32), device)
    inputs = packed_of(inputs) if packed else inputs

    def start_of(index, y):
        if start == "expanded":
            return torch.ones((), device=device, dtype=y.dtype).expand(y.shape)
        if start == "transposed":
            return randn(2, 3, 32, device=device, dtype=y.dtype).transpose(0, 1)
        return randn(3, 2, 64, device=device, dtype=y.dtype)[..., 32:]

    function = (lambda gate_up: glu_packed(gate_up, "silu")) if packed else (lambda gate, up: glu(gate, up, "silu"))
    actual = outputs_and_gradients(function, inputs, start_of)
    assert_same_bits(actual, outputs_and_gradients(function, inputs, lambda i, y: start_of(i, y).contiguous()))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_linear(device, dtype, bias, frozen):
    shape, outputs = ((2, 700, 1408), 512) if device.type == "cuda" else ((2, 7, 96), 40)
    inputs = linear_inputs_of(shape, outputs, device, dtype, bias=bias, frozen=frozen)
    check_against_stock(turbo_linear_of("silu"), stock_linear_of("silu"), stock_linear_of("silu"), inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_packed(device, activation):
    inputs = linear_inputs_of((2, 7, 96), 40, device)
    inputs = packed_of(inputs) | {name: inputs[name] for name in ("weight", "bias")}

    def stock(gate_up, weight, bias):
        return F.linear(stock_packed_of(activation)(gate_up), weight, bias)

    def turbo(gate_up, weight, bias):
        return glu_packed_linear(gate_up, weight, bias, activation)

    check_against_stock(turbo, stock, stock, inputs)


@pytest.mark.parametrize("trained", [("weight",), ("bias",), ("weight", "up"), ("gate",)])
def test_linear_partly_trained(device, trained):
    inputs = linear_inputs_of((2, 7, 96), 40, device)
    for name, value in inputs.items():
        value.requires_grad_(name in trained)
    run = check_against_stock(turbo_linear_of("silu"), stock_linear_of("silu"), stock_linear_of("silu"), inputs)
    assert run.keys() == {"y"} | {"d" + name for name in trained}


@pytest.mark.parametrize("layout", ["contiguous", "columns", "transposed"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_product_is_made_again_bit_for_bit(device, activation, packed, layout, dtype):
    """backward's h is forward's: dweight is that of the product that the user's loss has seen."""
    shape = (257, 1000) if device.type == "cuda" else (2, 64)
    inputs = inputs_of((3, *shape), device, dtype)
    gate_up = packed_of(inputs)["gate_up"].detach()
    gate, up = (gate_up, None) if packed else (inputs["gate"].detach(), inputs["up"].detach())
    view = {"contiguous": lambda x: x, "columns": lambda x: x[..., :50], "transposed": lambda x: x.transpose(0, 1)}[
        layout
    ]
    gate, up = view(gate), up if up is None else view(up)
    h = torch.ops.hf_turbo.glu(gate, up, activation, dtype)
    dh = randn(*h.shape, device=device, dtype=dtype)
    expected = torch.ops.hf_turbo.glu_backward(dh, gate, up, activation)
    actual = torch.ops.hf_turbo.glu_backward_keep_h(dh, gate, up, activation)
    assert torch.equal(dh, h)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_product_is_not_saved(device):
    inputs = linear_inputs_of((2, 7, 96), 40, device)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        turbo_linear_of("silu")(**inputs)
    assert {t.data_ptr() for t in kept} == {inputs[name].data_ptr() for name in ("gate", "up", "weight")}


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, FP32), (FP32, BF16), (BF16, BF16)])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_under_autocast(device, dtypes, frozen):
    inputs = linear_inputs_of((2, 7, 96), 40, device, *dtypes, frozen=frozen)

    def under_autocast(function):
        def wrapped(**tensors):
            with torch.autocast(device.type, BF16):
                return function(**tensors)

        return wrapped

    run = check_against_stock(
        under_autocast(turbo_linear_of("silu")),
        under_autocast(stock_linear_of("silu")),
        stock_linear_of("silu"),
        inputs,
    )
    assert run["y"].dtype == BF16
    assert run["dgate"].dtype == dtypes[0]


def test_linear_refuses_mixed_dtypes(device):
    inputs = linear_inputs_of((2, 8), 4, device, BF16, FP32)
    with pytest.raises(TypeError, match="cast them to one dtype"):
        turbo_linear_of("silu")(**inputs)


def test_same_bits_twice_and_backward_twice(device):
    inputs = linear_inputs_of((2, 7, 96), 40, device)
    runs = [outputs_and_gradients(turbo_linear_of("silu"), inputs) for _ in range(2)]
    assert_same_bits(*runs)
    y = turbo_linear_of("silu")(**inputs)
    grads = [torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(device, shape):
    inputs = linear_inputs_of(shape, 4, device)
    run = outputs_and_gradients(turbo_linear_of("silu"), inputs)
    assert run["y"].shape == (*shape[:-1], 4)
    assert run["dgate"].shape == run["dup"].shape == shape
    assert not run["dweight"].any()
    assert not run["dbias"].any()
    assert outputs_and_gradients(lambda gate_up: glu_packed(gate_up, "gelu"), packed_of(inputs))["y"].shape == shape


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_nan_infinity_and_large(device, dtype, activation):
    special = [float("nan"), float("inf"), -float("inf"), 1e3, -1e3, 90.0, -90.0, 0.0]
    gate = torch.tensor(special, device=device, dtype=dtype).repeat(2).requires_grad_()
    up = torch.tensor([1.0] * 8 + [float("inf")] * 8, device=device, dtype=dtype).requires_grad_()
    inputs = {"gate": gate, "up": up}
    actual = outputs_and_gradients(lambda gate, up: glu(gate, up, activation), inputs)
    # float64, because torch's float32 gelu(inf) is NaN on CPUs.
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    expected = outputs_and_gradients(stock_of(activation), wide)
    for name in ("y", "dup", "dgate"):
        # Where the factor is a rounding error of zero, 0 * inf and tiny * inf differ.
        rows = slice(0, 8) if name != "dup" else slice(None)
        assert_same_specials(name, actual[name][rows], expected[name][rows])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    gate = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    up = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    packed_weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda g, u: glu(g, u, activation), (gate, up))
    assert check(lambda g: glu_packed(g, activation), (gate,))
    assert check(lambda g, u, w, b: glu_linear(g, u, w, b, activation), (gate, up, weight, bias))
    assert check(lambda g, w: glu_packed_linear(g, w, None, activation), (gate, packed_weight))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(device, packed):
    gate = randn(3, 4, 16, device=device, dtype=BF16).transpose(0, 1)
    up = None if packed else randn(4, 3, 16, device=device, dtype=FP32)
    h = torch.ops.hf_turbo.glu(gate, up, "silu", FP32)
    torch.library.opcheck(torch.ops.hf_turbo.glu.default, (gate, up, "silu", FP32))
    torch.library.opcheck(torch.ops.hf_turbo.glu_backward.default, (h, gate, up, "silu"))
    torch.library.opcheck(torch.ops.hf_turbo.glu_backward_keep_h.default, (h.clone(), gate, up, "silu"))


def test_compile(device):
    """One graph, and the same bits."""
    inputs = linear_inputs_of((2, 3, 16), 4, device)
    function = turbo_linear_of("silu")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same_bits(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs))


def test_refusals(device):
    gate, weight = randn(2, 8, device=device, dtype=BF16), randn(4, 8, device=device, dtype=BF16)
    with pytest.raises(ValueError, match="activation"):
        glu(gate, gate, "relu")
    with pytest.raises(ValueError, match="one shape"):
        glu(gate, gate[:, :4], "silu")
    with pytest.raises(ValueError, match="even"):
        glu_packed(gate[:, :7], "silu")
    with pytest.raises(ValueError, match="weight"):
        glu_packed_linear(gate, weight, None, "silu")
    with pytest.raises(ValueError, match="bias"):
        glu_linear(gate, gate, weight, weight[0], "silu")
    with pytest.raises(TypeError, match="floating-point"):
        glu(gate.int(), gate, "silu")


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_more_than_2_31_elements(cuda, packed):
    rows, width = 2**31 // 8192 + 8, 8192
    gate = torch.zeros(rows, width, device=cuda, dtype=BF16)
    gate[-8:] = randn(8, width, device=cuda, dtype=BF16)
    small = gate[-8:].clone().requires_grad_()
    gate.requires_grad_()
    function = (lambda x: glu_packed(x, "silu")) if packed else (lambda x: glu(x, x.detach(), "silu"))
    y, expected = function(gate), function(small)
    assert torch.equal(y[-8:], expected)
    (dgate,) = torch.autograd.grad(y, gate, y.detach())
    (expected_dgate,) = torch.autograd.grad(expected, small, expected.detach())
    assert torch.equal(dgate[-8:], expected_dgate)


def test_module_names_every_activation():
    assert set(module.ACTIVATIONS) == set(STOCK_ACTIVATIONS)
