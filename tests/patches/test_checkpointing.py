"""Checkpointed layers: the bits of stock, whatever a script does between forward and backward.

Each test runs with recomputation by torch and by hf_turbo, and the inputs of layers in host memory.

CPU tensors stand for those of a device, and copies happen as late as they may (late_copies.py).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hf_turbo.patches import checkpointing
from hf_turbo.patches.host_memory import Saved
from torch import nn

import hf_turbo
from tests.models import batch, loss_and_gradients, switch_on, switched_off, tiny_model
from tests.patches.late_copies import LateCopies

LAYERS = 5
OTHERS = switched_off("offload")
ATTRIBUTE = "_gradient_checkpointing_func"


@pytest.fixture(params=[False, "auto"], ids=["by torch", "by hf_turbo"])
def copies(monkeypatch, request) -> Iterator[LateCopies]:
    """Makes CPU tensors leave, of any size."""
    monkeypatch.setitem(OTHERS, "checkpointing", request.param)
    copies = LateCopies()
    monkeypatch.setitem(checkpointing.COPIES, "cpu", lambda device: copies)
    monkeypatch.setattr(checkpointing, "MIN_BYTES", 0)
    yield copies
    hf_turbo.disable()
    gc.collect()
    copies.settle()


def switch_off(model: Any) -> None:
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def checkpointed(family: str = "llama", reentrant: bool = False, **changes: Any) -> Any:
    return switch_on(tiny_model(family, **{"num_hidden_layers": LAYERS, **changes}), reentrant)


def patch(model: nn.Module, **options: Any) -> Any:
    report = hf_turbo.patch_model(model, **{**OTHERS, "offload": True, **options})
    return next(row for row in report.rows if row.role == "offload")


def results(model: Any, **inputs: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)  # dropout
    loss, gradients = loss_and_gradients(model, {**batch(), **inputs})
    return loss, {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(ours: tuple[Any, dict[str, Any]], stock: tuple[Any, dict[str, Any]]) -> None:
    assert torch.equal(ours[0], stock[0])
    assert ours[1].keys() == stock[1].keys()
    for name, gradient in stock[1].items():
        assert torch.equal(ours[1][name], gradient), name


reentrant_or_not = pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])


# ------------------------------------------------------------------------------------------------ the same bits


@reentrant_or_not
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe", "phi3"])
def test_loss_and_gradients_are_those_of_stock(copies, family, reentrant):
    model = checkpointed(family, reentrant)
    stock = results(model)
    assert patch(model).patched == LAYERS
    for step in range(3):
        assert_same(results(model), stock)
        assert copies.log[step * (2 * LAYERS - 2) :] == [
            *(f"out {i + LAYERS * step}" for i in range(LAYERS)),
            *(f"back {i + LAYERS * step}" for i in reversed(range(LAYERS - 2))),
        ]


@reentrant_or_not
def test_dropout_is_drawn_alike_again(copies, reentrant):
    model = checkpointed("llama", reentrant, attention_dropout=0.3)
    stock = results(model)
    torch.manual_seed(2)
    assert not torch.equal(loss_and_gradients(model, batch())[0], stock[0])
    patch(model)
    assert_same(results(model), stock)


@reentrant_or_not
def test_bf16_under_autocast(copies, reentrant):
    model = checkpointed("llama", reentrant)
    with torch.autocast("cpu", torch.bfloat16):
        stock = results(model)
        patch(model)
        assert_same(results(model), stock)
    assert "back 0" in copies.log


@reentrant_or_not
def test_adapters_on_a_frozen_model(copies, reentrant):
    """The first layer's input is a leaf that was made to require a gradient: accumulation holds on to it anyway."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    lora = peft.LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    switch_on(model, reentrant)
    model.enable_input_require_grads()
    stock = results(model)
    assert any(gradient.count_nonzero() for gradient in stock[1].values())
    patch(model)
    assert_same(results(model), stock)
    assert [entry for entry in copies.log if entry.startswith("out")] == [f"out {i}" for i in range(LAYERS - 1)]


def test_frozen_embeddings_without_input_gradients(copies):
    """Non-reentrant checkpointing recomputes the first layer from an input that needs no gradient."""
    model = checkpointed()
    model.disable_input_require_grads()
    model.get_input_embeddings().weight.requires_grad_(False)
    stock = results(model)
    patch(model)
    assert_same(results(model), stock)
    assert "back 0" in copies.log


# ------------------------------------------------------------------------------------------------ what scripts do


