"""Head and loss in one: the loss, the per-row statistics, and the gradients of hidden, weight and bias."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import linear_cross_entropy as module
from hf_turbo.kernels.linear_cross_entropy import (
    OPTIONAL_OUTPUTS,
    LogitTransform,
    linear_cross_entropy,
    linear_log_prob,
)
from transformers.loss.loss_utils import fixed_cross_entropy

from tests.kernels.helpers import assert_as_exact_as_stock, assert_same_bits, outputs_and_gradients, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks at test sizes."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(module, "_LEAST_ROWS", 16)
    monkeypatch.setattr(module, "_ROW_TILE", 8)


def operands(device, dtype, rows=60, hidden=24, vocabulary=103, bias=True, frozen=False, masked=0.3):
    inputs = {
        "hidden": randn(rows, hidden, device=device, dtype=dtype).requires_grad_(),
        "weight": randn(vocabulary, hidden, device=device, dtype=dtype, seed=1, scale=0.5).requires_grad_(not frozen),
        "bias": randn(vocabulary, device=device, dtype=dtype, seed=2).requires_grad_(not frozen) if bias else None,
    }
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < masked] = -100
    return inputs, labels.to(device)


def stock_loss(labels, num_items, scale, softcap):
    """As the CausalLM tails of transformers with ForCausalLMLoss."""

    def stock(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        if scale != 1.0:
            logits = logits * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return fixed_cross_entropy(logits, labels, num_items)

    return stock


def check(turbo, stock, inputs, start=lambda _, y: torch.ones_like(y)):
    """The rule of helpers.py for the gradients, and for the output unless it is one number: that is luck."""
    wide = {k: None if v is None else v.detach().double().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    actual = outputs_and_gradients(turbo, inputs, start)
    expected = outputs_and_gradients(stock, inputs, start)
    exact = outputs_and_gradients(stock, wide, start)
    for name, value in actual.items():
        if value.ndim:
            assert_as_exact_as_stock(name, value, expected[name], exact[name])
        else:
            # The sum of rows that test_log_prob judges.
            torch.testing.assert_close(value, expected[name], rtol=2 * torch.finfo(inputs["hidden"].dtype).eps, atol=0)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, 5.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("num_items", [None, 450.0], ids=["mean", "num-items"])
def test_loss_and_gradients(device, dtype, frozen, scale, softcap, num_items):
    inputs, labels = operands(device, dtype, frozen=frozen)
    items = None if num_items is None else torch.tensor(num_items, device=device)

    def turbo(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias, num_items=items, logit_scale=scale, softcap=softcap)

    # A loss scaler's factor for fp16, as it is trained; without it stock's own gradients underflow.
    factor = 1024.0 if dtype == torch.float16 else 1.0
    check(turbo, stock_loss(labels, items, scale, softcap), inputs, lambda _, y: torch.full_like(y, factor))


@pytest.mark.parametrize(("rows", "hidden", "vocabulary"), [(1, 1, 2), (7, 5, 17), (67, 16, 1000), (20, 8, 9001)])
def test_odd_sizes(device, rows, hidden, vocabulary):
    inputs, labels = operands(device, torch.float32, rows, hidden, vocabulary, bias=False, masked=0.0)
    check(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias),
        stock_loss(labels, None, 1.0, None),
        inputs,
    )


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden+bias"])
def test_only_what_is_asked_for(device, trained):
    """Frozen operands get no gradient, and cost none."""
    inputs, labels = operands(device, torch.float32)
    inputs = {name: value.detach().requires_grad_(name in trained) for name, value in inputs.items()}
    check(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias),
        stock_loss(labels, None, 1.0, None),
        inputs,
    )


def test_leading_dimensions(device):
    inputs, labels = operands(device, torch.float32, rows=60, bias=False)
    flat = linear_cross_entropy(inputs["hidden"], inputs["weight"], labels)
    shaped = linear_cross_entropy(inputs["hidden"].view(3, 20, -1), inputs["weight"], labels.view(3, 20))
    assert torch.equal(flat, shaped)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_backward_twice_and_scaled(device, frozen):
    """The first backward hands its sums out; a second one computes them again."""
    inputs, labels = operands(device, torch.float32, frozen=frozen)
    loss = linear_cross_entropy(inputs["hidden"], inputs["weight"], labels, inputs["bias"])
    leaves = [value for value in inputs.values() if value.requires_grad]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    third = torch.autograd.grad(loss * 0.5, leaves)
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, b), "a gradient handed out must not change"
        torch.testing.assert_close(b * 3, c)
        torch.testing.assert_close(b * 0.5, d)


def test_autocast_casts_as_linear_does(device):
    inputs, labels = operands(device, torch.float32)

    def stock(hidden, weight, bias):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=hidden.dtype != torch.float64):
            return stock_loss(labels, None, 1.0, None)(hidden, weight, bias)

    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = check(
            lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias),
            lambda hidden, weight, bias: (
                stock_loss(labels, None, 1.0, None)(hidden, weight, bias)
                if hidden.dtype != torch.float64
                else torch.autocast(device.type, enabled=False)(stock_loss(labels, None, 1.0, None))(
                    hidden, weight, bias
                )
            ),
            inputs,
        )
    assert actual["dweight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_log_prob_with_upstream_gradients_that_differ(device, dtype, softcap, frozen):
    """Preference and policy losses weight rows differently; a trained head's gradient must follow."""
    inputs, labels = operands(device, dtype, frozen=frozen, masked=0.0)
    transform = LogitTransform(0.9, softcap or 0.0, 1 / 1.3)
    weights = randn(len(labels), device=device, dtype=torch.float32, seed=9)

    def stock(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias) * 0.9
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return (logits / 1.3).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    check(
        lambda hidden, weight, bias: linear_log_prob(hidden, weight, labels, bias, transform=transform)[0],
        stock,
        inputs,
        lambda _, y: (weights * (1024.0 if dtype == torch.float16 else 1.0)).to(y.dtype),
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_entropy_gradient(device, frozen):
    inputs, labels = operands(device, torch.float32, frozen=frozen, masked=0.0)

    def turbo(hidden, weight, bias):
        log_prob, entropy, *_ = linear_log_prob(hidden, weight, labels, bias, outputs=("entropy",))
        return log_prob + entropy * entropy

    def stock(hidden, weight, bias):
        log_p = F.linear(hidden, weight, bias).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, labels[:, None]).squeeze(-1) + entropy * entropy

    check(turbo, stock, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optional_outputs(device, dtype):
    inputs, labels = operands(device, dtype, masked=0.0)
    labels[::2] = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"]).argmax(-1)[::2]
    everything = linear_log_prob(inputs["hidden"], inputs["weight"], labels, inputs["bias"], outputs=OPTIONAL_OUTPUTS)

    def stock(dtype_):
        logits = F.linear(*(inputs[name].detach().to(dtype_) for name in ("hidden", "weight", "bias")))
        log_p = logits.to(torch.promote_types(dtype_, torch.float32)).log_softmax(-1)
        p = log_p.exp()
        return (
            log_p.gather(-1, labels[:, None]).squeeze(-1),
            -(p * log_p).sum(-1),
            (p * p).sum(-1).log(),
            logits.to(log_p.dtype).mean(-1),
            logits.argmax(-1) == labels,
        )

    for name, turbo, low, exact in zip(
        ("log_prob", *OPTIONAL_OUTPUTS), everything, stock(dtype), stock(torch.float64), strict=True
    ):
        if name == "is_top1":
            assert turbo.dtype == torch.bool
            assert torch.equal(turbo, low)
        else:
            assert_as_exact_as_stock(name, turbo, low, exact)
    for i, name in enumerate(OPTIONAL_OUTPUTS, start=1):
        alone = linear_log_prob(inputs["hidden"], inputs["weight"], labels, inputs["bias"], outputs=(name,))
        assert torch.equal(alone[i], everything[i])
        assert [value is None for value in alone] == [False, *(other != name for other in OPTIONAL_OUTPUTS)]


def test_a_tie_is_top1_only_for_the_first(device):
    weight = torch.ones(4, 3, device=device)
    hidden = torch.ones(4, 3, device=device)
    labels = torch.arange(4, device=device)
    *_, is_top1 = linear_log_prob(hidden, weight, labels, outputs=("is_top1",))
    assert is_top1.tolist() == [True, False, False, False]


@pytest.mark.parametrize("num_items", [None, 5.0])
@pytest.mark.parametrize("rows", [0, 6], ids=["empty", "all-masked"])
def test_nothing_to_average_is_as_stock(device, rows, num_items):
    inputs, labels = operands(device, torch.float32, rows=rows)
    labels.fill_(-100)
    turbo = outputs_and_gradients(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias, num_items=num_items), inputs
    )
    stock = outputs_and_gradients(stock_loss(labels, num_items, 1.0, None), inputs)
    for name, value in stock.items():
        torch.testing.assert_close(turbo[name], value, equal_nan=True, msg=name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_as_stock(device, poison):
    inputs, labels = operands(device, torch.float32, rows=12, masked=0.0)
    with torch.no_grad():
        inputs["hidden"][3, 2] = poison
    turbo = outputs_and_gradients(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias), inputs
    )
    stock = outputs_and_gradients(stock_loss(labels, None, 1.0, None), inputs)
    for name, value in stock.items():
        assert torch.equal(turbo[name].isnan(), value.isnan()), name


