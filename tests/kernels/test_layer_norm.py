from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import layer_norm as module
from hf_turbo.kernels.layer_norm import layer_norm
from transformers.models.cohere.modeling_cohere import CohereLayerNorm

from tests.kernels.helpers import (
    assert_same_bits,
    assert_same_specials,
    check_against_stock,
    outputs_and_gradients,
    randn,
)

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def turbo(x, weight=None, bias=None):
    return layer_norm(x, weight, bias, EPS)


COHERE = CohereLayerNorm(1, EPS)


def cohere(x, weight):
    COHERE._parameters["weight"] = weight  # any tensor, and at no cost to a benchmark's host time
    return COHERE(x)


def torch_layer_norm(x, weight=None, bias=None):
    """nn.LayerNorm, which takes parameters of the dtype of x or of float32."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def exact(x, weight=None, bias=None):
    centred = x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def inputs_of(
    shape, device, dtype=BF16, parameter_dtype=None, *, heads=None, bias=False, frozen=False
) -> dict[str, Any]:
    parameter_dtype = parameter_dtype or dtype
    width = shape[-1:] if heads is None else (heads, shape[-1])
    inputs = {
        "x": (randn(*shape, device=device, dtype=dtype, scale=3.0) + 1).requires_grad_(),
        "weight": (randn(*width, device=device, dtype=parameter_dtype, seed=1) * 0.3 + 1).requires_grad_(not frozen),
    }
    if bias:
        inputs["bias"] = randn(shape[-1], device=device, dtype=parameter_dtype, seed=2).requires_grad_(not frozen)
    return inputs


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP32, BF16)])
@pytest.mark.parametrize("frozen", [False, True])
def test_cohere(device, dtypes, frozen):
    shape = (3, 700, 1000) if device.type == "cuda" else (3, 7, 100)
    check_against_stock(turbo, cohere, exact, inputs_of(shape, device, *dtypes, frozen=frozen))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_cohere_heads(device, dtype):
    """Weights [heads, head_dim] of the query and key norms."""
    shape = (2, 600, 16, 128) if device.type == "cuda" else (2, 30, 3, 128)
    check_against_stock(turbo, cohere, exact, inputs_of(shape, device, dtype, heads=shape[-2]))


def test_heads_with_bias(device):
    inputs = inputs_of((2, 5, 3, 16), device, FP32, heads=3)
    inputs["bias"] = randn(16, device=device, dtype=FP32).requires_grad_()

    def stock(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], None, None, EPS) * weight + bias

    check_against_stock(turbo, stock, exact, inputs)


@pytest.mark.parametrize("shape", [(5, 7), (37, 127), (2, 9, 64), (9, 4097), (64,)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_shapes_with_bias(device, shape, dtype):
    check_against_stock(turbo, torch_layer_norm, exact, inputs_of(shape, device, dtype, bias=True))


def test_without_parameters(device):
    inputs = {"x": inputs_of((6, 40), device)["x"]}
    check_against_stock(turbo, torch_layer_norm, exact, inputs)


def test_rows_of_one_element(device):
    """The variance is zero: y is the bias and nothing flows back to x."""
    run = outputs_and_gradients(turbo, inputs_of((5, 1), device, bias=True))
    assert torch.equal(run["dx"], torch.zeros_like(run["dx"]))
    assert torch.equal(run["dweight"], torch.zeros_like(run["dweight"]))
    assert (run["dbias"] == 5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(2, 4096, 4096), (8192, 1024), (4096, 8192), (300, 12288), (16, 65536)])
def test_real_shapes(cuda, shape, frozen, dtype):
    check_against_stock(turbo, cohere, exact, inputs_of(shape, cuda, dtype, frozen=frozen))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_parameters_without_x(device, trained):
    inputs = inputs_of((6, 40), device, bias=True)
    for name, value in inputs.items():
        value.requires_grad_(name == trained)
    assert check_against_stock(turbo, torch_layer_norm, exact, inputs).keys() == {"y", "d" + trained}


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, :2],
        lambda x: x.transpose(1, 2),
        lambda x: x.chunk(2, dim=-1)[1].transpose(1, 2),
        lambda x: x[:, 1:4, :2],
        lambda x: x[..., ::2],
        lambda x: x[:, :1].expand(2, 5, 3, 64),
    ],
    ids=["heads", "heads first", "halves, heads first", "three strides", "every second element", "expanded"],
)
@pytest.mark.parametrize("heads", [False, True])
def test_layouts(device, view, heads):
    """Any view gives the bits of its contiguous copy."""
    x = randn(2, 5, 3, 64, device=device, dtype=BF16).requires_grad_()
    shape = view(x).shape
    weight = randn(*shape[-2 if heads else -1 :], device=device, dtype=BF16, seed=1)
    on_view = outputs_and_gradients(lambda x: turbo(view(x), weight), {"x": x})
    on_copy = outputs_and_gradients(lambda x: turbo(view(x).contiguous(), weight), {"x": x})
    assert_same_bits(on_view, on_copy)


@pytest.mark.parametrize("heads", [None, 3])
def test_incoming_gradient_layouts(device, heads):
    inputs = inputs_of((2, 4, 3, 32), device, heads=heads)
    for start in (
        lambda i, y: torch.ones((), device=device, dtype=y.dtype).expand(y.shape),
        lambda i, y: randn(2, 3, 4, 32, device=device, dtype=y.dtype).transpose(1, 2),
        lambda i, y: randn(2, 4, 3, 64, device=device, dtype=y.dtype)[..., 32:],
    ):
        actual = outputs_and_gradients(turbo, inputs, start)
        assert_same_bits(actual, outputs_and_gradients(turbo, inputs, lambda i, y, s=start: s(i, y).contiguous()))


@pytest.mark.parametrize("heads", [None, 3])
def test_same_bits_twice(device, heads):
    shape = (2, 2000, 3, 1024) if device.type == "cuda" else (2, 40, 3, 64)
    inputs = inputs_of(shape, device, heads=heads, bias=True)
    assert_same_bits(*(outputs_and_gradients(turbo, inputs) for _ in range(2)))


def test_backward_twice(device):
    inputs = inputs_of((6, 40), device, bias=True)
    y = turbo(**inputs)
    runs = [torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(device, shape):
    run = outputs_and_gradients(turbo, inputs_of(shape, device, bias=True))
    assert run["y"].shape == run["dx"].shape == shape
    for name in ("dweight", "dbias"):
        assert torch.equal(run[name], torch.zeros(8, device=device, dtype=BF16))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_nan_and_infinity(device, dtype):
    x = randn(5, 40, device=device, dtype=dtype)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), -float("inf")
    x[3] = 7
    inputs = {"x": x.requires_grad_(), "weight": randn(40, device=device, dtype=dtype).requires_grad_()}
    actual, expected = outputs_and_gradients(turbo, inputs), outputs_and_gradients(cohere, inputs)
    assert_same_specials("y", actual["y"], expected["y"])
    assert actual["dx"][3:].isfinite().all()
    assert actual["dx"][:3].isnan().any(-1).all()


def test_gradcheck():
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    heads_weight = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    for arguments in ((x, weight, bias), (x, heads_weight, bias), (x, weight), (x,)):
        assert torch.autograd.gradcheck(turbo, arguments)


@pytest.mark.parametrize("heads", [None, 3])
def test_opcheck(device, heads):
    x, weight = (tensor.detach() for tensor in inputs_of((2, 4, 3, 16), device, heads=heads).values())
    x, bias = x if heads else x.transpose(1, 2), weight[0] if heads else weight
    torch.library.opcheck(torch.ops.hf_turbo.layer_norm.default, (x, weight, bias, EPS))
    _, mean, rstd = torch.ops.hf_turbo.layer_norm(x, weight, bias, EPS)
    for needed in ((True, True, True), (True, False, False), (False, False, True)):
        arguments = (torch.ones_like(x), x, weight, bias, mean, rstd, *needed)
        torch.library.opcheck(torch.ops.hf_turbo.layer_norm_backward.default, arguments)


def test_compile(device):
    """One graph, and the same bits."""
    inputs = inputs_of((2, 3, 16), device, bias=True)
    compiled = torch.compile(turbo, backend="aot_eager", fullgraph=True)
    assert_same_bits(outputs_and_gradients(compiled, inputs), outputs_and_gradients(turbo, inputs))


def test_refusals(device):
    x, weight = randn(2, 8, device=device, dtype=BF16), randn(8, device=device, dtype=BF16)
    for wrong in (weight[:4], weight.expand(3, 8), weight.view(2, 2, 2)):
        with pytest.raises(ValueError, match="weight"):
            layer_norm(x, wrong, None, EPS)
    with pytest.raises(ValueError, match="bias"):
        layer_norm(x, weight, weight[:4], EPS)
    with pytest.raises(TypeError, match="floating-point"):
        layer_norm(x.int(), weight, None, EPS)
    if module.use_triton(x):
        with pytest.raises(ValueError, match="65536"):
            layer_norm(torch.empty(1, 65537, device=device, dtype=BF16), None, None, EPS)


@pytest.mark.gpu
def test_more_than_2_31_elements(cuda):
    rows, width = 2**31 // 4096 + 64, 4096
    x = torch.empty(rows, width, device=cuda, dtype=BF16).fill_(1.0)
    x[-64:] = randn(64, width, device=cuda, dtype=BF16)
    weight = randn(width, device=cuda, dtype=BF16).requires_grad_()
    small = x[-64:].clone().requires_grad_()
    x.requires_grad_()
    y, expected = turbo(x, weight), turbo(small, weight)
    assert torch.equal(y[-64:], expected)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    (expected_dx,) = torch.autograd.grad(expected, small, expected.detach())
    assert torch.equal(dx[-64:], expected_dx)