@reentrant_or_not
def test_several_graphs_before_one_backward(copies, reentrant):
    model = checkpointed(reentrant=reentrant)

    def step() -> tuple[Any, dict[str, Any]]:
        model.zero_grad()
        losses = [model(**batch(seed=seed)).loss for seed in range(3)]
        total = losses[0] + losses[2] - losses[1]
        total.backward()
        return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    stock = step()
    patch(model)
    assert_same(step(), stock)
    assert_same(step(), stock)


def test_graphs_finished_in_the_order_they_were_begun(copies):
    """No guess of what comes next is right here."""
    model = checkpointed()

    def step() -> tuple[Any, dict[str, Any]]:
        model.zero_grad()
        losses = [model(**batch(seed=seed)).loss for seed in range(2)]
        for loss in losses:
            loss.backward()
        return losses[0].detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    stock = step()
    patch(model)
    assert_same(step(), stock)


def test_backward_twice_through_one_graph(copies):
    model = checkpointed()

    def step() -> tuple[Any, dict[str, Any]]:
        model.zero_grad()
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    stock = step()
    patch(model)
    assert_same(step(), stock)


def test_gradients_of_a_part_of_the_graph(copies):
    model = checkpointed()

    def step() -> tuple[Any, dict[str, Any]]:
        loss = model(**batch()).loss
        top = list(model.model.layers[3].parameters())
        bottom = list(model.model.layers[0].parameters())
        gradients = [*torch.autograd.grad(loss, top, retain_graph=True), *torch.autograd.grad(loss, bottom)]
        return loss.detach(), {str(i): gradient for i, gradient in enumerate(gradients)}

    stock = step()
    patch(model)
    assert_same(step(), stock)


@reentrant_or_not
def test_evaluation_in_between_copies_nothing(copies, reentrant):
    model = checkpointed(reentrant=reentrant)
    stock = results(model)
    patch(model)
    torch.manual_seed(1)
    loss = model(**batch()).loss
    queued = list(copies.log)
    with torch.no_grad():
        model(**batch(seed=5))
    model.eval()
    with torch.inference_mode():
        model(**batch(seed=6))
    model.train()
    assert copies.log == queued
    model.zero_grad()
    loss.backward()
    assert_same((loss.detach(), {name: p.grad for name, p in model.named_parameters()}), stock)


@reentrant_or_not
def test_what_is_never_differentiated_is_given_back(copies, reentrant):
    model = checkpointed(reentrant=reentrant)
    stock = results(model)
    patch(model)
    store = checkpointing._STORES[model.model.layers[0]]
    for _ in range(3):
        loss = model(**batch()).loss
        del loss
    failing = model.model.layers[3].mlp.register_forward_hook(lambda *_: 1 / 0)
    for _ in range(3):
        with contextlib.suppress(ZeroDivisionError):
            model(**batch())
    failing.remove()
    taken = store.bytes
    assert_same(results(model), stock)
    gc.collect()
    assert not any(type(thing) is Saved for thing in gc.get_objects())
    assert store.bytes <= taken
    store.trim()
    assert store.bytes == 0


@reentrant_or_not
def test_checkpointing_switched_off_and_on_again(copies, reentrant):
    """As TRL does around generation and reference passes."""
    model = checkpointed(reentrant=reentrant)
    stock = results(model)
    patch(model)
    switch_off(model)
    model(**batch()).loss.backward()
    assert copies.log == []
    switch_on(model, reentrant)
    assert_same(results(model), stock)
    assert "back 0" in copies.log


