from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hf_turbo.kernels.rope import rope
from transformers.models.gemma3n.modeling_gemma3n import apply_rotary_pos_emb as gemma3n
from transformers.models.gemma4.modeling_gemma4 import apply_rotary_pos_emb as gemma4
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as glm4
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as olmo2
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3

from tests.kernels.helpers import (
    assert_same_bits,
    assert_same_specials,
    check_against_stock,
    outputs_and_gradients,
    randn,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Body(NamedTuple):
    """A function of transformers, how to ask for it, and the width of its cos as a fraction of the head."""

    stock: Callable[..., Any]
    options: dict[str, Any]
    width: float = 1.0


BODIES = {
    "llama": Body(llama, {}),
    "phi3": Body(phi3, {}, 0.75),
    "glm": Body(glm, {"interleaved": True}, 0.5),
    "glm4": Body(glm4, {"interleaved": True}),
    "olmo2": Body(olmo2, {"keep_dtype": True}),
    "gpt_oss": Body(gpt_oss, {"half_width": True}, 0.5),
}


def inputs_of(device, dtype=BF16, cos_dtype=None, *, heads=(4, 2), tokens=3, head_dim=16, batch=2, width=1.0):
    """q and k [B, S, heads, D] as projections give them; the two halves of cos differ on purpose."""
    q, k = (
        randn(batch, tokens, count, head_dim, device=device, dtype=dtype, seed=seed).requires_grad_()
        for seed, count in enumerate(heads)
    )
    angles = torch.randn(batch, tokens, int(head_dim * width), generator=torch.Generator().manual_seed(9)) * 3
    cos, sin = (f(angles).to(device, cos_dtype or dtype) for f in (torch.cos, torch.sin))
    return {"q": q, "k": k, "cos": cos, "sin": sin}


def heads_first(function, **options):
    return lambda q, k, cos, sin: function(q.transpose(1, 2), k.transpose(1, 2), cos, sin, **options)


def check(body: Body, inputs):
    stock = heads_first(body.stock)
    return check_against_stock(heads_first(rope, **body.options), stock, stock, inputs)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP32, BF16)])
@pytest.mark.parametrize("body", BODIES)
def test_bodies(device, body, dtypes):
    sizes = {"heads": (32, 8), "tokens": 300, "head_dim": 128} if device.type == "cuda" else {}
    check(BODIES[body], inputs_of(device, *dtypes, **sizes, width=BODIES[body].width))


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32)])
@pytest.mark.parametrize("stock", [gemma3n, gemma4])
@pytest.mark.parametrize("heads_dim", [1, 2])
def test_single_tensor(device, stock, heads_dim, dtypes):
    inputs = inputs_of(device, *dtypes)
    inputs = {"x": inputs["q"], "cos": inputs["cos"], "sin": inputs["sin"]}

    def turn(x):
        return x.transpose(1, 2) if heads_dim == 1 else x

    def turbo(x, cos, sin):
        rotated, nothing = rope(turn(x), None, cos, sin, unsqueeze_dim=heads_dim)
        assert nothing is None
        return rotated

    def expected(x, cos, sin):
        return stock(turn(x), cos, sin, unsqueeze_dim=heads_dim)

    check_against_stock(turbo, expected, expected, inputs)


@pytest.mark.parametrize(
    ("body", "heads", "head_dim"),
    [
        ("llama", (1, 1), 2),
        ("llama", (3, 1), 6),
        ("llama", (28, 4), 32),  # heads that are no power of two
        ("llama", (40, 40), 128),  # more heads than a tile holds
        ("phi3", (5, 3), 24),
        ("glm", (5, 1), 12),
        ("gpt_oss", (9, 1), 10),
        ("llama", (2, 2), 192),
    ],
)
def test_sizes(device, body, heads, head_dim):
    sizes = {"heads": heads, "head_dim": head_dim, "tokens": 3}
    check(BODIES[body], inputs_of(device, **sizes, width=BODIES[body].width))


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (16, 16)])
def test_real_shapes(cuda, heads, dtypes):
    check(BODIES["llama"], inputs_of(cuda, *dtypes, heads=heads, tokens=4096, head_dim=128))


def test_one_cos_for_all(device):
    """cos of batch 1, as rotary modules give it for shared positions, and expanded."""
    inputs = inputs_of(device)
    inputs["cos"], inputs["sin"] = inputs["cos"][:1], inputs["sin"][:1]
    first = check(BODIES["llama"], inputs)
    expanded = inputs | {name: inputs[name].expand(2, -1, -1) for name in ("cos", "sin")}
    function = heads_first(rope)
    assert_same_bits(outputs_and_gradients(function, inputs), outputs_and_gradients(function, expanded))
    assert first.keys() == {"y0", "y1", "dq", "dk"}


def test_cos_and_sin_of_other_strides(device):
    inputs = inputs_of(device)
    expected = outputs_and_gradients(heads_first(rope), inputs)
    for other in (
        {"sin": inputs["sin"].transpose(0, 1).contiguous().transpose(0, 1)},
        {name: torch.stack([inputs[name]] * 2, -1)[..., 0] for name in ("cos", "sin")},
    ):
        changed = inputs | other
        actual = rope(changed["q"], changed["k"], changed["cos"], changed["sin"], unsqueeze_dim=2)
        assert all(torch.equal(a.transpose(1, 2), expected[f"y{i}"]) for i, a in enumerate(actual))


