"""Whole trainings whose micro-batches share passes: the logs, metrics and weights of stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_turbo.patches import agreement, deepspeed, micro_batches, padding
from hf_turbo.patches.engine import is_live
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import hf_turbo
from tests.hosts.test_padding_hosts import ROWS, make_dpo, make_kto, make_plain, make_reward, make_sft
from tests.models import tiny_model
from tests.training import Run, arguments, compare, tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")
ALL = 1 << 20


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Micro-batches of each pass."""
    seen, run = [], padding._run

    def recorded(backbone: Any, stock: Any, kwargs: Any, rest: Any, of: Any, state: Any) -> None:
        seen.append(len(of.micro_batches))
        run(backbone, stock, kwargs, rest, of, state)

    monkeypatch.setattr(padding, "_run", recorded)
    return seen


@pytest.mark.parametrize("make", [make_sft, make_dpo, make_kto, make_reward, make_plain])
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.newest)])
def test_trainers(make, checkpointing, passes, tmp_path):
    more = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "gradient_checkpointing": checkpointing}
    if make is make_kto:
        more["per_device_train_batch_size"] = 2  # its KL term needs two
    turbo = compare(lambda folder: make(folder, **more), tmp_path, max_tokens_per_pass=ALL)
    assert turbo.patched["merging"] >= 1
    assert passes
    assert set(passes) <= {4, 2}  # 2: the last step of an epoch of KTO's 8 batches, or of pairs
    assert 4 in passes


@pytest.mark.newest
@pytest.mark.parametrize(("accumulation", "size"), [(3, 3), (16, 1), (5, 2)])
def test_an_uneven_last_step(accumulation, size, passes, tmp_path):
    more = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": size, "max_steps": 4}
    compare(lambda folder: make_sft(folder, **more), tmp_path, max_tokens_per_pass=ALL)
    assert accumulation in passes


def make_lora(folder: Path, **more: Any) -> Trainer:
    args = SFTConfig(**arguments(folder, **more))
    lora = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear")
    return SFTTrainer(
        tiny_model("llama"), args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer(), peft_config=lora
    )


@pytest.mark.newest
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(checkpointing, passes, tmp_path):
    more = {"gradient_accumulation_steps": 4, "gradient_checkpointing": checkpointing}
    compare(lambda folder: make_lora(folder, **more), tmp_path, max_tokens_per_pass=ALL)
    assert 4 in passes


def test_a_limit_divides_the_step(passes, tmp_path):
    """The gradient of two passes and a half, and of one each, is that of stock."""
    more = {"gradient_accumulation_steps": 5, "per_device_train_batch_size": 1}
    compare(lambda folder: make_sft(folder, **more), tmp_path, max_tokens_per_pass=30)
    assert 1 < max(passes) < 5


def test_by_itself_no_pass_holds_more_than_a_padded_micro_batch(monkeypatch, tmp_path):
    sizes, run = [], padding._run

    def recorded(backbone: Any, stock: Any, kwargs: Any, rest: Any, of: Any, state: Any) -> None:
        sizes.append((sum(each.tokens for each in of.micro_batches), state.worst))
        run(backbone, stock, kwargs, rest, of, state)

    monkeypatch.setattr(padding, "_run", recorded)
    compare(lambda folder: make_sft(folder, gradient_accumulation_steps=4), tmp_path)
    assert sizes
    assert all(tokens <= worst for tokens, worst in sizes)


