"""Memory that runs out within a step, at any place: the step is done again, and nothing of the training changes."""

from __future__ import annotations

import gc
import random
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from hf_turbo.patches import head, padding, retry, trl, varlen
from hf_turbo.patches.advice import advice
from hf_turbo.patches.collectives import Tape
from peft import LoraConfig
from transformers import Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTConfig, SFTTrainer

import hf_turbo
from tests.hosts.test_padding_hosts import (
    ROWS,
    make_adapted_dpo,
    make_dpo,
    make_grpo,
    make_kto,
    make_plain,
    make_reward,
    make_sft,
)
from tests.models import tiny_model
from tests.training import Run, arguments, compare, tokenizer

pytestmark = [pytest.mark.usefixtures("on_cpu"), pytest.mark.filterwarnings("ignore:hf_turbo. step")]


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fault: Callable[[], None]) -> torch.Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.fault()
        return dy, None


class Faults:
    """Fails at the given calls, counted from 0, of the attention of any layer or of the loss, forward or backward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: dict[str, int] = {}
        self.fail_at: dict[str, set[int]] = {}
        attend = varlen.varlen_attention
        monkeypatch.setattr(varlen, "varlen_attention", self._faulty("attention", attend))
        monkeypatch.setattr(trl, "linear_log_prob", self._faulty("loss", trl.linear_log_prob))
        monkeypatch.setattr(head, "linear_cross_entropy", self._faulty("loss", head.linear_cross_entropy))

    def _fault(self, name: str) -> None:
        call = self.calls[name] = self.calls.get(name, -1) + 1
        if call in self.fail_at.get(name, ()):
            raise torch.OutOfMemoryError(f"CUDA out of memory. By intent, in {name}")

    def _faulty(self, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            self._fault(name)
            output = stock(*args, **kwargs)
            backward = lambda: self._fault(f"{name} backward")  # noqa: E731
            if isinstance(output, tuple):
                return _FailsBackward.apply(output[0], backward), *output[1:]
            return _FailsBackward.apply(output, backward)

        return faulty


@pytest.fixture
def faults(monkeypatch) -> Faults:
    return Faults(monkeypatch)


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """What was told of each step that was taken back."""
    told, run = [], retry.Retry.__init__

    def noted(self: Any, trainer: Any, make_room: Any, tell: Callable[[str], None]) -> None:
        run(self, trainer, make_room, lambda event: (told.append(event), tell(event)))

    monkeypatch.setattr(retry.Retry, "__init__", noted)
    return told


def make_dropout(folder: Path, **more: Any) -> Trainer:
    """Random numbers in every layer."""
    args = SFTConfig(**arguments(folder, max_steps=4, **more))
    lora = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")
    return SFTTrainer(
        tiny_model("llama"), args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer(), peft_config=lora
    )


PLACES = ["attention", "attention backward", "loss", "loss backward"]


@pytest.mark.newest
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", [0, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_bits(place, call, checkpointing, faults, counted, tmp_path):
    """At any layer, forward and backward, and in the loss, in the first step and later; dropout included."""
    make = lambda folder: make_dropout(folder, gradient_checkpointing=checkpointing)  # noqa: E731
    options = {"turbo": True, "padding": True}
    without = Run(make, tmp_path / "without", **options)
    faults.calls.clear()
    faults.fail_at = {place: {call}}
    faulty = Run(make, tmp_path / "faulty", **options)
    assert len(counted) == 1
    assert "out of memory in " in counted[0]
    assert without.updates.keys() == faulty.updates.keys()
    for name, update in without.updates.items():
        assert torch.equal(update, faulty.updates[name]), name
    for name in ("loss", "grad_norm", "mean_token_accuracy", "num_tokens"):
        assert torch.equal(without.logged(name), faulty.logged(name)), name


@pytest.mark.newest
@pytest.mark.parametrize(
    ("make", "place"),
    [(make, "attention") for make in (make_sft, make_dpo, make_grpo)]
    + [(make, "attention backward") for make in (make_sft, make_plain, make_reward, make_adapted_dpo, make_kto)],
)
def test_trainers_with_accumulation(make, place, faults, counted, tmp_path):
    """Micro-batches of a step that were done already are done again, and counted once."""
    faults.fail_at = {place: {3, 9}}
    more = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "max_steps": 3}
    compare(lambda folder: make(folder, **more), tmp_path, padding=True)
    assert len(counted) >= 1


def test_checkpointing_is_added_where_nothing_else_helps(faults, counted, tmp_path):
    """Twice in a row; what was added goes with the training."""
    faults.fail_at = {"attention": {2, 3}}
    trainers = []

    def make(folder: Path) -> Trainer:
        trainers.append(make_sft(folder, max_steps=4))
        return trainers[-1]

    compare(make, tmp_path, padding=True)
    assert [told.partition("done again, ")[2] for told in counted] == [
        "after freeing unused memory",
        "with gradient checkpointing, for the rest of this training",
    ]
    assert not any(trainer.model.is_gradient_checkpointing for trainer in trainers)


def test_what_is_told_is_what_changed(faults, counted, tmp_path):
    """A pass that micro-batches shared; no layer was kept."""
    faults.fail_at = {"attention backward": {1}}
    trainer = make_sft(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    with hf_turbo.session(padding=True, merging=True, max_tokens_per_pass=1000, report=False):
        trainer.train()
    assert [told.partition("done again, ")[2] for told in counted] == ["with each micro-batch in a pass of its own"]


@pytest.mark.parametrize(
    ("optim", "model", "size", "expected"),
    [
        ("adamw_torch", {}, 2, ["per_device_train_batch_size", "max_length", "adamw_8bit", "QLoRA"]),
        ("sgd", {"is_quantized": True, "is_loaded_in_8bit": True}, 1, ["max_length", "QLoRA"]),
        ("paged_adamw_8bit", {"is_quantized": True, "is_loaded_in_4bit": True}, 1, ["max_length"]),
    ],
)
def test_advice_names_what_is_not_in_use(optim, model, size, expected):
    trainer = SimpleNamespace(
        args=SimpleNamespace(optim=optim, per_device_train_batch_size=size),
        model=SimpleNamespace(**model),
        accelerator=SimpleNamespace(state=SimpleNamespace()),
    )
    said = advice(trainer)
    names = ("per_device_train_batch_size", "max_length", "adamw_8bit", "QLoRA")
    assert [name for name in names if name in said] == expected


def test_collectives_that_are_not_understood():
    """DDP's own is not the loss's."""
    for name, said in {"_broadcast_coalesced": "model is called more than once a step", "send": "(send)"}.items():
        tape = Tape()
        tape.call(name, lambda *args: None, (), {})
        assert said in tape.against
        assert "loss" not in tape.against


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("step", [0, 2])
def test_optimizer(optim, step, monkeypatch, counted, tmp_path):
    """Before it has changed anything, its step is done again."""
    make = lambda folder: make_sft(folder, optim=optim, learning_rate=1e-3, max_steps=4)  # noqa: E731
    without = Run(make, tmp_path / "without", turbo=True, padding=True)
    cls, calls = (torch.optim.AdamW if optim == "adamw_torch" else torch.optim.SGD), []
    stock, zeros = cls._init_group, torch.zeros_like

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. By intent")

    def faulty(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 2 * step + 1:  # two groups, with and without weight decay
            made = iter([zeros] * 3)
            with monkeypatch.context() as patch:  # in the middle of a state
                patch.setattr(torch, "zeros_like", lambda *args, **kwargs: next(made, fail)(*args, **kwargs))
                stock(*args)
            fail()
        return stock(*args)

    monkeypatch.setattr(cls, "_init_group", faulty)
    faulty = Run(make, tmp_path / "faulty", turbo=True, padding=True)
    for name, update in without.updates.items():
        assert torch.equal(update, faulty.updates[name]), name


def test_an_optimizer_that_has_begun_is_not_done_again(monkeypatch, tmp_path):
    """Weights of the second group lack their update: that cannot be taken back."""
    calls, stock = [], torch.optim.SGD._init_group

    def faulty(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. By intent")
        return stock(*args)

    monkeypatch.setattr(torch.optim.SGD, "_init_group", faulty)
    with (
        hf_turbo.session(padding=True, report=False),
        pytest.raises(torch.OutOfMemoryError, match="some weights were updated and others were not"),
    ):
        make_sft(tmp_path).train()


def test_the_report_and_the_logs_tell(faults, tmp_path):
    faults.fail_at = {"attention": {2}}
    trainer = make_sft(tmp_path)
    with hf_turbo.session(padding=True, report=False) as report, pytest.warns(RuntimeWarning, match="out of memory in"):
        trainer.train()
    (note,) = [note for note in report.notes if "out of memory" in note]
    assert note.startswith("step 2: out of memory in model.layers.0.self_attn")
    assert trainer.state.log_history[1]["turbo/retried_steps"] == 1
    assert "turbo/retried_steps" not in trainer.state.log_history[0]


def test_a_fault_that_stays_is_an_error_that_says_what_to_do(faults, tmp_path):
    """And what was saved before is whole."""
    trainer = make_sft(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    faults.fail_at = {"attention": set(range(4, 1000))}
    with (
        hf_turbo.session(padding=True, report=False),
        pytest.raises(torch.OutOfMemoryError, match="nothing is left that would take less"),
    ):
        trainer.train()
    faults.fail_at = {}
    assert not trainer.model.is_gradient_checkpointing
    resumed = make_sft(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


class Drawing(SFTTrainer):
    """Random numbers of Python in the loss."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss * (1 + random.random()) if torch.is_tensor(loss) else (loss[0] * (1 + random.random()), *loss[1:])


