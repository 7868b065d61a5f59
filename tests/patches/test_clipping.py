"""Clipping whose scale is left to the step: the bits of gradients that were scaled first, and when it is not left."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_turbo.kernels.clip_grad_norm import Gradients
from hf_turbo.patches import clipping
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_turbo
from tests.models import tiny_model
from tests.training import arguments, one_thread, padded_rows

OPTIONS = {"metrics": False, "report": False, "optimizer": True, "host": False}
OPTIMS = ["adamw_torch", "adamw_8bit"]


pytestmark = pytest.mark.newest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def scalings(monkeypatch) -> list[Any]:
    """A call for each time that gradients are scaled where they lie."""
    calls: list[Any] = []
    multiply = Gradients.multiply
    monkeypatch.setattr(Gradients, "multiply", lambda self, scale: (calls.append(scale), multiply(self, scale))[1])
    return calls


def make(folder: Path, cls: type = Trainer, callbacks: Any = None, **more: Any) -> Trainer:
    """With a norm that every step is above, and parameters in two groups."""
    given = {"optim": "adamw_torch", "max_steps": 3, "max_grad_norm": 0.1, "weight_decay": 0.1, **more}
    args = TrainingArguments(**arguments(folder, **given))
    return cls(tiny_model("llama"), args, train_dataset=padded_rows(0, 16), callbacks=callbacks)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    set_seed(0)
    with hf_turbo.session(**OPTIONS):
        trainer.train()
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


class Looks(TrainerCallback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [each.grad for each in model.parameters() if each.grad is not None]
        self.norms.append(float(torch.stack([each.norm() for each in grads]).norm()))


def assert_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_weights_as_with_gradients_that_were_scaled(tmp_path, scalings, optim, accumulation):
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    more = {"optim": optim, "gradient_accumulation_steps": accumulation}
    left = make(tmp_path, **more)
    weights = weights_of(left)
    assert scalings == []
    looks = Looks()
    seen = make(tmp_path, callbacks=[looks], **more)
    assert_equal(weights_of(seen), weights)
    assert len(scalings) == 3
    assert looks.norms == pytest.approx([0.1] * 3, rel=1e-3)
    logs = [[log["grad_norm"] for log in each.state.log_history if "grad_norm" in log] for each in (left, seen)]
    assert logs[0] == logs[1]
    assert min(logs[0]) > 0.1


def test_nothing_is_kept_behind_a_training(tmp_path):
    trainer = make(tmp_path)
    kept = []

    class Notes(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            kept.append(clipping._clipped)

    trainer.add_callback(Notes())
    weights_of(trainer)
    assert kept == [None] * 3


class Overrides(Trainer):
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, grad_norm)


def hooked(trainer: Trainer) -> None:
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: None)


def frozen_late(trainer: Trainer) -> None:
    """Something is clipped that the optimizer does not have."""
    trainer.create_optimizer()
    trainer.optimizer.param_groups[0]["params"].pop()


class OwnLoop(Trainer):
    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        return super()._inner_training_loop(*args, **kwargs)


class Wraps(TrainerCallback):
    """A logger of gradients, say, around a step."""

    def __init__(self, inner: bool):
        self.inner = inner

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        around = optimizer.optimizer if self.inner else optimizer
        stock = around.step
        around.step = functools.wraps(stock)(lambda *args, **kwargs: stock(*args, **kwargs))


class OfPeft(TrainerCallback):
    """As PEFT has one, which weighs parameters by their gradients."""

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        pass

    on_optimizer_step.__module__ = "peft.tuners.adamss.asa_callback"


@pytest.mark.parametrize(
    ("cls", "prepare"),
    [
        (Overrides, None),
        (OwnLoop, None),
        (Trainer, hooked),
        (Trainer, frozen_late),
        (Trainer, lambda trainer: trainer.add_callback(Wraps(inner=True))),
        (Trainer, lambda trainer: trainer.add_callback(Wraps(inner=False))),
        (Trainer, lambda trainer: trainer.add_callback(OfPeft())),
    ],
    ids=["norm", "loop", "hook", "others", "inner step", "step", "peft"],
)
def test_where_somebody_may_look_gradients_are_scaled(tmp_path, scalings, cls, prepare):
    trainer = make(tmp_path, cls)
    if prepare is not None:
        prepare(trainer)
    weights_of(trainer)
    assert len(scalings) == 3


def test_clipping_outside_of_a_trainer_scales(scalings):
    hf_turbo.enable(optimizer=True)
    try:
        from accelerate import Accelerator

        accelerator, inner = Accelerator(cpu=True), torch.nn.Linear(4, 4)
        model, optimizer = accelerator.prepare(inner, torch.optim.AdamW(inner.parameters()))
        accelerator.backward(model(torch.ones(2, 4)).pow(2).sum())
        accelerator.clip_grad_norm_(model.parameters(), 1e-3)
        assert len(scalings) == 1
        assert float(torch.stack([each.grad.norm() for each in inner.parameters()]).norm()) == pytest.approx(1e-3)
        optimizer.step()
    finally:
        hf_turbo.disable()


class Turns(TrainerCallback):
    """Has the second step be stock's."""

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        for group in optimizer.param_groups:
            group["maximize"] = state.global_step == 1


def test_a_step_of_stock_has_scaled_gradients(tmp_path, scalings):
    expected = weights_of(make(tmp_path, callbacks=[Turns(), Looks()]))
    scalings.clear()
    assert_equal(weights_of(make(tmp_path, callbacks=[Turns()])), expected)
    assert len(scalings) == 1


def test_gradients_without_a_step_are_scaled_in_the_end(tmp_path, scalings):
    trainer = make(tmp_path)
    trainer.create_optimizer()

    def fails(closure: Any = None) -> None:
        raise KeyboardInterrupt

    class Breaks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.optimizer.optimizer.__dict__["step"] = fails

    trainer.add_callback(Breaks())
    with pytest.raises(KeyboardInterrupt):
        weights_of(trainer)
    assert len(scalings) == 1
    grads = [each.grad for each in trainer.model.parameters() if each.grad is not None]
    assert float(torch.stack([each.norm() for each in grads]).norm()) == pytest.approx(0.1, rel=1e-3)
    assert clipping._clipped is None


def test_a_trainer_is_not_kept(tmp_path):
    trainer = make(tmp_path)
    weights_of(trainer)
    reference = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert reference() is None
