"""Batches fetched while the device computes: the same ones, in the same order, with the same random numbers.

On a CPU it is only done where it is asked for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import hf_turbo
from tests.models import switched_off, tiny_model
from tests.training import padded_rows, tokenizer

pytestmark = pytest.mark.newest


class Drawing:
    """A collator that passes for one of transformers, and draws a random number from its sixth batch on."""

    __module__ = "transformers.fake"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: list[Any]) -> Any:
        self.calls += 1
        batch = default_data_collator(rows)
        if self.calls > 5:
            batch["labels"] = torch.where(torch.rand(batch["labels"].shape) < 0.5, batch["labels"], -100)
        return batch


class Masking(DataCollatorForLanguageModeling):
    """As transformers' own, which masks other tokens each time."""

    __module__ = DataCollatorForLanguageModeling.__module__


class Switch(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            hf_turbo.disable()


def train(
    tmp_path: Any, collator: Any, turbo: bool, callbacks: Any = (), dropout: float = 0.1, **arguments: Any
) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
    rows = [{name: tensor.tolist() for name, tensor in row.items()} for row in padded_rows(0, 22)]
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        **{"num_train_epochs": 2, **arguments},
    )
    seen: list[Any] = []

    class Noting(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((inputs["input_ids"].clone(), inputs["labels"].clone()))
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Noting(
        tiny_model("llama", attention_dropout=dropout, attn_implementation="eager"),
        args,
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
        callbacks=list(callbacks),
    )
    with hf_turbo.session(**{**switched_off("host"), "host": turbo}) as report:
        trainer.train()
        notes = [note for note in report.notes if note.startswith("data:")]
    return (seen, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]), notes


def assert_same(found: Any, expected: Any) -> None:
    assert found[1] == expected[1]
    assert len(found[0]) == len(expected[0])
    for one, other in zip(found[0], expected[0], strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("arguments", "early"),
    # 11 batches an epoch, the first of which, and the two of which are watched, are not early.
    [({}, 16), ({"gradient_accumulation_steps": 3}, 14), ({"max_steps": 6}, 2)],
    ids=["epochs", "accumulation", "few steps"],
)
def test_the_same_batches(tmp_path, arguments, early):
    expected, none = train(tmp_path, default_data_collator, False, **arguments)
    found, notes = train(tmp_path, default_data_collator, True, **arguments)
    assert_same(found, expected)
    assert none == []
    assert len(notes) == 1
    assert "were fetched while the device computed" in notes[0]
    assert int(notes[0].split()[1]) >= early, notes


def test_batches_that_draw_random_numbers_are_not_early(tmp_path):
    words = tokenizer()
    words.mask_token = "w3"
    collator = Masking(words, mlm=True, mlm_probability=0.3)
    expected, _ = train(tmp_path, collator, False)
    found, notes = train(tmp_path, collator, True)
    assert_same(found, expected)
    assert notes == ["data: batches are fetched between steps: fetching them draws random numbers"]


def test_random_numbers_that_come_late_are_those_of_stock(tmp_path):
    """A step that draws none of the CPU's itself, as on a GPU: without dropout."""
    arguments = {"max_steps": 14, "dropout": 0.0}
    expected, _ = train(tmp_path, Drawing(), False, **arguments)
    collator = Drawing()
    found, notes = train(tmp_path, collator, True, **arguments)
    assert collator.calls > 5
    assert_same(found, expected)
    assert len(notes) == 1
    assert notes[0].endswith("and then no more: fetching them draws random numbers")


def test_switched_off_in_mid_training(tmp_path):
    """What was fetched early is not lost."""
    expected, _ = train(tmp_path, default_data_collator, False)
    found, _ = train(tmp_path, default_data_collator, True, callbacks=[Switch()])
    assert_same(found, expected)


def test_datasets_and_collators_of_the_script(tmp_path):
    _, notes = train(tmp_path, lambda rows: default_data_collator(rows), True)
    assert notes == ["data: batches are fetched between steps: <lambda> is a collator of the script's own"]
