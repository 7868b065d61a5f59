"""States that would not fit: a paged optimizer in the place of the user's, whose arguments and checkpoints stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from hf_turbo.kernels import _bf16_weights as kernel
from hf_turbo.patches import (
    bf16_weights,
    device_memory,
    engine,
    host_memory,
    managed_memory,
    optimizer_choice,
    optimizers,
)
from hf_turbo.patches.bf16_weights import REMAINDER
from torch import nn
from torch.utils.data import Dataset

import hf_turbo
from hf_turbo.policies import optimizers as policy
from hf_turbo.policies.footprint import Trained, optimizer_bytes
from tests.models import tiny_model
from tests.patches.test_bf16_weights import trainer as make_trainer

pytestmark = [pytest.mark.newest, pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")]

bitsandbytes = pytest.importorskip("bitsandbytes")

GIB = 2**30


@pytest.fixture
def patch() -> Iterator[Callable[..., None]]:
    """Patches optimizers until the end of the test."""
    applied: list[engine.Patch] = []

    def apply(optimizer: Any, note: Callable[[str], None] = print, **options: Any) -> None:
        for one in optimizers.find(optimizer, note, **options).patches:
            one.apply()
            applied.append(one)

    engine.switch(True)
    yield apply
    engine.switch(False)
    assert engine.revert_all(applied) == []


def test_what_does_not_fit():
    billion = [Trained(10**9, 2, False)]
    assert optimizer_bytes("adamw_torch", billion) == (4 * 10**9, 0)
    assert optimizer_bytes("adamw_torch", billion, exact_masters=True) == (10 * 10**9, 0)
    assert optimizer_bytes("adamw_torch", [Trained(10**9, 4, False)], exact_masters=True) == (8 * 10**9, 0)
    mixed = [*billion, Trained(10**4, 2, False), Trained(10**9, 4, False)]
    assert optimizer_bytes("paged_adamw_32bit", mixed, exact_masters=True) == (10 * 10**4, 18 * 10**9)
    assert policy.fits(4 * GIB, 2 * GIB, GIB, 0, 7 * GIB)
    assert not policy.fits(4 * GIB, 2 * GIB, GIB, 0, 6 * GIB)
    assert not policy.fits(4 * GIB, 2 * GIB, 4 * GIB, 0, 7 * GIB)
    assert not policy.fits(4 * GIB, 2 * GIB, GIB, 2 * GIB, 7 * GIB)


def test_never_a_less_precise_form():
    billion = [Trained(10**9, 4, False)]
    for optim, paged in policy.PAGED_FORMS.items():
        assert ("8bit" in optim) == ("8bit" in paged)
        assert policy.paged_form(optim, billion, False, 100 * GIB) == (paged, "")
    paged, reason = policy.paged_form("adamw_torch_fused", billion, False, 5 * GIB)
    assert paged is None
    assert "optim='paged_adamw_8bit'" in reason
    assert policy.paged_form("adamw_8bit", billion, False, 5 * GIB)[0] == "paged_adamw_8bit"
    in_16_bits = [Trained(10**9, 2, False)]
    assert policy.paged_form("adamw_8bit", in_16_bits, False, 4 * GIB)[0] == "paged_adamw_8bit"
    assert policy.paged_form("adamw_8bit", in_16_bits, True, 4 * GIB)[0] is None


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without memory to speak of."""
    monkeypatch.setattr(device_memory, "free", lambda device: 2**20)


def run(path: Any, turbo: bool, resume: Any = None, **options: Any) -> Any:
    hf = {"optimizer": True, **options.pop("turbo_options", {})}
    callbacks = [hf_turbo.TurboCallback(**hf)] if turbo else None
    one = make_trainer(path, tiny_model("llama"), callbacks=callbacks, **{"weight_decay": 0.1, **options})
    one.train(resume_from_checkpoint=resume)
    return one


