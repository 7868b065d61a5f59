"""Whole trainings without padding, `padding=True`: the logs and weights of stock, and what the report says of it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_turbo.patches import padding, varlen
from peft import LoraConfig
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import hf_turbo
from tests.models import tiny_model
from tests.training import arguments, compare, distinct_words, tokenizer, words

# Dialogues of three to twenty words, as uneven as real ones.
ROWS = [{"prompt": words(i, 3 + 5 * i % 11), "completion": " " + words(i + 3, 2 + 7 * i % 9)} for i in range(16)]
PAIRS = [
    {"prompt": words(i, 3 + 5 * i % 11), "chosen": " " + words(i, 2 + 7 * i % 9), "rejected": " " + words(i + 1, 3)}
    for i in range(16)
]


pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def passes(monkeypatch) -> list[list[tuple[int, int]]]:
    """Tokens of each micro-batch of each pass, and those of stock."""
    seen, run = [], padding._run

    def recorded(backbone: Any, stock: Any, kwargs: Any, rest: Any, of: Any, state: Any) -> None:
        seen.append([(each.tokens, each.rows * each.columns) for each in of.micro_batches])
        run(backbone, stock, kwargs, rest, of, state)

    monkeypatch.setattr(padding, "_run", recorded)
    return seen


def make_sft(folder: Path, **more: Any) -> Trainer:
    args = SFTConfig(**arguments(folder, **more))
    return SFTTrainer(tiny_model("llama"), args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer())


def make_dpo(folder: Path, **more: Any) -> Trainer:
    args = DPOConfig(**arguments(folder, **more))
    data = Dataset.from_list(PAIRS)
    return DPOTrainer(tiny_model("llama"), tiny_model("llama"), args, train_dataset=data, processing_class=tokenizer())


def make_kto(folder: Path, **more: Any) -> Trainer:
    args = KTOConfig(**arguments(folder, **more))
    data = Dataset.from_list([{**row, "label": i % 2 == 0} for i, row in enumerate(ROWS)])
    return KTOTrainer(tiny_model("qwen3"), tiny_model("qwen3"), args, train_dataset=data, processing_class=tokenizer())


def make_reward(folder: Path, **more: Any) -> Trainer:
    torch.manual_seed(0)
    config = tiny_model("llama").config
    config.num_labels = 1
    args = RewardConfig(**arguments(folder, **more))
    model = LlamaForSequenceClassification(config).train()
    return RewardTrainer(model, args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer())


def make_plain(folder: Path, left: bool = False, **more: Any) -> Trainer:
    words_of = tokenizer()
    words_of.padding_side = "left" if left else "right"
    examples = []
    for row in ROWS:
        ids = words_of(row["prompt"] + row["completion"])["input_ids"]
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]})
    collator = DataCollatorForSeq2Seq(words_of)
    args = TrainingArguments(**arguments(folder, **more))
    return Trainer(tiny_model("llama"), args, train_dataset=examples, data_collator=collator)


def rollouts(folder: Path, cls: type, config: type, **more: Any) -> Trainer:
    args = config(**arguments(folder, max_completion_length=5, num_generations=4, beta=0.1, use_vllm=False, **more))
    model = tiny_model("llama")
    model.save_pretrained(folder / "base")
    model.config._name_or_path = str(folder / "base")  # from where the reference model is loaded
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    return cls(model, distinct_words, args, train_dataset=data, processing_class=tokenizer())


def make_grpo(folder: Path, **more: Any) -> Trainer:
    return rollouts(folder, GRPOTrainer, GRPOConfig, **more)


def make_rloo(folder: Path, **more: Any) -> Trainer:
    return rollouts(folder, RLOOTrainer, RLOOConfig, **more)


@pytest.fixture
def without_gradients(monkeypatch) -> list[bool]:
    """Of each call without gradients, whether its padding was left out."""
    seen, stock = [], padding._without_gradients

    def noted(*args: Any) -> Any:
        output = stock(*args)
        seen.append(output is not None)
        return output

    monkeypatch.setattr(padding, "_without_gradients", noted)
    return seen


def make_adapted_dpo(folder: Path, **more: Any) -> Trainer:
    args = DPOConfig(**arguments(folder, **more))
    lora = LoraConfig(r=4, target_modules="all-linear")
    data = Dataset.from_list(PAIRS)
    return DPOTrainer(
        tiny_model("llama"), None, args, train_dataset=data, processing_class=tokenizer(), peft_config=lora
    )


def test_calls_without_gradients_in_a_loss_of_ones_own_stay_stock(without_gradients, tmp_path):
    """It may use what is computed of padding."""

    class Held(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                held = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.mean()
            return super().compute_loss(model, inputs, **kwargs) * (1 + held)

    def make(folder: Path) -> Trainer:
        args, data = DPOConfig(**arguments(folder)), Dataset.from_list(PAIRS)
        model, reference = tiny_model("llama"), tiny_model("llama")
        return Held(model, reference, args, train_dataset=data, processing_class=tokenizer())

    compare(make, tmp_path, padding=True)
    assert without_gradients
    assert not any(without_gradients)


def test_other_calls_without_gradients_stay_stock(without_gradients, tmp_path):
    """A callback may look at anything, evaluation too."""

    class Looking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            batch = tokenizer()([ROWS[0]["prompt"], ROWS[1]["completion"]], padding=True, return_tensors="pt")
            with torch.no_grad():
                model(**batch)

    trainer = make_adapted_dpo(tmp_path)
    trainer.add_callback(Looking())
    with hf_turbo.session(report=False):
        trainer.train()
        during = len(without_gradients)
        trainer.evaluate(trainer.train_dataset)
    steps = trainer.state.global_step
    assert without_gradients.count(True) <= steps
    assert without_gradients.count(False) >= steps
    assert not any(without_gradients[during:])


class Looking(TrainerCallback):
    """What a model in training says of padding, and its logits, after the first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.seen = look(model)


