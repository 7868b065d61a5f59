from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hf_turbo.kernels import rms_norm as module
from hf_turbo.kernels.rms_norm import rms_norm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from tests.kernels.helpers import (
    assert_same_bits,
    assert_same_specials,
    check_against_stock,
    outputs_and_gradients,
    randn,
)

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Body(NamedTuple):
    """A norm of transformers and how to ask for it."""

    cls: type[torch.nn.Module]
    options: dict[str, Any]


BODIES = {
    "llama": Body(LlamaRMSNorm, {"round_before_weight": True}),
    "olmo2": Body(Olmo2RMSNorm, {}),
    "gemma": Body(GemmaRMSNorm, {"weight_offset": 1.0}),
    "gemma3n": Body(Gemma3nRMSNorm, {}),
    "gemma4": Body(Gemma4RMSNorm, {}),
}


@cache
def stock_module(cls: type[torch.nn.Module], width: int, eps: float, options: tuple[tuple[str, Any], ...]):
    return cls(width, eps, **dict(options))


def stock_of(body: Body, eps: float = EPS):
    def stock(x, weight):
        options = () if weight is not None else (("with_scale", False),)
        norm = stock_module(body.cls, x.shape[-1], eps, options)
        if weight is not None:
            norm._parameters["weight"] = weight  # any tensor, and at no cost to a benchmark's host time
        return norm(x)

    return stock


def turbo_of(body: Body, eps: float = EPS):
    return lambda x, weight: rms_norm(x, weight, eps, **body.options)


def exact_of(body: Body, eps: float = EPS):
    def exact(x, weight):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return normed if weight is None else normed * (weight + body.options.get("weight_offset", 0.0))

    return exact


def inputs_of(shape, device, x_dtype=BF16, weight_dtype=BF16, weight=True, frozen=False) -> dict[str, Any]:
    x = randn(*shape, device=device, dtype=x_dtype, scale=3.0).requires_grad_()
    if not weight:
        return {"x": x, "weight": None}
    values = randn(shape[-1], device=device, dtype=weight_dtype, seed=1) * 0.3 + 1
    return {"x": x, "weight": values.requires_grad_(not frozen)}


def check(body: Body, inputs, eps: float = EPS):
    return check_against_stock(turbo_of(body, eps), stock_of(body, eps), exact_of(body, eps), inputs)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP32, BF16), (FP16, BF16)])
@pytest.mark.parametrize("body", BODIES)
def test_bodies(device, body, dtypes):
    shape = (3, 700, 1000) if device.type == "cuda" else (3, 7, 100)
    check(BODIES[body], inputs_of(shape, device, *dtypes))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_without_weight(device, dtype):
    check(BODIES["gemma4"], inputs_of((5, 33), device, dtype, weight=False))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (37, 127), (2, 9, 64), (9, 4097), (64,), (1, 64)])
def test_shapes(device, shape, frozen):
    # A row of one element needs an eps that keeps its gradient from vanishing.
    check(BODIES["llama"], inputs_of(shape, device, frozen=frozen), eps=0.1 if shape[-1] == 1 else EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 4096, 4096), (8192, 1024), (3000, 5120), (4096, 8192), (2, 512, 32, 128), (300, 16384), (16, 65536)]
)
def test_real_shapes(cuda, shape, frozen, dtype):
    check(BODIES["gemma"], inputs_of(shape, cuda, dtype, dtype, frozen=frozen))


def test_weight_without_x(device):
    inputs = inputs_of((6, 40), device)
    inputs["x"].requires_grad_(False)
    assert check(BODIES["olmo2"], inputs).keys() == {"y", "dweight"}


