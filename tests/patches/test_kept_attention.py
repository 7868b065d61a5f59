"""Layers recomputed without their attention: the bits of stock, attention computed once, and nothing left behind."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_turbo.patches import checkpointing, kept_attention, kept_layers
from hf_turbo.patches.kept_layers import Kept
from torch.utils.checkpoint import checkpoint

import hf_turbo
from hf_turbo.policies import memory
from hf_turbo.policies.memory import Layer
from tests.models import loss_and_gradients, switch_on, switched_off, tiny_model
from tests.patches.test_padding import packed, padded

LAYERS = 3
ALL = tuple(range(LAYERS))
OPTIONS = switched_off("checkpointing", "memory")
_FORWARD = ("aten::_scaled_dot_product_flash_attention_for_cpu", "_CappedAttention")


def checkpointed(family: str = "llama", **changes: Any) -> Any:
    return switch_on(tiny_model(family, **{"num_hidden_layers": LAYERS, **changes}))


def dense() -> dict[str, torch.Tensor]:
    return padded((20, 20, 20))


def masked() -> dict[str, torch.Tensor]:
    """So short that the mask, which is kept as torch makes it, weighs less than half of the output."""
    return padded((9, 20, 20, 4))


def patch(model: Any, **options: Any) -> None:
    hf_turbo.patch_model(model, **{**OPTIONS, **options})


def results(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Loss, gradients, and the random numbers drawn after it all."""
    torch.manual_seed(1)
    loss, gradients = loss_and_gradients(model, inputs)
    return [loss, *(gradient.clone() for gradient in gradients.values()), torch.rand(3)]


@pytest.fixture
def handed_out(monkeypatch) -> list[int]:
    """One for each kept output that a recomputation was given instead of computing it."""
    found: list[int] = []
    hand_out = kept_attention._HandOut

    def apply(*args: Any) -> Any:
        found.append(1)
        return hand_out.apply(*args)

    monkeypatch.setattr(kept_attention, "_HandOut", SimpleNamespace(apply=apply))
    return found


def assert_same(ours: list[torch.Tensor], stock: list[torch.Tensor]) -> None:
    assert len(ours) == len(stock)
    assert all(map(torch.equal, ours, stock))


CASES = [
    ("llama", dense, {}, {}),
    ("llama", masked, {}, {}),  # a mask, and keys repeated for it
    ("llama", padded, {"padding": True}, {}),
    ("qwen3", packed, {"padding": True}, {}),
    ("phi3", padded, {"padding": True}, {}),  # queries, keys and values in one tensor
    ("mistral", padded, {"padding": True}, {}),  # a window
    ("gemma3", padded, {"padding": True}, {"sliding_window": 8}),
    ("gemma2", padded, {"padding": True}, {}),  # capped scores
    ("gpt-oss", padded, {"padding": True}, {}),  # sinks
    ("qwen3-moe", dense, {}, {}),
]


@pytest.mark.parametrize(("family", "make", "options", "changes"), CASES)
def test_the_bits_of_recomputation(plan, handed_out, family, make, options, changes):
    """Of stock; where padding is left out, of the same with memory="as_is". No attention is recomputed."""
    model, inputs = checkpointed(family, **changes), make()
    if options:
        patch(model, memory="as_is", **options)
    expected = results(model, inputs)
    hf_turbo.disable()
    patch(model, **options)
    calls = 1 if family == "gemma2" or family == "gpt-oss" or make in (dense, masked) or not options else 3
    for plan.kept, layers in [(Kept(), 0), (Kept(), 0), (Kept(0, ALL), LAYERS), (Kept(1, (0,)), 1), (Kept(0, ALL), 3)]:
        assert_same(results(model, inputs), expected)
        assert len(handed_out) == layers * calls  # documents of equal length are one call
        handed_out.clear()
    assert all(cost.attention and cost.scores > 0 for cost in plan.costs)