def test_a_masked_vocabulary_entry(device):
    """A bias of -inf removes a token: probability zero, no gradient, no nan."""
    inputs, labels = operands(device, torch.float32, masked=0.0)
    labels[labels == 7] = 8
    with torch.no_grad():
        inputs["bias"][7] = -float("inf")
    check(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias),
        stock_loss(labels, None, 1.0, None),
        {**inputs, "bias": inputs["bias"].detach()},
    )


@pytest.mark.parametrize("label", [-1, 103, 2**40])
def test_label_outside_the_vocabulary(device, label):
    inputs, labels = operands(device, torch.float32)
    labels[5] = label
    with pytest.raises(IndexError, match=r"must be -100 or in \[0, 103\)"):
        linear_cross_entropy(inputs["hidden"], inputs["weight"], labels)


def test_another_ignore_index(device):
    inputs, labels = operands(device, torch.float32)
    expected = linear_cross_entropy(inputs["hidden"], inputs["weight"], labels)
    labels[labels == -100] = 42_000
    assert torch.equal(linear_cross_entropy(inputs["hidden"], inputs["weight"], labels, ignore_index=42_000), expected)


def test_bad_operands(device):
    inputs, labels = operands(device, torch.float32)
    with pytest.raises(ValueError, match="need"):
        linear_cross_entropy(inputs["hidden"][:, 1:], inputs["weight"], labels)
    with pytest.raises(ValueError, match="need"):
        linear_cross_entropy(inputs["hidden"], inputs["weight"], labels[1:])
    with pytest.raises(ValueError, match="need"):
        linear_cross_entropy(inputs["hidden"], inputs["weight"], labels, inputs["bias"][1:])
    with pytest.raises(TypeError, match="dtype"):
        linear_cross_entropy(inputs["hidden"], inputs["weight"].half(), labels)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_same_bits_twice(device, frozen):
    inputs, labels = operands(device, torch.bfloat16, frozen=frozen)

    def turbo(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias)

    assert_same_bits(outputs_and_gradients(turbo, inputs), outputs_and_gradients(turbo, inputs))