def look(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    rows = tokenizer()([ROWS[0]["prompt"], ROWS[1]["completion"]], padding=True, return_tensors="pt")
    outputs = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=rows["input_ids"])
    inner = model.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])
    assert type(outputs.logits) is torch.Tensor
    return {"logits": outputs.logits, "hidden": inner.last_hidden_state}


def test_outside_of_the_step_that_was_judged_all_is_stock(passes, tmp_path):
    """A callback and a loop behind `train()` may look at padding and at logits, and nobody has judged them."""
    callback = Looking()

    def make(folder: Path) -> Trainer:
        trainer = make_plain(folder)
        trainer.add_callback(callback)
        return trainer

    def probe(trainer: Trainer) -> dict[str, torch.Tensor]:
        behind = look(trainer.model)
        return {**{f"callback's {name}": value for name, value in callback.seen.items()}, **behind}

    turbo = compare(make, tmp_path, probe=probe)
    assert turbo.patched["padding"] == turbo.patched["loss"] == 1
    assert len(passes) == len(turbo.logged("loss"))


class Training(TrainerCallback):
    """Trains the same model by another trainer for a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            other = make_plain(Path(args.output_dir) / "other", max_steps=1)
            other.model = other.model_wrapped = model
            other.train()


class PooledLoss(Trainer):
    """A loss against a target that padding is part of, where no gradient comes to it."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        outputs = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        hidden = outputs.last_hidden_state
        return (hidden[:, 0] - hidden.detach().mean(1)).square().mean()


def test_another_trainer_of_the_same_model_judges_for_itself(passes, tmp_path):
    def make(folder: Path) -> Trainer:
        trainer = make_plain(folder, max_steps=4)
        trainer.__class__ = PooledLoss
        trainer.add_callback(Training())
        return trainer

    compare(make, tmp_path)
    assert len(passes) == 1  # the other's step


WITH_REFERENCE = [make_dpo, make_adapted_dpo, make_kto, make_grpo, make_rloo]


TRAINERS = [make_sft, make_reward, make_plain, *WITH_REFERENCE]
IN_SHORT = [(make, True, 3, 0.1) for make in TRAINERS]
LONG = [(make, False, 100, 0.02) for make in (make_sft, make_reward, make_plain, make_adapted_dpo)]


@pytest.mark.parametrize(
    ("make", "checkpointing", "steps", "rate"),
    [*IN_SHORT, *(pytest.param(*case, marks=pytest.mark.newest) for case in LONG)],
)
def test_trainers(make, checkpointing, steps, rate, passes, without_gradients, tmp_path):
    """Log-probabilities of a reference model, or of the policy without its adapter, go without padding, too."""
    more = {"gradient_checkpointing": checkpointing, "max_steps": steps, "learning_rate": rate}
    turbo = compare(lambda folder: make(folder, **more), tmp_path, padding=True)
    assert turbo.patched["padding"] >= 1
    assert passes
    assert all(tokens < stock for micro_batches in passes for tokens, stock in micro_batches)
    assert any(without_gradients) == (make in WITH_REFERENCE)


