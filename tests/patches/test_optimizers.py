"""Patched optimizers: as stock for whoever uses, wraps, saves, copies or changes them; on the CPU by `on_cpu`."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from hf_turbo.kernels.adamw import MultiTensorAdamW
from hf_turbo.patches import clipping, engine, optimizers, retry
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

import hf_turbo
from tests.models import batch, tiny_model

pytestmark = pytest.mark.newest

bitsandbytes = pytest.importorskip("bitsandbytes")

MAKERS: dict[str, Callable[..., Any]] = {
    "torch": torch.optim.AdamW,
    "torch-fused": lambda params, **kw: torch.optim.AdamW(params, fused=True, **kw),
    "torch-loop": lambda params, **kw: torch.optim.AdamW(params, foreach=False, **kw),
    "bnb-8bit": bitsandbytes.optim.AdamW8bit,
    "bnb-hf-8bit": lambda params, **kw: bitsandbytes.optim.AdamW(params, optim_bits=8, **kw),
    "bnb-32bit": bitsandbytes.optim.AdamW,
    "bnb-paged-8bit": bitsandbytes.optim.PagedAdamW8bit,
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=list(MAKERS))
def maker(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return MAKERS[request.param]


@pytest.fixture(autouse=True)
def _paged_falls_back(recwarn: Any) -> None:
    """On the CPU bitsandbytes warns that paging falls back."""


@pytest.fixture
def patch() -> Iterator[Callable[..., Any]]:
    """Patches an optimizer until the end of the test; returns notes and a function that reverts."""
    applied: list[Any] = []

    def apply(optimizer: Any, **options: Any) -> tuple[list[str], Callable[[], list[bool]]]:
        notes: list[str] = []
        finding = optimizers.find(optimizer, notes.append, **{"on_cpu": True, **options})
        assert finding.patched == 1, dict(finding.reasons)
        for one in finding.patches:
            one.apply()
        patches = list(reversed(finding.patches))
        applied.extend(patches)

        def revert() -> list[bool]:
            for one in patches:
                applied.remove(one)
            return [one.revert() for one in patches]

        return notes, revert

    engine.switch(True)
    yield apply
    engine.switch(False)
    for one in reversed(applied):
        one.revert()


class Model(nn.Module):
    """Parameters of 8-bit and of 32-bit states, and one that never gets a gradient."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"a": (64, 80), "b": (40,), "c": (3, 5), "d": (4100,), "idle": (7,)}.items():
            value = torch.randn(shape, generator=generator).to(device, dtype)
            setattr(self, name, nn.Parameter(value))

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.a, self.d, self.idle], "weight_decay": 0.1},
            {"params": [self.b, self.c], "weight_decay": 0.0, "lr": 3e-3},
        ]


def set_grads(model: Model, step: int, skip: tuple[str, ...] = ("idle",)) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for name, param in model.named_parameters():
        grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype) * 0.1
        param.grad = None if name in skip else grad