# Views of a leaf [2, 5, 3, 64], as attention makes them of its projections.
LAYOUTS = {
    "slice of a packed row": lambda x: x[..., 1:2, :],
    "some heads": lambda x: x[:, :, :2],
    "heads first": lambda x: x.transpose(1, 2),
    "some heads first": lambda x: x[:, :, :2].transpose(1, 2),
    "half of each head": lambda x: x.chunk(2, dim=-1)[0],
    "half of each head, heads first": lambda x: x.chunk(2, dim=-1)[1].transpose(1, 2),
    "three strides": lambda x: x[:, 1:4, :2],
    "every second element": lambda x: x[..., ::2],
    "expanded": lambda x: x[:, :1].expand(2, 5, 3, 64),
    "flipped dimensions": lambda x: x.permute(2, 1, 0, 3),
    "not the last dimension": lambda x: x.transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    """Any view gives the bits of its contiguous copy, and outputs in the memory order of the view."""
    view, body = LAYOUTS[layout], BODIES["llama"]
    x = randn(2, 5, 3, 64, device=device, dtype=BF16).requires_grad_()
    weight = randn(view(x).shape[-1], device=device, dtype=BF16, seed=1)
    on_view = outputs_and_gradients(lambda x: turbo_of(body)(view(x), weight), {"x": x})
    on_copy = outputs_and_gradients(lambda x: turbo_of(body)(view(x).contiguous(), weight), {"x": x})
    assert_same_bits(on_view, on_copy)
    if layout not in ("every second element", "not the last dimension", "expanded", "three strides"):
        assert on_view["y"].stride() == torch.empty_like(view(x)).stride()


@pytest.mark.parametrize("layout", ["heads first", "three strides", "every second element", "expanded"])
def test_layouts_with_weight_gradient(device, layout):
    """dweight of a view: the rows may be added up in another order."""
    view, body = LAYOUTS[layout], BODIES["gemma"]
    inputs = inputs_of((2, 5, 3, 64), device)
    inputs["weight"] = inputs["weight"].detach()[: view(inputs["x"]).shape[-1]].clone().requires_grad_()
    functions = [lambda x, weight, f=f: f(view(x), weight) for f in (turbo_of(body), stock_of(body), exact_of(body))]
    check_against_stock(*functions, inputs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("start", ["expanded", "one row", "transposed", "strided"])
def test_incoming_gradient_layouts(device, start, transposed):
    """Gradients arrive in any layout: expanded from a sum, transposed from attention, sliced from a concatenation."""
    inputs = inputs_of((2, 4, 3, 32), device)

    def start_of(index, y):
        if start == "expanded":
            return torch.ones((), device=device, dtype=y.dtype).expand(y.shape)
        if start == "one row":
            return randn(32, device=device, dtype=y.dtype).expand(y.shape)
        if start == "transposed":
            return randn(*y.mT.shape, device=device, dtype=y.dtype).mT
        return randn(*y.shape[:-1], 64, device=device, dtype=y.dtype)[..., :32]

    def turbo(x, weight):
        return rms_norm(x.transpose(1, 2) if transposed else x, weight, EPS)

    actual = outputs_and_gradients(turbo, inputs, start_of)
    assert_same_bits(actual, outputs_and_gradients(turbo, inputs, lambda i, y: start_of(i, y).contiguous()))


def test_same_bits_twice(device):
    shape = (5000, 1024) if device.type == "cuda" else (40, 127)
    inputs = inputs_of(shape, device)
    runs = [outputs_and_gradients(turbo_of(BODIES["llama"]), inputs) for _ in range(2)]
    assert_same_bits(*runs)


def test_backward_twice(device):
    inputs = inputs_of((6, 40), device)
    y = turbo_of(BODIES["llama"])(**inputs)
    start = torch.ones_like(y)
    first = torch.autograd.grad(y, [inputs["x"], inputs["weight"]], start, retain_graph=True)
    second = torch.autograd.grad(y, [inputs["x"], inputs["weight"]], start)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_weight_costs_nothing(device, monkeypatch):
    seen = []
    op = module._rms_norm_backward
    monkeypatch.setattr(module, "_rms_norm_backward", lambda *a: seen.append(op(*a)) or seen[-1])
    outputs_and_gradients(turbo_of(BODIES["llama"]), inputs_of((6, 40), device, frozen=True))
    assert seen[0][1].numel() == 0


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(device, shape):
    run = outputs_and_gradients(turbo_of(BODIES["llama"]), inputs_of(shape, device))
    assert run["y"].shape == run["dx"].shape == shape
    assert torch.equal(run["dweight"], torch.zeros(shape[-1], device=device, dtype=BF16))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("body", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_nan_and_infinity(device, body, dtype):
    x = randn(6, 40, device=device, dtype=dtype)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), -float("inf")
    x[3] = 0
    x[4] = torch.finfo(dtype).max
    inputs = {"x": x.requires_grad_(), "weight": randn(40, device=device, dtype=dtype).requires_grad_()}
    actual = outputs_and_gradients(turbo_of(BODIES[body]), inputs)
    expected = outputs_and_gradients(stock_of(BODIES[body]), inputs)
    assert_same_specials("y", actual["y"], expected["y"])
    # Rows of finite numbers keep finite gradients. In the others, where autograd meets 0 * infinity is its affair.
    assert actual["dx"][[3, 5]].isfinite().all()
    assert actual["dx"][:3].isnan().any(-1).all()


def test_gradcheck():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"weight_offset": 1.0}, {"round_before_weight": True}):
        assert torch.autograd.gradcheck(lambda x, w, o=options: rms_norm(x, w, EPS, **o), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x.mT, None, EPS), (x,))


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(device, transposed):
    x = randn(2, 3, 4, 16, device=device, dtype=BF16)
    x = x.transpose(1, 2) if transposed else x
    weight = randn(16, device=device, dtype=FP32)
    for round_before_weight in (False, True):
        arguments = (x, weight, EPS, 0.0, round_before_weight)
        torch.library.opcheck(torch.ops.hf_turbo.rms_norm.default, arguments)
    _, rstd = torch.ops.hf_turbo.rms_norm(*arguments)
    for need_dx, need_dweight in ((True, True), (True, False), (False, True)):
        arguments = (torch.ones_like(x), x, weight, rstd, 0.0, need_dx, need_dweight)
        torch.library.opcheck(torch.ops.hf_turbo.rms_norm_backward.default, arguments)


