"""Checkpointed layers that are not recomputed where memory is free: the same bits, and as many as fit."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_turbo.patches import checkpointing, device_memory, host_memory, kept_layers
from hf_turbo.patches.kept_layers import Costs, Kept, Stack

import hf_turbo
from hf_turbo.lifecycle import _Activation
from hf_turbo.policies import memory
from tests.models import batch, loss_and_gradients, switch_on, switched_off, tiny_model

LAYERS = 5
OPTIONS = switched_off("checkpointing", "memory")
CPU = torch.device("cpu")
MIB = 2**20


def checkpointed(family: str = "llama", reentrant: bool = False, **changes: Any) -> Any:
    return switch_on(tiny_model(family, **{"num_hidden_layers": LAYERS, **changes}), reentrant)


@pytest.fixture
def plan(monkeypatch) -> SimpleNamespace:
    """`plan.keep` of the last layers are kept; `plan.asked` is what the plans were given."""
    asked = SimpleNamespace(keep=0, asked=[])

    def layers(costs, rest, device, before):
        asked.asked.append(([each.whole for each in costs], rest, device))
        return Kept(asked.keep)

    monkeypatch.setattr(_Activation, "_memory_plan", lambda self: layers)
    return asked


def patch(model: Any, **options: Any) -> Any:
    report = hf_turbo.patch_model(model, **{**OPTIONS, **options})
    return next(row for row in report.rows if row.role == "memory")


def count_runs(model: Any) -> list[int]:
    """How often each layer ran, from here on."""
    runs = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        layer.input_layernorm.register_forward_hook(count)
    return runs


def results(model: Any) -> list[torch.Tensor]:
    """Loss, gradients, and the random numbers drawn after it all; the batch has padding."""
    torch.manual_seed(1)
    loss, gradients = loss_and_gradients(model, batch())
    return [loss, *(gradient.clone() for gradient in gradients.values()), torch.rand(3)]


def assert_same(ours: list[torch.Tensor], stock: list[torch.Tensor]) -> None:
    assert len(ours) == len(stock)
    assert all(map(torch.equal, ours, stock))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe", "phi3"])
def test_the_bits_of_stock(plan, family):
    model = checkpointed(family)
    stock = results(model)
    row = patch(model)
    assert (row.found, row.patched, row.exactness) == (LAYERS, LAYERS, "exact")
    for keep in (0, 0, 2, LAYERS, 1):
        plan.keep = keep
        assert_same(results(model), stock)


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_is_that_of_stock(plan, autocast):
    model = checkpointed(attention_dropout=0.3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stock = results(model)
        patch(model)
        for plan.keep in (0, 3, LAYERS):
            assert_same(results(model), stock)


def test_the_last_layers_run_once(plan):
    model = checkpointed()
    patch(model)
    runs = count_runs(model)
    plan.keep = 2
    results(model)
    assert runs == [2] * LAYERS  # all measured now
    results(model)
    assert runs == [4, 4, 4, 3, 3]
    assert len(plan.asked) == 1


def test_sizes_are_those_of_what_is_saved(plan):
    model = checkpointed()
    patch(model)
    layer, calls = model.model.layers[2], []
    handle = layer.self_attn.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    results(model)
    handle.remove()
    results(model)
    ((sizes, rest, device),) = plan.asked
    assert (rest, device) == (None, CPU)
    own = {each.untyped_storage().data_ptr() for each in (*layer.parameters(), *layer.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    layer.gradient_checkpointing = False
    hidden = torch.randn_like(calls[0]["hidden_states"]).requires_grad_()
    kwargs = {name: value for name, value in calls[0].items() if name != "hidden_states"}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, **kwargs)
    assert sizes[2] == pytest.approx(sum(each.untyped_storage().nbytes() for each in saved.values()), rel=0.02)


def test_what_grows_with_the_square(plan):
    """Longer rows than were measured are taken to cost the square; they are measured anew where recomputed."""
    stack, layers = _stack(plan)
    _measure(stack, layers, rows=2, length=8, nbytes=4096)
    for rows, length, expected in [(2, 8, 4096), (1, 8, 2048), (4, 8, 8192), (2, 16, 16384), (2, 4, 2048)]:
        stack.begin(rows * length, length, CPU)
        assert plan.asked[-1][0] == [expected] * 2
    assert stack.watch(0, torch.zeros(1, 8, 4)) is None
    assert stack.watch(0, torch.zeros(1, 0, 4)) is None
    _measure(stack, layers, rows=1, length=16, nbytes=4096)
    stack.begin(16, 16, CPU)
    assert plan.asked[-1][0] == [4096] * 2


def test_less_after_memory_ran_out(plan):
    stack, layers = _stack(plan)
    assert not stack.tighten()
    stack, layers = _stack(plan)
    _measure(stack, layers, rows=1, length=8, nbytes=1024)
    plan.keep = 2
    stack.begin(8, 8, CPU)
    assert stack.keeps_all
    assert stack.kept_bytes == 2048
    assert stack.tighten()
    assert not stack.tighten()  # nothing was planned since
    stack.begin(8, 8, CPU)
    assert plan.asked[-1][0] == [4096] * 2
    assert stack.kept_bytes == 2048  # what it truly is


def test_what_else_a_pass_takes(plan, monkeypatch):
    """The peak beyond what was there before and what was kept; of fewer tokens as much, of more in proportion."""
    stack, layers = _stack(plan)
    numbers = SimpleNamespace(allocated=1000, peak=5000)
    monkeypatch.setattr(device_memory, "allocated", lambda device: numbers.allocated)
    monkeypatch.setattr(device_memory, "peak_allocated", lambda device: numbers.peak)
    _measure(stack, layers, rows=1, length=10, nbytes=100)
    stack.begin(0, 0, CPU)
    stack.begin(10, 10, CPU)
    assert plan.asked[-1][1] is None
    stack.begin(20, 20, CPU)
    assert plan.asked[-1][1] == (5000 - 1000) * 2  # an upper bound: the peak may be an older one
    numbers.peak, plan.keep = 21000, 2
    stack.begin(10, 10, CPU)
    assert plan.asked[-1][1] == 21000 - 1000
    numbers.peak = 30200
    stack.begin(10, 10, CPU)
    assert plan.asked[-1][1] == 30200 - 1000 - 200


def test_other_shapes_are_recomputed(plan):
    stack, layers = _stack(plan)
    _measure(stack, layers, rows=1, length=8, nbytes=64)
    plan.keep = 2
    for shape in [(8,), (8, 4), (2, 8, 8, 4)]:
        assert not stack.keeps(0, torch.zeros(shape))
        assert stack.watch(0, torch.zeros(shape)) is None
    assert stack.keeps(0, torch.zeros(1, 8, 4))


def test_layers_that_write_to_their_buffers(plan):
    """Stock updates running statistics twice, and so must we."""
    model, twin = (checkpointed() for _ in range(2))
    for each in (model, twin):
        each.model.layers[1].mlp.act_fn = torch.nn.Sequential(_Norm(), torch.nn.SiLU())
    plan.keep = LAYERS
    patch(model)
    for _ in range(3):
        results(model)
    hf_turbo.disable()
    for _ in range(3):
        results(twin)
    ours, stock = (dict(each.named_buffers()) for each in (model, twin))
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)
    assert any("num_batches_tracked" in name for name in stock)
    assert plan.asked == []


class _Norm(torch.nn.BatchNorm1d):
    def __init__(self) -> None:
        super().__init__(80)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


def test_weights_that_are_wrappers(plan):
    """Of a layer with such weights nothing is measured, and nothing fails."""

    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(function)

    layer = torch.nn.Linear(2, 2)
    layer._parameters["weight"] = torch.Tensor._make_wrapper_subclass(Wrapper, (2, 2))
    with pytest.raises(RuntimeError):
        layer.weight.untyped_storage().data_ptr()
    stack = Stack([layer], lambda costs, rest, device, before: Kept(1))
    watch = stack.watch(0, torch.zeros(1, 8, 4))
    assert watch is not None
    watch([torch.zeros(4)])
    stack.begin(8, 8, CPU)
    assert not stack.keeps_all


def test_random_numbers_that_are_not_preserved(plan):
    """Stock draws new ones when it recomputes."""
    model, twin = (tiny_model("llama", num_hidden_layers=LAYERS, attention_dropout=0.3) for _ in range(2))
    plan.keep = LAYERS
    for each in (model, twin):
        switch_on(each, settings={"preserve_rng_state": False})
    patch(model)
    ours = [results(model) for _ in range(3)]
    hf_turbo.disable()
    for one, other in zip(ours, [results(twin) for _ in range(3)], strict=True):
        assert_same(one, other)


def test_memory_that_does_not_suffice_without_keeping(plan, monkeypatch):
    """The error of stock, after few attempts."""
    model = checkpointed()
    patch(model, padding=True)
    plan.keep = LAYERS
    results(model)
    results(model)
    attempts = []

    def fails(self, *args, **kwargs):
        attempts.append(self)
        raise torch.OutOfMemoryError("for the test")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(type(model.model.embed_tokens), "forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        results(model)
    assert len(attempts) == 2


def test_as_is(plan):
    row = patch(checkpointed(), memory="as_is")
    assert (row.patched, row.reason) == (0, "memory='as_is'")


def test_reentrant_is_left_to_torch(plan):
    model = checkpointed(reentrant=True)
    plan.keep = LAYERS
    stock = results(model)
    patch(model)
    runs = count_runs(model)
    for _ in range(2):
        assert_same(results(model), stock)
    assert runs == [4] * LAYERS


def test_evaluation_and_generation_plan_nothing(plan):
    model = checkpointed()
    patch(model)
    results(model)
    with torch.no_grad():
        model(**batch())
    assert plan.asked == []


def test_hooks_of_the_script_see_what_they_would_in_stock(plan):
    """Activation offloading, say: the layers' inputs, and not all that they save."""
    model = checkpointed()
    patch(model)
    results(model)
    plan.keep = LAYERS
    runs = count_runs(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        results(model)
    assert runs == [2] * LAYERS


def test_reverted(plan):
    model = checkpointed()
    plan.keep = LAYERS
    patch(model)
    results(model)
    hf_turbo.disable()
    assert not any(layer in kept_layers.PLACES for layer in model.model.layers)
    runs = count_runs(model)
    results(model)
    assert runs == [2] * LAYERS


def test_nothing_keeps_the_model_alive(plan):
    import weakref

    model = checkpointed()
    patch(model)
    results(model)
    layer = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert layer() is None


def test_every_second_layer(plan):
    model = switch_on(tiny_model("llama", num_hidden_layers=LAYERS), every_n_layers=2)
    stock = results(model)
    patch(model)
    for plan.keep in (0, 1, LAYERS):
        assert_same(results(model), stock)


def test_memory_runs_out(plan, monkeypatch):
    """In a backbone that computes no padding: the pass is made again with less kept."""
    model = checkpointed()
    stock = results(model)
    patch(model, padding=True)
    results(model)
    plan.keep = LAYERS
    forward, runs = type(model.model.layers[0].mlp).forward, []

    def fails_once(self, *args, **kwargs):
        runs.append(self)
        if len(runs) == 4:
            plan.keep = 0
            raise torch.OutOfMemoryError("for the test")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", fails_once)
    ours = results(model)
    assert len(runs) == 4 + 2 * LAYERS
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def _stack(plan: SimpleNamespace) -> tuple[Stack, list[torch.nn.Module]]:
    layers: list[torch.nn.Module] = [torch.nn.Identity(), torch.nn.Identity()]

    def layers_of_plan(costs, rest, device, before):
        plan.asked.append(([each.whole for each in costs], rest, device))
        return Kept(plan.keep)

    return Stack(layers, layers_of_plan), layers


def _measure(stack: Stack, layers: list[torch.nn.Module], rows: int, length: int, nbytes: int) -> None:
    for index in range(len(layers)):
        watch = stack.watch(index, torch.zeros(rows, length, 4))
        assert watch is not None
        watch([torch.zeros(nbytes, dtype=torch.uint8)])


# ------------------------------------------------------------------------------------------------ policy


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("8 GB", 8 * 10**9),
        ("1.5MiB", 3 * 2**19),
        (2**30, 2**30),
        (0.6, 600),
        ("0.6", 600),
        (1.0, 1000),
        (1, 1000),
        ("2TiB", 2**41),
    ],
)
def test_budgets(budget, expected):
    assert memory.budget_bytes(budget, 1000) == expected