def curve(one: Any) -> list[float]:
    return [log["loss"] for log in one.state.log_history if "loss" in log]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_stands_in_for_the_users_choice(tmp_path, scarce, optim):
    """Losses are stock's, arguments and checkpoints the user's: each goes on from the other's."""
    stock, turbo = run(tmp_path / "stock", False, optim=optim), run(tmp_path / "turbo", True, optim=optim)
    optimizer = turbo.optimizer.optimizer
    assert type(optimizer).__module__.startswith("bitsandbytes")
    assert optimizer.is_paged
    assert turbo.args.optim == optim
    assert "get_optimizer_cls_and_kwargs" not in vars(turbo)
    assert curve(turbo) == pytest.approx(curve(stock), rel=2e-4)
    report = json.loads((tmp_path / "turbo" / "hf_turbo_report.json").read_text())
    row = next(row for row in report["rows"] if row["role"] == "optimizer")
    paged = policy.PAGED_FORMS[optim]
    assert row["kernel"] == f"adamw ({paged} for {optim}), clip_grad_norm"
    assert any(f"{paged} stands in for it" in note for note in report["notes"])

    folders = [tmp_path / name / "checkpoint-2" for name in ("stock", "turbo")]
    arguments = [torch.load(folder / "training_args.bin", weights_only=False) for folder in folders]
    assert arguments[0].optim == arguments[1].optim
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in folders]
    for mine, theirs in zip(states[1]["state"].values(), states[0]["state"].values(), strict=True):
        assert mine.keys() == theirs.keys()
    for mine, theirs in zip(states[1]["param_groups"], states[0]["param_groups"], strict=True):
        assert mine == theirs

    goes_on = run(tmp_path / "goes on", False, resume=str(folders[1]), optim=optim)
    assert curve(goes_on) == pytest.approx(curve(stock), rel=2e-4)
    resumed = run(tmp_path / "resumed", True, resume=str(folders[0]), optim=optim)
    assert resumed.optimizer.optimizer.is_paged
    assert curve(resumed) == pytest.approx(curve(stock), rel=2e-4)


