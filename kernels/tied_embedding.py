"""An embedding whose weight is that of the language-model head too: one gradient [V, H] for both.

    y = weight[ids]                                        [..., H]
    dweight = gradient of the head + sum over tokens t of dy_t in row ids_t

Autograd makes a dense gradient for each of the two, zeros in most rows of the embedding's, and adds them. Here the
head's gradient waits, and the embedding, whose turn in backward comes after the head's, adds its rows to it and hands
out the sum: the same bits, one [V, H] less, and no pass over all rows. Rows of one token are summed as by autograd,
into [tokens, H], and added in one go, so that no sum depends on the order in which a GPU's threads come.

Whether the embedding's turn will come in this backward pass, and has not yet, is asked of autograd. If not (the head
alone is differentiated, or hidden states are detached in between), both gradients go their own ways.

Shapes: ids [...] int; weight [V, H]. Gradients have the dtype of the weight.

Floor: forward 2*T*H*e bytes; backward 5*T*H*e, T tokens of e-byte elements, V*H*e of stock's 4*V*H*e saved.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F

from ._launch import once_differentiable

# Rows of V for each token: with fewer, a dense gradient is no larger.
_LEAST_ROWS_PER_TOKEN = 2


class _Waiting:
    """The gradient of a head, from its turn in backward to that of the embedding."""

    __slots__ = ("_given_in", "_gradient", "_taken_in")

    def __init__(self) -> None:
        self._gradient: torch.Tensor | None = None
        self._given_in = self._taken_in = -1  # the backward passes in which the two had their turns

    def give(self, gradient: torch.Tensor) -> bool:
        """False where the embedding's turn has come already."""
        present = torch._C._current_graph_task_id()
        if self._taken_in == present:
            return False
        # What is left of a pass that failed belongs to nobody.
        if self._gradient is None or self._given_in != present:
            self._gradient, self._given_in = gradient, present
        else:
            self._gradient += gradient
        return True

    def take(self) -> torch.Tensor | None:
        gradient, self._gradient, self._taken_in = self._gradient, None, torch._C._current_graph_task_id()
        return gradient if self._given_in == self._taken_in else None


class Tie:
    """What a head needs to leave its weight's gradient with an embedding.

    Args:
        node: of the embedding's output in autograd's graph.
    """

    __slots__ = ("_node", "_waiting")

    def __init__(self, node: Any, waiting: _Waiting):
        self._node, self._waiting = node, waiting

    def takes(self, gradient: torch.Tensor) -> bool:
        """In backward: whether the embedding sees to this gradient, which is its own from then on."""
        return torch._C._will_engine_execute_node(self._node) and self._waiting.give(gradient)


# By the id of a weight: the node of the last embedding with it, as long as that lives, and what waits for it. Nothing
# refers to the weight itself, not weakly either: torch.utils.swap_tensors refuses such tensors.
_LAST: dict[int, tuple[weakref.ref[Any], _Waiting]] = {}


def tie_of(weight: torch.Tensor) -> Tie | None:
    """To the last embedding by `tied_embedding` with this weight, if its output is still there."""
    found = _LAST.get(id(weight))
    if found is None or not weight.requires_grad or torch.compiler.is_compiling():
        return None
    node, waiting = found[0](), found[1]
    return Tie(node, waiting) if node is not None and _weight_of(node) is weight else None


def _weight_of(node: Any) -> torch.Tensor | None:
    """The weight of an embedding, by its node in autograd's graph."""
    accumulation = node.next_functions[1][0]
    return getattr(accumulation, "variable", None)


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding_idx: int, waiting: _Waiting) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding_idx, ctx.waiting = weight.shape[0], padding_idx, waiting
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        total, ids, dy = ctx.waiting.take(), ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
        if total is None or ctx.rows < _LEAST_ROWS_PER_TOKEN * len(ids) or total.dtype != dy.dtype:
            dense = _summed(dy, ids, ctx.rows, ctx.padding_idx)
            return None, dense if total is None else total.add_(dense), None, None
        rows, places = _numbered(ids)
        sums = _summed(dy, places, len(ids), -1)
        if ctx.padding_idx >= 0:
            sums.masked_fill_((rows == ctx.padding_idx)[:, None], 0.0)
        return None, total.index_add_(0, rows, sums), None, None


def _summed(dy: torch.Tensor, ids: torch.Tensor, rows: int, padding_idx: int) -> torch.Tensor:
    """[rows, H], each the sum of the dy of one id, as autograd has it."""
    return torch.ops.aten.embedding_dense_backward(dy, ids, rows, padding_idx, False)


def _numbered(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct ids in order, and the place of each id among them, without waiting for the device.

    The first is as long as `ids`; what is over repeats the smallest.
    """
    ordered, order = ids.sort(stable=True)
    is_new = torch.zeros_like(ordered)
    is_new[1:] = ordered[1:] != ordered[:-1]
    numbers = is_new.cumsum(0)
    distinct = ordered[:1].repeat(len(ids)).scatter_(0, numbers, ordered)
    return distinct, torch.empty_like(numbers).scatter_(0, order, numbers)


def tied_embedding(ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """F.embedding(ids, weight, padding_idx), for a weight that `linear_log_prob` or `linear_cross_entropy` uses next.

    Args:
        ids: [...]. weight: [V, H], trained.
        padding_idx: whose row has no gradient from here.
    """
    waiting = _Waiting()
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += weight.shape[0]
    y: torch.Tensor = _TiedEmbedding.apply(ids, weight, padding_idx, waiting)
    if y.grad_fn is not None:
        key = id(weight)

        def forget(reference: weakref.ref[Any]) -> None:
            if key in _LAST and _LAST[key][0] is reference:
                del _LAST[key]

        _LAST[key] = weakref.ref(y.grad_fn, forget), waiting
    return y