def test_added_by_names_that_are_not_deprecated():
    model = tiny_model("llama")
    added = checkpointing.Added(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        added.apply()
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
        added.revert()
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_every_second_layer(copies):
    model = switch_on(tiny_model("llama", num_hidden_layers=8), every_n_layers=2)
    stock = results(model)
    row = patch(model)
    assert (row.found, row.patched, row.reason) == (8, 4, "4 x acts once gradient checkpointing is on")
    assert_same(results(model), stock)
    assert copies.log == [*(f"out {i}" for i in range(4)), "back 1", "back 0"]


@reentrant_or_not
def test_disabled_between_forward_and_backward(copies, reentrant):
    model = checkpointed(reentrant=reentrant)
    stock = results(model)
    patch(model)
    torch.manual_seed(1)
    loss = model(**batch()).loss
    hf_turbo.disable()
    model.zero_grad()
    loss.backward()
    assert_same((loss.detach(), {name: p.grad for name, p in model.named_parameters()}), stock)
    queued = list(copies.log)
    assert_same(results(model), stock)
    assert copies.log == queued


def test_a_change_in_place_is_an_error_as_in_stock(copies):
    model = checkpointed()

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        args[0].add_(1)

    for patched in (False, True):
        if patched:
            patch(model)
        handle = model.model.layers[LAYERS - 1].register_forward_hook(spoil)
        loss = model(**batch()).loss
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        handle.remove()


# ------------------------------------------------------------------------------------------------ what stays stock


def runs_of_layers(model: Any) -> int:
    """How often the layers of a model run in one forward and backward."""
    runs: list[int] = []
    # The first module of a layer: recomputation stops early.
    norms = [layer.input_layernorm for layer in model.model.layers]
    handles = [norm.register_forward_hook(lambda *_: runs.append(1)) for norm in norms]
    results(model)
    for handle in handles:
        handle.remove()
    return len(runs)


@reentrant_or_not
def test_each_layer_is_checkpointed_once(copies, reentrant):
    """transformers 5.23 wraps the forward of each subclass of a layer anew."""
    model = checkpointed(reentrant=reentrant)
    before = type(model.model.layers[0]).forward
    patch(model)
    assert runs_of_layers(model) == 2 * LAYERS
    assert type(model.model.layers[0]).forward is before


@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_device_hooks_on_layers(copies, first):
    """A model spread by a device map: the hooks hold on to the forward they found."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = checkpointed()
    stock = results(model)
    if first == "patch":
        patch(model)
    for layer in model.model.layers:
        add_hook_to_module(layer, ModelHook())
    if first == "hooks":
        patch(model)
    assert runs_of_layers(model) == 2 * LAYERS
    assert_same(results(model), stock)
    assert "back 0" in copies.log


def test_classes_made_by_fsdp(copies):
    """FSDP2 makes a class out of the one it finds."""
    model = checkpointed()
    stock = results(model)
    patch(model)
    for layer in model.model.layers:
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
    assert runs_of_layers(model) == 2 * LAYERS
    assert_same(results(model), stock)
    assert "back 0" in copies.log


def test_without_checkpointing_nothing_happens(copies):
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    stock = results(model)
    with pytest.raises(RuntimeError, match=r"offload=True was asked for but cannot be had .* acts once"):
        patch(model)
    assert_same(results(model), stock)
    assert copies.log == []
    switch_on(model)
    assert_same(results(model), stock)
    assert "back 0" in copies.log


def keep_on_cpu(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers' `offload=True` puts in, but for pinned memory."""
    with torch.autograd.graph.save_on_cpu(device_type="cpu"):
        return torch.utils.checkpoint.checkpoint(function, *args, **kwargs)


select = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, [])


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(keep_on_cpu, use_reentrant=False),
        functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, context_fn=select),
        lambda function, *args: function(*args),
    ],
    ids=["another function", "selective", "no checkpoint at all"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_other_checkpoint_functions_are_left_alone(copies, function, when):
    model = checkpointed()
    if when == "before":
        model._set_gradient_checkpointing(True, function)
        with pytest.raises(RuntimeError, match="checkpointed selectively, or by a function other than torch's"):
            patch(model)
    else:
        patch(model)
        model._set_gradient_checkpointing(True, function)
    ours = results(model)
    assert copies.log == []
    hf_turbo.disable()
    assert_same(ours, results(model))


def test_hooks_of_the_script_see_everything(copies):
    """save_on_cpu, TRL's activation offloading, a checkpoint around all layers."""
    model = checkpointed()
    stock = results(model)
    patch(model)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        assert_same(results(model), stock)
    assert seen.count(torch.Size([3, 21, 48])) >= LAYERS
    assert copies.log == []


def test_small_inputs_stay(copies, monkeypatch):
    model = checkpointed()
    patch(model)
    size = 3 * 21 * 48 * 4
    monkeypatch.setattr(checkpointing, "MIN_BYTES", size + 1)
    results(model)
    assert copies.log == []
    monkeypatch.setattr(checkpointing, "MIN_BYTES", size)
    results(model)
    assert "back 0" in copies.log


def test_compiled_layers_are_left_alone(copies):
    model = checkpointed(num_hidden_layers=2)
    stock = results(model)
    patch(model)
    torch._dynamo.reset()
    model.model.layers[0].compile(backend="eager")
    assert_same(results(model), stock)


def test_a_layer_that_calls_the_function_itself(copies):
    model = checkpointed()
    patch(model)
    function, x = model.model.layers[0]._gradient_checkpointing_func, torch.ones(2, requires_grad=True)
    assert torch.equal(function(lambda x, *, scale: x * scale, x, scale=3), 3 * x)
    seen = []
    hf_turbo.disable()
    function(lambda x: seen.append(torch._C._autograd._top_saved_tensors_default_hooks(False)) or x.sin(), x)
    assert "torch/utils/checkpoint" in seen[0][0].__code__.co_filename


# ------------------------------------------------------------------------------------------------ in and out


def test_revert_leaves_the_attribute_the_host_wrote(copies):
    model = checkpointed()
    layer = model.model.layers[0]
    cls, function = type(layer), layer._gradient_checkpointing_func
    patch(model)
    assert type(layer) is not cls
    assert (type(layer).__name__, type(layer).__module__) == (cls.__name__, cls.__module__)
    assert layer._gradient_checkpointing_func is not function
    assert layer.__dict__[ATTRIBUTE] is function
    hf_turbo.disable()
    assert type(layer) is cls
    assert layer._gradient_checkpointing_func is function
    assert layer not in checkpointing._STORES


def test_a_layer_that_was_never_checkpointed_has_no_function(copies):
    model = tiny_model("llama")
    layer = model.model.layers[0]
    had = hasattr(layer, ATTRIBUTE)
    with contextlib.suppress(RuntimeError):
        patch(model)
    assert hasattr(layer, ATTRIBUTE) is had


def test_copies_and_saved_models_are_stock(copies):
    model = checkpointed()
    cls = type(model.model.layers[0])
    patch(model)
    results(model)
    model.disable_input_require_grads()  # of 5.23, a local function: cannot be pickled in stock either
    assert type(copy.deepcopy(model).model.layers[0]) is cls
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"hf_turbo" not in buffer.getvalue()
    assert not any("hf_turbo" in key for key in model.state_dict())


def test_recorders_still_see_the_layers(copies):
    model = checkpointed()
    stock = model(**batch(), output_hidden_states=True).hidden_states
    patch(model)
    ours = model(**batch(), output_hidden_states=True).hidden_states
    assert len(ours) == len(stock) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def test_host_memory_goes_with_the_model(copies):
    patch(checkpointed())  # the first import of bitsandbytes keeps an error, and with it the frames around
    hf_turbo.disable()
    model = checkpointed()
    patch(model)
    results(model)
    before = len(checkpointing._STORES)
    del model
    gc.collect()
    assert len(checkpointing._STORES) == before - LAYERS


# ------------------------------------------------------------------------------------------------ the report


def rows(model: Any, folder: Any, **arguments: Any) -> list[tuple[int, str]]:
    """Patched layers and the reason, by the report of a training."""
    from transformers import Trainer, TrainingArguments

    hf_turbo.enable(**switched_off("checkpointing"))
    settings = {"report_to": "none", "use_cpu": True, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    examples = [{name: tensor[0] for name, tensor in batch().items()} for _ in range(4)]
    Trainer(model, TrainingArguments(str(folder), **settings, **arguments), train_dataset=examples).train()
    return [(row.patched, row.reason) for row in hf_turbo.report().rows if row.role == "checkpointing"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, []),
        ({"gradient_checkpointing": True}, [(2, "")]),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            [(0, "use_reentrant=True is torch's to do")],
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"determinism_check": "none"}},
            [(0, "determinism_check='none' is torch's to do")],
        ),
    ],
)
def test_what_a_trainer_asks_for(tmp_path, arguments, expected):
    try:
        assert rows(tiny_model("llama"), tmp_path, **arguments) == expected
    finally:
        hf_turbo.disable()