def test_exact_masters_beside_paged_states(tmp_path, scarce):
    """A resumed run is the same run, to the last bit."""
    options = {"optim": "adamw_torch", "turbo_options": {"bf16_weights": "exact_master"}}
    models = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        callbacks = [hf_turbo.TurboCallback(**options["turbo_options"])]
        one = make_trainer(tmp_path / name, optim="adamw_torch", callbacks=callbacks)
        one.train(resume_from_checkpoint=resume)
        assert one.optimizer.optimizer.is_paged
        models.append(one.model)
    for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(param, other)
    state = torch.load(tmp_path / "whole" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"][0]
    assert {"step", "exp_avg", "exp_avg_sq", "hf_turbo_remainder"} == state.keys()


NAMED = [("adamw_torch", "paged_adamw_8bit"), ("adamw_torch", "paged_adamw_32bit"), ("adamw_8bit", "adamw_torch_fused")]


@pytest.mark.parametrize(("optim", "named"), NAMED)
def test_by_name(tmp_path, optim, named):
    """The run, and the checkpoint, of a script whose arguments say so; it goes on from checkpoints of the script's."""
    told = run(tmp_path / "told", True, optim=named)
    given = {"turbo_options": {"optim": named}}
    turbo = run(tmp_path / "turbo", True, optim=optim, **given)
    assert turbo.args.optim == optim
    assert "get_optimizer_cls_and_kwargs" not in vars(turbo)
    assert curve(turbo) == curve(told)
    report = json.loads((tmp_path / "turbo" / "hf_turbo_report.json").read_text())
    row = next(row for row in report["rows"] if row["role"] == "optimizer")
    assert row["kernel"] == f"adamw ({named} for {optim}), clip_grad_norm"
    assert row["exactness"] == ("approximate" if named == "paged_adamw_8bit" else "re-associated")
    assert any(f"optim='{named}' in the place of {optim}" in note for note in report["notes"])
    states = [
        torch.load(tmp_path / name / "checkpoint-2" / "optimizer.pt", weights_only=True) for name in ("told", "turbo")
    ]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for mine, other in zip(states[1]["state"].values(), states[0]["state"].values(), strict=True):
        assert mine.keys() == other.keys()
    resumed = run(tmp_path / "resumed", True, optim=optim, resume=str(tmp_path / "turbo" / "checkpoint-2"), **given)
    assert curve(resumed) == curve(told)


@pytest.mark.parametrize(("optim", "named"), NAMED[:2])
def test_states_of_the_scripts_own(tmp_path, optim, named):
    """Those of torch's AdamW go on as fp32 states of any other, in 8 bits too: as precise as they were."""
    stock = run(tmp_path / "stock", False, optim=optim)
    options = {"optim": optim, "turbo_options": {"optim": named}}
    goes_on = run(tmp_path / "goes on", True, resume=str(tmp_path / "stock" / "checkpoint-2"), **options)
    assert curve(goes_on) == pytest.approx(curve(stock), rel=2e-4)


def test_states_of_no_use_by_name(tmp_path):
    """8 bits are not what torch's AdamW goes on from."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    codes = torch.zeros(3, dtype=torch.uint8)
    state = {"state1": codes, "state2": codes, "qmap1": torch.zeros(256), "step": 1}
    saved = {"state": {0: {"__bnb_optimizer_quant_state__": state}}, "param_groups": [{"params": [0], "alpha": 0.0}]}
    stand_in = optimizer_choice.StandIn("adamw_8bit", "adamw_torch", None)
    with pytest.raises(ValueError, match=r"states in 8 bits.*resume with the optim"):
        stand_in.to_load(optimizer, saved)
    wide = bitsandbytes.optim.AdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"states in 8 bits, which paged_adamw_32bit cannot take"):
        optimizer_choice.StandIn("adamw_8bit", "paged_adamw_32bit", None).to_load(wide, saved)
    for name in ("state1", "state2"):
        state[name] = torch.ones(3)
    del state["qmap1"]
    optimizer.load_state_dict(stand_in.to_load(optimizer, saved))
    (loaded,) = optimizer.state.values()
    assert loaded.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert "alpha" not in optimizer.param_groups[0]


def test_what_a_scheduler_keeps_in_groups():
    """Stock loads it, and the scheduler reads it at its next step."""
    for stand_in in (
        optimizer_choice.StandIn("adamw_8bit", "adamw_torch", None),
        optimizer_choice.StandIn("adamw_torch", "adamw_8bit", torch.optim.AdamW([torch.zeros(1)]).param_groups[0]),
    ):
        cls = torch.optim.AdamW if stand_in.used == "adamw_torch" else bitsandbytes.optim.AdamW8bit
        optimizer = cls([nn.Parameter(torch.zeros(3))])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
        optimizer.load_state_dict(stand_in.to_load(optimizer, stand_in.saved(optimizer, optimizer.state_dict())))
        optimizer.step()
        scheduler.step()


def test_models_that_the_trainer_makes(tmp_path):
    """For each training another optimizer, and options as arguments have them then."""
    hf_turbo.enable(optimizer=True, optim="adamw_torch")
    one = make_trainer(tmp_path, tiny_model("llama"), optim="adamw_8bit", max_steps=1, save_strategy="no")

    def make(*_: Any) -> Any:
        one.args.learning_rate *= 2  # as a search for it does, once training has begun
        return tiny_model("llama")

    one.model_init = make
    for _ in range(3):
        one.train()
        assert isinstance(one.optimizer.optimizer, torch.optim.AdamW)
        assert one.optimizer.optimizer.param_groups[0]["initial_lr"] == one.args.learning_rate


def test_optimizers_of_the_scripts_own(tmp_path):
    one = make_trainer(tmp_path, tiny_model("llama"), optim="adamw_8bit", max_steps=1, save_strategy="no")
    one.create_optimizer = lambda *_: setattr(one, "optimizer", torch.optim.SGD(one.model.parameters(), lr=1e-3))
    hf_turbo.enable(optim="adamw_torch")
    with pytest.raises(RuntimeError, match="<lambda> is the script's"):
        one.train()
    with pytest.raises(RuntimeError, match="sgd, which is no AdamW"):
        make_trainer(tmp_path, optim="sgd", max_steps=1, save_strategy="no").train()
    hf_turbo.disable()
    with pytest.raises(RuntimeError, match=r"optim='adamw_torch' was asked for .*switched off"):
        run(tmp_path, True, optim="adamw_8bit", turbo_options={"optim": "adamw_torch", "optimizer": False})


def test_by_name_or_not_at_all(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"optim='adamw_torch' was asked for but .*optim_args is given.*optim='auto'"
    ):
        run(tmp_path, True, optim="adamw_8bit", optim_args="x=1", turbo_options={"optim": "adamw_torch"})
    hf_turbo.enable(optim="adamw_8bit")
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="a loop of your own makes its optimizer"):
        Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
def test_a_second_training_by_name(tmp_path, optim):
    """Of the same optimizer; and one of the script's own that has the name by chance is none."""
    hf_turbo.enable(optimizer=True, optim="adamw_torch")
    one = run(tmp_path, False, optim=optim)
    first = one.optimizer.optimizer
    one.args.max_steps = 6
    one.train()
    assert one.optimizer.optimizer is first
    other = make_trainer(tmp_path, tiny_model("llama"), optim="adamw_torch", max_steps=1, save_strategy="no")
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=1e-3)
    with pytest.raises(RuntimeError, match="the script has made its optimizer"):
        other.train()


