"""The optimizer's step inside backward: the bits of the step after it, gradients that are gone, what keeps it out."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_turbo.patches import optimizer_in_backward
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_turbo
from hf_turbo.policies import optimizers as policy
from tests.models import tiny_model
from tests.training import arguments, one_thread, padded_rows

pytestmark = pytest.mark.newest

bitsandbytes = pytest.importorskip("bitsandbytes")

# Nothing but what is tested, so that stock is what it is compared with.
ROLES = ("norms", "mlp", "layers", "rope", "loss", "lora", "autocast", "embeddings", "padding", "checkpointing")
NOTHING_ELSE = dict.fromkeys((*ROLES, "host", "optimizer", "metrics", "report"), False)
ALL = {"metrics": False, "report": False, "padding": True, "optimizer": True}
STEPS = 3


@pytest.fixture(autouse=True, scope="module")
def _few_objects() -> Iterator[None]:
    """`train()` has Python collect garbage, which takes a second among all that imports have made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch) -> Iterator[None]:
    """Of one larger matrix, or some small tensors."""
    monkeypatch.setattr(policy, "_LEAST_BUCKET", 8_000)
    monkeypatch.setattr(policy, "_MOST_BUCKETS", 10**6)
    with one_thread():
        yield


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Tensors in each step that was made within backward."""
    made: list[int] = []
    step = optimizer_in_backward.StepInBackward._step_bucket

    def counted(self: Any) -> None:
        made.append(len(self._waiting))
        step(self)

    monkeypatch.setattr(optimizer_in_backward.StepInBackward, "_step_bucket", counted)
    return made


def make(
    folder: Path,
    model: Any = None,
    cls: type = Trainer,
    optimizer: Callable[[Any], Any] | None = None,
    callbacks: Any = None,
    **more: Any,
) -> Trainer:
    """With weights that decay and others that do not, and a learning rate that changes with every step."""
    given = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01, "lr_scheduler_type": "linear"}
    args = TrainingArguments(**arguments(folder, **{"max_steps": STEPS, "max_grad_norm": 0.0, **given, **more}))
    model = tiny_model("llama") if model is None else model
    optimizers = (None if optimizer is None else optimizer(model), None)
    return cls(model, args, train_dataset=padded_rows(0, 16), optimizers=optimizers, callbacks=callbacks)


def trained(trainer: Trainer, resume: Path | None = None, **options: Any) -> SimpleNamespace:
    """Weights, states by name and logs after training; stock without options."""
    set_seed(0)
    report = None
    if options:
        with hf_turbo.session(**options) as report:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    else:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    named = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    optimizer = trainer.optimizer.optimizer
    return SimpleNamespace(
        weights={name: each.detach().clone() for name, each in trainer.model.named_parameters()},
        states={named[id(key)]: dict(state) for key, state in optimizer.state.items()},
        saved=trainer.optimizer.state_dict(),
        logs=[
            {k: v for k, v in log.items() if "runtime" not in k and "_per_" not in k}
            for log in trainer.state.log_history
        ],
        report=report,
    )


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> SimpleNamespace:
    """The run of what `make` makes by default."""
    with one_thread():
        return trained(make(tmp_path_factory.mktemp("stock")))


def assert_same(one: Any, other: Any) -> None:
    """To the last bit; weights must have moved, or the test could not fail."""
    assert one.logs == other.logs
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name
    assert one.states.keys() == other.states.keys()
    assert one.saved["state"].keys() == other.saved["state"].keys()
    assert one.saved["param_groups"] == other.saved["param_groups"]
    for name, state in one.states.items():
        assert state.keys() == other.states[name].keys(), name
        for key, value in state.items():
            twin = other.states[name][key]
            same = torch.equal(value, twin) and value.dtype == twin.dtype if torch.is_tensor(value) else value == twin
            assert same, (name, key)


def row_of(report: Any) -> Any:
    return next(row for row in report.rows if row.role == "optimizer_in_backward")


def tuned(cls: Any, **options: Any) -> Callable[[Any], Any]:
    """Three groups, of different learning rates, decays and more."""

    def of(model: Any) -> Any:
        parameters = list(model.parameters())
        groups = [
            {"params": parameters[::3], "lr": 0.01, "weight_decay": 0.0},
            {"params": parameters[1::3], "lr": 0.003, "weight_decay": 0.2},
            {"params": parameters[2::3]},
        ]
        return cls(groups, **{"lr": 0.02, **options})

    return of


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch": {},
    "torch-fused": {"optim": "adamw_torch_fused"},
    "torch-foreach": {"optimizer": tuned(torch.optim.AdamW, foreach=True)},
    "amsgrad": {"optimizer": tuned(torch.optim.AdamW, amsgrad=True)},
    "maximize": {"optimizer": tuned(torch.optim.AdamW, maximize=True, betas=(0.8, 0.95), eps=1e-6)},
    "adam": {"optimizer": tuned(torch.optim.Adam, weight_decay=0.1)},
    "sgd": {"optimizer": tuned(torch.optim.SGD, momentum=0.9, nesterov=True)},
    "bnb-8bit": {"optim": "adamw_8bit"},
    "bnb-32bit": {"optimizer": tuned(bitsandbytes.optim.AdamW)},
    "bnb-paged": {"optim": "paged_adamw_8bit"},
}
IN_BF16 = ("torch", "torch-fused", "bnb-8bit")


@pytest.mark.filterwarnings("ignore")  # on the CPU bitsandbytes warns that paging falls back
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in OPTIMIZERS), *((name, torch.bfloat16) for name in IN_BF16)]
)
def test_the_bits_of_stock(name, dtype, steps, tmp_path):
    runs = [
        trained(make(tmp_path, tiny_model("llama", dtype), **OPTIMIZERS[name]), **options)
        for options in ({}, {**NOTHING_ELSE, "optimizer_in_backward": True})
    ]
    assert_same(*runs)
    row = row_of(runs[1].report)
    assert (row.found, row.patched, row.exactness) == (len(runs[0].weights), len(runs[0].weights), "exact")
    assert len(steps) >= 5 * STEPS, "nothing was stepped within backward"
    assert all("grad_norm" in log for log in runs[0].logs[:STEPS])


@pytest.mark.parametrize(
    ("name", "max_norm"), [("torch", 0.05), ("torch-foreach", 1e9), ("sgd", 0.05), ("bnb-8bit", 0.05)]
)
def test_the_bits_of_stock_that_clips(name, max_norm, steps, tmp_path):
    """Backward is gone through twice: for the norm, and for the steps."""
    runs = [
        trained(make(tmp_path, max_grad_norm=max_norm, **OPTIMIZERS[name]), **options)
        for options in ({}, {**NOTHING_ELSE, "optimizer_in_backward": True})
    ]
    assert_same(*runs)
    assert len(steps) >= 5 * STEPS
    assert all(0.05 < log["grad_norm"] < 1e9 for log in runs[1].logs[:STEPS])


class Uneven(nn.Module):
    """A model with a weight that is used twice, one that serves every other step, and one that never does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.calls = model, 0
        self.scale, self.some, self.idle = (nn.Parameter(torch.ones(3000)) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        self.calls += 1
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        loss = output.loss * self.scale.mean() + self.scale.square().mean()
        return {"loss": loss + self.some.square().mean() if self.calls % 2 else loss}


def frozen(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or "norm" in name)
    return model


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=32, target_modules="all-linear", lora_dropout=0.1))


