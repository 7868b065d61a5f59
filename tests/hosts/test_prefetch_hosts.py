"""Batches fetched while the device computes: the same ones, in the same order, with the same random numbers.

On a CPU it is only done where it is asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils import data
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import hf_turbo
from tests.hosts.test_padding_hosts import make_adapted_dpo, make_grpo, make_sft
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


def table() -> Dataset:
    return Dataset.from_list([{name: tensor.tolist() for name, tensor in row.items()} for row in padded_rows(0, 22)])


class Steered(TrainerCallback):
    """A sampler, a batch sampler or a dataset that a callback steers."""

    def __init__(self) -> None:
        self.shift = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shift = 5 * state.global_step


class SteeredSampler(Steered, data.Sampler):
    def __iter__(self) -> Iterator[int]:
        return ((i + self.shift) % 22 for i in range(22))

    def __len__(self) -> int:
        return 22


class SteeredRows(Steered, data.Dataset):
    def __init__(self) -> None:
        super().__init__()
        self.rows = padded_rows(0, 22)

    def __getitem__(self, i: int) -> Any:
        return self.rows[(i + self.shift) % 22]

    def __len__(self) -> int:
        return 22


def train(
    tmp_path: Any,
    collator: Any,
    turbo: bool,
    callbacks: Any = (),
    dropout: float = 0.1,
    dataset: Any = None,
    sampler: Any = None,
    **arguments: Any,
) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
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
        def _get_train_sampler(self, *args: Any) -> Any:
            return super()._get_train_sampler(*args) if sampler is None else sampler

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((inputs["input_ids"].clone(), inputs["labels"].clone()))
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Noting(
        tiny_model("llama", attention_dropout=dropout, attn_implementation="eager"),
        args,
        train_dataset=table() if dataset is None else dataset,
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


@pytest.mark.parametrize("kind", ["sampler", "Subset", "ConcatDataset", "StackDataset"])
def test_what_a_callback_may_steer(tmp_path, kind):
    """However deep it lies in what is torch's."""

    def run(turbo: bool) -> tuple[Any, list[str]]:
        steered = SteeredSampler() if kind == "sampler" else SteeredRows()
        wrapped = {
            "sampler": lambda: {"sampler": steered},
            "Subset": lambda: {"dataset": data.Subset(data.Subset(steered, range(22)), range(20))},
            "ConcatDataset": lambda: {"dataset": data.ConcatDataset([table().with_format("torch"), steered])},
            "StackDataset": lambda: {"dataset": data.StackDataset(table().with_format("torch"), steered)},
        }[kind]()
        collator = stacked if kind == "StackDataset" else default_data_collator
        return train(tmp_path, collator, turbo, callbacks=[steered], **wrapped)

    expected, _ = run(False)
    found, notes = run(True)
    assert_same(found, expected)
    what = "SteeredSampler is a sampler" if kind == "sampler" else "SteeredRows is a dataset"
    assert notes == [f"data: batches are fetched between steps: {what} of the script's own"]


def stacked(rows: list[Any]) -> Any:
    return default_data_collator([row[1] for row in rows])


def test_datasets_of_torch(tmp_path):
    """Of tables: known all the way down."""
    dataset = data.ConcatDataset([data.Subset(table(), range(10)), table()])
    expected, _ = train(tmp_path, default_data_collator, False, dataset=dataset)
    found, notes = train(tmp_path, default_data_collator, True, dataset=dataset)
    assert_same(found, expected)
    assert "were fetched while the device computed" in notes[0]


@pytest.mark.parametrize("make", [make_sft, make_adapted_dpo, make_grpo])
def test_trainers_of_trl(tmp_path, make):
    trainer = make(tmp_path, max_steps=8)
    with hf_turbo.session(**{**switched_off("host"), "host": True}) as report:
        trainer.train()
    (note,) = [note for note in report.notes if note.startswith("data:")]
    assert note.endswith("batches were fetched while the device computed")


def test_a_thread_of_the_script(tmp_path):
    """Has batches of its own, in their order, and changes nothing of the training's."""
    _, alone = train(tmp_path, default_data_collator, True)
    orders: list[list[int]] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            orders.append([])
            for (each,) in data.DataLoader(data.TensorDataset(torch.arange(50)), generator=torch.Generator()):
                orders[-1].append(each.item())
                time.sleep(1e-4)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        _, notes = train(tmp_path, default_data_collator, True)
    finally:
        over.set()
        thread.join()
    assert all(order == list(range(50)) for order in orders)
    assert notes == alone
