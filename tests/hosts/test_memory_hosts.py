"""Checkpointing that a script asks for, where memory is free: the same bits, step by step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import hf_turbo
from hf_turbo.policies import memory
from tests.hosts.test_padding_hosts import PAIRS, ROWS
from tests.models import tiny_model
from tests.training import arguments, tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")


def make_sft(folder: Path, adapted: bool = True) -> Any:
    args = SFTConfig(**arguments(folder, max_steps=8, gradient_accumulation_steps=2, gradient_checkpointing=True))
    peft = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if adapted else None
    data = Dataset.from_list(ROWS)
    model = tiny_model("llama", attention_dropout=0.1)
    return SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer(), peft_config=peft)


def make_full(folder: Path) -> Any:
    return make_sft(folder, adapted=False)


def make_dpo(folder: Path) -> Any:
    args = DPOConfig(**arguments(folder, max_steps=6, gradient_checkpointing=True))
    peft = LoraConfig(r=4, target_modules="all-linear")
    data = Dataset.from_list(PAIRS)
    return DPOTrainer(
        tiny_model("llama"), args=args, train_dataset=data, processing_class=tokenizer(), peft_config=peft
    )


def run(make: Any, folder: Path, **options: Any) -> tuple[list[Any], list[torch.Tensor], dict[str, Any]]:
    """Logged losses and gradient norms, final weights, and the report."""
    trainer = make(folder)
    with hf_turbo.session(**options):
        trainer.train()
    logs = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    report = json.loads((folder / "hf_turbo_report.json").read_text())
    return logs, [each.detach().clone() for each in trainer.model.parameters()], report


@pytest.mark.parametrize("make", [make_sft, make_full, make_dpo])
def test_the_bits_of_recomputation(tmp_path, make):
    logs, weights, report = run(make, tmp_path / "auto")
    other_logs, other_weights, as_is = run(make, tmp_path / "as_is", memory="as_is")
    assert logs == other_logs
    assert all(map(torch.equal, weights, other_weights))
    (row,) = [row for row in report["rows"] if row["role"] == "memory" and row["patched"]]
    assert (row["patched"], row["exactness"], row["reason"]) == (2, "exact", "")
    assert any("needed no recomputation" in note for note in report["notes"])
    assert not any("recomputation" in note for note in as_is["notes"])
    assert {row["reason"] for row in as_is["rows"] if row["role"] == "memory"} == {"memory='as_is'"}


@pytest.mark.newest
def test_no_memory_is_held_on_to(tmp_path, monkeypatch):
    """Of the layers kept, over steps of varying lengths."""
    import gc

    counts: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gc.collect()
            counts.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))

    trainer = make_sft(tmp_path)
    trainer.add_callback(Count())
    with hf_turbo.session():
        trainer.train()
    assert len(counts) > 4
    assert max(counts[3:]) <= counts[2]


@pytest.mark.newest
def test_the_bits_of_recomputation_without_attention(tmp_path, monkeypatch):
    """Of preference pairs in passes without padding, one layer kept whole and one without its attention."""
    logs, weights, _ = run(make_dpo, tmp_path / "as_is", memory="as_is")
    monkeypatch.setattr(memory, "what_to_keep", lambda layers, room, before: (1, (0,)))
    other_logs, other_weights, report = run(make_dpo, tmp_path / "auto")
    assert logs == other_logs
    assert all(map(torch.equal, weights, other_weights))
    (note,) = [note for note in report["notes"] if note.startswith("memory:")]
    assert re.fullmatch(r"memory: (\d+)% of the .* needed no recomputation, \1% none of attention", note)