MODELS: dict[str, Callable[[], Any]] = {
    "tied": lambda: tiny_model("llama-bias"),
    "frozen in part": lambda: frozen(tiny_model("llama")),
    "uneven": lambda: Uneven(tiny_model("llama")),
    "lora": lambda: adapted(tiny_model("llama")),
}


@pytest.mark.parametrize(
    ("name", "checkpointing", "max_norm"),
    [
        ("tied", False, 0.0),
        ("tied", True, 0.05),
        ("frozen in part", True, 0.0),
        ("uneven", False, 0.05),
        ("lora", False, 0.0),
        ("lora", True, 0.05),
    ],
)
def test_models(name, checkpointing, max_norm, steps, tmp_path):
    more = {"gradient_checkpointing": checkpointing, "max_grad_norm": max_norm}
    runs = [
        trained(make(tmp_path, MODELS[name](), **more), **options)
        for options in ({}, {**NOTHING_ELSE, "optimizer_in_backward": True})
    ]
    assert_same(*runs)
    assert len(steps) >= 2 * STEPS
    if name == "uneven":
        counts = {name: float(runs[1].states[name]["step"]) for name in ("scale", "some")}
        assert counts == {"scale": STEPS, "some": 2}
        assert "idle" not in runs[1].states


@pytest.mark.filterwarnings("ignore:hf_turbo. step:RuntimeWarning")
@pytest.mark.parametrize("weights", ["as_is", "exact_master", "stochastic_rounding"])
@pytest.mark.parametrize(("optim", "family"), [("adamw_torch", "gemma"), ("adamw_8bit", "llama")])
def test_beside_all_the_rest(weights, optim, family, steps, tmp_path):
    """Our kernels, passes without padding, checkpoints, masters, rounding by chance: the same with it and without."""
    more = {"optim": optim, "gradient_checkpointing": True, "learning_rate": 1e-4}
    runs = [
        trained(
            make(tmp_path, tiny_model(family, torch.bfloat16), **more),
            **{**ALL, "bf16_weights": weights, "optimizer_in_backward": within},
        )
        for within in (False, True)
    ]
    for run in runs:  # our clipping has the norm in more digits than stock, whose gradients these are
        for log in run.logs:
            log.pop("grad_norm", None)
    assert_same(*runs)
    assert len(steps) >= 4 * STEPS
    assert not [note for note in runs[1].report.notes if "stock for a step" in note or "stood" in note]
    lost = [[note for note in run.report.notes if "updates of bf16 weights were lost" in note] for run in runs]
    assert lost[0] == lost[1]
    assert len(lost[0]) == (weights == "as_is")
    assert all(row.patched for run in runs for row in run.report.rows if row.role in ("optimizer", "padding", "norms"))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_clipped_beside_all_the_rest(optim, steps, tmp_path):
    """Our clipping adds the norm up in another order."""
    more = {"optim": optim, "gradient_checkpointing": True, "learning_rate": 1e-4, "max_grad_norm": 0.05}
    runs = [
        trained(make(tmp_path, tiny_model("llama"), **more), **ALL, optimizer_in_backward=within)
        for within in (False, True)
    ]
    for one, other in zip(runs[0].logs, runs[1].logs, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    for name, weight in runs[0].weights.items():
        torch.testing.assert_close(runs[1].weights[name], weight, rtol=1e-4, atol=1e-6)
    assert len(steps) >= 4 * STEPS
    assert not [note for note in runs[1].report.notes if "stood" in note]


def live_bytes(model: nn.Module) -> int:
    return sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)


