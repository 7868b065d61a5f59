"""bf16 weights under patched optimizers: as an fp32 run, saved and resumed; what is told of those that are as they are.

On the CPU by the torch reference of the kernels; those have tests of their own.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hf_turbo.kernels import _bf16_weights as kernel
from hf_turbo.patches import engine, optimizers
from hf_turbo.patches.bf16_weights import REMAINDER
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

import hf_turbo
from tests.models import batch, tiny_model
from tests.patches.test_optimizers import MAKERS, Model, is_turbo

pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore:hf_turbo. step:RuntimeWarning")]

BF16, CPU = torch.bfloat16, torch.device("cpu")
SOME = ["torch", "torch-fused", "bnb-8bit", "bnb-32bit"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def patch() -> Iterator[Callable[..., Any]]:
    """Patches an optimizer until the end of the test; returns notes and a function that reverts."""
    applied: list[Any] = []

    def apply(optimizer: Any, choice: Any = "as_is", **options: Any) -> tuple[list[str], Callable[[], None]]:
        notes: list[str] = []
        finding = optimizers.find(optimizer, notes.append, True, choice, **options)
        assert finding.patched == 1, dict(finding.reasons)
        for one in finding.patches:
            one.apply()
        applied.append(finding.patches)

        def revert() -> None:
            applied.remove(finding.patches)
            assert engine.revert_all(finding.patches) == []

        return notes, revert

    engine.switch(True)
    yield apply
    engine.switch(False)
    for patches in applied:
        engine.revert_all(patches)


def train(model: Model, optimizer: Any, steps: range, read: Callable[[Any], Any] = lambda param: param) -> None:
    """Gradients that depend on the weights, in bf16; `read` gives the weight that forward sees."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for name, param in model.named_parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.device, BF16) * 0.1
            grad += 0.1 * read(param.detach())
            param.grad = None if name == "idle" else grad.to(param.dtype)
        optimizer.step()


def master_of(param: torch.Tensor, optimizer: Any) -> torch.Tensor:
    return kernel.join(param.detach(), optimizer.state[param][REMAINDER])


def assert_same(one: Any, other: Any, optimizer: Any, other_optimizer: Any) -> None:
    """Weights and states to the last bit."""
    for name, param in one.named_parameters():
        twin = other.get_parameter(name)
        assert torch.equal(param, twin), name
        state, twin_state = optimizer.state.get(param, {}), other_optimizer.state.get(twin, {})
        assert state.keys() == twin_state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(twin_state[key])), (name, key)


@pytest.mark.parametrize("maker", SOME)
def test_exact_masters_are_an_fp32_run(device, patch, maker):
    """Same kernel, fp32 weights, whose nearest bf16 forward sees: the same bits, weights and states."""
    model, twin = Model(device, BF16), Model(device, BF16).float()
    optimizer, reference = MAKERS[maker](model.groups(), lr=1e-4), MAKERS[maker](twin.groups(), lr=1e-4)
    notes, _ = patch(optimizer, "exact_master")
    patch(reference)
    train(model, optimizer, range(6))
    train(twin, reference, range(6), read=lambda param: kernel.split(param)[0])
    assert is_turbo(optimizer)
    assert notes == []
    for name, param in model.named_parameters():
        if name == "idle":
            assert not optimizer.state.get(param)
            continue
        other = twin.get_parameter(name)
        assert torch.equal(master_of(param, optimizer), other), name
        for key, value in reference.state[other].items():
            mine = torch.as_tensor(optimizer.state[param][key])
            assert mine.dtype == torch.as_tensor(value).dtype, key
            assert torch.equal(mine, torch.as_tensor(value)), key
    plain = Model(device, BF16)
    stock = MAKERS[maker](plain.groups(), lr=1e-4)
    train(plain, stock, range(6))
    assert float((model.a != plain.a).float().mean()) > 0.05  # or the test could not fail


