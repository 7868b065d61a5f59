"""Clipping by the total norm, against torch's own and float64, with the norms that are not finite."""

from __future__ import annotations

import pytest
import torch
from hf_turbo.kernels import clip_grad_norm as module
from hf_turbo.kernels.clip_grad_norm import clip_grad_norm

from tests.kernels.helpers import assert_as_exact_as_stock, assert_same_specials, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(16, 300), (5,), (0,), (5000,), (3, 7), ()]


def make_grads(device, *dtypes, shapes=SHAPES, scale=1.0) -> list[torch.Tensor]:
    return [
        randn(*shape, device=device, dtype=dtypes[i % len(dtypes)], seed=i, scale=scale)
        for i, shape in enumerate(shapes)
    ]


def stock_clip(grads, max_norm, dtype=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    params = [torch.nn.Parameter(torch.zeros_like(grad, dtype=dtype)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(param.dtype, copy=True)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    return norm, [param.grad for param in params]


@pytest.mark.parametrize("dtypes", [*[[dtype] for dtype in DTYPES], [torch.float32, torch.bfloat16]], ids=str)
@pytest.mark.parametrize("max_norm", [1.0, 0, 1e4, float("inf")])
def test_as_exact_as_torch(device, dtypes, max_norm):
    grads = make_grads(device, *dtypes)
    stock_norm, stock = stock_clip(grads, max_norm)
    exact_norm, exact = stock_clip(grads, max_norm, torch.float64)
    norm = clip_grad_norm(grads, max_norm)
    assert (norm.dtype, norm.shape, norm.device) == (stock_norm.dtype, stock_norm.shape, stock_norm.device)
    assert_as_exact_as_stock("norm", norm, stock_norm, exact_norm)
    for i, grad in enumerate(grads):
        assert_as_exact_as_stock(f"grad {SHAPES[i]}", grad, stock[i], exact[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [1.0, float("inf")])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), "overflow"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_norms_that_are_not_finite(device, dtype, max_norm, bad):
    """A float16 norm overflows where no gradient does: stock's scale is then 0."""
    grads = make_grads(device, dtype)
    if bad == "overflow":
        grads[3].fill_(60000.0 if dtype == torch.float16 else 1e19)
    else:
        grads[3][10] = bad
    stock_norm, stock = stock_clip(grads, max_norm)
    norm = clip_grad_norm(grads, max_norm)
    assert_same_specials("norm", norm, stock_norm)
    assert not bool(norm.isfinite())
    for i, grad in enumerate(grads):
        assert_same_specials(f"grad {i}", grad, stock[i])
        assert torch.equal(grad.nan_to_num(0, 0, 0), stock[i].nan_to_num(0, 0, 0))


def test_zero_gradients(device):
    grads = [torch.zeros(100, device=device), torch.zeros(3, device=device)]
    assert clip_grad_norm(grads, 1.0).item() == 0
    assert all(bool((grad == 0).all()) for grad in grads)


def test_gradients_below_the_norm_keep_their_bits(device):
    grads = make_grads(device, torch.bfloat16)
    before = [grad.clone() for grad in grads]
    clip_grad_norm(grads, 1e4)
    assert all(torch.equal(new, old) for new, old in zip(grads, before, strict=True))


def test_unaligned_views(device):
    """Buckets of DistributedDataParallel hold gradients at any offset."""
    flat = randn(3000, device=device, dtype=torch.bfloat16)
    untouched = flat.clone()
    grads = [flat[1:1001], flat[1003:1006], flat[1010:2010]]
    expected = [grad.clone() for grad in grads]
    norm, expected_norm = clip_grad_norm(grads, 1.0), clip_grad_norm(expected, 1.0)
    assert torch.equal(norm, expected_norm)
    assert all(torch.equal(new, old) for new, old in zip(grads, expected, strict=True))
    assert torch.equal(flat[1001:1003], untouched[1001:1003])
    assert torch.equal(flat[2010:], untouched[2010:])


def test_many_elements_take_several_tiles_per_program(device, monkeypatch):
    shapes = [(70000,), (65536,), (3,)]
    grads, several = (make_grads(device, torch.float32, shapes=shapes) for _ in range(2))
    norm = clip_grad_norm(grads, 1.0)
    monkeypatch.setattr(module, "_MANY", 0)
    torch.testing.assert_close(clip_grad_norm(several, 1.0), norm, rtol=1e-6, atol=0)
    for one, other in zip(grads, several, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_same_bits_every_time(device):
    first, second = (make_grads(device, torch.bfloat16) for _ in range(2))
    assert torch.equal(clip_grad_norm(first, 1.0), clip_grad_norm(second, 1.0))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_float64_takes_the_reference(device):
    grads = make_grads(device, torch.float64)
    stock_norm, stock = stock_clip(grads, 1.0)
    torch.testing.assert_close(clip_grad_norm(grads, 1.0), stock_norm)
    for grad, expected in zip(grads, stock, strict=True):
        torch.testing.assert_close(grad, expected)


def test_refuses_what_has_no_norm(device):
    with pytest.raises(ValueError, match="at least one"):
        clip_grad_norm([], 1.0)
    with pytest.raises(TypeError, match="floating-point"):
        clip_grad_norm([torch.zeros(3, dtype=torch.int32, device=device)], 1.0)
