"""Checkpointing without torch's hooks: the bits, the memory and the errors of torch's, for any function."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hf_turbo.patches import recomputation
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

CPU = torch.device("cpu")
STOCK = functools.partial(checkpoint, use_reentrant=False)


def ours(function: Any, *args: Any, stock: Any = STOCK) -> Any:
    assert recomputation.is_plain(stock, args, CPU)
    return recomputation.recompute_in_backward(stock, function, args, CPU)


class Layer(nn.Module):
    """Draws random numbers and saves what it computes, with a count of its runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.runs = nn.Linear(6, 9), nn.Linear(9, 6), 0

    def forward(self, x: torch.Tensor, scale: Any = 2.0) -> torch.Tensor:
        self.runs += 1
        return x + self.down(nn.functional.dropout(self.up(x * scale).sin(), 0.4, self.training))


def inputs(requires_grad: bool = True) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(4, 6).requires_grad_(requires_grad)


def gradients(call: Any, backward: Any = lambda y, x: y.square().sum().backward(), **changes: Any) -> list[Any]:
    """Outputs, gradients and the random numbers drawn after it all."""
    layer, x = Layer(), inputs(**changes)
    torch.manual_seed(7)
    y = call(layer, x)
    backward(y, x)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), torch.rand(3)]


def assert_same(some: list[Any], others: list[Any]) -> None:
    for one, other in zip(some, others, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def several(call: Any, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return call(layer, call(layer, call(layer, x), torch.tensor(0.5)), 3)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_are_those_of_torch(requires_grad, autocast):
    def call(how: Any) -> Any:
        def run(layer: Any, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return several(how, layer, x)

        return gradients(run, requires_grad=requires_grad)

    assert_same(call(ours), call(STOCK))


def test_autocast_around_backward_alone():
    def backward(y: torch.Tensor, x: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y.square().sum().backward()

    assert_same(gradients(ours, backward), gradients(STOCK, backward))


def test_random_numbers_need_not_be_kept():
    stock = functools.partial(STOCK, preserve_rng_state=False)
    assert_same(gradients(functools.partial(ours, stock=stock)), gradients(stock))
    with pytest.raises(AssertionError):
        assert_same(gradients(stock), gradients(STOCK))


def test_backward_twice_and_in_parts():
    def twice(y: torch.Tensor, x: torch.Tensor) -> None:
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()

    def parts(y: torch.Tensor, x: torch.Tensor) -> None:
        (x.grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        y.sin().sum().backward()

    for backward in (twice, parts):
        assert_same(gradients(ours, backward), gradients(STOCK, backward))


def test_weights_changed_between_two_backward_passes():
    """Each pass recomputes from the weights as they are then."""

    def run(how: Any) -> list[torch.Tensor]:
        layer, x = Layer(), inputs()
        y = how(layer, x)
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)
        with torch.no_grad():
            layer.up.weight.data.mul_(2)
        return [*first, *torch.autograd.grad(y.sum(), x)]

    assert_same(run(ours), run(STOCK))


def test_gradients_of_gradients():
    def backward(y: torch.Tensor, x: torch.Tensor) -> None:
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    assert_same(gradients(ours, backward), gradients(STOCK, backward))


@pytest.mark.parametrize("inner", [STOCK, ours], ids=["torch inside", "hf_turbo inside"])
@pytest.mark.parametrize("outer", [STOCK, ours], ids=["torch outside", "hf_turbo outside"])
def test_one_in_another(inner, outer):
    def call(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return outer(lambda x: several(inner, layer, x).cos(), x)

    expected = gradients(lambda layer, x: STOCK(lambda x: several(STOCK, layer, x).cos(), x))
    assert_same(gradients(call), expected)


def test_a_gradient_inside():
    def penalised(layer: Any, x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope.square()

    def call(how: Any) -> list[Any]:
        return gradients(lambda layer, x: how(functools.partial(penalised, layer), x))

    assert_same(call(ours), call(STOCK))


def test_one_recomputation_for_a_group_of_passes():
    layer, x = Layer(), inputs()
    y = ours(layer, x).split(3, dim=1)
    with torch.utils.checkpoint.GraphExecGroup():
        y[0].sum().backward(retain_graph=True)
    assert layer.runs == 2


def test_stops_at_the_last_saved_tensor():
    reached = []

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        reached.append(1)
        return y + 1

    ours(function, inputs()).sum().backward()
    assert reached == [1]


def test_nothing_saved_and_nothing_to_differentiate():
    x = inputs()
    ours(lambda x: x + 1, x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not ours(lambda x: x.sin(), inputs(False)).requires_grad


def test_memory_is_given_back():
    """A recomputed tensor lives until its node is done, all else as long as the graph, without a garbage collection."""

    def living(kind: type) -> list[Any]:
        return [thing for thing in gc.get_objects() if type(thing) is kind and id(thing) not in others]

    def kept() -> int:
        return sum(slot.tensor is not None for slot in living(recomputation._Slot))

    def function(x: torch.Tensor) -> torch.Tensor:
        a = x.sin()
        a.register_hook(lambda _: during.append(kept()))
        b = a.cos()
        b.register_hook(lambda _: during.append(kept()))
        return b.tan()

    ours(torch.sin, inputs()).sum().backward()  # imports of torch's leave frames in cycles, the first time
    others: set[int] = set()
    others = {id(thing) for thing in (*living(recomputation._Slot), *living(recomputation._Region))}
    gc.disable()
    try:
        during: list[int] = []
        y = ours(function, inputs())
        assert kept() == 0
        y.sum().backward()
        assert during == [2, 1]
        assert living(recomputation._Slot) == []
        del y
        y = ours(function, inputs())
        assert len(living(recomputation._Slot)) == 3
        del y
        assert living(recomputation._Slot) == living(recomputation._Region) == []
    finally:
        gc.enable()


def test_an_error_inside_passes_and_states_are_restored():
    class Fails(nn.Module):
        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            torch.rand(1)
            if self.runs == 2:
                raise ZeroDivisionError
            return x.sin()

    y = ours(Fails(), inputs())
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.sin()[:2].cos(), "different metadata"),
        (lambda x: x.double().sin().cos(), "different metadata"),
        (lambda x: x.sin(), "different number of tensors"),
    ],
)
def test_a_function_that_changes_is_an_error_as_in_torch(change, message):
    for how in (ours, STOCK):
        functions = iter([lambda x: x.sin().cos(), change])
        y = how(lambda x, functions=functions: next(functions)(x), inputs())
        with pytest.raises(CheckpointError, match=message):
            y.sum().backward()


def test_an_input_changed_in_place_is_an_error_as_in_torch():
    for how in (ours, STOCK):
        x = inputs().clone()
        y = how(lambda x: x.sin().cos(), x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_looking_at_a_saved_tensor_outside_of_backward():
    x = inputs()
    y = ours(lambda x: x.sin(), x)
    assert torch.equal(y.grad_fn._saved_self, x)
    assert torch.equal(y.grad_fn._saved_self, x)
    y.sum().backward()
    assert torch.equal(x.grad, x.detach().cos())


def test_weights_cast_by_autocast_are_cast_anew():
    """Autocast switched on without a context around, as on a thread of autograd's, keeps what it has cast."""

    def losses(how: Any) -> list[float]:
        torch.manual_seed(0)
        weight, x = torch.randn(6, 6).requires_grad_(), inputs()
        found = []
        torch.set_autocast_enabled("cpu", True)
        try:
            for _ in range(3):
                loss = how(lambda x, weight=weight: (x @ weight).sin(), x).float().sum()
                loss.backward()
                found.append(loss.item())
                with torch.no_grad():
                    weight -= weight.grad
                weight.grad = None
        finally:
            torch.set_autocast_enabled("cpu", False)
            torch.clear_autocast_cache()
        return found

    assert losses(ours) == losses(STOCK)
    assert len(set(losses(ours))) == 3


def test_an_argument_changed_in_place_under_hooks_of_the_script():
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1).sin().cos()

    def call(how: Any) -> list[Any]:
        with torch.autograd.graph.save_on_cpu():
            return gradients(lambda layer, x: how(function, x * 1))

    assert_same(call(ours), call(STOCK))


def test_hooks_of_the_script_see_what_torch_shows_them():
    def call(how: Any) -> list[Any]:
        seen = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen.append((tensor.requires_grad, tensor.is_leaf, torch.is_grad_enabled()))
            return tensor * 2 if tensor.requires_grad else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return [*gradients(how), torch.tensor(seen)]

    assert_same(call(ours), call(STOCK))


def test_saved_tensors_read_twice_are_an_error_as_in_torch():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy + ctx.saved_tensors[0] + ctx.saved_tensors[0]

    for how in (ours, STOCK):
        with pytest.raises(CheckpointError, match="already unpacked once"):
            how(Twice.apply, inputs()).sum().backward()


def plain(stock: Any) -> bool:
    return recomputation.is_plain(stock, (torch.ones(1),), CPU)


def test_what_is_left_to_torch():
    assert plain(STOCK)
    select = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, [])
    for changes in (
        {"use_reentrant": True},
        {"context_fn": select},
        {"debug": True},
        {"determinism_check": "none"},
        {"early_stop": False},
    ):
        assert not plain(functools.partial(checkpoint, **{"use_reentrant": False, **changes}))
    assert not plain(checkpoint)
    assert not plain(functools.partial(STOCK, lambda x: x))
    assert not recomputation.is_plain(STOCK, (), torch.device("meta"))
    assert not recomputation.is_plain(STOCK, (inputs(), torch.ones(1, device="meta")), CPU)
    assert not recomputation.is_plain(STOCK, (inputs(), [inputs()]), CPU)
    assert recomputation.is_plain(STOCK, (inputs(), None, 3), CPU)
    with torch.utils.checkpoint.set_checkpoint_debug_enabled(True):
        assert not plain(STOCK)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        assert not plain(STOCK)
    with torch.no_grad():
        assert not plain(STOCK)
    with torch.device("cpu"):
        assert not plain(STOCK)
    with torch.autograd.graph.disable_saved_tensors_hooks("none"):
        assert not plain(STOCK)
    seen = []
    torch.func.vmap(lambda x: seen.append(plain(STOCK)) or x)(torch.ones(2))
    assert seen == [False]
    assert plain(STOCK)