@pytest.mark.parametrize("accumulation", [3, 16])
def test_accumulation_with_an_uneven_last_batch(accumulation, passes, tmp_path):
    more = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 3, "max_steps": 3}
    compare(lambda folder: make_sft(folder, **more), tmp_path, padding=True)
    assert passes


@pytest.mark.parametrize("more", [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}])
def test_packing_of_trl(more, monkeypatch, tmp_path):
    documents, attend = [], varlen.varlen_attention

    def recorded(query: Any, key: Any, value: Any, lengths: list[int], **kwargs: Any) -> Any:
        documents.append(lengths)
        return attend(query, key, value, lengths, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attention", recorded)
    compare(lambda folder: make_sft(folder, per_device_train_batch_size=2, **more), tmp_path, padding=True)
    assert documents
    assert all(len(lengths) > 1 for lengths in documents)


def test_left_padding(passes, tmp_path):
    compare(lambda folder: make_plain(folder, left=True), tmp_path, padding=True)
    assert passes


def test_labels_on_padding_stay_stock(passes, tmp_path):
    """A collator that puts labels where the mask has none: stock trains on them, and so must we."""

    def make(folder: Path) -> Trainer:
        trainer = make_plain(folder, max_steps=20)  # the losses of two steps can be the same bits in all runs but one
        collator = trainer.data_collator

        def labelled(features: Any) -> Any:
            batch = collator(features)
            batch["labels"][batch["attention_mask"] == 0] = 5
            return batch

        trainer.data_collator = labelled
        return trainer

    compare(make, tmp_path, padding=True)
    # Where four rows are a token longer or shorter, what is on padding is what the last tokens predict.
    assert all(stock - tokens <= 4 for each in passes for tokens, stock in each)
    assert len(passes) < 20 // 4


class OverAllTokens(Trainer):
    """A loss that padding is part of."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        return model(**inputs).logits.float().square().mean()


class Pooled(LlamaForCausalLM):
    """A head that padding is part of."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return {"loss": hidden.mean(1).square().mean()}


def over_all_tokens(folder: Path, how: str) -> Trainer:
    trainer, loss = make_plain(folder), lambda outputs, *_, **__: outputs["logits"].float().square().mean()
    if how == "compute_loss":
        trainer.__class__ = OverAllTokens
    elif how == "compute_loss_func":
        trainer.compute_loss_func = loss
    elif how == "loss_function":
        trainer.model.loss_function = lambda logits, *_, **__: logits.float().square().mean()
    else:
        trainer.model.__class__ = Pooled
    return trainer


@pytest.mark.parametrize("how", ["compute_loss", "compute_loss_func", "loss_function", "model"])
def test_losses_that_padding_may_be_part_of(how, passes, tmp_path):
    turbo = compare(lambda folder: over_all_tokens(folder, how), tmp_path)
    assert any("may use what is computed of padding" in reason for reason in turbo.reasons)
    assert passes == []


def test_the_report_says_what_was_left_out(passes, tmp_path):
    with hf_turbo.session(padding=True):
        make_sft(tmp_path).train()
    tokens, stock = (sum(column) for column in zip(*itertools.chain(*passes), strict=True))
    notes = json.loads((tmp_path / "hf_turbo_report.json").read_text())["notes"]
    assert notes == hf_turbo.report().notes
    (note,) = [note for note in notes if note.startswith("padding: ")]
    assert [int(each.replace(",", "")) for each in re.findall(r"[\d,]+(?= tokens|  *\()", note)] == [tokens, stock]
    assert f"{1 - tokens / stock:.0%}" in note


@pytest.mark.newest
def test_a_hundred_steps_of_shared_passes(tmp_path):
    more = {"max_steps": 100, "learning_rate": 0.02, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    options = {"padding": True, "max_tokens_per_pass": 1 << 20}
    losses = compare(lambda folder: make_sft(folder, **more), tmp_path, factor=3, **options).logged("loss")
    assert len(losses) == 100
    assert losses[-10:].mean() < losses[:10].mean()
