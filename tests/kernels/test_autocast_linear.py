"""Linear layers under autocast, with the casts of input and weight given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import _weights
from hf_turbo.kernels.autocast_linear import autocast_linear

from tests.kernels.helpers import check_against_stock

BF16, FP16 = torch.bfloat16, torch.float16


def inputs_of(
    tokens: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32, bias: bool = False
) -> dict[str, torch.Tensor | None]:
    """Of query, key and value: an input in `dtype`, weights and biases in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    sizes = {"q": width, "k": width // 4, "v": width // 4}
    tensors: dict[str, torch.Tensor | None] = {"x": draw(2, tokens // 2, width).to(dtype).requires_grad_()}
    for name, size in sizes.items():
        tensors[f"weight_{name}"] = (draw(size, width) / width**0.5).requires_grad_()
        tensors[f"bias_{name}"] = draw(size).requires_grad_() if bias else None
    return tensors


def turbo_of(dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, ...]]:
    """All three with one cast of the input."""

    def turbo(x: torch.Tensor, **tensors: Any) -> tuple[torch.Tensor, ...]:
        low, weights = x.detach().to(dtype), {name: tensors[f"weight_{name}"] for name in "qkv"}
        casts = {name: each.detach().to(dtype) for name, each in weights.items()}
        return tuple(autocast_linear(x, weights[n], tensors[f"bias_{n}"], low, casts[n]) for n in "qkv")

    return turbo


def stock_of(dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, ...]]:
    def stock(x: torch.Tensor, **tensors: Any) -> tuple[torch.Tensor, ...]:
        with torch.autocast(x.device.type, dtype):
            return tuple(F.linear(x, tensors[f"weight_{name}"], tensors[f"bias_{name}"]) for name in "qkv")

    return stock


def exact(x: torch.Tensor, **tensors: Any) -> tuple[torch.Tensor, ...]:
    return tuple(F.linear(x, tensors[f"weight_{name}"], tensors[f"bias_{name}"]) for name in "qkv")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "given"), [(BF16, torch.float32), (BF16, BF16), (FP16, torch.float32)])
def test_as_autocast(device, dtype, given, bias):
    """Outputs are the same bits, gradients no further from float64, and on a CPU the same but for biases."""
    inputs = inputs_of(*((512, 256) if device.type == "cuda" else (14, 32)), device, given, bias)
    ours = check_against_stock(turbo_of(dtype), stock_of(dtype), exact, inputs)
    expected = stock_of(dtype)(**inputs)
    assert all(torch.equal(ours[f"y{i}"], y) for i, y in enumerate(expected))
    if device.type == "cpu":
        torch.autograd.backward(expected, [torch.ones_like(y) for y in expected])
        start = turbo_of(dtype)(**inputs)
        gradients = torch.autograd.grad(
            start, [inputs[f"weight_{n}"] for n in "qkv"], [torch.ones_like(y) for y in start]
        )
        assert all(map(torch.equal, gradients, [inputs[f"weight_{n}"].grad for n in "qkv"]))


@pytest.mark.parametrize("frozen", ["x", "weight_q"])
def test_nothing_is_kept_for_what_is_frozen(device, frozen):
    inputs = inputs_of(14, 32, device)
    inputs[frozen].requires_grad_(False)
    y, *_ = turbo_of(BF16)(**inputs)
    assert [saved is None for saved in y.grad_fn.saved_tensors] == [frozen != "x", frozen == "x"]
    y.sum().backward()
    assert (inputs["x"].grad is None) == (frozen == "x")
    assert (inputs["weight_q"].grad is None) == (frozen == "weight_q")


def test_one_row_without_dimensions(device):
    inputs = inputs_of(14, 32, device)
    row = inputs["x"].detach()[0, 0].requires_grad_()
    check_against_stock(turbo_of(BF16), stock_of(BF16), exact, {**inputs, "x": row})


def test_copies_that_are_offered():
    """Are used instead of a cast, by those who see to gradients themselves and by autograd."""
    weight = torch.nn.Parameter(torch.randn(4, 3))
    copy = weight.detach().to(BF16)
    before = _weights.offer(lambda asked, dtype: copy if asked is weight and dtype == BF16 else None)
    try:
        assert _weights.compute_weight(weight, BF16) is copy
        assert _weights.compute_weight(weight, FP16).dtype == FP16
        assert _weights.compute_weight(weight, torch.float32) is weight
        cast = _weights.cast_weight(weight, BF16)
        assert cast.data_ptr() == copy.data_ptr()
        gradient = torch.randn(4, 3).to(BF16)
        cast.backward(gradient)
        assert torch.equal(weight.grad, gradient.float())
    finally:
        assert _weights.offer(before) is not None
    assert _weights.cast_weight(weight, BF16).data_ptr() != copy.data_ptr()
