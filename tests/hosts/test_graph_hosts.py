"""Passes by recordings, with a recorder that does the work again at every replay: what rests on them, on a CPU.

What a CUDA graph itself does is tested on a GPU (tests/patches/test_graphs_gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_turbo.kernels import varlen_attention
from hf_turbo.patches import graphs, padding
from peft import LoraConfig
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import hf_turbo
from tests.hosts.test_padding_hosts import PAIRS, ROWS
from tests.models import tiny_model
from tests.training import arguments, compare, tokenizer

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("on_cpu")]


@pytest.fixture(autouse=True)
def recorder(monkeypatch) -> list[Callable[[], None]]:
    """Recordings, two for each size: forward and backward."""
    recorded: list[Callable[[], None]] = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work)
        return work

    def flash(query: Any, key: Any, value: Any, starts: Any, longest: int, *rest: Any) -> torch.Tensor:
        lengths = starts.diff().tolist()
        assert max(lengths) <= longest
        return varlen_attention._by_runs(query, key, value, lengths, *rest)

    monkeypatch.setitem(graphs._RECORDERS, "cpu", lambda device: record)
    monkeypatch.setattr(graphs, "SMALLEST", 32)
    monkeypatch.setattr(varlen_attention, "_flash_can", lambda query, value: True)
    monkeypatch.setattr(varlen_attention, "_flash", flash)
    return recorded


@pytest.fixture
def served(monkeypatch) -> list[bool]:
    """Of each pass, whether a recording served it."""
    seen, output = [], graphs.Graphs.output

    def noted(self: Any, *args: Any) -> Any:
        result = output(self, *args)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(graphs.Graphs, "output", noted)
    return seen


def make_sft(folder: Path, **more: Any) -> Trainer:
    args = SFTConfig(**arguments(folder, max_steps=12, **more))
    lora = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear")
    return SFTTrainer(
        tiny_model("llama"), args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer(), peft_config=lora
    )


def make_dpo(folder: Path, **more: Any) -> Trainer:
    args = DPOConfig(**arguments(folder, max_steps=12, **more))
    lora = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear")
    data = Dataset.from_list(PAIRS)
    return DPOTrainer(
        tiny_model("llama"), None, args, train_dataset=data, processing_class=tokenizer(), peft_config=lora
    )


@pytest.mark.parametrize(
    ("make", "checkpointing", "accumulation"),
    [(make_sft, False, 1), (make_sft, True, 3), (make_dpo, True, 1), (make_dpo, False, 3)],
)
def test_trainers(make, checkpointing, accumulation, served, tmp_path):
    more = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": accumulation}
    turbo = compare(lambda folder: make(folder, **more), tmp_path, graphs=True, max_tokens_per_pass=1 << 20)
    assert turbo.patched["graphs"] == 1
    assert sum(served) >= 5
    assert not all(served)


def test_recordings_are_few_and_the_report_counts_them(recorder, tmp_path):
    with hf_turbo.session(graphs=True):
        make_sft(tmp_path).train()
    (note,) = [note for note in hf_turbo.report().notes if note.startswith("padding: ")]
    assert f"by {len(recorder) // 2} CUDA graphs" in note
    assert 1 <= len(recorder) // 2 <= 4


class Meddler(TrainerCallback):
    """Does something to the model at the beginning of the eighth step."""

    def __init__(self, meddle: Callable[[Any], None]):
        self.meddle = meddle

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 7:
            self.meddle(model)


def rescale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)


def freeze(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "layers.0" in name and "lora_A" in name:
            parameter.requires_grad_(False)


def replace(model: Any) -> None:
    norm = model.get_base_model().model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 1.5, requires_grad=False)


def move(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def hook_gradients(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient.clamp(-1e-4, 1e-4))


def hook(model: Any) -> None:
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 1.5)


@pytest.mark.parametrize("meddle", [rescale, freeze, replace, move, hook_gradients, hook])
def test_what_a_recording_rests_on_may_change(meddle, served, tmp_path):
    def make(folder: Path) -> Trainer:
        trainer = make_sft(folder)
        trainer.add_callback(Meddler(meddle))
        return trainer

    compare(make, tmp_path, graphs=True)
    assert True in served[:7]
    assert len(served) < 8 or not served[7]


def test_two_forwards_before_a_backward(served, tmp_path):
    """Activations are shared: the second is computed."""

    class Twice(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            other = {name: each.clone() for name, each in inputs.items()}
            return super().compute_loss(model, inputs, **kwargs) + super().compute_loss(model, other, **kwargs)

    def make(folder: Path) -> Trainer:
        args = SFTConfig(**arguments(folder, max_steps=8))
        lora = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear")
        data = Dataset.from_list(ROWS)
        model = tiny_model("llama")
        return Twice(model, args, train_dataset=data, processing_class=tokenizer(), peft_config=lora)

    compare(make, tmp_path, padding=True, graphs=True)
    assert True in served
    # The very first pass asks for no recording.
    assert all(not second for first, second in zip(served[1::2], served[2::2], strict=True) if first)


def test_what_cannot_be_recorded_is_computed(monkeypatch, served, tmp_path):
    def fail(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(graphs._RECORDERS, "cpu", lambda device: fail)
    compare(lambda folder: make_sft(folder), tmp_path, graphs=True)
    assert not any(served)
    with hf_turbo.session(graphs=True):
        make_sft(tmp_path).train()
    (note,) = [note for note in hf_turbo.report().notes if note.startswith("padding: ")]
    assert "recording failed: RuntimeError: operation not permitted" in note


def test_random_numbers_that_no_name_tells_of(served, monkeypatch, tmp_path):
    """Dropout by a function, of a probability that is called something else."""
    trainer = make_sft(tmp_path)
    layer = trainer.model.get_base_model().model.layers[0].mlp
    stock = type(layer).forward

    class Noisy(type(layer)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(stock(self, x), 0.1)

    layer.__class__ = Noisy
    with hf_turbo.session(graphs=True):
        trainer.train()
    assert not any(served)
    (note,) = [note for note in hf_turbo.report().notes if note.startswith("padding: ")]
    assert note.endswith("passes are not recorded: it draws random numbers")


def test_attention_that_needs_the_lengths(served, monkeypatch, tmp_path):
    monkeypatch.setattr(varlen_attention, "_flash_can", lambda query, value: False)
    with hf_turbo.session(graphs=True):
        make_sft(tmp_path).train()
    assert not any(served)
    (note,) = [note for note in hf_turbo.report().notes if note.startswith("padding: ")]
    assert note.endswith("passes are not recorded: its attention does not take lengths from the device")


def test_dropout_since_an_earlier_training(tmp_path):
    trainer = make_sft(tmp_path)
    backbone = trainer.model.get_base_model().model
    with ExitStack() as applied:

        def apply(finding):
            for patch in finding.patches:
                patch.apply()
                applied.callback(patch.revert)

        for expected in (True, False):
            apply(padding.find(trainer.model, device_type="cpu"))
            finding = padding.find_graphs(trainer.model, device_type="cpu", checkpointed=False)
            apply(finding)
            assert (finding.patched == 1) is expected
            assert (padding._STATES[backbone].graphs is not None) is expected
            trainer.model.config.attention_dropout = backbone.config.attention_dropout = 0.5


def test_dropout_is_not_recorded(tmp_path):
    def make(folder: Path) -> Trainer:
        args = SFTConfig(**arguments(folder))
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
        data = Dataset.from_list(ROWS)
        model = tiny_model("llama")
        return SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer(), peft_config=lora)

    trainer = make(tmp_path)
    with hf_turbo.session(graphs=True), pytest.raises(RuntimeError, match=r"graphs=True was asked for.*dropout"):
        trainer.train()


def test_nothing_keeps_the_model_alive(tmp_path):
    import gc
    import weakref

    with hf_turbo.session(graphs=True):
        trainer = make_sft(tmp_path)
        trainer.train()
        backbone = weakref.ref(trainer.model.get_base_model().model)
        assert padding._STATES[backbone()].graphs is not None
        del trainer
        gc.collect()
        assert backbone() is None


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([512] * 8, (4096, 0, 512)),
        ([100, 200, 300], (640, 16, 320)),
        ([7], (32, 16, 32)),
        ([1000, 1], (1024, 16, 1024)),
        (list(range(40, 60)), (1024, 32, 256)),
    ],
)
def test_sizes(lengths, expected):
    assert graphs.size_of(lengths) == expected


def test_a_size_holds_what_it_is_made_for():
    """And serves others only where nothing exceeds it, the filling not either."""
    import random

    draw, sizes, served = random.Random(0), [], 0
    for _ in range(500):
        lengths = [draw.randint(1, 900) for _ in range(draw.randint(1, 40))]
        size = graphs.size_of(lengths)
        filling = size.tokens - sum(lengths)
        assert 0 <= filling <= max(0.26 * size.tokens, graphs.SMALLEST)
        assert size.holds(lengths)
        for each in (size, *sizes):
            if each.documents and each.holds(lengths):
                served += 1
                assert len(lengths) < each.documents
                assert max(*lengths, each.tokens - sum(lengths)) <= each.longest <= each.tokens
        sizes.append(size)
    assert served > 2 * len(sizes)


def test_filling_that_is_longer_than_any_document():
    """2,574 tokens fit a recording made for 3,139, but their filling would be longer than what it attends to."""
    recorded = graphs.Size(3584, 16, 896)
    assert recorded.holds([400] * 7 + [300])
    assert not recorded.holds([320] * 7 + [334])


def test_passes_in_which_the_device_is_last_are_not_recorded(monkeypatch, served, tmp_path):
    monkeypatch.setattr(graphs.Race, "is_won_by_host", lambda self, tokens: tokens > 0)
    compare(make_sft, tmp_path, graphs=True)
    assert served
    assert not any(served)


def test_the_race_of_host_and_device():
    """What the device takes by itself shows only where it is behind the host."""
    race = graphs.Race()
    assert not race.is_won_by_host(10**6)
    for tokens, host, device in ((700, 2.0, 2.3), (500, 0.07, 0.07), (1200, 0.08, 0.081), (2100, 0.07, 0.071)):
        race.note(tokens, host, device, False)
    assert not race.is_won_by_host(10**6)  # the first one compiled, the others had the device wait
    race.note(4000, 0.07, 0.09, False)
    assert not race.is_won_by_host(3999)
    assert race.is_won_by_host(4000)
    race.note(3500, 0.08, 0.072, True)
    assert race.is_won_by_host(3500)
