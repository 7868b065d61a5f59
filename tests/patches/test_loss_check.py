"""Trainer's check of the loss: same logs, same types, and no wait for the backward pass."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hf_turbo.patches import loss_check
from transformers import Trainer, TrainingArguments

import hf_turbo
from tests.models import batch, tiny_model

pytestmark = pytest.mark.newest


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mechanism is the same there, but for the wait."""
    monkeypatch.setattr(loss_check, "DEVICES", {"cpu"})


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return {name: tensor[0] for name, tensor in batch(seed=index).items()}


class Spoiled(Trainer):
    """Makes the losses of chosen steps infinite or NaN, and notes what training_step returns."""

    factors: dict[int, float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * self.factors.get(self.state.global_step, 1.0)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.returned = [*getattr(self, "returned", []), loss]
        return loss


def train(tmp_path: Any, factors: dict[int, float], turbo: bool, **arguments: Any) -> Spoiled:
    defaults = {"max_steps": 5, "logging_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0, "disable_tqdm": True}
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, save_strategy="no", report_to="none", **{**defaults, **arguments}
    )
    trainer = Spoiled(tiny_model("llama"), args, train_dataset=Samples())
    trainer.factors = factors
    with hf_turbo.session(report=False, metrics=False) if turbo else hf_turbo.session(host=False, norms=False):
        trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("factors", [{}, {2: float("inf")}, {2: float("nan")}, {0: float("nan")}], ids=str)
@pytest.mark.parametrize("filtered", [True, False])
def test_logs_are_those_of_stock(tmp_path: Any, factors: dict[int, float], filtered: bool) -> None:
    options = {"logging_nan_inf_filter": filtered, "gradient_accumulation_steps": 2, "logging_steps": 2}
    options["seed"] = 3
    stock, turbo = (train(tmp_path, factors, on, **options) for on in (False, True))
    torch.testing.assert_close(losses(turbo), losses(stock), rtol=1e-5, atol=0.0, equal_nan=True)
    assert len(losses(stock)) > 1
    assert type(turbo._tr_loss) is torch.Tensor


def test_the_question_is_answered_from_the_copy(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    get = loss_check._Value.get
    monkeypatch.setattr(loss_check._Value, "get", lambda self: asked.append(1) or get(self))
    train(tmp_path, {}, turbo=True)
    assert len(asked) == 2 * 5  # isnan and isinf of each step


def test_the_loss_is_a_plain_tensor_to_all_else(tmp_path: Any) -> None:
    trainer = train(tmp_path, {}, turbo=True)
    loss = trainer.returned[0]
    assert isinstance(loss, torch.Tensor)
    assert type(loss + 1) is type(loss.clone()) is type(loss.detach()) is type(2 * loss) is torch.Tensor
    assert type(pickle.loads(pickle.dumps(loss))) is torch.Tensor
    assert loss.item() == float(loss) == loss_check._Value(loss.detach()).get()
    assert torch.isnan(loss * float("nan"))
    assert torch.isfinite(loss)


def test_a_trainer_that_returns_another_loss_is_asked_as_in_stock(tmp_path: Any) -> None:
    class Doubling(Spoiled):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().training_step(*args, **kwargs)

    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, save_strategy="no", report_to="none")
    trainer = Doubling(tiny_model("llama"), args, train_dataset=Samples())
    trainer.factors = {}
    with hf_turbo.session(report=False):
        trainer.train()
    assert all(isinstance(loss, loss_check._KnownLoss) for loss in trainer.returned)
    assert type(trainer._tr_loss) is torch.Tensor


def test_reverts(tmp_path: Any) -> None:
    from accelerate import Accelerator

    stock = Trainer.training_step, Accelerator.backward
    train(tmp_path, {}, turbo=True)
    assert (Trainer.training_step, Accelerator.backward) == stock
