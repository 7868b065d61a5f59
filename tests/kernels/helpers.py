"""How kernels are judged: against float64, and never worse than the modelling code they replace.

The rule, for outputs and every gradient: err(turbo) <= 1.1 * err(stock) + floor, where err is the norm of the
difference to the float64 result over the norm of that result. The floor is one float32 ulp, the precision of the
statistics, or one element off by one ulp of its dtype, which is what luck decides in a tensor of a few elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, torch.Tensor | None]
Tensors = dict[str, torch.Tensor]


def relative_error(actual: torch.Tensor, reference64: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, or the former alone if the reference is zero."""
    assert actual.shape == reference64.shape, f"shape {list(actual.shape)}, reference {list(reference64.shape)}"
    difference = torch.linalg.vector_norm(actual.detach().double() - reference64)
    scale = torch.linalg.vector_norm(reference64)
    return (difference / scale if scale > 0 else difference).item()


def assert_as_exact_as_stock(name: str, turbo: torch.Tensor, stock: torch.Tensor, reference64: torch.Tensor) -> None:
    """The rule above; `name` says which tensor in the message."""
    assert turbo.dtype == stock.dtype, f"{name}: dtype {turbo.dtype}, stock {stock.dtype}"
    turbo_error, stock_error = relative_error(turbo, reference64), relative_error(stock, reference64)
    ulp = torch.finfo(turbo.dtype).eps
    floor = max(min(ulp, torch.finfo(torch.float32).eps), ulp / max(1, turbo.numel()) ** 0.5)
    # `not <=` and not `>`: NaN must fail.
    if not turbo_error <= 1.1 * stock_error + floor:
        raise AssertionError(f"{name}: error {turbo_error:.3e}, stock {stock_error:.3e}, floor {floor:.1e}")


def outputs_and_gradients(function: Callable[..., Any], inputs: Inputs, output_gradients: Any = None) -> Tensors:
    """Runs `function(**inputs)` on leaves of its own, then backward.

    Args:
        inputs: those that require a gradient are differentiated.
        output_gradients: called with the index and the output, gives the gradient to start from; default: all ones.

    Returns:
        "y" (or "y0", "y1", ... of a tuple; None outputs left out) and "d" + name of each differentiated input.
    """
    leaves = {
        name: None if value is None else value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in inputs.items()
    }
    before = {name: (value, value.detach().clone()) for name, value in leaves.items() if value is not None}
    result = function(**leaves)
    named = {"y": result} if torch.is_tensor(result) else {f"y{i}": y for i, y in enumerate(result) if y is not None}
    outputs = list(named.values())
    starts = [torch.ones_like(y) if output_gradients is None else output_gradients(i, y) for i, y in enumerate(outputs)]
    starts_before = [start.clone() for start in starts]
    differentiated = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    reached = [i for i, y in enumerate(outputs) if y.requires_grad]
    if reached:
        torch.autograd.backward([outputs[i] for i in reached], [starts[i] for i in reached])
    for name, (leaf, value) in before.items():
        assert _is_same(leaf, value), f"{name} was modified"
        assert (leaf.grad is not None) == leaf.requires_grad, f"{name}: gradient missing or not asked for"
    for start, value in zip(starts, starts_before, strict=True):
        assert _is_same(start, value), "an incoming gradient was modified"
    return {name: y.detach() for name, y in named.items()} | {f"d{n}": leaf.grad for n, leaf in differentiated.items()}


def _is_same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True)


def check_against_stock(
    turbo: Callable[..., Any], stock: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs
) -> Tensors:
    """Applies the rule to outputs and gradients of `turbo`; `reference` gets the inputs in float64. Returns turbo's."""
    starts: dict[int, torch.Tensor] = {}

    def start_of(index: int, y: torch.Tensor) -> torch.Tensor:
        # Rounded to the dtype of turbo's output, which runs first, and the same numbers for all three.
        if index not in starts:
            starts[index] = randn(*y.shape, device=y.device, dtype=y.dtype, seed=7 + index)
        return starts[index].to(y.dtype)

    actual = outputs_and_gradients(turbo, inputs, start_of)
    expected = outputs_and_gradients(stock, inputs, start_of)
    wide = {n: v if v is None else v.detach().double().requires_grad_(v.requires_grad) for n, v in inputs.items()}
    exact = outputs_and_gradients(reference, wide, start_of)
    assert actual.keys() == expected.keys() == exact.keys()
    for name, value in actual.items():
        assert_as_exact_as_stock(name, value, expected[name], exact[name])
    return actual


def assert_same_bits(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), f"{name}: other bits"


def assert_same_specials(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN and infinities in the same places, and equal signs of the latter."""
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN elsewhere"
    infinite = expected.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{name}: infinity elsewhere"
    assert torch.equal(actual[infinite].sign(), expected[infinite].sign()), f"{name}: sign of infinity"


def randn(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