@pytest.mark.parametrize(("within", "max_norm"), [(False, 0.0), (True, 0.0), (True, 0.05)])
def test_gradients_are_gone(within, max_norm, tmp_path):
    """Whenever one comes, those that stand are less than a bucket; without it, in the end they all do."""
    trainer, peaks = make(tmp_path, max_grad_norm=max_norm), [0]
    parameters = list(trainer.model.parameters())

    class Watch(TrainerCallback):
        """When a gradient is about to be added: by hooks of nodes, which are no hooks of parameters."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.nodes = [each.view_as(each).grad_fn.next_functions[0][0] for each in parameters]
            for node in self.nodes:
                node.register_prehook(lambda grads: peaks.append(live_bytes(trainer.model) + grads[0].nbytes))

    trainer.add_callback(Watch())
    trained(trainer, **{**NOTHING_ELSE, "optimizer_in_backward": within})
    total, largest = sum(each.nbytes for each in parameters), max(each.nbytes for each in parameters)
    assert len(peaks) == 1 + STEPS * len(parameters) * (2 if max_norm else 1)
    assert max(peaks) == total if not within else 0 < max(peaks) < 8_000 + largest < total / 4


def test_checkpoints_are_those_of_stock(steps, tmp_path):
    """And each resumes the other."""
    options = {**NOTHING_ELSE, "optimizer_in_backward": True}
    kept = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    stock = trained(make(tmp_path / "stock", **kept))
    turbo = trained(make(tmp_path / "turbo", **kept), **options)
    assert_same(stock, turbo)
    files = [torch.load(tmp_path / name / "checkpoint-2" / "optimizer.pt") for name in ("stock", "turbo")]
    assert files[0]["param_groups"] == files[1]["param_groups"]
    for key, state in files[0]["state"].items():
        assert all(torch.equal(value, files[1]["state"][key][name]) for name, value in state.items())
    to_stock = trained(make(tmp_path / "a", **kept), resume=tmp_path / "turbo" / "checkpoint-2")
    del steps[:]
    to_turbo = trained(make(tmp_path / "b", **kept), resume=tmp_path / "stock" / "checkpoint-2", **options)
    assert len(steps) >= 5 * 2
    for resumed in (to_stock, to_turbo):
        resumed.logs = stock.logs  # of the steps before it has read them from a file
        assert_same(stock, resumed)


def test_off_in_the_middle(stock, steps, tmp_path):
    seen = []

    class Off(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append((len(steps), any(each._post_accumulate_grad_hooks for each in model.parameters())))
            if state.global_step == 2:
                hf_turbo.disable()

    methods = {name: vars(type(make(tmp_path).accelerator))[name] for name in ("backward", "clip_grad_norm_")}
    trainer = make(tmp_path, callbacks=[Off()])
    assert_same(stock, trained(trainer, **NOTHING_ELSE, optimizer_in_backward=True))
    assert seen[0][0] > 0
    assert seen[1] == (2 * seen[0][0], True)
    assert seen[2] == (2 * seen[0][0], False)
    assert {name: vars(type(trainer.accelerator))[name] for name in methods} == methods


def test_nothing_stays_behind_and_the_next_training_has_it_again(steps, tmp_path):
    trainer = make(tmp_path)
    options = {**NOTHING_ELSE, "optimizer_in_backward": True}
    with hf_turbo.session(**options):
        trainer.train()
        first = len(steps)
        assert not any(each._post_accumulate_grad_hooks for each in trainer.model.parameters())
        trainer.train()
    assert len(steps) == 2 * first > 0


# ------------------------------------------------------------------------------------------------------ what is refused


class Looks(TrainerCallback):
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As one that logs the norms of layers."""


