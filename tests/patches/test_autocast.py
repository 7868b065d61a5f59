"""float32 weights under autocast: the bits of stock, with fewer casts."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_turbo.kernels import _weights
from hf_turbo.patches import autocast, shadows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_turbo
from hf_turbo.policies import memory
from tests.models import switched_off, tiny_model
from tests.training import arguments, one_thread, padded_rows

OPTIONS = switched_off("autocast")
MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def threads():
    with one_thread():
        yield


class Casts(TorchDispatchMode):
    """Counts casts from float32 to bfloat16 of matrices [N, K], and of inputs [rows, length, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.inputs = self.together = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            if args[0].dtype == torch.float32:
                self.weights += args[0].ndim == 2 and args[0].shape[0] > 14
                self.inputs += args[0].ndim == 3
        self.together += function is torch.ops.aten._foreach_copy_.default
        return function(*args, **kwargs)


class Count(TrainerCallback):
    """The casts of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Casts] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(Casts())
        self.steps[-1].__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps[-1].__exit__(None, None, None)


def train(
    folder: Path, model: Any, callbacks: Any = (), trainer_class: Any = Trainer, **more: Any
) -> dict[str, torch.Tensor]:
    """Four steps; returns the weights afterwards."""
    rows = padded_rows(0, 16)
    args = {"bf16": True, "max_steps": 4, "per_device_train_batch_size": 2, "seed": 3, **more}
    trainer = trainer_class(
        model=model, args=TrainingArguments(**arguments(folder, **args)), train_dataset=rows, callbacks=[*callbacks]
    )
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def turbo(folder: Path, model: Any, callbacks: Any = (), **more: Any) -> tuple[dict[str, torch.Tensor], Any]:
    options = more.pop("options", OPTIONS)
    with hf_turbo.session(**options) as report:
        weights = train(folder, model, callbacks, **more)
        swapped = [module for module in model.modules() if type(module).__name__ == "Linear"]
    assert not any(type(module) is not torch.nn.Linear for module in swapped)
    assert _weights._lookup is None
    return weights, report


def row_of(report: Any) -> Any:
    return next(row for row in report.rows if row.role == "autocast")


CHECKPOINTED = {"gradient_checkpointing": True}
REENTRANT = {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 4},
        CHECKPOINTED,
        {**CHECKPOINTED, "gradient_accumulation_steps": 2, "options": switched_off("autocast", "checkpointing")},
        {**REENTRANT, "gradient_accumulation_steps": 2},
    ],
    ids=["plain", "accumulation", "checkpointing", "both", "reentrant"],
)
def test_the_bits_of_stock(tmp_path, more):
    """On a CPU, where gradients too are rounded as by autocast."""
    own = {name: value for name, value in more.items() if name != "options"}
    stock = train(tmp_path, tiny_model("llama"), **own)
    ours, report = turbo(tmp_path, tiny_model("llama"), **more)
    row = row_of(report)
    assert (row.found, row.patched) == (14, 14)
    assert ours.keys() == stock.keys()
    for name in stock:
        assert torch.equal(ours[name], stock[name]), name
    assert any("16-bit copies" in note for note in report.notes) == bool(own)
