"""float32 weights under autocast: the bits of stock, with fewer casts."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_turbo.kernels import _weights
from hf_turbo.patches import autocast, shadows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_turbo
from hf_turbo.policies import memory
from tests.models import switched_off, tiny_model
from tests.training import arguments, compare, one_thread, padded_rows

OPTIONS = switched_off("autocast")
CAST = (torch.float32, torch.bfloat16)
MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def threads():
    with one_thread():
        yield


class Casts(TorchDispatchMode):
    """Counts casts from float32 to bfloat16 of weights [N, K], and of what is [rows, length, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.inputs = self.together = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and (args[0].dtype, kwargs.get("dtype")) == CAST:
            self.weights += args[0].ndim == 2 and args[0].shape[0] > 30
            self.inputs += args[0].ndim == 3
        self.together += function is torch.ops.aten._foreach_copy_.default
        return function(*args, **kwargs)


class Count(TrainerCallback):
    """The casts of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Casts] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(Casts())
        self.steps[-1].__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps[-1].__exit__(None, None, None)


def train(
    folder: Path, model: Any, callbacks: Any = (), trainer_class: Any = Trainer, **more: Any
) -> dict[str, torch.Tensor]:
    """Four steps; returns the weights afterwards."""
    rows = padded_rows(0, 16)
    args = {"bf16": True, "max_steps": 4, "per_device_train_batch_size": 2, "seed": 3, **more}
    trainer = trainer_class(
        model=model, args=TrainingArguments(**arguments(folder, **args)), train_dataset=rows, callbacks=[*callbacks]
    )
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def turbo(folder: Path, model: Any, callbacks: Any = (), **more: Any) -> tuple[dict[str, torch.Tensor], Any]:
    options = more.pop("options", OPTIONS)
    with hf_turbo.session(**options) as report:
        weights = train(folder, model, callbacks, **more)
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(module) for module in linear} == {torch.nn.Linear}
    assert _weights._lookup is None
    return weights, report


def row_of(report: Any) -> Any:
    return next(row for row in report.rows if row.role == "autocast")


CHECKPOINTED = {"gradient_checkpointing": True}
REENTRANT = {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 4},
        CHECKPOINTED,
        {**CHECKPOINTED, "gradient_accumulation_steps": 2, "options": switched_off("autocast", "checkpointing")},
        {**REENTRANT, "gradient_accumulation_steps": 2},
    ],
    ids=["plain", "accumulation", "checkpointing", "both", "reentrant"],
)
def test_the_bits_of_stock(tmp_path, more):
    """On a CPU, where gradients too are rounded as by autocast."""
    own = {name: value for name, value in more.items() if name != "options"}
    stock = train(tmp_path, tiny_model("llama"), **own)
    ours, report = turbo(tmp_path, tiny_model("llama"), **more)
    row = row_of(report)
    assert (row.found, row.patched) == (14, 14)
    assert ours.keys() == stock.keys()
    for name in stock:
        assert torch.equal(ours[name], stock[name]), name
    assert any("16-bit copies" in note for note in report.notes) == bool(own)


@pytest.mark.newest
def test_each_weight_is_cast_once_per_step(tmp_path):
    """Stock: in every forward, and again in every recomputation; the head is cast once per forward."""
    more = {**CHECKPOINTED, "gradient_accumulation_steps": 2}
    stock, ours = Count(), Count()
    train(tmp_path, tiny_model("llama"), [stock], **more)
    turbo(tmp_path, tiny_model("llama"), [ours], options=switched_off("autocast", "checkpointing", "mlp"), **more)
    assert [step.weights for step in stock.steps] == [2 * (2 * 14 + 1)] * 4
    # What is cast shows in the first step. The head is stock here: it is not asked for.
    assert [step.weights for step in ours.steps] == [2 * (2 * 14 + 1), 2, 2, 2]
    assert [step.together for step in ours.steps] == [0, 1, 1, 1]
    # Of each layer's two normed inputs there is one copy instead of three and two. Gradients are cast beside: of two
    # branches of a layer, and of the logits.
    gradients = 2 * (2 * 2 + 1)
    assert [step.inputs for step in stock.steps] == [2 * (2 * 2 * 5 + 1) + gradients] * 4
    assert [step.inputs for step in ours.steps] == [2 * (2 * 2 * 2 + 1) + gradients] * 4


@pytest.mark.newest
def test_with_all_roles(tmp_path):
    """The gated MLP, the head and recomputation take the copies too; weights end where they do without them."""
    more = {**CHECKPOINTED, "gradient_accumulation_steps": 2}
    roles = switched_off("autocast", "checkpointing", "mlp", "loss")
    without, _ = turbo(tmp_path, tiny_model("llama"), options={**roles, "autocast": False}, **more)
    count = Count()
    ours, report = turbo(tmp_path, tiny_model("llama"), [count], options=roles, **more)
    assert [step.weights for step in count.steps] == [2 * (2 * 14 + 1), 0, 0, 0]
    for name in without:
        assert torch.equal(ours[name], without[name]), name
    assert row_of(report).patched == 14


class Writes(TrainerCallback):
    """Changes weights in ways that their versions do not show, before and after steps."""

    def on_step_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(1.25)

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.75


class Evaluates(Trainer):
    """Might do anything in a step."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.newest
def test_weights_that_are_written_to_between_steps(tmp_path):
    more = {**CHECKPOINTED, "gradient_accumulation_steps": 2}
    stock = train(tmp_path, tiny_model("llama"), [Writes()], **more)
    ours, report = turbo(tmp_path, tiny_model("llama"), [Writes()], **more)
    for name in stock:
        assert torch.equal(ours[name], stock[name]), name
    assert any("in 3 steps" in note for note in report.notes)


def adapted() -> Any:
    """LoRA on a float32 model."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"]))


@pytest.mark.newest
def test_frozen_weights_under_adapters(tmp_path):
    """Fused adapters take the copies. Nothing changes but the number of casts."""
    more = {**CHECKPOINTED, "gradient_accumulation_steps": 2}
    roles = switched_off("autocast", "lora", "mlp", "checkpointing")
    count = Count()  # in both, as adapters are added in another way where somebody watches the operators
    without, _ = turbo(tmp_path, adapted(), [Count()], options={**roles, "autocast": False}, **more)
    ours, report = turbo(tmp_path, adapted(), [count], options=roles, **more)
    for name in without:
        assert torch.equal(ours[name], without[name]), name
    assert row_of(report).patched == 2 * 4  # the layers without an adapter
    # Of the head stock's cast remains.
    assert count.steps[0].weights > 2 * 2 * 14
    assert [step.weights for step in count.steps[1:]] == [2, 2, 2]
    assert [step.together for step in count.steps] == [0, 1, 1, 1]


def test_hooks_on_gradients_fire_as_ever(tmp_path):
    """As those of DistributedDataParallel, once per backward, with float32 gradients."""
    seen: dict[str, list[torch.dtype]] = {}
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda each, name=name: seen.setdefault(name, []).append(each.grad.dtype)
        )
    turbo(tmp_path, model, gradient_accumulation_steps=2, max_steps=3)
    assert seen == {name: [torch.float32] * 6 for name, _ in model.named_parameters()}


@pytest.mark.newest
def test_a_tied_and_resized_vocabulary_and_frozen_parts(tmp_path):
    """Some weights in 16 bits, some frozen, biases; the head is the embedding, with rows added."""

    def model() -> Any:
        made = tiny_model("llama-bias")
        made.resize_token_embeddings(101)
        made.model.layers[0].self_attn.requires_grad_(False)
        return made

    more = {**CHECKPOINTED, "gradient_accumulation_steps": 2}
    stock = train(tmp_path, model(), **more)
    ours, report = turbo(tmp_path, model(), **more)
    assert row_of(report).patched == 14
    for name in stock:  # a bias is rounded less often
        torch.testing.assert_close(ours[name], stock[name], rtol=0, atol=1e-3 if "bias" in name else 2e-4)


class ActsWithinSteps(TrainerCallback):
    def on_substep_end(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"callbacks": [ActsWithinSteps()]}, "on_substep_end may look at gradients or change weights"),
        ({"trainer_class": Evaluates}, "training_step is overridden by Evaluates"),
    ],
)
def test_where_weights_may_change_unnoticed(tmp_path, more, reason):
    stock = train(tmp_path, tiny_model("llama"), max_steps=1)
    ours, report = turbo(tmp_path, tiny_model("llama"), max_steps=1, **more)
    assert row_of(report).patched == 0
    assert reason in row_of(report).reason
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


def test_without_autocast_there_is_nothing_to_say(tmp_path):
    _, report = turbo(tmp_path, tiny_model("llama"), max_steps=1, bf16=False)
    assert not any(row.role == "autocast" for row in report.rows)
    with pytest.raises(RuntimeError, match="autocast=True was asked for"):
        turbo(tmp_path, tiny_model("llama"), max_steps=1, bf16=False, options={**OPTIONS, "autocast": True})


# ------------------------------------------------------------------------------------------------ single layers


def layer(bias: bool = True, rows: int = 24, columns: int = 16) -> torch.nn.Linear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(columns, rows, bias)
    linear.__class__ = autocast.same_name_subclass(torch.nn.Linear, autocast._make_forward)
    return linear


@pytest.fixture
def step():
    """Inside a training step, with copies from the second on."""
    copies = shadows.Shadows(lambda size, rest, device: True)
    hf_turbo.enable(**OPTIONS)
    with copies.training_step(True):
        yield copies


def low(copies: shadows.Shadows, weight: torch.Tensor) -> torch.Tensor | None:
    return copies(weight, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", ["float32", "low"])
def test_gradients_by_the_rule(step, dtype, given):
    """No further from fp64 than autocast, for an input in float32 and for one in 16 bits already."""
    torch.manual_seed(1)
    x = torch.randn(2, 33, 16)
    x = x.to(dtype) if given == "low" else x
    dy = torch.randn(2, 33, 24)

    def run(linear: Any, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        y = linear(x)
        y.backward(dy.to(y.dtype))
        return [y, x.grad, linear.weight.grad, linear.bias.grad]

    wide = torch.nn.Linear(16, 24).double()
    stock, ours = torch.nn.Linear(16, 24), layer()
    for each in (wide, stock):
        each.load_state_dict(ours.state_dict())
    exact = run(wide, x.double(), dy.to(dtype).double())
    with torch.autocast("cpu", dtype):
        expected, found = run(stock, x, dy), run(ours, x, dy)
    assert "AutocastLinear" in found[0].grad_fn.name()
    assert torch.equal(found[0], expected[0])
    for reference, theirs, mine in zip(exact, expected, found, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - reference).norm() <= 1.1 * (theirs - reference).norm()


def test_inputs_are_shared_as_long_as_they_are_the_same(step):
    linear, x = layer(), torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        for _ in range(3):
            linear(x)
        assert casts.inputs == 1
        x.mul_(2)
        assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
        assert casts.inputs == 3  # one of them stock's
    assert autocast._COPIES._last is not None
    del x
    gc.collect()
    assert autocast._COPIES._last is None


@pytest.mark.parametrize("change", ["float64", "off", "no_grad", "disabled", "weight", "float16", "empty"])
def test_what_is_stocks(step, change):
    linear, x = layer(), torch.randn(3, 5, 16)
    dtype, grad = torch.bfloat16, True
    if change == "float64":
        x, linear = x.double(), linear.double()
    elif change == "no_grad":
        grad = False
    elif change == "disabled":
        hf_turbo.disable()
    elif change == "weight":
        linear = linear.bfloat16()
    elif change == "empty":
        x = x[:0]
    with torch.autocast("cpu", dtype, enabled=change != "off"), torch.set_grad_enabled(grad):
        y = linear(x)
    assert y.grad_fn is None or ("AutocastLinear" in y.grad_fn.name()) == (change == "float16")


def test_a_copy_is_of_the_weight_as_it_is():
    """New in every step, and not handed out where the weight is another or was written to."""
    weight, other = layer().weight, layer().weight
    copies = shadows.Shadows(lambda size, rest, device: True)
    for _ in range(2):
        with copies.training_step(True):
            found = [low(copies, weight), low(copies, weight)]
    assert found[0] is found[1] is not None
    assert torch.equal(found[0], weight.bfloat16())
    assert low(copies, weight) is None, "between steps"
    with torch.no_grad():
        weight.data.add_(1)
    with copies.training_step(True):
        assert torch.equal(low(copies, weight), weight.bfloat16())
        assert copies(weight, torch.float16) is None
    for _ in range(2):
        with copies.training_step(True):
            low(copies, weight)
            low(copies, weight)
    with copies.training_step(True), torch.no_grad():
        assert low(copies, weight) is not None
        weight.add_(1)
        assert low(copies, weight) is None
        weight.data = other.data
        assert low(copies, weight) is None


def test_what_is_cast_once_has_no_copy():
    weight = layer().weight
    copies = shadows.Shadows(lambda size, rest, device: True)
    for _ in range(4):
        with copies.training_step(True):
            assert low(copies, weight) is None


def test_a_weight_that_is_gone_is_not_kept():
    copies, linear = shadows.Shadows(lambda size, rest, device: True), layer()
    for _ in range(2):
        with copies.training_step(True):
            low(copies, linear.weight), low(copies, linear.weight)
    del linear
    gc.collect()
    with copies.training_step(True):
        assert not copies._casts


def test_frozen_weights_may_be_written_to_between_steps():
    """In ways that nothing shows: `merge()` of PEFT writes to `weight.data`, bitsandbytes to an address."""
    weight = layer().weight.requires_grad_(False)
    copies = shadows.Shadows(lambda size, rest, device: True)
    for step in range(4):
        with copies.training_step(True):
            found = low(copies, weight), low(copies, weight)
        assert step == 0 or torch.equal(found[0], weight.bfloat16())
        if step % 2:
            weight.data.mul_(2)
        else:
            weight.detach().numpy()[:] += 1


def test_memory_that_is_not_plainly_free():
    weight, asked = layer().weight, []
    copies = shadows.Shadows(lambda *given: bool(asked.append(given)))
    for _ in range(3):
        with copies.training_step(True):
            assert low(copies, weight) is low(copies, weight) is None
    assert asked == [(24 * 16 * 2, None, torch.device("cpu"))] * 2
    assert memory.copies_fit(2 * MIB, 40 * MIB, 10 * MIB)
    assert not memory.copies_fit(9 * MIB, 40 * MIB, 0)
    assert not memory.copies_fit(2 * MIB, 40 * MIB, 33 * MIB)


def test_after_memory_ran_out_there_are_no_copies():
    weight = layer().weight
    copies = shadows.Shadows(lambda size, rest, device: True)
    for _ in range(2):
        with copies.training_step(False):
            low(copies, weight), low(copies, weight)
        if copies._casts[id(weight)].low is None:
            copies.end_step()
    assert copies.tighten()
    for _ in range(3):
        with copies.training_step(True):
            assert low(copies, weight) is low(copies, weight) is None
    assert not copies.tighten()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    """By the rule for whole runs: gradients are rounded less often there. Memory is asked of the device."""

    def make(folder: Path) -> Trainer:
        more = {**CHECKPOINTED, "gradient_accumulation_steps": 2, "use_cpu": False, "bf16": True, "max_steps": 4}
        args = TrainingArguments(**arguments(folder, **more))
        return Trainer(model=tiny_model("llama"), args=args, train_dataset=padded_rows(0, 32))

    run = compare(make, tmp_path, precision=torch.bfloat16, **switched_off("autocast", "report"))
    assert run.patched["autocast"] == 14
    assert any("16-bit copies" in note and "in 3 steps" in note for note in hf_turbo.report().notes)