class LooksLater(TrainerCallback):
    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Gradients are still there in stock."""


class Own(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


class Clipping(Trainer):
    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(model)


def sharing(model: Any) -> Any:
    model.extra = nn.Parameter(model.lm_head.weight.data)
    return model


def hooked_optimizer(model: Any) -> Any:
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def replaced_step(model: Any) -> Any:
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step = lambda closure=None: None
    return optimizer


def of_some(model: Any) -> Any:
    return torch.optim.AdamW(list(model.parameters())[1:])


REFUSED: dict[str, dict[str, Any]] = {
    "max_grad_norm=0 switches that off": {"max_grad_norm": 1.0, "optimizer": of_some},
    "gradient_accumulation_steps > 1": {"gradient_accumulation_steps": 2},
    "training_step is overridden by Own": {"cls": Own},
    "_clip_grad_norm is overridden by Clipping": {"cls": Clipping},
    "Looks.on_pre_optimizer_step may look at gradients": {"callbacks": [Looks()]},
    "LooksLater.on_optimizer_step may look at gradients": {"callbacks": [LooksLater()]},
    "use_reentrant=True": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "torch_compile": {"torch_compile": True},
    "TRL hands out once": {"max_grad_norm": 1.0, "attributes": {"activation_offloading": True}},
    "Adagrad is not known to treat each tensor by itself": {"optim": "adagrad"},
    "Adafactor is not known": {"optim": "adafactor"},
    "hooks on the optimizer's step": {"optimizer": hooked_optimizer},
    "step was replaced on the optimizer": {"optimizer": replaced_step},
    "parameters share memory": {"model": lambda: sharing(tiny_model("llama"))},
    "differentiable": {"optimizer": tuned(torch.optim.AdamW, differentiable=True)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_had_is_an_error(reason, tmp_path):
    """It is asked for by name. Nothing has been trained, and nothing is left of it."""
    more = dict(REFUSED[reason])
    if "model" in more:
        more["model"] = more["model"]()
    attributes = more.pop("attributes", {})
    trainer = make(tmp_path, **more)
    vars(trainer.args).update(attributes)
    before = copy.deepcopy(trainer.model.state_dict())
    message = rf"optimizer_in_backward=True was asked for but cannot be had: .*{reason.split('=')[0]}"
    with (
        hf_turbo.session(**NOTHING_ELSE, optimizer_in_backward=True),
        pytest.raises(RuntimeError, match=message) as error,
    ):
        trainer.train()
    assert reason in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert not any(each._post_accumulate_grad_hooks for each in trainer.model.parameters())


def test_several_processes_and_scalers(tmp_path):
    trainer = make(tmp_path)
    accelerator = SimpleNamespace(num_processes=2, distributed_type="MULTI_GPU", scaler=None)
    trainer.accelerator = accelerator
    assert optimizer_in_backward.conflict(trainer) == "several processes: gradients are added up after backward"
    accelerator.distributed_type = "FSDP"
    assert optimizer_in_backward.conflict(trainer) == "fsdp: gradients are added up after backward"
    accelerator.num_processes, accelerator.distributed_type, accelerator.scaler = 1, "NO", object()
    assert "fp16" in optimizer_in_backward.conflict(trainer)
    accelerator.scaler = None
    assert optimizer_in_backward.conflict(trainer) is None


def test_loops_of_the_scripts_own_are_refused():
    from accelerate import Accelerator

    model = nn.Linear(4, 4)
    with (
        hf_turbo.session(**NOTHING_ELSE, optimizer_in_backward=True),
        pytest.raises(RuntimeError, match="cannot be had: a loop of your own"),
    ):
        Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters()))


# ------------------------------------------------------------------------------------------ what comes in mid-training


def late(act: Callable[[Any], Any]) -> TrainerCallback:
    class Late(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 1:
                act(SimpleNamespace(args=args, model=model, optimizer=kwargs["optimizer"]))

    return Late()


LATE: dict[str, Callable[[Any], Any]] = {
    "hooks on gradients": lambda at: at.model.lm_head.weight.register_hook(lambda grad: grad * 0.5),
    "hooks on the optimizer's step": lambda at: at.optimizer.optimizer.register_step_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("reason", LATE)
def test_what_comes_late_makes_steps_stock(reason, steps, tmp_path):
    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            counts.append(len(steps))

    stock = trained(make(tmp_path, callbacks=[late(LATE[reason])]))
    turbo = trained(make(tmp_path, callbacks=[late(LATE[reason]), Count()]), **NOTHING_ELSE, optimizer_in_backward=True)
    assert_same(stock, turbo)
    assert counts[0] > 0
    assert counts == [counts[0]] * STEPS
    (note,) = [note for note in turbo.report.notes if "stood" in note]
    assert note.startswith("optimizer_in_backward: all gradients stood in step 2 or more: ")
    assert reason in note


def test_memory_that_runs_out_in_the_first_backward(steps, tmp_path, monkeypatch):
    """Nothing was used: the step is done again."""
    stock = trained(make(tmp_path, max_grad_norm=0.05))
    look, looked = optimizer_in_backward.StepInBackward._look_at_bucket, []

    def out_of_memory(self: Any) -> None:
        looked.append(1)
        if len(looked) == 3:
            raise torch.OutOfMemoryError("no memory")
        look(self)

    monkeypatch.setattr(optimizer_in_backward.StepInBackward, "_look_at_bucket", out_of_memory)
    options = {**NOTHING_ELSE, "memory": "auto", "optimizer_in_backward": True}
    with pytest.warns(RuntimeWarning, match="is done again"):
        turbo = trained(make(tmp_path, max_grad_norm=0.05), **options)
    assert_same(stock, turbo)


class Twice(Trainer):
    """Its loss goes backward for a part of it."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        self.accelerator.backward(model.lm_head.weight.square().sum())
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
def test_a_loss_that_goes_backward_itself(steps, tmp_path, monkeypatch, max_norm):
    """With gradients of less than a bucket, all of which stand."""
    monkeypatch.setattr(policy, "_LEAST_BUCKET", 2**30)
    runs = [
        trained(make(tmp_path, cls=Twice, max_grad_norm=max_norm), **options)
        for options in ({}, {**NOTHING_ELSE, "optimizer_in_backward": True})
    ]
    assert_same(*runs)