def test_a_model_that_checkpoints_before_the_trainer_has_it(tmp_path):
    """As PEFT's prepare_model_for_kbit_training leaves it."""
    try:
        assert rows(switch_on(tiny_model("llama")), tmp_path) == [(2, "")]
    finally:
        hf_turbo.disable()


# ------------------------------------------------------------------------------------------------ sizes


def test_sizes_are_read_off_the_weights():
    layer = tiny_model("llama", torch.bfloat16).model.layers[0]
    weights = 48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 80
    assert checkpointing.sizes_of(layer) == (48 * 2, 2 * weights)


def test_adapters_do_not_hide_what_they_wrap():
    peft = pytest.importorskip("peft")
    plain = tiny_model("llama")
    size, flops = checkpointing.sizes_of(plain.model.layers[0])
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    adapted = checkpointing.sizes_of(model.base_model.model.model.layers[0])
    assert adapted[0] == size
    assert flops < adapted[1] < 1.5 * flops


def test_quantized_weights_count_by_their_elements():
    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), False)

    layer = tiny_model("llama").model.layers[0]
    expected = checkpointing.sizes_of(layer)
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Packed(child))
    assert checkpointing.sizes_of(layer) == expected


def test_of_experts_those_that_a_token_visits():
    model = tiny_model("qwen3-moe")
    layer = model.model.layers[0]
    every, visited = (checkpointing.sizes_of(layer, visits)[1] for visits in (None, 2))
    experts = 2 * sum(p.numel() for p in layer.parameters() if p.ndim == 3)
    assert math.isclose(every - visited, experts / 2)
    assert checkpointing._experts_per_token(model) == 2