def train(model: Model, optimizer: Any, steps: range, scheduler: Any = None, **options: Any) -> None:
    for step in steps:
        set_grads(model, step, **options)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def assert_close(model: Model, other: Model, optimizer: Any = None) -> None:
    """Equal to rounding; with 8-bit states equal on average: on the CPU bitsandbytes takes near codes."""
    by_codes = "bitsandbytes" in type(optimizer).__module__
    for name, param in model.named_parameters():
        expected = other.get_parameter(name)
        if by_codes:
            difference = (param - expected).abs()
            assert float(difference.mean()) < 2e-5, name
            assert float(difference.max()) < 5e-3, name
        else:
            torch.testing.assert_close(param, expected, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def is_turbo(optimizer: Any) -> bool:
    """Whether the last steps ran on tables of ours."""
    stepper = optimizers._PATCHED.get(optimizer)
    return stepper is not None and stepper._plan is not None


def test_curve_is_that_of_stock(device, maker, patch):
    model, twin = Model(device), Model(device)
    optimizer, stock = maker(model.groups(), lr=1e-2), maker(twin.groups(), lr=1e-2)
    train(twin, stock, range(6))
    notes, _ = patch(optimizer)
    train(model, optimizer, range(6))
    assert is_turbo(optimizer)
    assert notes == []
    assert_close(model, twin, optimizer)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[param].keys() == stock.state[other].keys()
        for key, value in stock.state[other].items():
            mine = optimizer.state[param][key]
            assert type(mine) is type(value)
            if torch.is_tensor(value):
                assert (mine.dtype, mine.device, mine.shape) == (value.dtype, value.device, value.shape), key
        if stock.state[other]:
            assert float(optimizer.state[param]["step"]) == float(stock.state[other]["step"]) == 6
    assert model.idle.grad is None
    assert not optimizer.state.get(model.idle)


@pytest.mark.parametrize("way", ["stock to turbo", "turbo to stock", "turbo off and on again"])
def test_changes_over_in_mid_run(device, maker, patch, way):
    """Through a saved state_dict, as a resumed training does it."""
    model, twin = Model(device), Model(device)
    optimizer, stock = maker(model.groups(), lr=1e-2), maker(twin.groups(), lr=1e-2)
    train(twin, stock, range(8))
    if way == "stock to turbo":
        train(model, optimizer, range(4))
    else:
        _, revert = patch(optimizer)
        train(model, optimizer, range(4))
        if way == "turbo off and on again":
            assert all(revert())
            train(model, optimizer, range(4, 6))
            patch(optimizer)
            train(model, optimizer, range(6, 8))
            assert_close(model, twin, optimizer)
            return
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert b"hf_turbo" not in file.getvalue()
    file.seek(0)
    resumed = maker(model.groups(), lr=1e-2)
    resumed.load_state_dict(torch.load(file, weights_only=False))
    if way == "stock to turbo":
        patch(resumed)
    train(model, resumed, range(4, 8))
    assert is_turbo(resumed) == (way == "stock to turbo")
    assert_close(model, twin, optimizer)


def test_state_dict_loaded_into_a_patched_optimizer(device, maker, patch):
    """The tables were made of the states before it."""
    model, twin = Model(device), Model(device)
    optimizer, stock = maker(model.groups(), lr=1e-2), maker(twin.groups(), lr=1e-2)
    patch(optimizer)
    train(model, optimizer, range(2))
    train(twin, stock, range(2))
    saved, saved_params = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    twin_saved, twin_params = copy.deepcopy(stock.state_dict()), copy.deepcopy(twin.state_dict())
    train(model, optimizer, range(2, 4))
    train(twin, stock, range(2, 4))
    for one, one_optimizer, params, state in (
        (model, optimizer, saved_params, saved),
        (twin, stock, twin_params, twin_saved),
    ):
        one.load_state_dict(params)
        one_optimizer.load_state_dict(state)
        train(one, one_optimizer, range(4, 6))
    assert_close(model, twin, optimizer)
    assert float(optimizer.state[model.a]["step"]) == 4


@pytest.mark.parametrize("first", ["scheduler", "patch"])
def test_learning_rate_schedulers(device, maker, patch, first, recwarn):
    """They put a wrapper of `step` on the optimizer, and warn where it was never called."""
    model, twin = Model(device), Model(device)
    optimizer, stock = maker(model.groups(), lr=1e-2), maker(twin.groups(), lr=1e-2)
    schedule = lambda step: 1 / (1 + step)  # noqa: E731
    train(twin, stock, range(4), LambdaLR(stock, schedule))
    if first == "scheduler":
        scheduler = LambdaLR(optimizer, schedule)
        scheduled = optimizer.step
        _, revert = patch(optimizer)
    else:
        _, revert = patch(optimizer)
        scheduler = LambdaLR(optimizer, schedule)
    train(model, optimizer, range(4), scheduler)
    assert is_turbo(optimizer)
    assert optimizer._opt_called
    assert_close(model, twin, optimizer)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    assert all(revert())
    if first == "scheduler":
        assert optimizer.step is scheduled
    assert type(optimizer) is type(stock)
    train(model, optimizer, range(4, 6), scheduler)
    assert optimizer not in optimizers._PATCHED


def test_every_step_reads_its_rates(device, maker, patch):
    model, twin = Model(device), Model(device)
    optimizer, stock = maker(model.groups(), lr=1e-2), maker(twin.groups(), lr=1e-2)
    patch(optimizer)
    for step in range(4):
        for one in (optimizer, stock):
            group = one.param_groups[step % 2]
            group.update(lr=group["lr"] * 0.5, eps=1e-6, weight_decay=0.2, betas=(0.8, 0.99))
        train(model, optimizer, range(step, step + 1))
        train(twin, stock, range(step, step + 1))
    assert_close(model, twin, optimizer)


def test_parameters_that_come_and_go(device, maker, patch):
    """Without a gradient for a step, with a first one late, frozen, and in a group that is added late."""
    model, twin = Model(device), Model(device)
    extra = [nn.Parameter(torch.ones(30, device=device)) for _ in range(2)]
    runs = []
    for one, new in ((model, extra[0]), (twin, extra[1])):
        optimizer = maker(one.groups(), lr=1e-2)
        if one is model:
            patch(optimizer)
        train(one, optimizer, range(2), skip=("idle", "c"))
        train(one, optimizer, range(2, 4), skip=("b",))
        optimizer.add_param_group({"params": [new], "lr": 1e-1})
        new.grad = torch.full_like(new, 0.5)
        train(one, optimizer, range(4, 6))
        runs.append((optimizer, new))
    assert is_turbo(runs[0][0])
    assert_close(model, twin, runs[0][0])
    torch.testing.assert_close(extra[0], extra[1])
    for name in ("a", "b", "c", "idle"):
        steps = [
            float(run[0].state[one.get_parameter(name)]["step"]) for run, one in zip(runs, (model, twin), strict=True)
        ]
        assert steps[0] == steps[1], name


def test_memory_that_moves(device, maker, patch):
    """`.data =` for parameters, states replaced one by one: offloading between steps."""
    model, twin = Model(device), Model(device)
    optimizer, stock = maker(model.groups(), lr=1e-2), maker(twin.groups(), lr=1e-2)
    patch(optimizer)
    train(model, optimizer, range(2))
    for param in model.parameters():
        param.data = param.data.clone()
    train(model, optimizer, range(2, 3))
    for state in optimizer.state.values():
        for key, value in state.items():
            if torch.is_tensor(value):
                state[key] = value.clone()
    train(model, optimizer, range(3, 4))
    train(twin, stock, range(4))
    assert is_turbo(optimizer)
    assert_close(model, twin, optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(device, dtype, patch):
    for maker in (MAKERS["torch-fused"], MAKERS["bnb-8bit"]):
        model, twin = Model(device, dtype), Model(device, dtype)
        optimizer, stock = maker(model.groups(), lr=1e-2, eps=1e-4), maker(twin.groups(), lr=1e-2, eps=1e-4)
        patch(optimizer)
        train(model, optimizer, range(3))
        train(twin, stock, range(3))
        assert is_turbo(optimizer)
        for name, param in model.named_parameters():
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(param, twin.get_parameter(name), rtol=4 * eps, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 32])
def test_states_in_managed_memory(patch, bits):
    """Of 100,000 elements or more: torch takes them for CPU tensors."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    make = lambda p: bitsandbytes.optim.AdamW([p], lr=1e-2, optim_bits=bits, is_paged=True)  # noqa: E731
    value = torch.randn(300, 500, device="cuda")
    params = [nn.Parameter(value.clone()) for _ in range(2)]
    optimizer, stock = map(make, params)
    patch(optimizer)
    for step in range(3):
        for param, one in zip(params, (optimizer, stock), strict=True):
            param.grad = torch.randn(300, 500, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
            one.step()
    assert is_turbo(optimizer)
    states = [one.state[param] for one, param in zip((optimizer, stock), params, strict=True)]
    assert states[0]["state1"].device.type == "cpu"
    # bitsandbytes rounds to a code that is near, not always to the nearest, and with it the parameter moves.
    far = (~torch.isclose(params[0], params[1], rtol=1e-4, atol=1e-5)).float().mean()
    assert far <= (1e-4 if bits == 8 else 0)
    different = (states[0]["state1"] != states[1]["state1"]).float().mean()
    assert different < (1e-3 if bits == 8 else 1)


def test_gradient_norm_is_that_of_stock(device, patch):
    model, twin = Model(device), Model(device)
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-2)
    patch(optimizer)
    set_grads(model, 0)
    set_grads(twin, 0)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)  # not of a patched optimizer: stock
    torch.testing.assert_close(norm, expected)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (param.grad is None) == (other.grad is None)
        if param.grad is not None:
            torch.testing.assert_close(param.grad, other.grad)


def test_clipping_leaves_to_stock_what_is_its_own(device, patch, monkeypatch):
    calls = []
    monkeypatch.setattr(clipping, "Gradients", lambda *args, **kwargs: calls.append(args))
    clip_stock = torch.nn.utils.clip_grad_norm_
    model = Model(device)
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-2)
    patch(optimizer)
    clip = torch.nn.utils.clip_grad_norm_
    assert clip is not clip_stock
    assert (clip.__name__, inspect.signature(clip)) == (clip_stock.__name__, inspect.signature(clip_stock))
    set_grads(model, 0)
    clip(model.parameters(), 1.0, norm_type=float("inf"))
    clip(model.parameters(), 1.0, error_if_nonfinite=True)
    clip(model.parameters(), 1.0, foreach=False)
    clip([model.a, model.a], 1.0)
    model.a.grad = torch.randn(80, 64, device=device).t()
    clip(model.parameters(), 1.0)
    model.a.grad = model.a.grad.to_sparse()
    with pytest.raises(NotImplementedError):
        clip([model.a], 1.0)
    model.a.grad = None
    assert clip([model.idle], 1.0).item() == 0
    with pytest.warns(UserWarning, match="empty generator"):
        clip((p for p in []), 1.0)
    assert calls == []


def test_saved_tensors_notice_the_step(device, maker, patch):
    """Kernels write past autograd: version counters have to be bumped by hand."""
    model = Model(device)
    optimizer = maker(model.groups(), lr=1e-2)
    patch(optimizer)
    loss = (model.a**2).sum()
    set_grads(model, 0)
    grad_version = model.a.grad._version
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert model.a.grad._version > grad_version
    optimizer.step()
    assert is_turbo(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_run_once(device, maker, patch):
    model = Model(device)
    optimizer = maker(model.groups(), lr=1e-2)
    patch(optimizer)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append(("pre", type(args[0]).__name__)))
    optimizer.register_step_post_hook(lambda *args: seen.append(("post", type(args[0]).__name__)))
    train(model, optimizer, range(1))
    assert is_turbo(optimizer)
    set_grads(model, 1)
    optimizer.step(lambda: torch.zeros(()))
    name = type(optimizer).__name__
    assert seen == [("pre", name), ("post", name)] * 2


def test_closures_run_stock(device, maker, patch):
    model, twin = Model(device), Model(device)
    optimizer, stock = maker(model.groups(), lr=1e-2), maker(twin.groups(), lr=1e-2)
    patch(optimizer)
    train(model, optimizer, range(2))
    train(twin, stock, range(2))
    for one, one_optimizer in ((model, optimizer), (twin, stock)):

        def closure(one: Model = one) -> float:
            set_grads(one, 2)
            return 3.5

        assert one_optimizer.step(closure) == 3.5
        train(one, one_optimizer, range(3, 5))
    assert_close(model, twin, optimizer)
    assert float(optimizer.state[model.a]["step"]) == 5


def sparse(model: Model, optimizer: Any) -> None:
    model.b.grad = model.b.grad.to_sparse()


def not_contiguous(model: Model, optimizer: Any) -> None:
    model.a.grad = torch.ones(80, 64).t()


def tensor_rate(model: Model, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2)


def maximize(model: Model, optimizer: Any) -> None:
    optimizer.param_groups[1]["maximize"] = True


def grad_scaler(model: Model, optimizer: Any) -> None:
    optimizer.found_inf = torch.zeros(())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (not_contiguous, "not contiguous"),
        (tensor_rate, "tensor"),
        (maximize, "maximize"),
        (grad_scaler, "GradScaler"),
    ],
)
def test_steps_that_are_stock(patch, spoil, reason):
    """And say so once; the next step of the usual kind is ours again."""
    device = torch.device("cpu")
    model, twin = Model(device), Model(device)
    options = {"lr": 1e-2, "foreach": False} if spoil is tensor_rate else {"lr": 1e-2, "fused": True}
    optimizer, stock = torch.optim.AdamW(model.groups(), **options), torch.optim.AdamW(twin.groups(), **options)
    notes, _ = patch(optimizer)
    for one, one_optimizer in ((model, optimizer), (twin, stock)):
        train(one, one_optimizer, range(1))
        for step in (1, 2):
            set_grads(one, step)
            spoil(one, one_optimizer)
            one_optimizer.step()
        one_optimizer.param_groups[0]["lr"] = 1e-2
        one_optimizer.param_groups[1]["maximize"] = False
        one_optimizer.found_inf = None
        train(one, one_optimizer, range(3, 5))
    assert len(notes) == 1
    assert reason in notes[0]
    assert_close(model, twin)
    assert float(optimizer.state[model.a]["step"]) == float(stock.state[twin.a]["step"])


def test_sparse_gradients_raise_as_in_stock(patch):
    model = Model(torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-2)
    patch(optimizer)
    for step in range(2):  # before there are tables, and after
        set_grads(model, step)
        sparse(model, optimizer)
        with pytest.raises(RuntimeError, match="sparse gradients"):
            optimizer.step()
        train(model, optimizer, range(1))


def test_embeddings_that_bitsandbytes_keeps_in_32_bits(device, patch):
    """As the Trainer asks of it; other overrides of single parameters are stock's."""
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    saved = dict(manager.pid2config), dict(manager.index2config), list(manager.module_weight_config_triple)
    model, twin = nn.Embedding(100, 64, device=device), nn.Embedding(100, 64, device=device)
    twin.load_state_dict(model.state_dict())
    try:
        results = []
        for one in (model, twin):
            manager.register_module_override(one, "weight", {"optim_bits": 32})
            optimizer = bitsandbytes.optim.AdamW8bit(one.parameters(), lr=1e-2)
            results.append(optimizer)
            if one is model:
                patch(optimizer)
            for step in range(3):
                one.weight.grad = torch.full_like(one.weight, 0.1 * (step + 1))
                optimizer.step()
        assert is_turbo(results[0])
        assert results[0].state[model.weight]["state1"].dtype == torch.float32
        torch.testing.assert_close(model.weight, twin.weight, rtol=1e-5, atol=1e-6)
        manager.override_config(model.weight, "lr", 0.0)
        before = model.weight.detach().clone()
        results[0].step()
        assert torch.equal(model.weight, before)
    finally:
        manager.pid2config, manager.index2config, manager.module_weight_config_triple = saved
        manager.initialize()


def test_the_swap_keeps_names_copies_and_pickles(device, maker, patch):
    model = Model(device)
    optimizer = maker(model.groups(), lr=1e-2)
    cls = type(optimizer)
    shown, signature = repr(optimizer), inspect.signature(optimizer.step)
    _, revert = patch(optimizer)
    swapped = type(optimizer)
    assert swapped is not cls
    assert isinstance(optimizer, cls)
    assert (swapped.__name__, swapped.__qualname__, swapped.__module__) == (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    assert repr(optimizer) == shown
    assert inspect.signature(optimizer.step) == signature
    assert "step" not in vars(optimizer)
    if device.type == "cpu":
        train(model, optimizer, range(2))
    stock = copy.copy(maker(Model(device).groups(), lr=1e-2))
    for duplicate in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(duplicate) is cls
        assert vars(duplicate).keys() == vars(stock).keys()
    keys = set(vars(optimizer))
    assert all(revert())
    assert type(optimizer) is cls
    assert set(vars(optimizer)) == keys


def test_reverting_restores_the_clip_function_after_the_last(patch):
    stock = torch.nn.utils.clip_grad_norm_
    model = Model(torch.device("cpu"))
    one, other = torch.optim.AdamW([model.a]), torch.optim.AdamW([model.b])
    _, revert_one = patch(one)
    ours = torch.nn.utils.clip_grad_norm_
    _, revert_other = patch(other)
    assert torch.nn.utils.clip_grad_norm_ is ours is not stock
    assert all(revert_one())
    assert torch.nn.utils.clip_grad_norm_ is ours
    assert all(revert_other())
    assert torch.nn.utils.clip_grad_norm_ is stock


def test_a_captured_step_is_stock_once_reverted(patch):
    model = Model(torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-2)
    _, revert = patch(optimizer)
    captured = optimizer.step
    train(model, optimizer, range(1))
    revert()
    set_grads(model, 1)
    captured()
    assert optimizer.state[model.a]["step"] == 2
    assert not is_turbo(optimizer)


def test_no_optimizer_is_kept_alive(patch):
    import gc
    import weakref

    model = Model(torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.groups(), lr=1e-2)
    LambdaLR(optimizer, lambda step: 1.0)
    _, revert = patch(optimizer)
    train(model, optimizer, range(2))
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert all(revert())


class Subclass(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD is not an AdamW"),
        (lambda p: torch.optim.Adam(p), "Adam is not an AdamW"),
        (lambda p: Subclass(p), "Subclass is not an AdamW"),
        (lambda p: bitsandbytes.optim.Lion8bit(p), "Lion8bit is not an AdamW"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)), "tensor"),
        (lambda p: torch.optim.AdamW([p[0], nn.Parameter(torch.ones(2, device="meta"))]), "several devices"),
        (lambda p: torch.optim.AdamW([Odd(torch.ones(2))]), "subclasses"),
    ],
)
def test_what_is_not_understood_stays_stock(make, reason):
    class_before = torch.optim.AdamW
    optimizer = make([nn.Parameter(torch.ones(3))])
    finding = optimizers.find(optimizer, lambda note: None, on_cpu=True)
    assert (finding.found, finding.patched, finding.patches) == (1, 0, [])
    assert reason in next(iter(finding.reasons))
    assert type(optimizer) is not optimizers._same_name_subclass(class_before)


