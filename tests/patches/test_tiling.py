"""MLPs by tiles in whole models: as exact as stock, computed twice under checkpointing, stock again when reverted."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from hf_turbo.kernels import tiled_mlp
from hf_turbo.patches import expanded_weights, kept_layers, tiling
from peft import LoraConfig, get_peft_model

import hf_turbo
from hf_turbo.policies import tiling as policy
from tests.fp64 import Errors, hold_to_rule, squared_errors
from tests.models import batch, loss_and_gradients, quantised, switch_on, switched_off, tiny_model
from tests.patches.test_parity import PRECISIONS, draw, run

ROWS = 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """63 tokens in tiles of 16, the last of 15; a pass is long from 20 tokens on."""
    for name, value in {"LEAST_ROWS": ROWS, "MOST_ROWS": ROWS, "LONG": 20, "_MULTIPLE": 16}.items():
        monkeypatch.setattr(policy, name, value)
    yield
    hf_turbo.disable()


@pytest.fixture
def counts(monkeypatch) -> Counter[str]:
    """Tiles of which gate and up were computed, by the kernel or by calls."""
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        stock = getattr(owner, name)

        def counting(*args: Any) -> Any:
            counted[name] += 1
            return stock(*args)

        monkeypatch.setattr(owner, name, counting)

    count(tiled_mlp._Dense, "hidden")
    count(tiled_mlp._WithAdapters, "hidden")
    count(tiling._Calls, "forward")
    count(tiling._Calls, "backward")
    return counted


def adapted(model: Any, dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False, **options)
    return get_peft_model(model, config).train()


def patch(model: Any, memory: str = "as_is", *roles: str) -> Any:
    return hf_turbo.patch_model(model, **{**switched_off("mlp", "checkpointing", *roles), "memory": memory})


@pytest.mark.newest
@pytest.mark.xdist_group("parity")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["llama-bias", "phi3"])
def test_as_exact_as_stock(family, precision, counts):
    def pair(seed: int) -> tuple[Errors, Errors]:
        made = draw(family, seed)
        counts["hidden"] = 0
        patch(made.models[precision], "min_memory")  # which checkpoints
        results = run(made.models[precision], made.inputs, precision == "autocast")
        hf_turbo.disable()
        assert counts["hidden"] == 2 * 2 * 6  # layers, directions, tiles
        return squared_errors(results, made.reference), made.stock[precision]

    hold_to_rule(pair)


def nf4(model: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return quantised(model, "nf4-double")


def int8(model: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return quantised(model, "int8")


KINDS = {
    "dense": (lambda model: model, {}, "hidden"),
    "dropout": (lambda model: model, {"dropout": 0.3}, "hidden"),
    "nf4": (nf4, {}, "hidden"),
    "int8": (int8, {}, "calls"),
    "int8-dropout": (int8, {"dropout": 0.3}, "calls"),
    "dora": (lambda model: model, {"use_dora": True}, "calls"),
}


def adapters_of(kind: str) -> Any:
    base, options, _ = KINDS[kind]
    return switch_on(adapted(base(tiny_model("llama", hidden_size=64, intermediate_size=128)), **options))


@pytest.mark.newest
@pytest.mark.parametrize("kind", KINDS)
def test_adapters(kind, counts):
    """Against the same run by PEFT. With dropout, whose numbers are other ones: against itself, and by differences."""
    model, inputs = adapters_of(kind), batch()
    stock = None if "dropout" in kind else loss_and_gradients(model, inputs)
    patch(model, "min_memory", "lora")

    def results() -> Any:
        torch.manual_seed(3)
        loss, gradients = loss_and_gradients(model, inputs)
        return loss, {name: each.clone() for name, each in gradients.items()}, torch.rand(2)

    loss, gradients, _ = results()
    assert counts == ({"hidden": 2 * 2 * 4} if KINDS[kind][2] == "hidden" else {"forward": 2, "backward": 2})
    again = results()
    assert torch.equal(again[0], loss)
    assert all(torch.equal(each, gradients[key]) for key, each in again[1].items())
    if stock is not None:
        assert gradients.keys() == stock[1].keys()
        assert torch.allclose(loss, stock[0], rtol=1e-5)
        for key, each in stock[1].items():
            assert torch.linalg.vector_norm(gradients[key] - each) < 2e-4 * torch.linalg.vector_norm(each) + 1e-7, key
        return
    parameter = model.get_parameter(next(key for key in gradients if "layers.0.mlp.up_proj.lora_B" in key))
    direction = gradients[next(key for key in gradients if "layers.0.mlp.up_proj.lora_B" in key)]
    losses = []
    for step in (1, -1):
        with torch.no_grad():
            parameter.add_(direction, alpha=step * 1e-2 / direction.norm().item())
        losses.append(results()[0].double())
        with torch.no_grad():
            parameter.sub_(direction, alpha=step * 1e-2 / direction.norm().item())
    assert (losses[0] - losses[1]).item() / 2e-2 == pytest.approx(direction.norm().item(), rel=0.05)


def test_twice_under_checkpointing_and_no_oftener(counts):
    model = switch_on(tiny_model("llama"))
    patch(model)
    loss_and_gradients(model, batch())
    assert counts["hidden"] == 2 * 2 * 4
    loss_and_gradients(model, batch(rows=1, length=20))  # a short pass
    assert counts["hidden"] == 2 * 2 * 4


@pytest.mark.parametrize(
    ("family", "checkpointed", "reentrant", "memory", "expected"),
    [
        ("llama", False, False, "auto", 0),
        ("llama", True, True, "auto", 0),  # the whole layer runs again
        ("gemma2", True, False, "auto", 0),  # a norm comes after the MLP
        ("gemma2", True, False, "min_memory", 3),
        ("cohere2", True, False, "auto", 2),
        ("granite", True, False, "as_is", 2),
        ("phi3", True, False, "max_speed", 2),
    ],
)
def test_where_tiles_are(family, checkpointed, reentrant, memory, expected, counts):
    model = tiny_model(family)
    if checkpointed:
        switch_on(model, reentrant)
    patch(model, memory)
    loss_and_gradients(model, batch())
    assert counts["hidden"] == expected * 2 * 4


def test_kept_layers_have_the_same_bits_and_the_size_that_was_measured(monkeypatch, counts, plan):
    plan.kept = kept_layers.Kept(1)
    model = switch_on(tiny_model("llama"))
    patch(model, "auto")
    first = loss_and_gradients(model, batch())
    assert counts["hidden"] == 2 * 2 * 4
    first = first[0], {name: each.clone() for name, each in first[1].items()}
    second = loss_and_gradients(model, batch())
    assert counts["hidden"] == (2 * 2 + 2 + 1) * 4
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(each, second[1][name]) for name, each in first[1].items())
    asked = [each.whole for each in plan.costs]
    # What the same layer keeps without tiles: besides gate and up, what the tiled MLP saves is its input alike.
    hf_turbo.disable()
    monkeypatch.setattr(policy, "LONG", 10**6)
    other = switch_on(tiny_model("llama"))
    patch(other, "auto")
    loss_and_gradients(other, batch())
    stack, _ = kept_layers.PLACES[other.model.layers[0]]
    assert asked == [each.bytes for each in stack._measured]


def test_reverted_to_stock(counts):
    model = switch_on(tiny_model("llama"))
    stock = copy.deepcopy(loss_and_gradients(model, batch()))
    patch(model, "min_memory")
    hf_turbo.disable()
    loss, gradients = loss_and_gradients(model, batch())
    assert not counts
    assert torch.equal(loss, stock[0])
    assert all(torch.equal(each, stock[1][name]) for name, each in gradients.items())
    assert not tiling._PLACES


def test_min_memory_checkpoints_and_lets_nothing_wait():
    model = tiny_model("llama")
    wrapped, before = adapted(model), expanded_weights.MOST_WAITING_BYTES
    report = hf_turbo.patch_model(wrapped, memory="min_memory", metrics=False, report=False)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert any("gradient checkpointing of LlamaForCausalLM" in note for note in report.notes)
    reasons = {row.role: row.reason for row in report.rows}
    assert reasons["memory"] == "memory='min_memory'"
    assert expanded_weights.MOST_WAITING_BYTES == 0
    hf_turbo.disable()
    assert before == expanded_weights.MOST_WAITING_BYTES
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_min_memory_says_where_there_is_no_checkpointing():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    report = hf_turbo.patch_model(model, memory="min_memory", metrics=False, report=False)
    assert any("does not checkpoint this model" in note for note in report.notes)


class Shifting(torch.nn.Linear):
    """Looks at the row before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.roll(x, 1, -2))