class Popping(SFTTrainer):
    """A loss that takes something out of its inputs."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        inputs.setdefault("scale", 1.0)
        scale, inputs["scale"] = inputs.pop("scale"), 3.0
        kept = {name: value for name, value in inputs.items() if name != "scale"}
        return super().compute_loss(model, kept, **kwargs) * scale


class OwnGenerators(SFTTrainer):
    """Random numbers in the loss, of generators that the trainer keeps."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.of_torch, self.of_python = torch.Generator().manual_seed(3), random.Random(3)
        self.of_numpy = {"new": numpy.random.default_rng(3), "old": numpy.random.RandomState(3)}

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        drawn = torch.rand((), generator=self.of_torch) + self.of_python.random()
        drawn = drawn + self.of_numpy["new"].random() + self.of_numpy["old"].random()
        return super().compute_loss(model, inputs, **kwargs) * (1 + drawn)


class Perturbing(SFTTrainer):
    """Weights that differ while the gradient is computed, as in adversarial training."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
        loss = super().compute_loss(model, inputs, **kwargs)
        with torch.no_grad():
            next(model.parameters()).div_(1.5)
        return loss


def of_class(cls: type, folder: Path, **more: Any) -> Trainer:
    args = SFTConfig(**arguments(folder, gradient_accumulation_steps=2, max_steps=3, **more))
    return cls(tiny_model("llama"), args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer())


@pytest.mark.parametrize("cls", [Drawing, Popping, OwnGenerators])
def test_losses_of_other_kinds(cls, faults, counted, tmp_path):
    options = {"turbo": True, "padding": True, "merging": False}
    without = Run(lambda folder: of_class(cls, folder), tmp_path / "without", **options)
    faults.calls.clear()
    faults.fail_at = {"attention": {3, 7}}
    faulty = Run(lambda folder: of_class(cls, folder), tmp_path / "faulty", **options)
    assert len(counted) == 2
    for name, update in without.updates.items():
        assert torch.equal(update, faulty.updates[name]), name


class Summing(SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        self.total = getattr(self, "total", torch.zeros(()))
        self.total += loss.detach()
        return loss


class Collecting(SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        self.seen = getattr(self, "seen", {"losses": []})
        self.seen["losses"].append(loss.detach())
        return loss


class Logging(SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        self.log({"mine": loss.item()})
        return loss


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Summing, "written to 'total'"), (Collecting, "written to 'seen'"), (Logging, "the loss has logged")],
)
def test_notes_that_cannot_be_taken_back(cls, reason, faults, counted, tmp_path):
    """In the backward of a later step, behind what the loss of a micro-batch before has left."""
    faults.fail_at = {"attention backward": {6}}
    with hf_turbo.session(padding=True, report=False), pytest.raises(torch.OutOfMemoryError, match=reason):
        of_class(cls, tmp_path).train()
    assert counted == []


def test_weights_that_change_within_a_step_are_not_taken_back(faults, counted, tmp_path):
    trainer = of_class(Perturbing, tmp_path)
    faults.fail_at = {"attention": {3}}
    with (
        hf_turbo.session(padding=True, report=False),
        pytest.raises(torch.OutOfMemoryError, match="weights have changed within the step"),
    ):
        trainer.train()
    assert counted == []


class Own(SFTTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


def test_steps_that_are_not_done_again_say_why(faults, counted, tmp_path):
    """And the error is the one that was raised, where it was raised."""
    faults.fail_at = {"attention": {0}}
    with hf_turbo.session(padding=True, report=False), pytest.raises(torch.OutOfMemoryError) as error:
        of_class(Own, tmp_path).train()
    assert "By intent, in attention\nhf_turbo: memory ran out in model.layers.0.self_attn" in str(error.value)
    assert "(training_step is overridden by Own). What would take less" in str(error.value)
    assert error.traceback[-1].name == "_fault"
    assert counted == []


def test_nothing_stays_behind(faults, tmp_path):
    """Neither patches nor the trainer; also where it is switched off in the middle."""
    stock = {cls: vars(cls).get("training_step") for cls in Trainer.__mro__ + SFTTrainer.__mro__}
    step = AcceleratedOptimizer.step
    faults.fail_at = {"attention": {1}}

    class Off(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hf_turbo.disable()

    for callback in (None, Off()):
        trainer = make_plain(tmp_path)
        if callback is not None:
            trainer.add_callback(callback)
        with hf_turbo.session(padding=True, report=False) as report:
            trainer.train()
        assert not [note for note in report.notes if "left as it is" in note]
        assert {cls: vars(cls).get("training_step") for cls in stock} == stock
        assert AcceleratedOptimizer.step is step
        alive = weakref.ref(trainer)
        del trainer
        gc.collect()
        assert alive() is None


@pytest.mark.parametrize(("more", "options"), [({}, {"memory": "as_is"}), ({"auto_find_batch_size": True}, {})])
def test_left_to_the_user(more, options, faults, counted, tmp_path):
    trainer = make_sft(tmp_path, **more)
    faults.fail_at = {"attention": {0}}
    with hf_turbo.session(padding=True, report=False, **options):
        if more:
            trainer.train()  # with half the batch size
        else:
            with pytest.raises(torch.OutOfMemoryError):
                trainer.train()
    assert counted == []


def test_notes_of_a_trainer_are_put_back():
    """Containers stay the same objects; tensors are not kept alive; what is of the size of a dataset is left alone."""
    state = SimpleNamespace(tokens=7, log_history=[])
    metrics = {"train": defaultdict(list, loss=[1.0])}
    trainer = SimpleNamespace(
        state=state,
        step=3,
        metrics=metrics,
        recent=deque([1, 2], maxlen=4),
        long=list(range(300)),
        rows=dict.fromkeys(range(300)),
        tags={"a"},
        output=CausalLMOutput(logits=torch.ones(1)),
        last=[torch.ones(2)],
    )
    alive, output = weakref.ref(trainer.last[0]), trainer.output
    notes = retry._Notes(trainer)
    trainer.step += 1
    state.tokens += 5
    metrics["train"]["loss"].append(2.0)
    metrics["train"]["new"].append(2.0)
    trainer.recent.extend([3, 4, 5])
    trainer.tags.add("b")
    trainer.long.append(1)
    trainer.rows[300] = None
    trainer.output, trainer.last = None, [torch.zeros(2)]
    assert alive() is None
    notes.restore(trainer)
    assert (trainer.step, state.tokens) == (3, 7)
    assert trainer.metrics is metrics
    assert metrics == {"train": {"loss": [1.0]}}
    assert list(trainer.recent) == [1, 2]
    assert trainer.tags == {"a"}
    assert (len(trainer.long), len(trainer.rows)) == (300, 301)
    assert trainer.output is output
    assert torch.equal(trainer.last[0], torch.zeros(2))


def test_nothing_of_a_failed_pass_is_held(faults, monkeypatch, tmp_path):
    """The error holds the frames that failed: what they hold has to be free before the step is done again."""
    alive, left, run = weakref.WeakSet(), [], padding._run

    class Held:
        pass

    def holding(*args: Any) -> None:
        held = Held()
        alive.add(held)
        run(*args)

    again = retry.Retry._again

    def looked(self: Any) -> Any:
        gc.collect()
        left.append(len(alive))
        return again(self)

    monkeypatch.setattr(padding, "_run", holding)
    monkeypatch.setattr(retry.Retry, "_again", looked)
    faults.fail_at = {"attention": {1}}
    with hf_turbo.session(padding=True, report=False):
        make_sft(tmp_path).train()
    assert left == [0]