class Odd(nn.Parameter):
    pass


def test_a_step_replaced_by_somebody_else_stays(monkeypatch):
    model = Model(torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.groups())
    optimizer.step = lambda closure=None: None
    assert "on the optimizer" in next(iter(optimizers.find(optimizer, print, on_cpu=True).reasons))
    stock = torch.optim.AdamW.step

    @functools.wraps(stock)
    def wrapped(self: Any, closure: Any = None) -> Any:
        return stock(self, closure)

    for step in (lambda self, closure=None: None, wrapped):
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        finding = optimizers.find(torch.optim.AdamW(model.groups()), print, on_cpu=True)
        assert "AdamW.step was replaced" in next(iter(finding.reasons))


# ------------------------------------------------------------------------------------------------------------ lifecycle


def test_accelerate_loop(recwarn):
    """The scheduler is made before `prepare`, as in accelerate's examples."""
    hf_turbo.enable(optimizer=True)
    model = nn.Linear(70, 60)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = LambdaLR(inner, lambda step: 0.9**step)
    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler = accelerator.prepare(model, inner, scheduler)
    for _ in range(3):
        accelerator.backward(model(torch.randn(2, 70)).pow(2).mean())
        assert accelerator.clip_grad_norm_(model.parameters(), 1.0).ndim == 0
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert is_turbo(inner)
    assert inner.state[model.weight]["step"] == 3
    row = next(row for row in hf_turbo.report().rows if row.role == "optimizer")
    assert (row.model, row.found, row.patched, row.exactness) == ("AdamW", 1, 1, "re-associated")
    hf_turbo.disable()
    assert type(inner) is torch.optim.AdamW
    assert hf_turbo.report().notes == []
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling(patch, fused):
    """accelerate keeps bound methods of `step` when there is a GradScaler, which skips a step after an overflow."""
    device = torch.device("cpu")
    Accelerator(cpu=True)
    model, twin = Model(device), Model(device)
    for one in (model, twin):
        inner = torch.optim.AdamW(one.groups(), lr=1e-2, fused=fused)
        if one is model:
            patch(inner)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
        for step in range(4):
            set_grads(one, step)
            for param in one.parameters():
                if param.grad is not None:
                    param.grad *= scaler.scale(torch.ones(()))
            if step == 2:
                one.a.grad[0, 0] = float("inf")
            scaler.unscale_(inner)
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            assert optimizer.step_was_skipped == (step == 2 and not fused)
        assert is_turbo(inner) == (one is model and not fused)
        assert float(inner.state[one.a]["step"]) == 3
    assert_close(model, twin)