def test_recordings_go_backward_once(tmp_path):
    """CUDA graphs are for adapters; where backward may come twice there are none."""
    report = trained(make(tmp_path, max_grad_norm=0.05), **ALL, graphs="auto", optimizer_in_backward=True).report
    rows = [row for row in report.rows if row.role == "graphs"]
    assert all(row.patched == 0 for row in rows)


def test_exactness(tmp_path):
    rows = [
        row_of(trained(make(tmp_path, max_grad_norm=norm), **NOTHING_ELSE, optimizer_in_backward=True).report)
        for norm in (0.0, 0.05)
    ]
    assert [row.exactness for row in rows] == ["exact", "re-associated"]


def test_clipping_that_comes_late(steps, tmp_path):
    clips = lambda: [late(lambda at: setattr(at.args, "max_grad_norm", 0.01))]  # noqa: E731
    stock = trained(make(tmp_path, callbacks=clips()))
    turbo = trained(make(tmp_path, callbacks=clips()), **NOTHING_ELSE, optimizer_in_backward=True)
    assert_same(stock, turbo)
    assert len(steps) >= 5 * STEPS


def test_weights_that_are_trained_later(steps, tmp_path):
    """As by a callback that unfreezes what the optimizer has had all along: the head, whose gradient comes first."""

    def thaw(at: Any) -> None:
        at.model.lm_head.weight.requires_grad_(True)

    def frozen_late(model: Any) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model.lm_head.weight.requires_grad_(False)
        return optimizer

    runs = [
        trained(make(tmp_path, optimizer=frozen_late, callbacks=[late(thaw)]), **options)
        for options in ({}, {**NOTHING_ELSE, "optimizer_in_backward": True})
    ]
    assert_same(*runs)
    assert float(runs[1].states["lm_head.weight"]["step"]) == STEPS - 1


