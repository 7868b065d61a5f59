"""One gradient for a weight that is embedding and head: the bits of autograd's two, added."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import tied_embedding as module
from hf_turbo.kernels.linear_cross_entropy import linear_cross_entropy
from hf_turbo.kernels.tied_embedding import tie_of, tied_embedding

ROWS, WIDTH, PADDING = 211, 16, 5


def parts(device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]:
    """The weight, a matrix between embedding and head, and ids of which many are the same, some padding."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=generator, device=device).to(dtype)
    between = torch.randn(WIDTH, WIDTH, generator=generator, device=device).to(dtype).requires_grad_()
    ids = torch.randint(0, 12, (3, 7), generator=generator, device=device)
    ids[:, -2:] = torch.tensor([ROWS - 1, PADDING], device=device)
    return torch.nn.Parameter(weight), between, ids


def stock(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
    return F.embedding(ids, weight, padding_idx)


def loss_of(embed: Any, weight: torch.Tensor, between: torch.Tensor, ids: torch.Tensor, padding: int | None) -> Any:
    return linear_cross_entropy(embed(ids, weight, padding) @ between, weight, ids.roll(-1, 1))


@pytest.fixture
def left(monkeypatch):
    """How often a head's gradient was left with the embedding."""
    calls, give = [], module._Waiting.give

    def counted(self: Any, gradient: torch.Tensor) -> bool:
        calls.append(give(self, gradient))
        return calls[-1]

    monkeypatch.setattr(module._Waiting, "give", counted)
    return calls


@pytest.mark.parametrize("padding", [None, PADDING, PADDING - ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_two_gradients(device, left, dtype, padding):
    """Also where gradients are there already, of an earlier micro-batch."""
    gradients = []
    for embed in (stock, tied_embedding):
        weight, between, ids = parts(device, dtype)
        for shift in range(3):
            loss_of(embed, weight, between, (ids + shift) % ROWS, padding).backward()
        gradients.append((weight.grad, between.grad))
    assert left == [True] * 3
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_there_is_one_large_gradient(device, left):
    """Autograd keeps the very tensor that the head made."""
    made = []
    weight, between, ids = parts(device, torch.float32)
    give = module._Waiting.give
    module._Waiting.give = lambda self, gradient: made.append(gradient.data_ptr()) or give(self, gradient)
    loss_of(tied_embedding, weight, between, ids, None).backward()
    assert made == [weight.grad.data_ptr()]


def test_many_tokens_take_the_dense_way(device, left):
    gradients = []
    for embed in (stock, tied_embedding):
        weight, between, ids = parts(device, torch.float32)
        loss_of(embed, weight, between, ids.repeat(6, 1), PADDING).backward()
        gradients.append(weight.grad)
    assert left == [True]
    assert torch.equal(*gradients)


def test_two_losses_of_one_embedding(device, left):
    """Their gradients wait together."""
    gradients = []
    for embed in (stock, tied_embedding):
        weight, between, ids = parts(device, torch.float32)
        hidden = embed(ids, weight, None)
        losses = [linear_cross_entropy(hidden @ each, weight, ids) for each in (between, between.t())]
        (losses[0] + losses[1]).backward()
        gradients.append(weight.grad)
    assert left == [True, True]
    torch.testing.assert_close(*gradients)


def detached(ids: Any, weight: Any, between: Any) -> list[Any]:
    """The way to the embedding is cut, and gone in another backward, as where micro-batches share a pass."""
    hidden = tied_embedding(ids, weight)
    leaf = hidden.detach().requires_grad_()
    linear_cross_entropy(leaf @ between, weight, ids).backward()
    hidden.backward(leaf.grad)
    return [weight.grad, between.grad]


def only_between(ids: Any, weight: Any, between: Any) -> list[Any]:
    """Autograd does not come to the embedding."""
    loss = loss_of(tied_embedding, weight, between, ids, None)
    return [*torch.autograd.grad(loss, [between], retain_graph=True), weight.grad]


def both(ids: Any, weight: Any, between: Any) -> list[Any]:
    loss = loss_of(tied_embedding, weight, between, ids, None)
    return [*torch.autograd.grad(loss, [between, weight]), weight.grad]


def twice(ids: Any, weight: Any, between: Any) -> list[Any]:
    loss = loss_of(tied_embedding, weight, between, ids, None)
    loss.backward(retain_graph=True)
    loss.backward()
    return [weight.grad, between.grad]


def after_an_error(ids: Any, weight: Any, between: Any) -> list[Any]:
    """What a failed backward has left does not turn up in the next."""
    hidden = tied_embedding(ids, weight)
    fails = [True]

    def hook(gradient: torch.Tensor) -> None:
        if fails.pop():
            raise ValueError("in the middle")

    hidden.register_hook(hook)
    loss = linear_cross_entropy(hidden @ between, weight, ids.roll(-1, 1))
    with pytest.raises(ValueError, match="in the middle"):
        loss.backward(retain_graph=True)
    fails.append(False)
    weight.grad = between.grad = None
    loss.backward()
    return [weight.grad, between.grad]


def hooked(ids: Any, weight: Any, between: Any) -> list[Any]:
    """A hook sees the sum, once."""
    seen: list[torch.Tensor] = []
    weight.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    loss_of(tied_embedding, weight, between, ids, None).backward()
    return [*seen, weight.grad]


@pytest.mark.parametrize(
    ("case", "ways"),
    [
        (detached, []),
        (only_between, []),
        (both, [True]),
        (twice, [True, True]),
        (after_an_error, [True] * 2),
        (hooked, [True]),
    ],
)
def test_where_autograd_goes_otherwise(device, monkeypatch, left, case, ways):
    weight, between, ids = parts(device, torch.float32)
    ours = case(ids, weight, between)
    assert left == ways
    monkeypatch.setattr(
        f"{__name__}.tied_embedding", lambda ids, weight, padding=None: F.embedding(ids, weight, padding)
    )
    weight, between, ids = parts(device, torch.float32)
    for mine, theirs in zip(ours, case(ids, weight, between), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


def test_nothing_is_kept(device):
    """Neither a graph nor a weight that is gone."""
    weight, _, ids = parts(device, torch.float32)
    hidden = tied_embedding(ids, weight)
    assert tie_of(weight) is not None
    assert tie_of(torch.nn.Parameter(weight.detach())) is None
    del hidden
    assert tie_of(weight) is None
    key = id(weight)
    del weight
    gc.collect()
    assert key not in module._LAST
    frozen = torch.nn.Parameter(parts(device, torch.float32)[0].detach(), requires_grad=False)
    tied_embedding(ids, frozen)
    assert tie_of(frozen) is None
