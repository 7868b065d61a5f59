"""Trainers that checkpoint, stock and with layer inputs in host memory: the same bits in every log and weight.

CPU tensors stand for those of a device, and copies happen as late as they may (tests/patches/late_copies.py).
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_turbo.patches import checkpointing, waiting
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import hf_turbo
from tests.models import switched_off, tiny_model
from tests.patches.late_copies import LateCopies
from tests.training import (
    PREFERENCES,
    PROMPTS,
    arguments,
    distinct_words,
    padded_rows,
    prompts_and_completions,
    tokenizer,
)

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("on_cpu")]

LAYERS = 4
OFFLOAD = {**switched_off(), "offload": True}


@pytest.fixture
def copies(monkeypatch):
    copies = LateCopies()
    monkeypatch.setitem(checkpointing.COPIES, "cpu", lambda device: copies)
    monkeypatch.setattr(checkpointing, "MIN_BYTES", 0)
    yield copies
    gc.collect()
    copies.settle()


def model(**changes: Any) -> Any:
    return tiny_model("llama", num_hidden_layers=LAYERS, **changes)


LORA = {"target_modules": "all-linear", "r": 4, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}


def plain(folder: Path, **more: Any) -> Trainer:
    settings = arguments(folder, **{"gradient_checkpointing": True, "gradient_accumulation_steps": 2, **more})
    return Trainer(
        model(attention_dropout=0.1),
        TrainingArguments(**settings),
        train_dataset=padded_rows(0, 16),
        eval_dataset=padded_rows(16, 4),
    )


def sft(folder: Path, lora: bool = True, **more: Any) -> Trainer:
    return SFTTrainer(
        model(),
        SFTConfig(**arguments(folder, **{"gradient_checkpointing": True, "max_length": 32, **more})),
        train_dataset=prompts_and_completions(0, 16),
        eval_dataset=prompts_and_completions(16, 4),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def dpo(folder: Path, lora: bool = False, **more: Any) -> Trainer:
    return DPOTrainer(
        model(),
        ref_model=None if lora else model(seed=1),
        args=DPOConfig(**arguments(folder, **{"gradient_checkpointing": True, "max_length": 32, **more})),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def grpo(folder: Path) -> Trainer:
    settings = arguments(folder, gradient_checkpointing=True)
    return GRPOTrainer(
        model(),
        distinct_words,
        args=GRPOConfig(**settings, num_generations=4, max_completion_length=6, num_iterations=2, beta=0.1),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA),
    )


def train(make: Any, folder: Path, callback: Any = None, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Logs without timings, and weights."""
    set_seed(0)
    trainer = make(folder)
    if callback is not None:
        trainer.add_callback(callback)
    set_seed(0)
    if options:
        with hf_turbo.session(**options) as report:
            trainer.train()
        rows = [row for row in report.rows if row.role == "offload"]
        assert [(row.found, row.exactness) for row in rows] == [(LAYERS, "exact")]
        assert rows[0].patched == (LAYERS if options["offload"] else 0)
    else:
        trainer.train()
    timings = ("runtime", "per_second", "turbo/", "step_time", "profiling")
    logs = [{k: v for k, v in log.items() if not any(t in k for t in timings)} for log in trainer.state.log_history]
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