class BackwardInLoss(Trainer):
    """Goes backward by itself for a part of the loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        (0.1 * super().compute_loss(model, inputs, **kwargs)).backward()
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


def test_gradients_before_backward_stand(steps, tmp_path):
    runs = [
        trained(make(tmp_path, cls=BackwardInLoss), **options)
        for options in ({}, {**NOTHING_ELSE, "optimizer_in_backward": True})
    ]
    assert_same(*runs)
    assert not steps
    assert any("there were gradients before backward" in note for note in runs[1].report.notes)


class TwiceByAccelerate(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.accelerator.backward(0.1 * super().compute_loss(model, inputs, **kwargs))
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


def test_a_second_backward_is_an_error(tmp_path):
    with (
        hf_turbo.session(**NOTHING_ELSE, optimizer_in_backward=True),
        pytest.raises(RuntimeError, match="a second backward in one step"),
    ):
        make(tmp_path, cls=TwiceByAccelerate).train()


class Reentrant(nn.Module):
    """A layer that is called twice, within checkpoints of its own: its gradient comes in two parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(97, 64), nn.Linear(64, 64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = self.embedding(input_ids)
        for _ in range(2):
            hidden = checkpoint(lambda x: self.layer(x).tanh(), hidden, use_reentrant=True)
        return {"loss": hidden.square().mean()}


@pytest.mark.parametrize("bucket", [8_000, 10**6])
def test_gradients_that_come_in_parts(bucket, monkeypatch, tmp_path):
    """An error if the first part was used, and stock's bits if it waited for the second."""
    monkeypatch.setattr(policy, "_LEAST_BUCKET", bucket)
    options = {**NOTHING_ELSE, "optimizer_in_backward": True}
    if bucket == 8_000:
        with hf_turbo.session(**options), pytest.raises(RuntimeError, match="a gradient came in several parts"):
            make(tmp_path, Reentrant()).train()
        return
    assert_same(trained(make(tmp_path, Reentrant())), trained(make(tmp_path, Reentrant()), **options))


def test_norm_of_gradients_of_several_dtypes(steps, tmp_path):
    """Some of them gone and some not: the norm that is logged is stock's."""

    def mixed() -> Any:
        model = tiny_model("llama")
        model.model.layers[0].input_layernorm.to(torch.bfloat16)
        model.model.embed_tokens.to(torch.float64)
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.float())
        return model

    runs = [
        trained(make(tmp_path, mixed()), **options) for options in ({}, {**NOTHING_ELSE, "optimizer_in_backward": True})
    ]
    assert_same(*runs)
    assert steps


def test_clipping_of_what_is_gone_is_an_error(tmp_path):
    step = optimizer_in_backward.StepInBackward(
        make(tmp_path), torch.optim.AdamW([nn.Parameter(torch.ones(2))]), 1, print
    )
    (parameter,) = step.parameters
    step._norms[id(parameter)], step._step = torch.tensor(3.0), 0
    accelerator, call = step._trainer.accelerator, lambda *args: args
    hf_turbo.enable()
    assert step.around_clip(accelerator, call, ([parameter], math.inf), {}) == 3.0
    with pytest.raises(RuntimeError, match="gradients were used before they were to be clipped"):
        step.around_clip(accelerator, call, ([parameter],), {"max_norm": 1.0})
    others = [nn.Parameter(torch.ones(2))]
    assert step.around_clip(accelerator, call, (others, 1.0), {}) == (others, 1.0, 2)