def saved(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("choice", ["exact_master", "stochastic_rounding"])
@pytest.mark.parametrize("maker", SOME)
def test_a_resumed_run_is_the_same_run(device, patch, maker, choice):
    model, twin = Model(device, BF16), Model(device, BF16)
    optimizer, whole = MAKERS[maker](model.groups(), lr=1e-4), MAKERS[maker](twin.groups(), lr=1e-4)
    patch(whole, choice, seed=5)
    train(twin, whole, range(6))
    patch(optimizer, choice, seed=5)
    train(model, optimizer, range(3))
    resumed = MAKERS[maker](model.groups(), lr=1e-4)
    patch(resumed, choice, seed=5)
    resumed.load_state_dict(saved(optimizer))
    train(model, resumed, range(3, 6))
    assert is_turbo(resumed)
    assert_same(model, twin, resumed, whole)
    if choice == "stochastic_rounding":
        other = Model(device, BF16)
        another = MAKERS[maker](other.groups(), lr=1e-4)
        patch(another, choice, seed=6)
        train(other, another, range(6))
        assert not torch.equal(other.a, twin.a)


@pytest.mark.parametrize("maker", SOME)
def test_stock_goes_on_from_exact_masters_and_back(device, patch, maker):
    """Stock reads what it knows, in its own dtype; coming back, masters begin as the weights are."""
    model = Model(device, BF16)
    optimizer = MAKERS[maker](model.groups(), lr=1e-4)
    patch(optimizer, "exact_master")
    train(model, optimizer, range(3))
    stock = MAKERS[maker](model.groups(), lr=1e-4)
    stock.load_state_dict(saved(optimizer))
    train(model, stock, range(3, 5))
    for name in ("exp_avg", "exp_avg_sq"):
        if name in stock.state[model.a]:
            assert stock.state[model.a][name].dtype == BF16
    back = MAKERS[maker](model.groups(), lr=1e-4)
    notes, _ = patch(back, "exact_master")
    back.load_state_dict(saved(stock))
    before = model.a.detach().clone()
    train(model, back, range(5, 6))
    assert is_turbo(back)
    assert notes == []
    moved = master_of(model.a, back) - before.float()
    assert 0 < float(moved.abs().max()) < 3e-4  # a step from the weights: no remainder of old
    assert float(back.state[model.a]["step"]) == 6
    assert back.state[model.a][REMAINDER].dtype == torch.int16


def test_weights_that_somebody_writes_are_the_masters(patch):
    model = Model(CPU, BF16)
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-4)
    notes, _ = patch(optimizer, "exact_master")
    train(model, optimizer, range(3))
    assert not notes
    with torch.no_grad():
        model.a.copy_(torch.ones_like(model.a))
    kept = optimizer.state[model.d][REMAINDER].clone()
    assert bool(kept.any())
    for group in optimizer.param_groups:
        group.update(lr=0.0)
    train(model, optimizer, range(3, 4))
    assert not bool(optimizer.state[model.a][REMAINDER].any())
    assert torch.equal(optimizer.state[model.d][REMAINDER], kept)
    assert len(notes) == 1
    assert "their masters are what was written" in notes[0]


@pytest.mark.parametrize("maker", ["torch", "torch-fused", "bnb-8bit"])
def test_steps_that_are_stocks(patch, maker):
    """While masters are asked for they are an error; once all is reverted stock finds states of its own."""
    model = Model(CPU, BF16)
    optimizer = MAKERS[maker](model.groups(), lr=1e-4)
    _, revert = patch(optimizer, "exact_master")
    train(model, optimizer, range(2))
    weight, rest = model.a.clone(), optimizer.state[model.a][REMAINDER].clone()
    with pytest.raises(RuntimeError, match="cannot have it: it is given a closure"):
        optimizer.step(lambda: None)
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="something watches the operations"):
        optimizer.step()
    assert torch.equal(model.a, weight)
    assert torch.equal(optimizer.state[model.a][REMAINDER], rest)
    engine.switch(False)
    optimizer.step()
    engine.switch(True)
    assert REMAINDER not in optimizer.state[model.a]
    train(model, optimizer, range(2, 4))
    assert bool(optimizer.state[model.a][REMAINDER].any())
    revert()
    plain = MAKERS[maker](model.groups(), lr=1e-4)
    train(model, optimizer, range(4, 5))
    train(model, plain, range(4, 5))
    stock_keys = {key: getattr(value, "dtype", None) for key, value in plain.state[model.a].items()}
    assert {key: getattr(value, "dtype", None) for key, value in optimizer.state[model.a].items()} == stock_keys


def test_copies_and_moved_memory(patch):
    """Remainders that are given other memory, as offloading does, are found there."""
    model, twin = Model(CPU, BF16), Model(CPU, BF16)
    optimizer, other = torch.optim.AdamW(model.groups(), lr=1e-4), torch.optim.AdamW(twin.groups(), lr=1e-4)
    patch(optimizer, "exact_master")
    patch(other, "exact_master")
    train(twin, other, range(4))
    train(model, optimizer, range(2))
    for state in optimizer.state.values():
        if state:
            state[REMAINDER] = state[REMAINDER].clone()
    train(model, optimizer, range(2, 4))
    assert_same(model, twin, optimizer, other)
    assert type(copy.deepcopy(optimizer)) is torch.optim.AdamW


def test_fp32_weights_are_left_alone(patch):
    model = Model(CPU)
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-4)
    notes, _ = patch(optimizer, "exact_master")
    train(model, optimizer, range(2))
    assert is_turbo(optimizer)
    assert notes == ["bf16_weights='exact_master': AdamW trains no bf16 weights"]
    assert REMAINDER not in optimizer.state[model.a]