def test_a_second_training_saves_alike(tmp_path, scarce):
    hf_turbo.enable(optimizer=True)
    one = run(tmp_path, False, optim="adamw_torch")
    assert one.optimizer.optimizer.is_paged
    one.args.max_steps = 6
    one.train()
    state = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"][0]
    assert "exp_avg" in state


@pytest.mark.parametrize(
    ("options", "free", "said"),
    [
        ({}, 2**40, None),
        ({"optim": "sgd", "turbo_options": {"optimizer": "auto"}}, 2**20, None),
        ({"turbo_options": {"memory": "as_is"}}, 2**20, None),
        ({"optim_args": "x=1"}, 2**20, "optim_args"),
    ],
)
def test_the_users_choice_stands(tmp_path, monkeypatch, options, free, said):
    monkeypatch.setattr(device_memory, "free", lambda device: free)
    one = run(tmp_path, True, max_steps=1, save_strategy="no", **{"optim": "adamw_torch", **options})
    assert type(one.optimizer.optimizer).__module__.startswith("torch")
    notes = [note for note in hf_turbo.report().notes if "do not fit" in note]
    assert bool(notes) == (said is not None)
    assert said is None or said in notes[0]


class Counting(Dataset):
    """Which of its rows come depends on those that were asked for before."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.asked.append(i)
        x = torch.rand(4)
        return {"x": x, "labels": x.sum()}


class Regression(nn.Module):
    """Without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}


def test_any_module_and_dataset(tmp_path, monkeypatch):
    """The estimate, made where free memory is known, reads nothing that is the script's and does not fail."""
    monkeypatch.setattr(device_memory, "free", lambda device: 2**40)
    runs = []
    for turbo in (False, True):
        torch.manual_seed(0)
        callbacks = [hf_turbo.TurboCallback()] if turbo else None
        one = make_trainer(tmp_path, Regression(), optim="adamw_torch", save_strategy="no", callbacks=callbacks)
        one.train_dataset = Counting()
        one.train()
        runs.append((one.train_dataset.asked, curve(one)))
    assert runs[0] == runs[1]


def test_length_of_rows(tmp_path):
    """Of a table's; a transform of the script's own is not called. Random numbers are as before."""
    table = datasets.Dataset.from_list([{"input_ids": [1] * (5 + i)} for i in range(20)])
    one = make_trainer(tmp_path)
    state = torch.get_rng_state()
    one.train_dataset = table
    assert optimizer_choice.sizes_of_pass(one) == (2 * (5 + 15), 2, 48, 80, 2)
    one.train_dataset = table.with_transform(lambda rows: pytest.fail("a row was read"))
    assert optimizer_choice.sizes_of_pass(one)[0] == 2 * 1024
    one.train_dataset = table.rename_column("input_ids", "other")
    assert optimizer_choice.sizes_of_pass(one)[0] == 2 * 1024
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("why", ["no bitsandbytes", "host", "optimizers="])
def test_what_cannot_be_paged_is_said(tmp_path, scarce, monkeypatch, why):
    if why == "no bitsandbytes":
        monkeypatch.setattr(optimizer_choice.importlib.util, "find_spec", lambda name: None)
    if why == "host":
        monkeypatch.setattr(host_memory, "available", lambda: -1)  # small states do not page
    one = make_trainer(
        tmp_path, tiny_model("llama"), max_steps=1, save_strategy="no", callbacks=[hf_turbo.TurboCallback()]
    )
    if why == "optimizers=":
        one.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"lr": 1e-3})
    one.train()
    assert type(one.optimizer.optimizer) is torch.optim.AdamW
    (note,) = [note for note in hf_turbo.report().notes if "do not fit" in note]
    assert {"no bitsandbytes": "not installed", "host": "host memory", "optimizers=": "has made"}[why] in note