# Views of leaves [2, 3, heads, 32].
LAYOUTS = {
    "as projected": (2, lambda x: x),
    "heads first": (1, lambda x: x.transpose(1, 2)),
    "heads first, contiguous": (1, lambda x: x.transpose(1, 2).contiguous()),
    "slice of a packed projection": (1, lambda x: x[..., 8:24].transpose(1, 2)),
    "some heads": (1, lambda x: x[:, :, 1:].transpose(1, 2)),
    "every second element": (1, lambda x: x[..., ::2].transpose(1, 2)),
    "expanded": (1, lambda x: x[:, :1].expand(-1, 3, -1, -1).transpose(1, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    """Any view gives the bits of its contiguous copy, in the memory order of the view."""
    heads_dim, view = LAYOUTS[layout]
    inputs = inputs_of(device, head_dim=32, heads=(4, 3))
    width = view(inputs["q"]).shape[-1]
    inputs |= {name: inputs[name][..., :width].contiguous() for name in ("cos", "sin")}

    def on_view(q, k, cos, sin):
        return rope(view(q), view(k), cos, sin, unsqueeze_dim=heads_dim)

    def on_copy(q, k, cos, sin):
        return rope(view(q).contiguous(), view(k).contiguous(), cos, sin, unsqueeze_dim=heads_dim)

    actual = outputs_and_gradients(on_view, inputs)
    assert_same_bits(actual, outputs_and_gradients(on_copy, inputs))
    if layout not in ("every second element", "expanded"):
        assert actual["y0"].stride() == torch.empty_like(view(inputs["q"])).stride()


def test_gradients_keep_the_memory_order_of_the_inputs(device):
    """Whatever layout attention's gradient has, that of the projection's view needs no copy before the weight GEMM."""
    inputs = inputs_of(device)
    q, k = (inputs[name].transpose(1, 2) for name in ("q", "k"))
    outputs = rope(q, k, inputs["cos"], inputs["sin"])
    starts = [torch.randn_like(y).contiguous() for y in outputs]
    gradients = torch.autograd.grad(outputs, [q, k], starts)
    assert [g.stride() for g in gradients] == [q.stride(), k.stride()]


@pytest.mark.parametrize("start", ["expanded", "transposed", "every second"])
def test_incoming_gradient_layouts(device, start):
    inputs = inputs_of(device)

    def start_of(index, y):
        if start == "expanded":
            return torch.ones((), device=device, dtype=y.dtype).expand(y.shape)
        if start == "transposed":
            return randn(*y.mT.shape, device=device, dtype=y.dtype, seed=index).mT
        return randn(*y.shape[:-1], 32, device=device, dtype=y.dtype, seed=index)[..., ::2]

    function = heads_first(rope)
    actual = outputs_and_gradients(function, inputs, start_of)
    assert_same_bits(actual, outputs_and_gradients(function, inputs, lambda i, y: start_of(i, y).contiguous()))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(device, used):
    inputs = inputs_of(device)
    outputs = rope(inputs["q"], inputs["k"], inputs["cos"], inputs["sin"], unsqueeze_dim=2)
    both = torch.autograd.grad(outputs, [inputs["q"], inputs["k"]], [torch.ones_like(y) for y in outputs], True)
    start = torch.ones_like(outputs[used])
    one = torch.autograd.grad(outputs[used], [inputs["q"], inputs["k"]], start, allow_unused=True)
    assert torch.equal(one[used], both[used])
    assert one[1 - used] is None


@pytest.mark.parametrize("frozen", ["q", "k"])
def test_one_input_frozen(device, frozen):
    inputs = inputs_of(device)
    inputs[frozen].requires_grad_(False)
    assert len(check(BODIES["llama"], inputs)) == 3


def test_same_bits_twice_and_backward_twice(device):
    inputs = inputs_of(device)
    runs = [outputs_and_gradients(heads_first(rope), inputs) for _ in range(2)]
    assert_same_bits(*runs)
    outputs = heads_first(rope)(**inputs)
    starts = [torch.ones_like(y) for y in outputs]
    grads = [torch.autograd.grad(outputs, [inputs["q"], inputs["k"]], starts, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_backward_turns_back(device):
    """The rotation of a unit-length pair is undone by its transpose."""
    inputs = inputs_of(device, FP32)
    half = inputs["cos"][..., :8]
    cos, sin = (torch.cat([f(half), f(half)], -1) for f in (torch.cos, torch.sin))
    y, _ = rope(inputs["q"], None, cos, sin, unsqueeze_dim=2)
    (back,) = torch.autograd.grad(y, inputs["q"], y.detach())
    torch.testing.assert_close(back, inputs["q"].detach())


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
def test_empty(device, batch, tokens):
    inputs = inputs_of(device, batch=batch, tokens=tokens)
    run = outputs_and_gradients(heads_first(rope), inputs)
    assert run["y0"].shape == (batch, 4, tokens, 16)
    assert run["dk"].shape == (batch, tokens, 2, 16)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("body", ["llama", "glm"])
def test_nan_and_infinity(device, body):
    inputs = inputs_of(device, width=BODIES[body].width)
    q = inputs["q"].detach().clone()
    q[0, 0, 0, 1], q[0, 1, 1, 2], q[1, 2, 3, 15] = float("nan"), float("inf"), -float("inf")
    inputs["q"] = q.requires_grad_()
    actual = outputs_and_gradients(heads_first(rope, **BODIES[body].options), inputs)
    expected = outputs_and_gradients(heads_first(BODIES[body].stock), inputs)
    for name, value in expected.items():
        assert_same_specials(name, actual[name], value)


@pytest.mark.parametrize("body", BODIES)
def test_gradcheck(body):
    width, options = BODIES[body].width, BODIES[body].options
    inputs = {n: v.double() for n, v in inputs_of(torch.device("cpu"), FP32, tokens=2, head_dim=8, width=width).items()}
    q, k = (inputs[name].detach().requires_grad_() for name in ("q", "k"))

    def function(q, k):
        return heads_first(rope, **options)(q, k, inputs["cos"], inputs["sin"])

    assert torch.autograd.gradcheck(function, (q, k))


@pytest.mark.parametrize(("body", "with_k"), [("llama", True), ("glm", False)])
def test_opcheck(device, body, with_k):
    inputs = {n: v.detach() for n, v in inputs_of(device, BF16, FP32, width=BODIES[body].width).items()}
    q, k = (inputs[name].transpose(1, 2) for name in ("q", "k"))
    options = BODIES[body].options
    how = (1, options.get("interleaved", False), options.get("half_width", False))
    arguments = (q, k if with_k else None, inputs["cos"], inputs["sin"], *how, with_k)
    orders = ([0, 2, 1, 3], [0, 2, 1, 3] if with_k else [])
    torch.library.opcheck(torch.ops.hf_turbo.rope.default, (*arguments, *orders, BF16, BF16))


@pytest.mark.parametrize("with_k", [True, False])
def test_compile(device, with_k):
    """One graph, and the same bits."""
    inputs = inputs_of(device)

    def function(q, k, cos, sin):
        q_out, k_out = rope(q.transpose(1, 2), k.transpose(1, 2) if with_k else None, cos, sin)
        return (q_out * 2, k_out * 3) if with_k else q_out * 2

    inputs["k"].requires_grad_(with_k)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same_bits(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs))


def test_refusals(device):
    inputs = {n: v.detach() for n, v in inputs_of(device).items()}
    q, k, cos, sin = inputs.values()
    with pytest.raises(ValueError, match="unsqueeze_dim"):
        rope(q, k, cos, sin, unsqueeze_dim=3)
    with pytest.raises(ValueError, match="does not fit q"):
        rope(q, k, cos, sin, unsqueeze_dim=1)
    with pytest.raises(ValueError, match="does not fit k"):
        rope(q, k[:, :2], cos, sin, unsqueeze_dim=2)
    with pytest.raises(ValueError, match="one batch and D"):
        rope(q, k[..., :8], cos, sin, unsqueeze_dim=2)
    with pytest.raises(ValueError, match="alike"):
        rope(q, k, cos, sin[..., :8], unsqueeze_dim=2)
    with pytest.raises(ValueError, match="rotated elements"):
        rope(q, k, cos, sin, unsqueeze_dim=2, half_width=True)
    with pytest.raises(ValueError, match="gradient for cos"):
        rope(q, k, cos.clone().requires_grad_(), sin, unsqueeze_dim=2)
    with pytest.raises(TypeError, match="floating-point"):
        rope(q.int(), k, cos, sin, unsqueeze_dim=2)


@pytest.mark.gpu
@pytest.mark.parametrize("heads_dim", [1, 2])
def test_more_than_2_31_elements(cuda, heads_dim):
    """The last tokens of a huge tensor are those of a small one, in both memory orders."""
    tokens, heads, head_dim = 2**31 // (32 * 128) + 16, 32, 128
    shape = (1, heads, tokens, head_dim) if heads_dim == 1 else (1, tokens, heads, head_dim)
    q = torch.zeros(shape, device=cuda, dtype=BF16)
    last = (slice(None), slice(None), slice(-16, None)) if heads_dim == 1 else (slice(None), slice(-16, None))
    q[last] = randn(*q[last].shape, device=cuda, dtype=BF16)
    angles = randn(1, tokens, head_dim, device=cuda, dtype=FP32)
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
    small = q[last].clone().requires_grad_()
    q.requires_grad_()
    y, _ = rope(q, None, cos, sin, unsqueeze_dim=heads_dim)
    expected, _ = rope(small, None, cos[:, -16:], sin[:, -16:], unsqueeze_dim=heads_dim)
    assert torch.equal(y[last], expected)
    (dq,) = torch.autograd.grad(y, q, y.detach())
    (expected_dq,) = torch.autograd.grad(expected, small, expected.detach())
    assert torch.equal(dq[last], expected_dq)