KINDS = {
    "trainer": plain,
    "trainer-reentrant": lambda folder: plain(folder, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "trainer-eval": lambda folder: plain(folder, eval_strategy="steps", eval_steps=1, max_steps=3),
    "trainer-every-second-layer": lambda folder: plain(folder, gradient_checkpointing_kwargs={"every_n_layers": 2}),
    "sft": lambda folder: sft(folder, lora=False, gradient_accumulation_steps=2),
    "sft-lora": sft,
    "sft-lora-reentrant": lambda folder: sft(folder, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "dpo": dpo,
    "dpo-lora": lambda folder: dpo(folder, lora=True),
    "grpo": grpo,
}


@pytest.mark.parametrize("kind", KINDS)
def test_logs_and_weights_are_those_of_stock(copies, kind, tmp_path):
    stock = train(KINDS[kind], tmp_path / "stock")
    assert copies.log == []
    ours = train(KINDS[kind], tmp_path / "offload", **OFFLOAD)
    assert sum(entry.startswith("back") for entry in copies.log) >= (0 if kind == "trainer-every-second-layer" else 2)
    assert ours[0] == stock[0]
    assert ours[1].keys() == stock[1].keys()
    for name, weight in stock[1].items():
        assert torch.equal(ours[1][name], weight), name


def test_beside_all_other_features(copies, tmp_path):
    """Their kernels are run again by recomputation, from what the host gave back."""
    runs = [train(sft, tmp_path / str(choice), offload=choice, report=False) for choice in (False, True)]
    assert any(entry.startswith("back") for entry in copies.log)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[1][1][name], weight) for name, weight in runs[0][1].items())


def test_disabled_in_mid_training(copies, tmp_path):
    class Disable(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.copied = len(copies.log)
            hf_turbo.disable()

    stock = train(plain, tmp_path / "stock")
    disable = Disable()
    set_seed(0)
    ours = train(plain, tmp_path / "offload", disable, **OFFLOAD)
    assert len(copies.log) == disable.copied > 0
    assert ours[0] == stock[0]
    assert all(torch.equal(ours[1][name], weight) for name, weight in stock[1].items())


def test_host_memory_is_freed_after_training(copies, tmp_path):
    trainer = plain(tmp_path)
    with hf_turbo.session(**OFFLOAD):
        trainer.train()
        store = checkpointing._STORES[trainer.model.model.layers[0]]
        gc.collect()
        assert store.bytes == 0
        trainer.train()


def with_activation_offloading(folder: Path) -> Trainer:
    trainer = sft(folder)
    trainer.args.activation_offloading = True  # as an argument it needs an accelerator
    return trainer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_activation_offloading, "TRL offloads by itself"),
        (
            lambda folder: plain(folder, gradient_checkpointing_kwargs={"offload": True}),
            "transformers offloads by itself",
        ),
        (lambda folder: sft(folder, gradient_checkpointing_kwargs={"selective": True}), "selective checkpointing"),
    ],
)
@pytest.mark.parametrize("choice", ["auto", True])
def test_other_ways_of_a_trainer_stay_stock_with_a_reason(copies, make, reason, choice, tmp_path, monkeypatch):
    trainer = make(tmp_path)
    # Training itself may need a GPU for these.
    monkeypatch.setattr(type(trainer), "_inner_training_loop", lambda *_, **__: None)
    layer = type(checkpointing.layers_of(trainer.model).popitem()[1])
    with hf_turbo.session(**{**OFFLOAD, "offload": choice}) as report:
        if choice is True:
            with pytest.raises(RuntimeError, match=f"offload=True was asked for but cannot be had.*{reason}"):
                trainer.train()
        else:
            trainer.train()
            row = next(row for row in report.rows if row.role == "offload")
            assert (row.patched, row.found) == (0, LAYERS)
            assert reason in row.reason
        assert type(checkpointing.layers_of(trainer.model).popitem()[1]) is layer


def test_auto_keeps_them_where_the_speed_of_the_device_is_unknown(copies, tmp_path):
    trainer = plain(tmp_path)
    with hf_turbo.session(report=False) as report:
        trainer.train()
    row = next(row for row in report.rows if row.role == "offload")
    assert row.patched == 0
    assert "the speed of this device is unknown" in row.reason
    assert copies.log == []


def test_on_a_cpu_there_is_nothing_to_offload(tmp_path):
    trainer = plain(tmp_path)
    with hf_turbo.session(report=False) as report:
        trainer.train()
    assert "offload" not in {row.role for row in report.rows}
    with (
        hf_turbo.session(**OFFLOAD),
        pytest.raises(RuntimeError, match="nothing to offload from: training on cpu"),
    ):
        trainer.train()


