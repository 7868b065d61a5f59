"""Two processes over gloo: Trainer under DeepSpeed's ZeRO on a CPU, stock and turbo, with passes that are shared.

Not part of the environments of `make test`: DeepSpeed is a source distribution of 50 seconds. To run it:

    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed
    OMP_NUM_THREADS=1 python -m pytest tests/hosts/test_deepspeed.py
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import pytest
import torch

from tests.hosts.test_distributed import assert_no_drift, leave, set_up, start

STEPS, ACCUMULATION = 3, 4
# ZeRO's stage, family of the model, and what of it is trained. Gemma's embedding is its head.
CASES = {
    "1": (1, "qwen3", ""),
    "2, tied": (2, "gemma", ""),
    "2, attention": (2, "qwen3", "self_attn"),
    "3, tied": (3, "gemma", ""),
    "3, attention": (3, "qwen3", "self_attn"),
}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed would train on the GPU"),
    pytest.mark.newest,
]


def rows() -> list[dict[str, torch.Tensor]]:
    """Of other lengths and numbers of labels on each rank, so that each would share passes in its own way."""
    from tests.models import batch

    result = []
    for i in range(2 * STEPS * ACCUMULATION):
        row = {name: value[0] for name, value in batch(rows=1, length=24, seed=i, masked=False).items()}
        length = 24 - (7 * i + 5 * (i % 2)) % 17
        row["labels"][: i % 5] = -100
        row["attention_mask"][length:], row["labels"][length:] = 0, -100
        result.append(row)
    return result


def train(case: str, name: str, folder: str) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """A run called stock, perturbed or turbo: its losses, gradient norms and final weights, and turbo's report."""
    import deepspeed
    from transformers import Trainer, TrainingArguments, set_seed

    import hf_turbo
    from tests.models import tiny_model
    from tests.training import perturb

    stage, family, trained = CASES[case]
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=f"{folder}/{name}",
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=0.05,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        deepspeed={
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        },
    )
    model = tiny_model(family)
    if name == "perturbed":
        perturb(model)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in parameter_name)
    trainer = Trainer(model, arguments, train_dataset=rows())
    report: list[Any] = []
    if name == "turbo":
        hf_turbo.enable(report=False, max_tokens_per_pass=40)
    trainer.train()
    if name == "turbo":
        merging = next(row for row in hf_turbo.report().rows if row.role == "merging")
        report = [merging.patched, merging.reason, *hf_turbo.report().notes]
        hf_turbo.disable()
    logs = trainer.state.log_history
    values = {key: torch.tensor([float(log[key]) for log in logs if key in log]) for key in ("loss", "grad_norm")}
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        values |= {key: parameter.detach().clone() for key, parameter in parameters.items() if parameter.requires_grad}
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    return values, report


def worker(rank: int, port: int, folder: str) -> None:
    set_up(rank, port)
    os.environ["DS_ACCELERATOR"] = "cpu"
    from hf_turbo.patches import padding

    # It would compile an extension for processes that share memory.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    shared: list[int] = []
    run = padding._run

    def noted(backbone: Any, stock: Any, kwargs: Any, rest: Any, of: Any, state: Any) -> None:
        shared.append(len(of.micro_batches))
        run(backbone, stock, kwargs, rest, of, state)

    padding._run = noted
    results: dict[str, Any] = {}
    for case in os.environ.get("CASES", "|".join(CASES)).split("|"):
        shared.clear()
        runs = {name: train(case, name, folder) for name in ("stock", "perturbed", "turbo")}
        values = {name: each[0] for name, each in runs.items()}
        results[case] = {"runs": values, "report": runs["turbo"][1], "shared": list(shared)}
    torch.save(results, f"{folder}/rank{rank}.pt")
    leave()


def alone_plan(rank: int, first_alone: bool) -> list[int]:
    """How this rank would share passes if it were alone."""
    from hf_turbo.policies import batching

    lengths = [int(row["attention_mask"].sum()) for row in rows()][rank::2]
    plan = []
    for step in range(STEPS):
        tokens = lengths[step * ACCUMULATION : (step + 1) * ACCUMULATION]
        plan += [1, *batching.passes(tokens[1:], 40)] if first_alone else batching.passes(tokens, 40)
    return plan


def test_passes_are_shared_under_zero(tmp_path):
    ranks = start(worker, tmp_path)
    for case in ranks[0]:
        print(case, ranks[0][case]["report"], ranks[0][case]["shared"])
    for case in ranks[0]:
        shared = ranks[0][case]["shared"]
        assert ranks[1][case]["shared"] == shared, case
        assert STEPS < len(shared) < STEPS * ACCUMULATION, f"{case}: {shared}"
        for rank in range(2):
            result = ranks[rank][case]
            assert result["report"][:2] == [1, ""], result["report"]
            assert_no_drift(result["runs"], f"ZeRO-{case}, rank {rank}")