class Moved(torch.nn.Linear):
    """Both the weight and what is added to it are trained: they have the same gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.delta = torch.nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight + self.delta)


def with_layers(cls: type[torch.nn.Linear]) -> Any:
    model = tiny_model("llama")
    for layer in model.model.layers:
        old = layer.mlp.gate_proj
        layer.mlp.gate_proj = cls(old.in_features, old.out_features, bias=False)
        with torch.no_grad():
            layer.mlp.gate_proj.weight.copy_(old.weight)
    return model


def with_hook() -> Any:
    model = adapted(tiny_model("llama"), use_dora=True)
    for layer in model.get_base_model().model.layers:
        layer.mlp.up_proj.lora_B.default.register_forward_hook(lambda module, args, output: output[..., :1] + output)
    return model


def with_invocation() -> Any:
    """aLoRA: adapters act from the invocation tokens on."""
    return adapted(tiny_model("llama"), alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")


@pytest.mark.newest
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_layers(Shifting), "a Shifting may mix rows"),
        (lambda: with_layers(Moved), "a Moved may mix rows"),
        (with_hook, "hooks or an instance forward on its layers"),
        (with_invocation, "the adapter is a variant: ALoraLinearVariant"),
    ],
    ids=["mixing", "sums", "hook", "alora"],
)
def test_what_may_mix_rows_is_computed_at_once(make, reason, counts):
    model, inputs = switch_on(make()), batch(masked=False)
    inputs["input_ids"][:, 10:12] = torch.tensor([5, 6])
    loss, gradients = copy.deepcopy(loss_and_gradients(model, inputs))
    patch(model, "min_memory", "lora")
    again = loss_and_gradients(model, inputs)
    assert not counts
    assert torch.allclose(again[0], loss, rtol=1e-5)
    for name, each in gradients.items():
        assert torch.linalg.vector_norm(again[1][name] - each) < 2e-4 * torch.linalg.vector_norm(each) + 1e-7, name
    (note,) = [note for note in hf_turbo.report().notes if "computed at once" in note]
    assert note == f"memory='min_memory': LlamaMLP is computed at once: {reason}"


def test_sums_of_tiles_are_tensors_of_their_own():
    """Autograd returns one tensor as the gradient of both parameters."""
    x, dy = torch.randn(2, 8, 4)
    weight, delta = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.zeros(4, 4))
    calls = tiling._Calls(lambda rows: torch.nn.functional.linear(rows, weight + delta), 3, x.device)
    calls.forward(x)
    for gradient in calls.backward(x, dy, False, [weight, delta])[1:]:
        torch.testing.assert_close(gradient, dy.T @ x)


def test_bfloat16_adapters_are_not_summed_by_calls(counts):
    """Their gradients would be rounded once for each tile."""
    model = switch_on(adapted(tiny_model("llama"), use_dora=True)).to(torch.bfloat16)
    patch(model, "min_memory", "lora")
    loss_and_gradients(model, batch())
    assert not counts