def test_a_plain_loop_with_accelerate(copies):
    """Checkpointing may come after `prepare`."""
    from accelerate import Accelerator

    def losses() -> list[float]:
        set_seed(0)
        net = model()
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer = accelerator.prepare(net, optimizer)
        enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
        enable()
        result = []
        for _ in range(3):
            ids = torch.randint(3, 90, (2, 9))
            loss = net(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            result.append(loss.item())
        return result

    stock = losses()
    with hf_turbo.session(**OFFLOAD) as report:
        assert losses() == stock
    row = next(row for row in report.rows if row.role == "offload")
    assert (row.patched, row.reason) == (0, f"{LAYERS} x acts once gradient checkpointing is on")
    assert "back 0" in copies.log


# ------------------------------------------------------------------------------------------- without checkpointing


def not_checkpointed(folder: Path, family: str = "llama", **more: Any) -> Trainer:
    settings = arguments(folder, **{"gradient_accumulation_steps": 2, **more})
    trained = tiny_model(family, num_hidden_layers=LAYERS)
    return Trainer(trained, TrainingArguments(**settings), train_dataset=padded_rows(0, 16))


WITH_MLP = {name: off for name, off in switched_off().items() if name != "offload"} | {"mlp": True}


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_products_of_mlps_wait(copies, family, tmp_path):
    """The same bits as with the same patches and nothing on the host."""
    make = lambda folder: not_checkpointed(folder, family)  # noqa: E731
    kept = train(make, tmp_path / "kept", **WITH_MLP, offload=False)
    assert copies.log == []
    waited = train(make, tmp_path / "waited", **WITH_MLP, offload=True)
    out, back = ([entry for entry in copies.log if entry.startswith(way)] for way in ("out", "back"))
    steps = len(kept[0]) - 1
    assert len(out) == steps * 2 * LAYERS  # of two micro-batches
    assert len(back) == steps * 2 * (LAYERS - 1)  # the last one stays
    assert waited[0] == kept[0]
    for name, weight in kept[1].items():
        assert torch.equal(waited[1][name], weight), name


def test_products_wait_beside_all_other_features(copies, tmp_path):
    make = lambda folder: sft(folder, lora=False, gradient_checkpointing=False)  # noqa: E731
    runs = [train(make, tmp_path / str(choice), offload=choice, report=False) for choice in (False, True)]
    assert any(entry.startswith("back") for entry in copies.log)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[1][1][name], weight) for name, weight in runs[0][1].items())


def test_nothing_waits_in_layers_that_come_to_be_checkpointed(copies, tmp_path):
    class Switches(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.copied = len(copies.log)
            model.gradient_checkpointing_enable({"use_reentrant": False})

    switches = Switches()
    train(not_checkpointed, tmp_path, switches, **WITH_MLP, offload=True)
    assert len(copies.log) == switches.copied > 0


def test_no_more_products_wait_than_copies_hide(copies, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_turbo.policies.checkpointing.layers_that_leave", lambda sizes, *_: [True] + [False] * 3)
    trainer = not_checkpointed(tmp_path, max_steps=1)
    with hf_turbo.session(**WITH_MLP, offload=True) as report:
        trainer.train()
        store, _ = waiting._PLACES[trainer.model.model.layers[0].mlp]
        gc.collect()
        assert store.bytes == 0
    (row,) = [row for row in report.rows if row.role == "offload"]
    assert (row.patched, row.found) == (1, LAYERS)
    assert "would not hide" in row.reason
    assert not any(waiting.waits(layer.mlp) for layer in trainer.model.model.layers)


@pytest.mark.parametrize("why", ["adapters", "switched off"])
def test_where_no_product_can_wait_there_is_a_reason(copies, tmp_path, why):
    lora = why == "adapters"
    trainer = sft(tmp_path, lora, gradient_checkpointing=False)
    options = {**switched_off(), "mlp": lora, "offload": True}
    with (
        hf_turbo.session(**options),
        pytest.raises(
            RuntimeError, match=r"offload=True was asked for but cannot be had.*no gated MLP of plain linear"
        ),
    ):
        trainer.train()