# -------------------------------------------------------------------------------------------------------- out of memory


@pytest.fixture
def failing(monkeypatch, steps) -> Callable[[int], None]:
    """Has memory run out in the middle of the states that the given step within backward makes, once."""

    def arm(at: int) -> None:
        stock = torch.optim.AdamW._init_group

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. By intent")

        def faulty(*args: Any) -> Any:
            if len(steps) == at and not armed.pop("done", True):
                with monkeypatch.context() as patch:
                    patch.setattr(torch, "zeros_like", fail)
                    return stock(*args)
            return stock(*args)

        armed = {"done": False}
        monkeypatch.setattr(torch.optim.AdamW, "_init_group", faulty)

    return arm


@pytest.mark.filterwarnings("ignore:hf_turbo. step:RuntimeWarning")
def test_memory_that_runs_out_before_anything_changed(stock, failing, tmp_path):
    """The step is done again, and half a state is none."""
    failing(1)
    turbo = trained(make(tmp_path), **NOTHING_ELSE, optimizer_in_backward=True)
    assert_same(stock, turbo)
    assert any("the step was taken back and is done again" in note for note in turbo.report.notes)


def test_memory_that_runs_out_later_is_an_error_that_says_why(failing, tmp_path):
    failing(2)
    with (
        hf_turbo.session(**NOTHING_ELSE, optimizer_in_backward=True),
        pytest.raises(
            torch.OutOfMemoryError, match="had begun to step within backward: resume from the last checkpoint"
        ),
    ):
        make(tmp_path).train()


def test_states_that_have_changed_are_not_taken_back(steps, monkeypatch, tmp_path):
    """Without weight decay averages change first, and weights are as they were."""

    def fail(self: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. By intent")

    monkeypatch.setattr(torch.Tensor, "sqrt", fail)
    trainer = make(tmp_path, weight_decay=0.0)
    before = copy.deepcopy(trainer.model.state_dict())
    with (
        hf_turbo.session(**NOTHING_ELSE, optimizer_in_backward=True),
        pytest.raises(torch.OutOfMemoryError, match="had begun to step within backward"),
    ):
        trainer.train()
    assert len(steps) == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_hooks_of_others_are_not_taken_back(tmp_path):
    parameter = nn.Parameter(torch.ones(2))
    step = optimizer_in_backward.StepInBackward(None, torch.optim.AdamW([parameter]), 1, print)
    step.apply()
    assert optimizer_in_backward.step_of([nn.Parameter(torch.ones(1)), parameter]) is step
    assert not optimizer_in_backward.foreign_hooks(parameter)
    parameter.register_post_accumulate_grad_hook(lambda _: None)
    assert optimizer_in_backward.foreign_hooks(parameter)
    assert step.revert()
    assert len(parameter._post_accumulate_grad_hooks) == 1


class Wide(nn.Module):
    """Of weights that page, in bf16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(384, 384, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x.bfloat16()
        for layer in self.layers:
            y = y + layer(y).tanh()
        return {"loss": (y.float().mean(-1) - labels).square().mean()}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:hf_turbo. step:RuntimeWarning")
@pytest.mark.parametrize("weights", ["as_is", "exact_master", "stochastic_rounding"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_bits_on_a_gpu(optim, weights, steps, tmp_path):
    """Those of one step behind backward by the same kernel, where states page, too."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = [{"x": torch.randn(384), "labels": torch.tensor(0.1 * i)} for i in range(16)]
    runs = []
    for in_backward in (False, True):
        trainer = make(tmp_path, Wide(), optim=optim, use_cpu=False, remove_unused_columns=False)
        trainer.train_dataset = rows
        options = {**NOTHING_ELSE, "optimizer": True, "bf16_weights": weights, "optimizer_in_backward": in_backward}
        runs.append(trained(trainer, **options))
        for log in runs[-1].logs:
            log.pop("grad_norm", None)  # by another kernel where it is made of all gradients
    assert runs[0].weights["layers.0.weight"].is_cuda
    assert_same(*runs)
    assert len(steps) >= 3 * STEPS
    paged = [getattr(value, "is_paged", False) for value in runs[1].states["layers.0.weight"].values()]
    assert sum(paged) == (2 if "paged" in optim else 0)  # remainders were given back at the end
