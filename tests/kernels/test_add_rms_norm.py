from __future__ import annotations

import pytest
import torch
from hf_turbo.kernels import add_rms_norm as module
from hf_turbo.kernels.add_rms_norm import Norm, add_rms_norm, normed
from hf_turbo.kernels.rms_norm import rms_norm

from tests.kernels.helpers import (
    assert_same_bits,
    assert_same_specials,
    check_against_stock,
    outputs_and_gradients,
    randn,
)
from tests.kernels.test_rms_norm import BODIES, EPS, exact_of, stock_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def norm_of(body: str) -> Norm:
    return Norm(EPS, **BODIES[body].options)


def turbo_of(body: str, dtype=None):
    return lambda residual, branch, weight: add_rms_norm(residual, branch, weight, norm_of(body), dtype)


def stock_sum_of(body: str, norm=stock_of, dtype=None):
    """h and y by calls of their own; float64 inputs stay float64."""

    def stock(residual, branch, weight):
        h = residual * 1 if branch is None else residual + branch
        y = norm(BODIES[body])(h, weight)
        return h, y if dtype is None or y.dtype == torch.float64 else y.to(dtype)

    return stock


def inputs_of(shape, device, dtypes=(BF16, BF16, BF16), branch=True, frozen=False):
    weight = randn(shape[-1], device=device, dtype=dtypes[2], seed=2) * 0.3 + 1
    return {
        "residual": randn(*shape, device=device, dtype=dtypes[0], scale=3.0).requires_grad_(),
        "branch": randn(*shape, device=device, dtype=dtypes[1], seed=1).requires_grad_() if branch else None,
        "weight": weight.requires_grad_(not frozen),
    }


def check(body: str, inputs, dtype=None):
    functions = turbo_of(body, dtype), stock_sum_of(body, dtype=dtype), stock_sum_of(body, exact_of)
    return check_against_stock(*functions, inputs)


# Of residual, branch and weight: a model of one dtype; float32 under autocast; 16 bits with norms in float32.
DTYPES = [(BF16, BF16, BF16), (FP16, FP16, FP16), (FP32, FP32, FP32), (FP32, BF16, FP32), (BF16, BF16, FP32)]


@pytest.mark.parametrize("branch", [True, False], ids=["sum", "norm alone"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("body", ["llama", "olmo2", "gemma"])
def test_bodies(device, body, dtypes, branch):
    shape = (3, 700, 1000) if device.type == "cuda" else (3, 7, 100)
    check(body, inputs_of(shape, device, dtypes, branch))


@pytest.mark.parametrize("body", ["llama", "gemma"])
@pytest.mark.parametrize("dtypes", [(FP32, BF16, FP32), (FP32, FP32, FP32), (BF16, BF16, FP32), (BF16, BF16, BF16)])
def test_output_in_another_dtype_is_the_cast_one(device, body, dtypes):
    """The same bits as a cast behind the norm: no rounding is added, and none left out."""
    inputs = inputs_of((5, 100), device, dtypes)
    cast = {key: value for key, value in outputs_and_gradients(turbo_of(body), inputs).items() if key[0] == "y"}
    direct = outputs_and_gradients(turbo_of(body, BF16), inputs)
    assert torch.equal(direct["y0"], cast["y0"])
    assert torch.equal(direct["y1"], cast["y1"].to(BF16))
    if dtypes[0] == FP32:
        check(body, inputs, BF16)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (37, 127), (2, 9, 64), (9, 4097), (64,), (1, 64)])
def test_shapes(device, shape, frozen):
    check("llama", inputs_of(shape, device, frozen=frozen))


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (FP32, BF16, FP32)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(4, 2048, 2048), (2, 2048, 4096), (3000, 5120), (4096, 8192), (16, 65536)])
def test_real_shapes(cuda, shape, frozen, dtypes):
    check("llama", inputs_of(shape, cuda, dtypes, frozen=frozen))


@pytest.mark.parametrize("body", ["llama", "gemma"])
def test_the_bits_of_the_norm_alone(device, body):
    """Whether a layer runs fused or not, and a norm made again for backward, is the same number."""
    inputs = inputs_of((37, 127), device)
    h, y = turbo_of(body)(**inputs)
    assert torch.equal(h, inputs["residual"] + inputs["branch"])
    assert torch.equal(y, rms_norm(h, inputs["weight"], EPS, **BODIES[body].options))
    with torch.no_grad():  # as in backward
        assert torch.equal(y, normed(h, inputs["weight"], norm_of(body), y.dtype))