@pytest.mark.parametrize(
    "budget", ["8 gigs", "", "GiB", "-1GiB", 0, -5, 0.0, 1.5, 4096, "100", "3B", True, "0GiB", None, [1]]
)
def test_no_budgets(budget):
    with pytest.raises(ValueError, match="memory_budget="):
        memory.budget_bytes(budget, 1000)


@pytest.mark.parametrize(
    ("sizes", "room", "expected"),
    [
        ([1, 2, 3], 100, 3),
        ([1, 2, 3], 5, 2),
        ([1, 2, 3], 5.9, 2),
        ([9, 1, 1], 2, 2),
        ([1], 0, 0),
        ([1, 1], -5, 0),
        ([], 5, 0),
    ],
)
def test_layers_that_fit(sizes, room, expected):
    assert memory.layers_to_keep(sizes, room) == expected


def test_free_memory_and_budget(monkeypatch):
    """A share of what is free, but not what else a pass takes; with a budget, no more than that leaves."""
    numbers = SimpleNamespace(free=1000 * MIB, allocated=400 * MIB)
    monkeypatch.setattr(device_memory, "free", lambda device: numbers.free)
    monkeypatch.setattr(device_memory, "allocated", lambda device: numbers.allocated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10_000 * MIB))

    def keep(rest: float | None = None, **options: Any) -> int:
        activation = _Activation(hf_turbo.TurboConfig(**options), hf_turbo.report())
        costs = [Costs(10.0 * MIB, None, 1.0, 0.0)] * 100
        return activation._memory_plan()(costs, rest and rest * MIB, CPU, Kept()).whole

    assert keep() == 0  # nothing is known yet
    assert (keep(100.0), keep(100.0, memory="max_speed"), keep(100.0, memory="as_is")) == (40, 80, 0)
    assert (keep(750.0), keep(750.0, memory="max_speed"), keep(900.0)) == (10, 10, 0)
    assert keep(memory_budget="800MiB") == 0
    assert keep(150.0, memory_budget="800MiB") == 25
    assert keep(150.0, memory_budget=0.08) == 25
    assert keep(500.0, memory_budget="800MiB") == 0
    assert keep(150.0, memory_budget="100GiB") == 40


def test_free_memory_of_the_host(monkeypatch):
    """Which training processes share."""
    monkeypatch.setattr(host_memory, "available", lambda: 1000)

    def keep(**options: Any) -> int:
        activation = _Activation(hf_turbo.TurboConfig(**options), hf_turbo.report())
        return activation._memory_plan()([Costs(10.0, None, 1.0, 0.0)] * 100, None, CPU, Kept()).whole

    assert (keep(), keep(memory="max_speed"), keep(memory_budget="8GiB")) == (40, 80, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert keep() == 10


def test_of_a_model(plan):
    model = checkpointed()
    plan.keep = 2
    patch(model)
    for _ in range(3):
        results(model)
    note = checkpointing.end_training(model)
    assert note == "memory: 27% of the checkpointed layers' passes needed no recomputation"
    assert checkpointing.end_training(model) is None