@pytest.mark.gpu
@pytest.mark.parametrize("stands_in", [True, False])
def test_loaded_states_page(tmp_path, patch, stands_in):
    """Of 100,000 elements or more, in managed memory again; the next step is that of a run that never stopped."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    value = torch.randn(300, 500, device="cuda")
    params = [torch.nn.Parameter(value.clone()) for _ in range(2)]
    torch_group = {k: v for k, v in torch.optim.AdamW([params[0]], lr=1e-3).param_groups[0].items() if k != "params"}
    made = [bitsandbytes.optim.AdamW([p], lr=1e-3, is_paged=True) for p in params]
    for one in made:
        if stands_in:
            stand_in = optimizer_choice.StandIn("adamw_torch", "paged_adamw_32bit", torch_group)
            optimizer_choice._STAND_INS[one] = stand_in
        patch(one)
    for step in range(3):
        grad = torch.randn(300, 500, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        for param, one in zip(params, made, strict=True):
            param.grad = grad.clone()
            one.step()
        torch.save(made[0].state_dict(), tmp_path / "optimizer.pt")
        made[1].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True, map_location="cpu"))
        state = made[1].state[params[1]]["state1"]
        assert state.data_ptr() in {buffer.data_ptr() for buffer in made[1].page_mng.paged_tensors}
        assert state.is_paged
        assert torch.equal(params[0], params[1])


def test_notes_of_paged_memory_are_not_believed(tmp_path, patch):
    """What was saved from a GPU says of its states that they are in paged memory; bitsandbytes fetches such, and the
    process ends where they are not."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    param = torch.nn.Parameter(torch.randn(300, 500))
    optimizer = bitsandbytes.optim.AdamW([param], lr=1e-3, is_paged=True)
    patch(optimizer, on_cpu=True)
    param.grad = torch.randn(300, 500)
    optimizer.step()
    for name in ("state1", "state2"):
        optimizer.state[param][name].is_paged = True
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert any(getattr(value, "is_paged", False) for value in walk(loaded)), "the note is saved"
    optimizer.load_state_dict(loaded)
    assert not any(getattr(value, "is_paged", False) for value in walk(optimizer.state[param]))
    optimizer.step()


def walk(value):
    """Tensors in dicts of dicts."""
    if isinstance(value, dict):
        for each in value.values():
            yield from walk(each)
    elif torch.is_tensor(value):
        yield value


class Note:
    """Stands for a tensor in managed memory."""

    def __init__(self, address: int):
        self.data_ptr = lambda: address