def test_gradcheck():
    inputs, labels = operands(torch.device("cpu"), torch.float64, rows=6, hidden=3, vocabulary=5, masked=0.3)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias, softcap=3.0, num_items=7.0),
        tuple(inputs.values()),
        nondet_tol=1e-12,  # a second backward computes what the first handed out again, in another order
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_no_second_derivatives(device, frozen):
    """The gradient that comes to a loss is not recorded: torch's once_differentiable left their terms out silently."""
    inputs, labels = operands(device, torch.float32, frozen=frozen)
    (once,) = torch.autograd.grad(linear_cross_entropy(labels=labels, **inputs), inputs["hidden"])
    (recorded,) = torch.autograd.grad(
        linear_cross_entropy(labels=labels, **inputs), inputs["hidden"], create_graph=True
    )
    assert torch.equal(recorded, once)
    with pytest.raises(RuntimeError, match="second derivatives"):
        recorded.square().sum().backward()


def test_ops_are_well_formed(device):
    ops = torch.ops.hf_turbo
    logits = randn(4, 11, device=device, dtype=torch.float32)
    targets = torch.tensor([0, 3, 10, 5], device=device)
    ones, out = torch.ones(4, device=device), torch.empty(4, 11, device=device, dtype=torch.bfloat16)
    transform = (0.5, 3.0, 1.0)
    arguments = {
        ops.head_statistics_.default: (logits.clone(), targets, *transform, 1.0, 15),
        ops.head_gradient_.default: (logits.clone(), targets, ones, ones, ones, ones, None, *transform),
        ops.scaled_cast_.default: (logits, ones, out),
    }
    for op, values in arguments.items():
        torch.library.opcheck(op, values, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("differs", [False, True], ids=["one upstream gradient", "one a row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_of_the_weight_is_rounded_in_place(device, monkeypatch, dtype, differs):
    """As from a sum of its own, in the memory of its first part: 192 of 301 rows, in 32 bits."""
    inputs, labels = operands(device, dtype, 40, 48, 301, bias=True, frozen=False)
    inputs = {name: value.detach() if value is not None else None for name, value in inputs.items()}

    def gradient() -> torch.Tensor:
        weight = inputs["weight"].clone().requires_grad_()
        log_prob = linear_log_prob(inputs["hidden"], weight, labels.clamp(min=0), inputs["bias"], uniform=not differs)[
            0
        ]
        upstream = torch.linspace(0.1, 1.0, len(log_prob), device=device) if differs else torch.full_like(log_prob, 0.3)
        log_prob.backward(upstream.to(log_prob.dtype))
        return weight.grad

    expected = gradient()
    monkeypatch.setattr(module, "_IN_PLACE_BYTES", 0)
    monkeypatch.setattr(module, "_AT_A_TIME", 1000)
    actual = gradient()
    if device.type == "cuda":  # where products of other shapes may sum in another order
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected)
    assert actual.is_contiguous()
    assert actual.untyped_storage().nbytes() == (301 if dtype == torch.float32 else 192) * 48 * 4


def test_nothing_runs_beside_what_looks_at_saved_tensors(monkeypatch):
    """Hooks that copy them would copy what is not computed yet."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_gpu = SimpleNamespace(is_cuda=True)
    assert module.may_run_beside(on_gpu)
    assert not module.may_run_beside(torch.ones(1))
    with torch.autograd.graph.saved_tensors_hooks(lambda each: each, lambda each: each):
        assert not module.may_run_beside(on_gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not module.may_run_beside(on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("rows", [200, 4000], ids=["one chunk", "chunks"])
def test_last_products_beside_what_comes_next(cuda, monkeypatch, frozen, rows):
    """The same bits, whatever takes memory in the meantime, and if there is no backward."""
    monkeypatch.setattr(module, "_LEAST_ROWS", 256)
    inputs, labels = operands(cuda, torch.bfloat16, rows, 512, 50_000, bias=True, frozen=frozen, masked=0.0)
    monkeypatch.setattr(module, "may_run_beside", lambda _: False)

    def results() -> list[torch.Tensor]:
        leaves = [each.detach().requires_grad_(each.requires_grad) for each in inputs.values()]
        hidden, weight, bias = leaves
        asked = ("entropy", "is_top1")
        log_prob, entropy, _, _, is_top1 = linear_log_prob(hidden, weight, labels, bias, outputs=asked, uniform=True)
        junk = [torch.full((rows * 50_000,), float("nan"), device=cuda, dtype=torch.bfloat16) for _ in range(2)]
        log_prob.backward(torch.full_like(log_prob, 0.3))
        del junk
        return [log_prob, entropy, is_top1, *(each.grad for each in leaves if each.grad is not None)]

    expected = results()
    used = []
    monkeypatch.setattr(module, "may_run_beside", lambda _: used.append(1) or True)
    for _ in range(3):
        linear_log_prob(*list(inputs.values())[:2], labels, inputs["bias"], outputs=("entropy",), uniform=True)
        for one, other in zip(results(), expected, strict=True):
            assert torch.equal(one, other)
    assert len(used) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_real_shape(cuda, monkeypatch, frozen):
    """More than 2^31 bytes of logits, several chunks of the default size, softcap, bf16."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cuda": 512 << 20})
    monkeypatch.setattr(module, "_LEAST_ROWS", 256)
    inputs, labels = operands(cuda, torch.bfloat16, 9000, 512, 128_256, bias=False, frozen=frozen)
    check(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias, softcap=30.0),
        stock_loss(labels, None, 1.0, 30.0),
        inputs,
    )


@pytest.mark.gpu
def test_offsets_beyond_int32(cuda, monkeypatch):
    """One chunk of more than 2^31 logits."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cuda": 1 << 40})
    inputs, labels = operands(cuda, torch.bfloat16, 17_000, 64, 128_256, bias=False, frozen=True, masked=0.0)
    whole = outputs_and_gradients(lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels), inputs)
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cuda": 512 << 20})
    parts = outputs_and_gradients(lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels), inputs)
    torch.testing.assert_close(whole["y"], parts["y"])
    torch.testing.assert_close(whole["dhidden"], parts["dhidden"])


@pytest.mark.gpu
def test_memory_of_the_frozen_head(cuda, monkeypatch):
    """Extra memory is one chunk and the hidden gradient, whatever the number of rows."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cuda": 512 << 20})
    monkeypatch.setattr(module, "_LEAST_ROWS", 256)
    inputs, labels = operands(cuda, torch.bfloat16, 8192, 1024, 128_256, bias=False, frozen=True, masked=0.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(inputs["hidden"], inputs["weight"], labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 0.7 * 2**30