def test_a_clip_function_of_somebody_else_is_left_alone(patch, monkeypatch):
    clipping.patch()
    mine = lambda parameters, max_norm: None  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", mine)
    notes, revert = patch(torch.optim.AdamW(Model(torch.device("cpu")).parameters()))
    assert torch.nn.utils.clip_grad_norm_ is mine
    assert notes == ["torch.nn.utils.clip_grad_norm_ was replaced, and clips as it does"]
    assert all(revert())
    assert torch.nn.utils.clip_grad_norm_ is mine


def test_on_the_cpu_auto_is_stock():
    hf_turbo.enable()
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    clip = torch.nn.utils.clip_grad_norm_
    Accelerator(cpu=True).prepare(model, optimizer)
    row = next(row for row in hf_turbo.report().rows if row.role == "optimizer")
    assert (row.patched, row.reason) == (0, "on cpu stock is as fast")
    assert type(optimizer) is torch.optim.AdamW
    assert torch.nn.utils.clip_grad_norm_ is clip


def test_asked_for_by_name_and_not_an_adamw_raises():
    hf_turbo.enable(optimizer=True)
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"optimizer=True .* SGD is not an AdamW"):
        Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))


def test_switched_off():
    hf_turbo.enable(optimizer=False)
    optimizer = torch.optim.AdamW(nn.Linear(3, 3).parameters())
    Accelerator(cpu=True).prepare(optimizer)
    row = hf_turbo.report().rows[-1]
    assert (row.role, row.patched, row.reason) == ("optimizer", 0, "switched off: optimizer=False")


