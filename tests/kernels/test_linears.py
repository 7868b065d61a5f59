from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import linears as module
from hf_turbo.kernels.add_rms_norm import Norm, add_rms_norm
from hf_turbo.kernels.linears import Source, linears

from tests.kernels.helpers import check_against_stock, randn

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NORM = Norm(1e-5, round_before_weight=True)


def inputs_of(device, dtype, rows=(3, 7), width=40, outputs=(48, 16, 16), bias=False, frozen=()):
    inputs = {"x": randn(*rows, width, device=device, dtype=dtype, scale=2.0).requires_grad_()}
    inputs["norm"] = (randn(width, device=device, dtype=dtype, seed=1) * 0.3 + 1).requires_grad_("norm" not in frozen)
    for place, size in enumerate(outputs):
        weight = randn(size, width, device=device, dtype=dtype, seed=2 + place) * width**-0.5
        inputs[f"weight{place}"] = weight.requires_grad_(f"weight{place}" not in frozen)
        inputs[f"bias{place}"] = randn(size, device=device, dtype=dtype, seed=9).requires_grad_() if bias else None
    return inputs


def turbo(x, norm, **operands):
    h, y = add_rms_norm(x, None, norm, NORM)
    weights = [each for name, each in operands.items() if name.startswith("weight")]
    biases = [each for name, each in operands.items() if name.startswith("bias")]
    source = Source(h.detach(), norm, NORM, y.dtype)
    return (*linears(y, weights, biases, source), h)


def by_torch(x, norm, **operands):
    wide = x.to(torch.promote_types(x.dtype, FP32))
    y = norm * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM.eps)).to(x.dtype)
    count = len(operands) // 2
    return (*(F.linear(y, operands[f"weight{i}"], operands[f"bias{i}"]) for i in range(count)), x * 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_three_layers_behind_a_norm(device, dtype, bias):
    rows, width = ((2, 900), 512) if device.type == "cuda" else ((3, 33), 40)
    check_against_stock(turbo, by_torch, by_torch, inputs_of(device, dtype, rows, width, bias=bias))


FROZEN = [("weight1",), ("weight0", "weight1", "weight2"), ("norm",), ("weight0", "weight1", "weight2", "norm")]


@pytest.mark.parametrize("frozen", FROZEN, ids="+".join)
def test_frozen(device, frozen):
    check_against_stock(turbo, by_torch, by_torch, inputs_of(device, BF16, frozen=frozen))


def test_one_output_is_not_used(device):
    """Its weight has no gradient, as in stock."""
    inputs = inputs_of(device, FP32)
    q, _, v, _ = turbo(**inputs)
    (q.sum() + v.sum()).backward()
    assert inputs["weight1"].grad is None
    ours = [inputs[name].grad.clone() for name in ("x", "norm", "weight0", "weight2")]
    for value in inputs.values():
        if value is not None:
            value.grad = None
    q, _, v, _ = by_torch(**inputs)
    (q.sum() + v.sum()).backward()
    torch.testing.assert_close(ours, [inputs[name].grad for name in ("x", "norm", "weight0", "weight2")])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_wide_sums(device, dtype):
    """Under autocast stock sums the terms of dy in float32, each rounded before; here their sum is rounded once."""
    inputs = inputs_of(device, dtype, (64, 33), 64, outputs=(64, 64))
    del inputs["norm"]

    def ours(x, **operands):
        return linears(x, [operands["weight0"], operands["weight1"]], [None, None], wide=True)

    def stock(x, **operands):
        wide = x.to(torch.promote_types(x.dtype, FP32))  # whose gradients meet in float32
        return tuple(F.linear(wide.to(x.dtype), operands[f"weight{i}"]) for i in range(2))

    check_against_stock(ours, stock, stock, inputs)


def test_input_is_kept_only_where_it_cannot_be_made_again(device):
    inputs = inputs_of(device, BF16)
    h, y = add_rms_norm(inputs["x"], None, inputs["norm"], NORM)
    weights = [inputs[f"weight{i}"] for i in range(3)]

    def kept(*rest):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            linears(y, weights, [None] * 3, *rest)
        return saved

    source = Source(h.detach(), inputs["norm"], NORM, y.dtype)
    assert y.data_ptr() in kept()
    assert y.data_ptr() not in kept(source)
    assert h.data_ptr() in kept(source)
    for weight in weights:
        weight.requires_grad_(False)
    assert {y.data_ptr(), h.data_ptr()}.isdisjoint(kept(source))


def test_the_norm_is_made_again_once(device, monkeypatch):
    calls, op = [], module.normed
    monkeypatch.setattr(module, "normed", lambda *args: calls.append(1) or op(*args))
    outputs = turbo(**inputs_of(device, BF16))
    assert not calls
    torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
    assert len(calls) == 1


def test_refusals(device):
    y, weight = randn(2, 8, device=device, dtype=BF16), randn(4, 8, device=device, dtype=BF16)
    with pytest.raises(ValueError, match="shape"):
        linears(y, [weight.t()], [None])
    with pytest.raises(ValueError, match="bias"):
        linears(y, [weight], [y[0]])
    with pytest.raises(TypeError, match="one dtype"):
        linears(y, [weight.float()], [None])


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [(), ("weight0", "weight1", "weight2")], ids=["trained", "frozen"])
def test_real_shape(cuda, frozen):
    check_against_stock(
        turbo, by_torch, by_torch, inputs_of(cuda, BF16, (4, 2048), 2048, (2048, 512, 512), frozen=frozen)
    )
