"""benchmarks/train.py: workloads are what they are called; a dry run measures, compares and fails as it should."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import train
import worker
from workloads import WORKLOADS, Workload


@pytest.mark.parametrize(
    ("workload", "layers", "billions"),
    [
        ("llama1b-full", 16, 1.24),
        ("llama8b-lora", 32, 8.03),
        ("qwen3-4b-full", 36, 4.02),
        ("qwen3-moe-lora", 48, 30.53),  # the published model; the workload has 12 layers of it
    ],
)
def test_models_have_their_published_size(workload: str, layers: int, billions: float) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**WORKLOADS[workload].model_config(), "num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", WORKLOADS)
def test_samples_follow_the_workload(name: str) -> None:
    workload = WORKLOADS[name].change(["median=64", "cap=256"])
    columns = workload.samples(200, vocab_size=1000)
    assert columns == workload.samples(200, vocab_size=1000)
    lengths = sorted(len(row) for row in columns["input_ids"])
    assert lengths[-1] <= 256
    assert lengths[100] == pytest.approx(64, rel=0.25)
    assert (lengths[0] != lengths[-1]) == bool(workload.sigma)
    assert all(3 <= token < 1000 for row in columns["input_ids"] for token in row)
    assert ("labels" in columns) == bool(workload.masked)
    for row, labels in zip(columns["input_ids"], columns.get("labels", []), strict=False):
        masked = int(len(row) * workload.masked)
        assert labels == [-100] * masked + row[masked:]


def test_fields_can_be_changed_and_wrong_ones_are_told() -> None:
    changed = WORKLOADS["llama8b-qlora"].change(["batch_size=4", "nf4=false", "config.num_hidden_layers=3"])
    assert (changed.batch_size, changed.nf4, changed.model_config()["num_hidden_layers"]) == (4, False, 3)
    for wrong in ("batchsize=4", "batch_size", "config=3"):
        with pytest.raises(ValueError, match="use field=value"):
            changed.change([wrong])


def test_the_rule_finds_what_disagrees() -> None:
    stock = {"losses": [8.0, 7.9], "grad_norms": [1.0, 1.1], "tokens": [2048.0, 2000.0]}
    assert train.disagreements(stock, stock) == []
    assert "losses" in train.disagreements(stock, {**stock, "losses": [8.0, 8.1]})[0]
    assert "losses" in train.disagreements(stock, {**stock, "losses": [8.0, float("nan")]})[0]
    assert "losses" in train.disagreements(stock, {**stock, "losses": [8.0]})[0]
    assert "grad_norms" in train.disagreements(stock, {**stock, "grad_norms": [1.0, 1.3]})[0]
    assert "tokens" in train.disagreements(stock, {**stock, "tokens": [2048.0, 1999.0]})[0]


def test_percentile() -> None:
    assert train.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert train.percentile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert train.percentile([5.0], 0.95) == 5.0


def dry_run(workload: str, systems: str, path: Path, *more: str) -> tuple[int, dict]:
    code = train.main(
        [
            "--workload",
            workload,
            "--systems",
            systems,
            "--tiny",
            "--steps",
            "2",
            "--warmup",
            "1",
            "--json",
            str(path),
            *more,
        ]
    )
    return code, json.loads(path.read_text().splitlines()[-1])


def test_dry_run_of_stock(tmp_path: Path) -> None:
    code, run = dry_run("llama8b-lora-alpaca", "stock", tmp_path / "runs.jsonl")
    assert code == 0
    stock = run["systems"]["stock"]
    assert len(stock["step_ms"]) == 2
    assert len(stock["losses"]) == 3
    workload = Workload(**{**run["settings"], "lora_targets": "all-linear"})
    samples = workload.samples(3 * workload.batch_size * workload.accumulation, stock_vocab := 512)
    assert stock_vocab == workload.model_config()["vocab_size"]
    assert sum(stock["tokens"]) == sum(len(row) for row in samples["input_ids"])
    assert stock["tokens_per_second"] > 0


def test_a_failing_run_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "spec", lambda system, workload, **settings: {"system": system})  # fails in the worker
    code, run = dry_run("llama1b-full", "stock", tmp_path / "runs.jsonl")
    assert code == 1
    assert "KeyError: 'steps'" in run["problems"][0]
    assert "KeyError: 'steps'" in capsys.readouterr().out


def test_device_time() -> None:
    """Kernels of two streams count once; of copies, those with pinned memory, and what a kernel covers of them."""
    from torch.autograd import DeviceType

    def event(name: str, start: float, end: float) -> SimpleNamespace:
        times = SimpleNamespace(start=1e3 * start, end=1e3 * end)
        return SimpleNamespace(name=name, device_type=DeviceType.CUDA, time_range=times)

    events = [
        event("gemm", 10, 20),
        event("gemm", 15, 30),
        event("norm", 40, 50),
        event("Memcpy DtoH (Device -> Pinned)", 5, 25),  # 15 of 20 beside kernels
        event("Memcpy HtoD (Pinned -> Device)", 28, 44),  # 2 + 4 of 16
        event("Memcpy HtoD (Pageable -> Device)", 60, 70),
        event("Memset (Device)", 60, 70),
    ]
    figures = worker.device_time(SimpleNamespace(events=lambda: events))
    assert {name: value * worker.PROFILED_STEPS for name, value in figures.items()} == {
        "launches_per_step": 3,
        "gpu_busy_ms_per_step": 30,
        "host_copies_ms_per_step": 36,
        "hidden_copies_ms_per_step": 21,
    }