def test_when_pages_are_asked_for(monkeypatch):
    """What is new, what may have been read on the host, and all of it now and then."""
    functional = pytest.importorskip("bitsandbytes").functional
    clock, asked, notes = [0.0], [], []
    monkeypatch.setattr(managed_memory.time, "monotonic", lambda: 100 + clock[0])
    monkeypatch.setattr(managed_memory, "_let_reach", lambda tensor: tensor.data_ptr() != 3)
    monkeypatch.setattr(functional, "prefetch_tensor", lambda tensor: asked.append(tensor.data_ptr()))
    states = managed_memory.ManagedStates(notes.append)

    def step(*addresses: int) -> list[int]:
        asked.clear()
        if addresses:
            states.hold(list(map(Note, addresses)))
        states.fetch_if_due()
        return asked

    assert step() == []
    assert step(1, 2) == [1, 2]
    assert step() == []
    assert step(1, 2) == []
    assert notes == []
    assert step(1, 2, 3) == [1, 2, 3]
    assert ["lets the GPU reach none" in note for note in notes] == [True]
    assert step() == [1, 2, 3], "at each step, where the driver moves them"
    states = managed_memory.ManagedStates(notes.append)
    assert step(4) == [4]
    states.fetch_soon()
    assert step() == [4]
    clock[0] = 299.0
    assert step() == []
    clock[0] = 301.0
    assert step() == [4]
    assert step() == []


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 32])
def test_paged_exact_masters(tmp_path, patch, bits):
    """The bits of masters on the GPU, also while all states lie on the host, and after they were saved and loaded; no
    state of a large weight takes memory of the GPU that torch could have.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    values = [torch.randn(size, device="cuda", dtype=torch.bfloat16) * 0.02 for size in ((300, 501), (7,), (2048, 512))]
    models, made = [], []

    def add(paged: bool) -> None:
        models.append([nn.Parameter(value.clone()) for value in values])
        made.append(bitsandbytes.optim.AdamW(models[-1], lr=1e-4, optim_bits=bits, is_paged=paged))
        patch(made[-1], notes.append, bf16_weights="exact_master")

    def step(number: int) -> None:
        for i in range(len(values)):
            generator = torch.Generator("cuda").manual_seed(10 * number + i)
            grad = torch.randn(values[i].shape, device="cuda", generator=generator).bfloat16()
            for model in models:
                model[i].grad = grad
        for one in made:
            one.step()

    def agree() -> None:
        for i in range(len(values)):
            states = [one.state[model[i]] for one, model in zip(made, models, strict=True)]
            weights = [model[i].detach().cpu() for model in models]
            masters = [kernel.join(w, s[REMAINDER].cpu()) for w, s in zip(weights, states, strict=True)]
            assert all(torch.equal(master, masters[0]) for master in masters)
            for name in ("state1", "state2"):
                assert all(torch.equal(state[name].cpu(), states[0][name].cpu()) for state in states)

    notes: list[str] = []
    add(paged=False)
    add(paged=True)
    for number in range(2):
        step(number)
    agree()
    param = models[1][2]
    assert all(made[1].state[param][name].is_paged for name in ("state1", "state2", REMAINDER))
    assert made[1].state[models[1][1]][REMAINDER].is_cuda  # a small one

    managed = optimizers._PATCHED[made[1]].managed
    assert len(managed._tensors) == 6
    managed.fetch_if_due()
    for tensor in managed._tensors:
        tensor.view(torch.uint8).sum()  # of the host: pages move to who reads them
    step(2)
    agree()

    torch.save(made[1].state_dict(), tmp_path / "optimizer.pt")
    assert managed._next == 0
    before = torch.cuda.memory_allocated()
    add(paged=True)
    with torch.no_grad():
        for param, other in zip(models[2], models[1], strict=True):
            param.copy_(other)
    made[2].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True, map_location="cpu"))
    agree()
    assert torch.cuda.memory_allocated() - before < 1.5 * sum(value.nbytes for value in values)
    step(3)
    agree()
    assert made[2].state[models[2][2]][REMAINDER].is_paged
    assert len(optimizers._PATCHED[made[2]].managed._tensors) == 6
    assert notes == []


def test_remainders_are_taken_again(monkeypatch):
    """Managed memory is never freed: after a training, or a state that was loaded, it serves the next."""
    functional, made = bitsandbytes.functional, []

    def get_paged(size: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        made.append(torch.full((size,), 7, dtype=dtype))
        made[-1].is_paged, made[-1].page_deviceid = True, 0
        return made[-1]

    monkeypatch.setattr(functional, "get_paged", get_paged)
    monkeypatch.setattr(functional, "fill", lambda data, value: data.fill_(value if data.is_paged else 9))
    monkeypatch.setattr(managed_memory, "pages", lambda optimizer: True)
    param = nn.Parameter(torch.randn(3, 5, dtype=torch.bfloat16))
    optimizer = bitsandbytes.optim.PagedAdamW8bit([param])
    averages = torch.zeros(3, 5, dtype=torch.uint8)
    averages.is_paged = True
    optimizer.state[param] = {"state1": averages}
    weights = bf16_weights.Bf16Weights("exact_master", 0, print)
    weights.make_states(optimizer)
    rest = optimizer.state[param][REMAINDER]
    assert (rest.shape, rest.dtype, rest.is_paged, int(rest.abs().sum())) == ((3, 5), torch.int16, True, 0)
    weights.make_states(optimizer)
    assert optimizer.state[param][REMAINDER] is rest

    rest.fill_(-3)
    saved = {"param_groups": [{"params": [0]}], "state": {0: {REMAINDER: rest}}}
    weights.restore(optimizer, saved)
    assert optimizer.state[param][REMAINDER] is rest
    assert bool((rest == -3).all())
    weights.begin_step([(param, optimizer.state[param])])
    weights.end_step([(param, optimizer.state[param])])
    with torch.no_grad():
        param.zero_()
    weights.begin_step([(param, optimizer.state[param])])
    assert not bool(rest.any())

    rest.fill_(5)
    assert weights.give_back(optimizer)
    assert REMAINDER not in optimizer.state[param]
    weights.make_states(optimizer)
    assert optimizer.state[param][REMAINDER] is rest
    assert not bool(rest.any())
    assert len(made) == 1