class Substeps(TrainerCallback):
    """One that a library brought along: a script's own `on_substep_end` may look at gradients, and is left to stock."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("begin")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("substep")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("end")


Substeps.on_substep_end.__module__ = "transformers.somewhere"


def test_callbacks_fire_as_ever(passes, tmp_path):
    callback = Substeps()
    with hf_turbo.session(max_tokens_per_pass=ALL):
        trainer = make_sft(tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=2, max_steps=2)
        trainer.add_callback(callback)
        trainer.train()
    assert callback.events == ["begin", "substep", "substep", "end"] * 2
    assert set(passes) == {3}


class Clamping(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.clamp_(-0.05, 0.05)


def test_weights_that_change_between_micro_batches(passes, tmp_path):
    def make(folder: Path) -> Trainer:
        trainer = make_sft(folder, gradient_accumulation_steps=3)
        trainer.add_callback(Clamping())
        return trainer

    turbo = compare(make, tmp_path, max_tokens_per_pass=ALL)
    assert any("Clamping.on_substep_end may look at gradients" in reason for reason in turbo.reasons)
    assert set(passes) == {1}


@pytest.mark.parametrize("refuses_here", [False, True])
def test_all_processes_share_passes_or_none(refuses_here, passes, monkeypatch, tmp_path):
    """A callback on one rank alone: that rank takes part in the agreement, and the others ask it no more afterwards."""
    asked = []

    class WithAnother:
        """An agreement with a process that refuses where this one does not."""

        def most(self, values: list[int]) -> list[int]:
            asked.append(values)
            return [1]

        def close(self) -> None: ...

    monkeypatch.setattr(deepspeed, "needs_agreement", lambda trainer: True)
    monkeypatch.setattr(agreement, "Agreement", WithAnother)
    trainer = make_sft(tmp_path, gradient_accumulation_steps=4)
    if refuses_here:
        trainer.add_callback(Clamping())
    with hf_turbo.session(report=False, max_tokens_per_pass=ALL) as report:
        trainer.train()
    assert asked == [[refuses_here]]
    (row,) = [row for row in report.rows if row.role == "merging"]
    assert row.patched == 0
    assert ("another process" in row.reason) != refuses_here
    assert set(passes) == {1}


def test_resumed_from_a_checkpoint_of_stock_in_the_middle_of_an_epoch(passes, tmp_path):
    more = {"gradient_accumulation_steps": 3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def make(folder: Path) -> Trainer:
        return make_sft(folder, **more)

    stock = Run(make, tmp_path / "stock")
    perturbed = [Run(make, tmp_path / f"perturbed-{seed}", perturbed=seed) for seed in (1, 2, 3)]
    resume = tmp_path / "stock" / "checkpoint-2"
    turbo = Run(make, tmp_path / "turbo", turbo=True, resume=resume, max_tokens_per_pass=ALL)
    losses = [run.logged("loss", after=2) for run in (stock, turbo, *perturbed)]
    noise = max((loss - losses[0]).abs().max() for loss in losses[2:])
    assert (losses[1] - losses[0]).abs().max() <= 5 * noise + torch.finfo(torch.float32).eps * losses[0].abs().max()
    assert set(passes) <= {3, 1}  # an epoch is four micro-batches
    assert 3 in passes


class Stepwise(SFTTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().training_step(*args, **kwargs)


class Reversing(SFTTrainer):
    """Calls the model with tensors of its own."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        inputs = {
            **inputs,
            "input_ids": inputs["input_ids"].flip(0),
            "attention_mask": inputs["attention_mask"].flip(0),
        }
        return super().compute_loss(model, {**inputs, "labels": inputs["labels"].flip(0)}, **kwargs)


def test_a_training_step_of_the_script_is_left_alone(passes, tmp_path):
    def make(folder: Path) -> Trainer:
        args = SFTConfig(**arguments(folder, gradient_accumulation_steps=4))
        data = Dataset.from_list(ROWS)
        return Stepwise(tiny_model("llama"), args, train_dataset=data, processing_class=tokenizer())

    turbo = compare(make, tmp_path, max_tokens_per_pass=ALL)
    assert "training_step is overridden by Stepwise" in turbo.reasons
    assert set(passes) == {1}