def trainer(tmp_path, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", None)
    data = [{key: value[0] for key, value in batch(rows=1, seed=i, masked=False).items()} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        report_to="none",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.1,
        **{"save_strategy": "no", "max_steps": 4, **options},
    )
    return Trainer(tiny_model("llama"), arguments, train_dataset=data, callbacks=callbacks)


def curve(runner: Trainer) -> list[tuple[float, float]]:
    return [(log["loss"], log["grad_norm"]) for log in runner.state.log_history if "loss" in log]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_trainer(tmp_path, optim):
    """Losses, gradient norms and the saved optimizer are stock's; the callback's trainer gets its optimizer back."""
    stock = trainer(tmp_path / "stock", optim=optim, save_strategy="steps", save_steps=2)
    stock.train()
    callback = hf_turbo.TurboCallback(optimizer=True)
    turbo = trainer(tmp_path / "turbo", optim=optim, save_strategy="steps", save_steps=2, callbacks=[callback])
    steps = []
    counted = optimizers.MultiTensorAdamW.update
    with pytest.MonkeyPatch.context() as patch_context:
        update = lambda self, *args: (steps.append(1), counted(self, *args))  # noqa: E731
        patch_context.setattr(optimizers.MultiTensorAdamW, "update", update)
        turbo.train()
    assert len(steps) >= 4
    assert curve(turbo) == pytest.approx([pytest.approx(point, rel=2e-4) for point in curve(stock)])
    inner = turbo.optimizer.optimizer
    assert type(inner) is type(stock.optimizer.optimizer)
    assert inner not in optimizers._PATCHED
    report = json.loads((tmp_path / "turbo" / "hf_turbo_report.json").read_text())
    row = next(row for row in report["rows"] if row["role"] == "optimizer")
    assert (row["found"], row["patched"], row["reason"]) == (1, 1, "")
    saved = [
        torch.load(tmp_path / which / "checkpoint-2" / "optimizer.pt", weights_only=False)
        for which in ("stock", "turbo")
    ]
    assert saved[0]["state"].keys() == saved[1]["state"].keys()
    resumed = trainer(tmp_path / "resumed", optim=optim)
    resumed.train(resume_from_checkpoint=str(tmp_path / "turbo" / "checkpoint-2"))
    assert curve(resumed)[-2:] == pytest.approx([pytest.approx(point, rel=2e-4) for point in curve(stock)[-2:]])


@pytest.mark.parametrize("failing", [0, 1])
def test_memory_that_runs_out_in_a_step(failing, patch, monkeypatch):
    """Before anything has changed the step is made again; where one of two buckets has been updated, it is an error."""
    update, calls = MultiTensorAdamW.update, []

    def run(fail_at: int) -> tuple[list[torch.Tensor], list[float]]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8).bfloat16())]
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        patch(optimizer)
        calls.clear()

        def faulty(self: Any, *args: Any) -> None:
            calls.append(1)
            if len(calls) == fail_at:
                raise torch.OutOfMemoryError("CUDA out of memory. By intent")
            update(self, *args)

        monkeypatch.setattr(MultiTensorAdamW, "update", faulty)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            retry.step_optimizer(optimizer, optimizer.step, lambda where: None)
        return params, [float(optimizer.state[param]["step"]) for param in params]

    expected, steps = run(0)
    assert steps == [3, 3]
    if failing:
        with pytest.raises(torch.OutOfMemoryError, match="some weights were updated and others were not"):
            run(4)
        return
    params, steps = run(3)
    assert steps == [3, 3]
    assert all(torch.equal(one, other) for one, other in zip(params, expected, strict=True))