def test_compile(device):
    """One graph, and the same bits."""
    inputs = inputs_of((2, 3, 4, 16), device)

    def function(x, weight):
        return rms_norm(x.transpose(1, 2), weight, EPS, round_before_weight=True) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same_bits(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs))


def test_refusals(device):
    x, weight = randn(2, 8, device=device, dtype=BF16), randn(8, device=device, dtype=BF16)
    with pytest.raises(ValueError, match="shape"):
        rms_norm(x, weight[:4], EPS)
    with pytest.raises(ValueError, match="weight_offset"):
        rms_norm(x, weight, EPS, weight_offset=1.0, round_before_weight=True)
    with pytest.raises(TypeError, match="floating-point"):
        rms_norm(x.int(), weight, EPS)
    if module.use_triton(x):
        with pytest.raises(ValueError, match="65536"):
            rms_norm(torch.empty(1, 65537, device=device, dtype=BF16), None, EPS)
    y = rms_norm(x.requires_grad_(), weight, EPS)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


@pytest.mark.gpu
def test_more_than_2_31_elements(cuda):
    """The last rows of a huge tensor are those of a small one."""
    rows, width = 2**31 // 4096 + 64, 4096
    x = torch.empty(rows, width, device=cuda, dtype=BF16)
    x[:-64].fill_(1.0)
    x[-64:] = randn(64, width, device=cuda, dtype=BF16)
    weight = randn(width, device=cuda, dtype=BF16)
    for frozen in (True, False):
        huge = x.requires_grad_()
        small = x.detach()[-64:].clone().requires_grad_()
        trained = weight.detach().requires_grad_(not frozen)
        y = rms_norm(huge, trained, EPS)
        expected = rms_norm(small, trained, EPS)
        assert torch.equal(y[-64:], expected)
        (dx,) = torch.autograd.grad(y, huge, y.detach())
        (expected_dx,) = torch.autograd.grad(expected, small, expected.detach())
        assert torch.equal(dx[-64:], expected_dx)
        del y, dx


@pytest.mark.gpu
def test_other_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = inputs_of((64, 256), torch.device("cuda", 1))
    check(BODIES["llama"], inputs)