def test_a_training_step_set_on_the_trainer_is_left_alone(passes, tmp_path):
    """It looks at the gradients behind each micro-batch; padding is left out all the same."""
    norms = []

    def make(folder: Path) -> Trainer:
        trainer = make_sft(folder, gradient_accumulation_steps=4)
        stock = trainer.training_step

        def step(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = stock(*args, **kwargs)
            norms.append(trainer.model.model.norm.weight.grad.norm())
            return loss

        trainer.training_step = step
        return trainer

    def probe(trainer: Trainer) -> dict[str, torch.Tensor]:
        assert trainer.training_step.__name__ == "step"
        seen = torch.stack(norms)
        norms.clear()
        return {"norms": seen}

    turbo = compare(make, tmp_path, probe=probe, max_tokens_per_pass=ALL)
    assert any("training_step is overridden by" in reason for reason in turbo.reasons)
    assert passes
    assert set(passes) == {1}


def test_other_tensors_than_foreseen(passes, tmp_path):
    def make(folder: Path) -> Trainer:
        args = SFTConfig(**arguments(folder, gradient_accumulation_steps=4))
        data = Dataset.from_list(ROWS)
        return Reversing(tiny_model("llama"), args, train_dataset=data, processing_class=tokenizer())

    compare(make, tmp_path, padding=True, max_tokens_per_pass=ALL)
    assert set(passes) == {1}


def clamp_gradients(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def normalise_gradients(model: Any) -> None:
    """By a hook that sees the gradient of each micro-batch."""
    layer = model.model.layers[1].mlp
    layer.register_full_backward_hook(lambda module, into, out: tuple(0.01 * each / each.norm() for each in into))


class AtTrainBegin(TrainerCallback):
    def __init__(self, meddle: Any):
        self.meddle = meddle

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.meddle(model)


@pytest.mark.parametrize("meddle", [clamp_gradients, normalise_gradients])
@pytest.mark.parametrize("late", [False, True])
def test_hooks_on_gradients(meddle, late, passes, tmp_path):
    def make(folder: Path) -> Trainer:
        trainer = make_sft(folder, gradient_accumulation_steps=4)
        if late:
            trainer.add_callback(AtTrainBegin(meddle))
        else:
            meddle(trainer.model)
        return trainer

    compare(make, tmp_path, max_tokens_per_pass=ALL)
    assert set(passes) <= {1}


@pytest.mark.parametrize("more", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
def test_rows_packed_by_a_collator(more, passes, tmp_path):
    """What the collator adds about documents differs between micro-batches, and is no reason to leave one out."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": row, "labels": row}
        for row in (torch.randint(3, 90, (5 + 3 * i % 11,), generator=generator).tolist() for i in range(32))
    ]

    def make(folder: Path) -> Trainer:
        args = TrainingArguments(**arguments(folder, gradient_accumulation_steps=2))
        collator = DataCollatorWithFlattening(**more)
        return Trainer(tiny_model("llama"), args, train_dataset=rows, data_collator=collator)

    compare(make, tmp_path, max_tokens_per_pass=ALL)
    assert set(passes) == {2}


def test_a_last_micro_batch_with_other_arguments(monkeypatch, tmp_path):
    """It is computed alone, and those that waited for it go backward at once."""
    claim = micro_batches.Pass.serves
    refused = []

    def serves(self: Any, rest: Any) -> bool:
        if self.is_computed and len(self._handed_out) == len(self.micro_batches) - 1:
            refused.append(self)
            return False
        return claim(self, rest)

    monkeypatch.setattr(micro_batches.Pass, "serves", serves)
    compare(lambda folder: make_sft(folder, gradient_accumulation_steps=3), tmp_path, max_tokens_per_pass=ALL)
    assert refused


class AdaptersInTurn(SFTTrainer):
    """A loss of the script's own that changes the model between micro-batches."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        self.turn = 1 - getattr(self, "turn", 0)
        model.set_adapter(("default", "other")[self.turn])
        return super().compute_loss(model, inputs, **kwargs)


def test_a_loss_of_the_scripts_own_keeps_its_passes(passes, tmp_path):
    def make(folder: Path) -> Trainer:
        args = SFTConfig(**arguments(folder, gradient_accumulation_steps=2))
        lora = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear")
        model = get_peft_model(tiny_model("llama"), lora)
        model.add_adapter("other", lora)
        data = Dataset.from_list(ROWS)
        return AdaptersInTurn(model, args, train_dataset=data, processing_class=tokenizer())

    compare(make, tmp_path, padding=True, max_tokens_per_pass=ALL)
    assert set(passes) == {1}


def test_memory_that_runs_out_in_a_shared_pass(passes, monkeypatch, tmp_path):
    """The pass is done again in smaller ones; the numbers are those of stock."""
    failures, run = [], padding._run

    def failing(backbone: Any, stock: Any, kwargs: Any, rest: Any, of: Any, state: Any) -> None:
        run(backbone, stock, kwargs, rest, of, state)
        if len(of.micro_batches) > 1 and len(failures) < 2:
            failures.append(len(of.micro_batches))
            of.computed(None, {})
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(padding, "_run", failing)
    compare(lambda folder: make_sft(folder, gradient_accumulation_steps=4), tmp_path, max_tokens_per_pass=ALL)
    assert failures == [4, 4]
    assert passes[:5] == [4, 1, 1, 1, 1]


def test_rows_of_equal_length_share_passes_too(passes, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (16, 12)).tolist()]

    def make(folder: Path) -> Trainer:
        args = TrainingArguments(**arguments(folder, gradient_accumulation_steps=4))
        return Trainer(tiny_model("qwen3"), args, train_dataset=rows)

    compare(make, tmp_path, max_tokens_per_pass=ALL)
    assert set(passes) == {4}


def test_the_report_counts_passes(tmp_path):
    with hf_turbo.session(max_tokens_per_pass=ALL):
        make_sft(tmp_path, gradient_accumulation_steps=4, max_steps=2).train()
    (note,) = [note for note in hf_turbo.report().notes if note.startswith("padding: ")]
    assert note.endswith("in 2 passes instead of 8")


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_switched_off_in_the_middle_of_a_step(reentrant, tmp_path):
    """The micro-batches that are left are computed by stock; what those before have come to is not lost."""

    class Off(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                hf_turbo.disable()

    Off.on_substep_end.__module__ = "transformers.somewhere"
    more = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}

    def make(folder: Path) -> Trainer:
        trainer = make_sft(
            folder, gradient_accumulation_steps=3, max_steps=3, gradient_checkpointing=reentrant is not None, **more
        )
        trainer.add_callback(Off())
        return trainer

    compare(make, tmp_path, max_tokens_per_pass=ALL)
    with hf_turbo.session():
        assert is_live()
    assert not is_live()
