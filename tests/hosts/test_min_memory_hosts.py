"""`memory="min_memory"` in trainers whose scripts do not checkpoint: trained as stock, by all that saves memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from hf_turbo.kernels import tiled_mlp
from hf_turbo.patches import checkpointing
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_turbo.policies import tiling as policy
from tests.models import tiny_model
from tests.patches.late_copies import LateCopies
from tests.training import arguments, compare, padded_rows, prompts_and_completions, tokenizer

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("on_cpu")]


def sft(folder: Path) -> Trainer:
    return SFTTrainer(
        tiny_model("llama"),
        SFTConfig(**arguments(folder, max_length=32, gradient_accumulation_steps=2)),
        train_dataset=prompts_and_completions(0, 16),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )


def full(folder: Path) -> Trainer:
    settings = TrainingArguments(**arguments(folder, gradient_accumulation_steps=2))
    return Trainer(tiny_model("phi3"), settings, train_dataset=padded_rows(0, 16))


@pytest.mark.parametrize("make", [sft, full])
def test_trains_as_stock(tmp_path, make, monkeypatch):
    copies, tiles = LateCopies(), []
    monkeypatch.setitem(checkpointing.COPIES, "cpu", lambda device: copies)
    monkeypatch.setattr(checkpointing, "MIN_BYTES", 0)
    for name, value in {"LEAST_ROWS": 8, "MOST_ROWS": 8, "_MULTIPLE": 8}.items():
        monkeypatch.setattr(policy, name, value)
    cls = tiled_mlp._Dense if make is full else tiled_mlp._WithAdapters
    stock_hidden = cls.hidden

    def hidden(self: Any, x: Any, *rest: Any) -> Any:
        tiles.append(len(x))
        return stock_hidden(self, x, *rest)

    monkeypatch.setattr(cls, "hidden", hidden)

    turbo = compare(make, tmp_path, memory="min_memory")
    assert turbo.patched["offload"] == turbo.patched["checkpointing"] == 2
    assert turbo.patched["memory"] == 0
    assert any("min_memory" in reason for reason in turbo.reasons)
    assert max(tiles) == 8
    assert len(tiles) > 20
    gc.collect()
    copies.settle()
