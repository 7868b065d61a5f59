"""Norm and rotation of queries and keys in one pass: no further from fp64 than modelling code, one after the other."""

from __future__ import annotations

import pytest
import torch
from hf_turbo.kernels import qk_norm_rope as module
from hf_turbo.kernels.add_rms_norm import Norm
from hf_turbo.kernels.qk_norm_rope import qk_norm_rope
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from tests.kernels.helpers import assert_same_bits, check_against_stock, outputs_and_gradients, randn

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NORMS = {"qwen3": (Qwen3RMSNorm, Norm(1e-6, 0.0, True)), "gemma3": (Gemma3RMSNorm, Norm(1e-6, 1.0))}


def inputs_of(device, dtype=BF16, weight_dtype=None, *, heads=(4, 2), tokens=5, head_dim=16, batch=2, frozen=False):
    """q and k [B, S, heads, D] as projections give them; the two halves of cos differ on purpose."""
    q, k = (
        randn(batch, tokens, count, head_dim, device=device, dtype=dtype, seed=seed).requires_grad_()
        for seed, count in enumerate(heads)
    )
    q_weight, k_weight = (
        randn(head_dim, device=device, dtype=weight_dtype or dtype, seed=seed).requires_grad_(not frozen)
        for seed in (2, 3)
    )
    angles = torch.randn(batch, tokens, head_dim, generator=torch.Generator().manual_seed(9)) * 3
    cos, sin = (f(angles).to(device, weight_dtype or dtype) for f in (torch.cos, torch.sin))
    return {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}


def stock_of(kind, heads_dim=1):
    cls, norm = NORMS[kind]

    def normed(x, weight):
        made = cls(x.shape[-1], eps=norm.eps).to(x.device)
        del made.weight
        made.weight = weight
        return made(x)

    def stock(q, k, q_weight, k_weight, cos, sin):
        q, k = normed(q, q_weight), normed(k, k_weight)
        if heads_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=heads_dim)

    return stock


def turbo_of(kind, heads_dim=1):
    def turbo(q, k, *rest):
        if heads_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return qk_norm_rope(q, k, *rest, NORMS[kind][1], unsqueeze_dim=heads_dim)

    return lambda q, k, q_weight, k_weight, cos, sin: turbo(q, k, q_weight, k_weight, cos, sin)


def check(kind, inputs, heads_dim=1):
    stock = stock_of(kind, heads_dim)
    return check_against_stock(turbo_of(kind, heads_dim), stock, stock, inputs)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32)])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("heads_dim", [1, 2])
def test_families(device, kind, dtypes, heads_dim):
    sizes = {"heads": (32, 8), "tokens": 300, "head_dim": 128} if device.type == "cuda" else {}
    check(kind, inputs_of(device, *dtypes, **sizes), heads_dim)


@pytest.mark.parametrize(
    ("heads", "head_dim", "tokens"),
    [((1, 1), 2, 1), ((3, 1), 6, 4), ((28, 4), 24, 3), ((5, 5), 80, 3), ((40, 2), 64, 2), ((2, 1), 256, 37)],
)
def test_sizes(device, heads, head_dim, tokens):
    check("qwen3", inputs_of(device, heads=heads, head_dim=head_dim, tokens=tokens))


def test_one_row_of_angles_for_all(device):
    inputs = inputs_of(device, batch=3)
    inputs["cos"], inputs["sin"] = inputs["cos"][:1], inputs["sin"][:1]
    check("qwen3", inputs)


@pytest.mark.parametrize("frozen", ["weights", "k", "q and its weight"])
def test_frozen(device, frozen):
    inputs = inputs_of(device, frozen=frozen == "weights")
    for name in {"k": ["k"], "q and its weight": ["q", "q_weight"]}.get(frozen, []):
        inputs[name] = inputs[name].detach()
    check("qwen3", inputs)


def test_only_one_of_them_has_a_gradient(device):
    inputs = inputs_of(device)
    leaves = {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    turbo_of("qwen3")(**leaves)[1].sum().backward()
    for name in ("q", "q_weight"):
        assert leaves[name].grad is None or not leaves[name].grad.any()
    assert leaves["k"].grad.abs().sum() > 0


def test_more_tokens_than_programs_and_the_same_bits_each_time(device, monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", 1)
    inputs = inputs_of(device, FP32, tokens=700 if device.type == "cuda" else 11)
    check("qwen3", inputs)
    first, second = (outputs_and_gradients(turbo_of("qwen3"), inputs) for _ in range(2))
    assert_same_bits(first, second)


def test_strides(device):
    """Heads of one packed projection, and a gradient whose heads are not contiguous."""
    inputs = inputs_of(device, FP32)
    leaves = {name: value.detach().clone() for name, value in inputs.items()}
    packed = torch.cat([leaves["q"], leaves["k"]], 2).requires_grad_()
    q, k = packed.split([4, 2], 2)
    rest = [leaves[name] for name in ("q_weight", "k_weight", "cos", "sin")]
    outputs = qk_norm_rope(q.transpose(1, 2), k.transpose(1, 2), *rest, NORMS["qwen3"][1])
    expected = turbo_of("qwen3")(leaves["q"], leaves["k"], *rest)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert torch.equal(ours, theirs)
    starts = [torch.randn(*y.shape[:2], y.shape[3], y.shape[2], device=device).transpose(2, 3) for y in outputs]
    (strided,) = torch.autograd.grad(outputs, packed, starts, retain_graph=True)
    (dense,) = torch.autograd.grad(outputs, packed, [each.contiguous() for each in starts])
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("change", ["partial rotation", "float64", "no tokens", "two dtypes"])
def test_what_is_computed_in_turn(device, change):
    inputs = inputs_of(device, FP32)
    if change == "float64":
        inputs = {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    elif change == "no tokens":
        inputs = {name: value[:, :0] if value.ndim > 1 else value for name, value in inputs.items()}
    elif change == "two dtypes":
        inputs["k_weight"] = inputs["k_weight"].detach().to(BF16).requires_grad_()
    else:
        inputs = {name: value.detach() for name, value in inputs.items()}
        inputs["cos"], inputs["sin"] = inputs["cos"][..., :8], inputs["sin"][..., :8]
        outputs = turbo_of("qwen3")(**inputs)
        assert [each.shape[-1] for each in outputs] == [16, 16]
        return
    outputs, expected = turbo_of("qwen3")(**inputs), stock_of("qwen3")(**inputs)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ops_are_well_formed(device):
    inputs = inputs_of(device, FP32)
    q, k, q_weight, k_weight, cos, sin = (value.detach() for value in inputs.values())
    ops = torch.ops.hf_turbo
    if device.type == "cpu" and not module.use_triton(q):
        pytest.skip("needs Triton")
    forward = (q, k, q_weight, k_weight, cos, sin, 1e-6, 0.0, 2, FP32)
    backward = (torch.ones_like(q), q, q_weight, cos, sin, 1e-6, 0.0, 2, True)
    for op, arguments in ((ops.qk_norm_rope.default, forward), (ops.qk_norm_rope_backward.default, backward)):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