@pytest.mark.parametrize("trained", ["residual", "branch", "weight"])
def test_one_gradient_alone(device, trained):
    inputs = inputs_of((6, 40), device, (FP32, BF16, FP32))
    for name, value in inputs.items():
        value.requires_grad_(name == trained)
    assert check("gemma", inputs).keys() == {"y0", "y1", f"d{trained}"}


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("branch", [True, False])
def test_one_output_alone(device, used, branch):
    inputs = inputs_of((6, 40), device, (FP32, BF16, FP32), branch)
    if used == 0:
        inputs["weight"].requires_grad_(False)
    functions = turbo_of("llama"), stock_sum_of("llama"), stock_sum_of("llama", exact_of)
    check_against_stock(*(lambda f=f, **given: f(**given)[used] for f in functions), inputs)


def test_residual_that_is_changed_in_place_is_seen(device):
    inputs = inputs_of((6, 40), device, branch=False)
    x = inputs["residual"] * 1
    h, y = add_rms_norm(x, None, inputs["weight"], norm_of("llama"))
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (h + y).sum().backward()


def test_same_bits_twice_and_backward_twice(device):
    inputs = inputs_of((40, 127), device)
    assert_same_bits(*(outputs_and_gradients(turbo_of("llama"), inputs) for _ in range(2)))
    outputs = turbo_of("llama")(**inputs)
    starts = [torch.ones_like(each) for each in outputs]
    first = torch.autograd.grad(outputs, list(inputs.values()), starts, retain_graph=True)
    second = torch.autograd.grad(outputs, list(inputs.values()), starts)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
def test_nan_and_infinity(device):
    residual = randn(6, 40, device=device, dtype=BF16)
    residual[0, 3], residual[1, 4], residual[2, 5] = float("nan"), float("inf"), -float("inf")
    inputs = {**inputs_of((6, 40), device), "residual": residual.requires_grad_()}
    actual = outputs_and_gradients(turbo_of("llama"), inputs)
    expected = outputs_and_gradients(stock_sum_of("llama"), inputs)
    for name in ("y0", "y1"):
        assert_same_specials(name, actual[name], expected[name])
    assert actual["dresidual"][3:].isfinite().all()
    assert actual["dresidual"][:3].isnan().any(-1).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(device, shape):
    run = outputs_and_gradients(turbo_of("llama"), inputs_of(shape, device))
    assert run["y1"].shape == run["dresidual"].shape == run["dbranch"].shape == shape
    assert torch.equal(run["dweight"], torch.zeros(shape[-1], device=device, dtype=BF16))


def test_gradcheck():
    x, branch = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    for norm in (Norm(EPS), Norm(EPS, 1.0), Norm(EPS, 0.0, True)):
        assert torch.autograd.gradcheck(lambda *a, n=norm: add_rms_norm(*a, n), (x, branch, weight))
        assert torch.autograd.gradcheck(lambda x, w, n=norm: add_rms_norm(x, None, w, n), (x, weight))


def test_opcheck(device):
    x, branch, weight = (randn(*shape, device=device, dtype=BF16) for shape in ((6, 16), (6, 16), (16,)))
    for each in (branch, None):
        torch.library.opcheck(torch.ops.hf_turbo.add_rms_norm.default, (x, each, weight, EPS, 0.0, True, BF16))
    h, _, rstd = torch.ops.hf_turbo.add_rms_norm(x, branch, weight, EPS, 0.0, True, BF16)
    for dh, dtypes, trained in ((x, (BF16, FP32), True), (None, (None, BF16), False), (x, (BF16, None), True)):
        arguments = (dh, torch.ones_like(x), h, weight, rstd, 0.0, *dtypes, trained)
        torch.library.opcheck(torch.ops.hf_turbo.add_rms_norm_backward.default, arguments)


def test_refusals(device):
    x, weight = randn(2, 8, device=device, dtype=BF16), randn(8, device=device, dtype=BF16)
    with pytest.raises(ValueError, match="shape"):
        add_rms_norm(x, None, weight[:4], Norm(EPS))
    with pytest.raises(ValueError, match="one shape"):
        add_rms_norm(x, x[:1], weight, Norm(EPS))
    with pytest.raises(ValueError, match="weight_offset"):
        add_rms_norm(x, x, weight, Norm(EPS, 1.0, True))
    with pytest.raises(TypeError, match="floating-point"):
        add_rms_norm(x.int(), None, weight, Norm(EPS))
    if module.use_triton(x):
        with pytest.raises(ValueError, match="65536"):
            add_rms_norm(torch.empty(1, 65537, device=device, dtype=BF16), None, None, Norm(EPS))