@pytest.mark.parametrize(("family", "make"), [("llama", dense), ("gemma2", padded)])
def test_attention_runs_once(plan, family, make):
    """By the profiler: one forward of each layer's attention, where recomputation makes two."""
    model, inputs, counts = checkpointed(family), make(), []
    patch(model, padding=True)
    results(model, inputs)
    for plan.kept in (Kept(), Kept(0, ALL)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            results(model, inputs)
        counts.append(sum(event.count for event in profile.key_averages() if event.key in _FORWARD))
    assert counts == [2 * LAYERS, LAYERS]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dropout_elsewhere_and_autocast(plan, handed_out, family, autocast):
    """LoRA's dropout draws the same numbers. Head norms leave queries and keys in float32, which autocast casts."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear")
    model = peft.get_peft_model(tiny_model(family, num_hidden_layers=LAYERS), config)
    model.enable_input_require_grads()
    switch_on(model.base_model.model)
    inputs = dense()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock = results(model, inputs)
        patch(model)
        for plan.kept in (Kept(), Kept(), Kept(0, ALL)):
            assert_same(results(model, inputs), stock)
    assert len(handed_out) == LAYERS
    assert all(cost.attention for cost in plan.costs)


@pytest.mark.parametrize("options", [{}, {"padding": True}])
def test_dropout_of_attention_is_not_kept(plan, options):
    model, inputs = checkpointed(attention_dropout=0.3), padded()
    if options:
        patch(model, memory="as_is", **options)
    expected = results(model, inputs)
    hf_turbo.disable()
    patch(model, **options)
    for plan.kept in (Kept(), Kept(), Kept(0, ALL)):
        assert_same(results(model, inputs), expected)
    assert [cost.attention for cost in plan.costs] == [None] * LAYERS


def test_attention_that_is_not_understood(plan):
    """Eager attention, and one that keeps more than half as much as its output beside it: a mask."""
    for changes, inputs in (({"attn_implementation": "eager"}, dense()), ({}, padded())):
        model = checkpointed(**changes)
        stock = results(model, inputs)
        patch(model)
        for plan.kept in (Kept(), Kept(), Kept(0, ALL)):
            assert_same(results(model, inputs), stock)
        assert [cost.attention for cost in plan.costs] == [None] * LAYERS
        hf_turbo.disable()


def test_sizes_and_shares(plan):
    """Output and log-sum-exp, and the FLOP of two products."""
    model = checkpointed()
    patch(model)
    for _ in range(2):
        results(model, dense())
    tokens, width, heads = 60, 64, 4
    for cost in plan.costs:
        assert cost.attention == tokens * (4 * width + 4 * heads)
        assert cost.scores == 4 * tokens * width * 20 / 2
        assert cost.products == tokens * checkpointing.sizes_of(model.model.layers[0])[1]
        assert cost.whole > 5 * cost.attention


# ------------------------------------------------------------------------------------------------ one region


def attention(layer: torch.Tensor, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer of three projections, attention, and one of its output."""

    def run(x: torch.Tensor) -> torch.Tensor:
        product = x @ layer
        q, k, v = product.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        keeper = kept_attention.current()
        called.append(keeper is not None)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        y = sdpa(q, k, v, is_causal=True) if keeper is None else keeper.call(9, sdpa, q, k, v, is_causal=True)
        storages.extend(weakref.ref(each.untyped_storage()) for each in (product, y))
        return (y.transpose(1, 2).flatten(2) @ weight).tanh()

    return run


called: list[bool] = []
storages: list[Any] = []  # of queries, keys and values, and of the output


def region(keeps: bool = True, scale: float = 0.2) -> Any:
    """Leaves, the function of a layer, what it returns under recomputation, and the calls."""
    generator = torch.Generator().manual_seed(0)
    layer, weight, x = (
        (scale * torch.randn(*shape, generator=generator)).requires_grad_() for shape in ((8, 96), (32, 8), (2, 9, 8))
    )
    function, calls = attention(layer, weight), kept_attention.Calls(keeps)
    stock: Any = SimpleNamespace(keywords={})
    called.clear()
    storages.clear()
    y = checkpointing.recomputation.recompute_in_backward(
        stock, function, (x,), torch.device("cpu"), calls=calls, watch=None
    )
    return (layer, weight, x), function, y, calls


def test_backward_twice():
    """The second time attention runs again: what was kept is gone after the first."""
    leaves, function, y, _ = region()
    expected = torch.autograd.grad(function(leaves[2]).sum(), leaves)
    for _ in range(2):
        assert_same(list(torch.autograd.grad(y.sum(), leaves, retain_graph=True)), list(expected))


def test_nothing_is_current_outside():
    _, _, y, _ = region()
    assert kept_attention.current() is None
    y.sum().backward()
    assert called == [True, True]
    assert kept_attention.current() is None


def test_a_checkpoint_inside_keeps_for_itself():
    """Torch's, whose slots are not the region's, and one of ours, which has no calls."""
    generator = torch.Generator().manual_seed(0)
    layer, weight, x = (
        (0.2 * torch.randn(*shape, generator=generator)).requires_grad_() for shape in ((8, 96), (32, 8), (2, 9, 8))
    )
    run = attention(layer, weight)
    recompute: Any = checkpointing.recomputation.recompute_in_backward
    stock: Any = SimpleNamespace(keywords={})
    device = torch.device("cpu")
    expected = torch.autograd.grad(run(run(x)).sum(), (layer, weight, x))
    for inner in (
        lambda x: checkpoint(run, x, use_reentrant=False),
        lambda x: recompute(stock, run, (x,), device),
    ):
        calls = kept_attention.Calls(True)
        y = recompute(stock, lambda x, inner=inner: inner(run(x)), (x,), device, calls=calls)
        assert calls.bytes == 2 * 9 * (32 + 2) * 4  # of one of two
        assert_same(list(torch.autograd.grad(y.sum(), (layer, weight, x))), list(expected))


def test_other_shapes_and_changed_outputs_run_again():
    """What was kept serves only where it is what it was."""
    leaves, function, y, calls = region()
    expected = torch.autograd.grad(function(leaves[2]).sum(), leaves)
    (call,) = calls._calls
    assert call is not None
    _, *rest = call.arguments[0]
    for other in (
        call._replace(slot=call.slot + 1),
        call._replace(operator=torch.add),
        call._replace(arguments=[(torch.Size([1]), *rest), *call.arguments[1:]]),
        call._replace(output=call.output._replace(version=1)),
        call._replace(
            saved=[
                each if isinstance(each, tuple) and len(each) == 4 else each._replace(version=1) for each in call.saved
            ]
        ),
        None,
    ):
        calls._calls[0] = other and other._replace(output=other.output._replace(tensor=torch.zeros(2, 2, 9, 16)))
        assert_same(list(torch.autograd.grad(y.sum(), leaves, retain_graph=True)), list(expected))
    # And where it is, it is what is handed out: with zeros instead, backward differs.
    calls._calls[0] = call._replace(output=call.output._replace(tensor=torch.zeros(2, 2, 9, 16)))
    assert not torch.equal(torch.autograd.grad(y.sum(), leaves)[1], expected[1])


@pytest.mark.parametrize("keeps", [False, True])
def test_queries_keys_and_values_are_not_held(keeps):
    """While the layer waits for its backward; where attention is only measured, nor is anything else."""
    _, _, y, calls = region(keeps)
    assert [each() is not None for each in storages] == [False, keeps]
    assert calls.bytes == 2 * 9 * (32 + 2) * 4
    assert (calls._calls == [None]) != keeps
    y.sum().backward()
    assert all(each() is None for each in storages)
    assert calls._calls == [None]


# ------------------------------------------------------------------------------------------------ what is left behind


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.newest
def test_no_tensor_stays_over_steps_of_random_lengths(plan):
    """What is kept, whole or in part, goes with the pass: 200 steps."""
    model = switch_on(tiny_model("llama", num_hidden_layers=2, hidden_size=16, intermediate_size=16, head_dim=4))
    patch(model, padding=True)
    chance, counts = random.Random(0), []
    for step in range(200):
        whole = chance.randrange(3)
        plan.kept = Kept(whole, tuple(index for index in range(2 - whole) if chance.random() < 0.7))
        model(**padded(tuple(chance.randrange(3, 12) for _ in range(2)))).loss.backward()
        if step % 50 == 49:
            model.zero_grad(set_to_none=True)
            counts.append(alive())
    assert max(counts[1:]) <= counts[0]


@pytest.mark.parametrize("where", ["forward", "recomputation"])
def test_nothing_is_held_after_memory_ran_out(plan, where):
    model, inputs = checkpointed(), dense()
    stock = results(model, inputs)
    patch(model)
    for plan.kept in (Kept(), Kept(0, ALL)):
        results(model, inputs)
    model.zero_grad(set_to_none=True)
    before, runs = alive(), []

    def fails(*_: Any) -> None:
        runs.append(1)
        if len(runs) == (LAYERS if where == "forward" else LAYERS + 2):
            raise torch.OutOfMemoryError("for the test")

    handles = [layer.mlp.register_forward_pre_hook(fails) for layer in model.model.layers]
    with pytest.raises(torch.OutOfMemoryError):
        results(model, inputs)
    for handle in handles:
        handle.remove()
    assert kept_attention.current() is None
    model.zero_grad(set_to_none=True)
    assert alive() <= before
    assert_same(results(model, inputs), stock)


def test_the_report(plan):
    model = checkpointed()
    patch(model)
    results(model, dense())
    plan.kept = Kept(1, (1,))
    results(model, dense())
    expected = "memory: 17% of the checkpointed layers' passes needed no recomputation, 17% none of attention"
    assert checkpointing.end_training(model) == expected
    stack = kept_layers.stack_of(model.model)
    assert stack is not None
    assert (stack.attended, stack.kept_bytes) == (0, 0.0)


# ------------------------------------------------------------------------------------------------ policy


def layer(whole: float = 10, attention: float | None = 1, time: float = 10, attention_time: float = 2) -> Layer:
    return Layer(whole, attention, time, attention_time)


@pytest.mark.parametrize(
    ("layers", "room", "expected"),
    [
        ([layer()] * 4, 100, (4, ())),
        ([layer()] * 4, 0, (0, ())),
        ([layer()] * 4, -1, (0, ())),
        ([layer()] * 4, 2, (0, (2, 3))),
        ([layer()] * 4, 4, (0, (0, 1, 2, 3))),
        ([layer()] * 4, 13, (1, (0, 1, 2))),  # 10 + 3 * 2
        ([layer()] * 4, 12, (1, (1, 2))),
        ([layer(attention_time=0.5)] * 4, 10, (1, ())),  # short documents
        ([layer(attention_time=5)] * 4, 11, (0, (0, 1, 2, 3))),  # 20, against 10 + 5
        ([layer(attention=None)] * 4, 25, (2, ())),
        ([layer(), layer(attention_time=6), layer(), layer()], 1, (0, (1,))),  # windows everywhere else
        ([layer(attention=None), layer(), layer(whole=50), layer()], 12, (1, (1, 2))),
        ([], 5, (0, ())),
    ],
)
def test_what_to_keep(layers, room, expected):
    assert memory.what_to_keep(layers, room) == expected


def test_no_plan_is_better():
    """Against all that there are, by trying."""
    chance = random.Random(0)
    for _ in range(200):
        count = chance.randrange(1, 5)
        layers = [layer(10, 1, chance.choice([5, 10, 20]), chance.choice([0, 1, 4])) for _ in range(count)]
        room = chance.uniform(0, 40)
        most = 0.0
        for whole in range(count + 1):
            for chosen in range(1 << (count - whole)):
                kept = whole, tuple(index for index in range(count - whole) if chosen >> index & 1)
                if memory._fits(layers, room, kept):
                    most = max(most, memory._saved(layers, kept))
        found = memory.what_to_keep(layers, room)
        assert memory._fits(layers, room, found)
        assert memory._saved(layers, found) == most


def test_plans_stay_while_free_memory_varies():
    layers = [layer(10, 1, 10, 2)] * 60
    before = memory.what_to_keep(layers, 300)
    for room in (300, 301, 304, 299.5):
        kept = memory.what_to_keep(layers, room, before)
        assert memory._fits(layers, room, kept)
        assert kept == before or room < 300
    assert memory.what_to_keep(layers, 400, before) != before
    assert memory.what_to_keep(layers[:10], 50, before) == memory.what_to_keep(layers[:10], 50)


def test_long_documents_begin_with_attention():
    """Llama-8B, 32 layers of 109.2 KiB a token and 8.1 KiB of attention, as on an H200 with 50 GiB of room."""

    def kept(tokens: int, longest: int, room: float) -> memory.Kept:
        flops = 2 * 218e6 * tokens, 4 * tokens * 4096 * longest / 2
        return memory.what_to_keep([memory.layer(109.2 * 1024 * tokens, 8.1 * 1024 * tokens, *flops)] * 32, room)

    assert kept(32768, 32768, 50e9)[0] < 14
    assert len(kept(32768, 32768, 50e9)[1]) == 32 - kept(32768, 32768, 50e9)[0]
    whole, attention = kept(32768, 1024, 50e9)  # documents of a packed row
    assert whole == 13
    assert len(attention) <= 8