# ------------------------------------------------------------------------------------------------ updates that are lost


def lost_share(note: str) -> float:
    assert "bf16_weights='exact_master' keeps them" in note
    return float(note.split(": ", 1)[1].split("%")[0]) / 100


def test_lost_updates_are_counted(patch):
    """Once, against a count of all; weights that move or are not bf16 give no note."""
    torch.manual_seed(0)
    weight = (torch.randn(300, 400) * 0.02).to(BF16)
    for dtype, rate, lost in ((BF16, 2e-5, 0.6), (BF16, 0.1, 0.0), (torch.float32, 2e-5, 0.0)):
        param = nn.Parameter(weight.to(dtype, copy=True))
        optimizer = torch.optim.AdamW([param], lr=rate, weight_decay=0.0)
        notes, _ = patch(optimizer)
        for _ in range(2):
            param.grad = torch.randn(300, 400).to(dtype)
            param.grad[:100] = 0
            optimizer.step()
            if not notes:
                continue
            assert len(notes) == 1
            if optimizer.state[param]["step"] == 1:
                exact = float((param[100:] == weight[100:]).float().mean())
                assert lost_share(notes[0]) == pytest.approx(exact, abs=0.02)
                assert exact > lost
        assert bool(notes) == (lost > 0)


def test_lost_updates_are_not_counted_in_a_warm_up(patch):
    param = nn.Parameter(torch.ones(100, dtype=BF16))
    optimizer = torch.optim.AdamW([param], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    notes, _ = patch(optimizer)
    for step in range(4):
        param.grad = torch.ones_like(param)
        optimizer.step()
        scheduler.step()
        assert len(notes) == (step >= 2)
    assert notes[0].startswith("step 3: 100% of the updates")


# ------------------------------------------------------------------------------------------------------------ lifecycle


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), {}, "SGD is not an AdamW"),
        (lambda p: torch.optim.AdamW(p), {"optimizer": False}, "switched off"),
    ],
)
def test_asked_for_and_not_to_be_had_raises(make, options, reason):
    hf_turbo.enable(bf16_weights="exact_master", **options)
    with pytest.raises(RuntimeError, match=rf"bf16_weights='exact_master' .*{reason}.*bf16_weights='as_is'"):
        Accelerator(cpu=True).prepare(make(nn.Linear(3, 3).to(BF16).parameters()))


def trainer(tmp_path: Any, model: Any = None, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", None)
    data = [{key: value[0] for key, value in batch(rows=1, seed=i, masked=False).items()} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        report_to="none",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-3, **options},
    )
    model = tiny_model("llama", BF16) if model is None else model
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def turbo(choice: str) -> list[Any]:
    return [hf_turbo.TurboCallback(bf16_weights=choice)]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_trainer_resumes_from_checkpoints_of_either(tmp_path, optim):
    """Turbo's own to the last bit; stock's and turbo's by each other."""
    whole = trainer(tmp_path / "turbo", optim=optim, callbacks=turbo("exact_master"))
    whole.train()
    row = next(r for r in hf_turbo.report().rows if r.role == "optimizer")
    assert (row.patched, row.kernel) == (1, "adamw, exact_master, clip_grad_norm")
    checkpoint = tmp_path / "turbo" / "checkpoint-2"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert all(one[REMAINDER].dtype == torch.int16 for one in state.values())
    assert any(bool(one[REMAINDER].any()) for one in state.values())

    resumed = trainer(tmp_path / "again", optim=optim, callbacks=turbo("exact_master"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for param, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(param, other)
    last = [
        torch.load(path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
        for path in (tmp_path / "turbo", tmp_path / "again")
    ]
    for key, one in last[0].items():
        assert torch.equal(one[REMAINDER], last[1][key][REMAINDER])

    stock = trainer(tmp_path / "stock", optim=optim)
    stock.train(resume_from_checkpoint=str(checkpoint))
    assert stock.state.global_step == 4
    curves = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, stock)]
    assert curves[1] == pytest.approx(curves[0], rel=2e-2)
    back = trainer(tmp_path / "back", optim=optim, max_steps=6, callbacks=turbo("exact_master"))
    back.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-4"))
    assert back.state.global_step == 6
    state = torch.load(tmp_path / "back" / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    assert any(bool(one[REMAINDER].any()) for one in state.values())


def test_the_report_and_a_warning_say_what_is_lost(tmp_path):
    callback = hf_turbo.TurboCallback(optimizer=True)
    run = trainer(tmp_path, learning_rate=1e-5, max_steps=2, save_strategy="no", callbacks=[callback])
    with pytest.warns(RuntimeWarning, match="updates of bf16 weights were lost"):
        run.train()
    notes = json.loads((tmp_path / "hf_turbo_report.json").read_text())["notes"]
    assert any("updates of bf16 weights were lost" in note for note in notes)
