"""Gated MLPs by tiles of rows: at no time are there more intermediate results than those of one tile.

The formulas are those of glu.py and lora_mlp.py. A row of the output depends on the same row of the input alone, so
that forward goes through the rows tile by tile and saves the input; backward computes gate and up of a tile again, and
from them the tile's gradients. Those of the input are the rows of one result; those of weights, biases and adapters are
sums over the tiles, added up in float32 and rounded once. Weights are expanded or cast once per direction.

    memory: 2 T*K + at most 6 tile*I elements, and the dense weights     instead of     2 T*K + 5 T*I

`keep` saves gate and up after all, for layers of which nothing has to be computed twice: the same tiles, so the same
bits either way.

Under checkpointing nothing is computed twice for it: the output's node saves nothing, and what the node before saves is
known before anything is computed. Recomputation, which stops at the last saved tensor, so does not get to the MLP where
it is the last of its layer, and backward makes gate and up for the first time since forward.

Shapes: x [..., K]; gate and up [I, K], or one [2 I, K] for both; down [N, I]; biases [I], [2 I], [N], None; y [..., N].
Dtypes: dense layers compute in the dtype of autocast, or in that of x; those with adapters: see lora.py. Gradients have
the dtypes of what they belong to. Dropout of adapters draws a mask for each tile, the same in backward.

Floor: that of the MLP, and its products with gate and up once more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ._launch import device_kind, once_differentiable
from .glu import ACTIVATIONS, glu_backward, glu_backward_keep_h_, glu_forward
from .linear_cross_entropy import accumulate
from .lora import Projection, Static, draw_seed, linear, low_rank_add_, low_rank_inputs, tensors_of
from .lora_mlp import checked, gradients_of, hidden_of, product_of

_Part = torch.Tensor | None
_Hidden = tuple[_Part, ...]


class Tile(NamedTuple):
    """How an MLP is computed.

    Attributes:
        rows: of a tile.
        keep: whether gate and up are saved for backward.
    """

    rows: int
    keep: bool = False


class _Sums:
    """Gradients of tiles, added up in float32 or wider."""

    def __init__(self, dtypes: Sequence[torch.dtype | None]):
        self._dtypes = dtypes
        self._totals: list[_Part] = [None] * len(dtypes)

    @property
    def wide(self) -> list[torch.dtype | None]:
        """The dtypes that they are added up in; None for those that are not needed."""
        return [each and torch.promote_types(each, torch.float32) for each in self._dtypes]

    def add(self, i: int, part: _Part) -> None:
        total = self._totals[i]
        if part is not None:
            self._totals[i] = part if total is None else total.add_(part)

    def add_product(self, i: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """a @ b is not rounded before it is added."""
        if self._dtypes[i] is not None:
            self._totals[i] = accumulate(self._totals[i], a, b)

    def rounded(self) -> list[_Part]:
        """The sums in the dtypes of what they belong to, each in place of the wide one."""
        for i, total in enumerate(self._totals):
            if total is not None:
                self._totals[i] = total.to(self._dtypes[i])
                del total
        return self._totals


class _Mlp(ABC):
    """What is computed of a tile. `tensors` are all that a gradient may belong to, `saved` what it is computed with.

    Attributes:
        features: columns of y. dtype, out: of the products, and of y.
        dropout: of the projections' adapters.
    """

    features: int
    dtype: torch.dtype
    out: torch.dtype
    dropout: tuple[float, ...] = ()

    @abstractmethod
    def saved(self, tensors: Sequence[_Part]) -> Sequence[_Part]: ...

    @abstractmethod
    def weights(self, saved: Sequence[_Part], backward: bool) -> list[torch.Tensor]:
        """The dense matrices in `dtype`."""

    @abstractmethod
    def hidden(self, x: torch.Tensor, saved: Sequence[_Part], weights: list[torch.Tensor], seeds: Any) -> _Hidden:
        """What there is before the product with `down`; the first is h, and the others are for backward."""

    @abstractmethod
    def output(self, hidden: _Hidden, saved: Sequence[_Part], weights: list[torch.Tensor]) -> torch.Tensor:
        """y of a tile."""

    @abstractmethod
    def gradients(
        self,
        x: torch.Tensor,
        dy: torch.Tensor,
        hidden: _Hidden,
        saved: Sequence[_Part],
        weights: list[torch.Tensor],
        seeds: Any,
        need_x: bool,
        sums: _Sums,
    ) -> _Part:
        """The gradient of x; those of `tensors` are added to `sums`. `hidden` is without h."""

    @abstractmethod
    def versions(self) -> list[int]:
        """Of tensors that autograd does not see."""

    @abstractmethod
    def check(self, versions: list[int]) -> None:
        """Raises RuntimeError where one of them was changed since."""


class _WithAdapters(_Mlp):
    """Frozen projections with low-rank adapters. Tensors: all biases, all A, all B."""

    def __init__(self, static: Static, activation: str, features: int, dtype: torch.dtype):
        self._static, self._activation, self.features = static, activation, features
        self.dtype, self.out = dtype, static.out
        self._count = len(static.weights)
        self.dropout = tuple(each for stack in static.layout.stacks for each in stack.dropout)

    def saved(self, tensors: Sequence[_Part]) -> Sequence[_Part]:
        count = self._count
        return *tensors[:count], *self._static.layout.gather(tensors[count : 2 * count], tensors[2 * count :])

    def weights(self, saved: Sequence[_Part], backward: bool) -> list[torch.Tensor]:
        return list(map(self._static.weight_of(self.dtype, backward), range(self._count)))

    def hidden(self, x: torch.Tensor, saved: Sequence[_Part], weights: list[torch.Tensor], seeds: Any) -> _Hidden:
        into, down = self._adapters(saved)
        gate, up, s = hidden_of(x, into, weights.__getitem__, saved[: self._count - 1], seeds[:-1])
        h = product_of(gate, up, s, into, self._activation)
        return h, gate, up, s, low_rank_inputs(h, down, seeds[-1:])

    def output(self, hidden: _Hidden, saved: Sequence[_Part], weights: list[torch.Tensor]) -> torch.Tensor:
        h, *_, s_down = hidden
        y = linear(h, weights[-1], saved[self._count - 1], self.out)  # type: ignore[arg-type]
        if s_down is not None:
            low_rank_add_(y, s_down, self._adapters(saved)[1].b[0], 0.0, 0)
        return y

    def gradients(
        self,
        x: torch.Tensor,
        dy: torch.Tensor,
        hidden: _Hidden,
        saved: Sequence[_Part],
        weights: list[torch.Tensor],
        seeds: Any,
        need_x: bool,
        sums: _Sums,
    ) -> _Part:
        adapters = self._adapters(saved)
        dx, *others = gradients_of(
            x,
            hidden,  # type: ignore[arg-type]
            dy,
            adapters,
            weights.__getitem__,
            self._activation,
            need_x,
            sums.wide,
            seeds,
        )
        for i, part in enumerate(each for group in others for each in group):
            sums.add(i, part)
        return dx

    def versions(self) -> list[int]:
        return self._static.versions()

    def check(self, versions: list[int]) -> None:
        self._static.check(versions)

    def _adapters(self, saved: Sequence[_Part]) -> Any:
        return self._static.layout.adapters(saved[self._count :])  # type: ignore[arg-type]


class _Dense(_Mlp):
    """Plain linear layers, frozen or trained. Tensors: all weights, all biases."""

    def __init__(self, activation: str, features: int, dtype: torch.dtype, count: int):
        self._activation, self.features, self._count = activation, features, count
        self.dtype = self.out = dtype

    def saved(self, tensors: Sequence[_Part]) -> Sequence[_Part]:
        return tensors

    def weights(self, saved: Sequence[_Part], backward: bool) -> list[torch.Tensor]:
        return [each.to(self.dtype) for each in saved[: self._count] if each is not None]

    def hidden(self, x: torch.Tensor, saved: Sequence[_Part], weights: list[torch.Tensor], seeds: Any) -> _Hidden:
        gate = F.linear(x, weights[0], self._bias(saved, 0))
        up = F.linear(x, weights[1], self._bias(saved, 1)) if self._count == 3 else None
        return glu_forward(gate, up, self._activation, self.dtype), gate, up

    def output(self, hidden: _Hidden, saved: Sequence[_Part], weights: list[torch.Tensor]) -> torch.Tensor:
        return F.linear(hidden[0], weights[-1], self._bias(saved, -1))  # type: ignore[arg-type]

    def gradients(
        self,
        x: torch.Tensor,
        dy: torch.Tensor,
        hidden: _Hidden,
        saved: Sequence[_Part],
        weights: list[torch.Tensor],
        seeds: Any,
        need_x: bool,
        sums: _Sums,
    ) -> _Part:
        (gate, up), count, wide = hidden, self._count, sums.wide
        dy = dy if dy.dtype == self.dtype else dy.to(self.dtype)
        dh = torch.mm(dy, weights[-1])
        if wide[count - 1] is not None:
            dgate, dup = glu_backward_keep_h_(dh, gate, up, self._activation)
            sums.add_product(count - 1, dy.t(), dh)
        else:
            dgate, dup = glu_backward(dh, gate, up, self._activation)
        del dh
        dx = None
        for i, given in enumerate((dgate, dup, dy) if up is not None else (dgate, dy)):
            if i < count - 1:
                sums.add_product(i, given.t(), x)
                if need_x:
                    dx = torch.mm(given, weights[i]) if dx is None else dx.addmm_(given, weights[i])
            if wide[count + i] is not None:
                sums.add(count + i, given.sum(0, dtype=wide[count + i]))
        return dx

    def versions(self) -> list[int]:
        return []

    def check(self, versions: list[int]) -> None:
        """Autograd sees them all."""

    def _bias(self, saved: Sequence[_Part], i: int) -> _Part:
        bias = saved[self._count :][i]
        return None if bias is None else bias.to(self.dtype)


# ----------------------------------------------------------------------------------------------------------- autograd


def _tiles(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, max(count, 1), rows)]


def _seeds(seeds: tuple[int, ...], tile: int) -> tuple[int, ...]:
    return tuple((each + 0x9E3779B1 * tile) % (2**31 - 1) for each in seeds)


def _forward(
    mlp: _Mlp, x: torch.Tensor, saved: Sequence[_Part], tile: Tile, seeds: tuple[int, ...]
) -> tuple[torch.Tensor, list[_Part]]:
    """y, and what is kept of all tiles."""
    y = x.new_empty((len(x), mlp.features), dtype=mlp.out)
    kept: list[_Part] = []
    with torch.autocast(device_kind(x.device), enabled=False):
        weights = mlp.weights(saved, False)
        for number, rows in enumerate(_tiles(len(x), tile.rows)):
            hidden = mlp.hidden(x[rows].to(mlp.dtype), saved, weights, _seeds(seeds, number))
            y[rows] = mlp.output(hidden, saved, weights)
            if tile.keep:
                kept += hidden[1:]
            del hidden
    return y, kept


class _Saving(torch.autograd.Function):
    """All of the gradients, and where gate and up are kept also y; otherwise an empty stand-in for it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mlp: _Mlp, tile: Tile, seeds: tuple[int, ...], *tensors: _Part
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.mlp, ctx.tile, ctx.seeds, ctx.shape, ctx.versions = mlp, tile, seeds, x.shape, mlp.versions()
        ctx.dtypes = [None if each is None else each.dtype for each in tensors]
        shape = (*x.shape[:-1], mlp.features)
        x, saved = x.reshape(-1, x.shape[-1]), mlp.saved(tensors)
        ctx.count = len(saved)
        if not tile.keep:
            ctx.save_for_backward(x, *saved)
            return x.new_empty((), dtype=mlp.out).expand(shape)
        y, kept = _forward(mlp, x, saved, tile, seeds)
        ctx.save_for_backward(x, *saved, *kept)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: _Part) -> tuple[Any, ...]:
        need_x, _, _, _, *need = ctx.needs_input_grad
        if dy is None:
            return None, None, None, None, *(None for _ in need)
        ctx.mlp.check(ctx.versions)
        x, *tensors = ctx.saved_tensors
        sums = _Sums([dtype if each else None for dtype, each in zip(ctx.dtypes, need, strict=True)])
        with torch.autocast(device_kind(x.device), enabled=False):
            dx = _backward(ctx, x, tensors, dy.reshape(-1, dy.shape[-1]), need_x, sums)
        return None if dx is None else dx.view(ctx.shape), None, None, None, *sums.rounded()


def _backward(
    ctx: Any, x: torch.Tensor, tensors: list[_Part], dy: torch.Tensor, need_x: bool, sums: _Sums
) -> torch.Tensor | None:
    """The gradient of x; the others are added to `sums`."""
    mlp, tiles = ctx.mlp, _tiles(len(x), ctx.tile.rows)
    saved, kept = tensors[: ctx.count], tensors[ctx.count :]
    each_kept = len(kept) // len(tiles)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    weights = mlp.weights(saved, True)
    for number, rows in enumerate(tiles):
        part, seeds = x[rows].to(mlp.dtype), _seeds(ctx.seeds, number)
        hidden: _Hidden = tuple(kept[number * each_kept : (number + 1) * each_kept])
        if not ctx.tile.keep:
            hidden = mlp.hidden(part, saved, weights, seeds)[1:]
        gradient = mlp.gradients(part, dy[rows], hidden, saved, weights, seeds, need_x, sums)
        if dx is not None:
            dx[rows] = gradient
        del part, hidden, gradient
    return dx


class _Rest(torch.autograd.Function):
    """y in place of its stand-in, whose gradient is that of y. Saves nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        link: torch.Tensor,
        x: torch.Tensor,
        mlp: _Mlp,
        tile: Tile,
        seeds: tuple[int, ...],
        *tensors: _Part,
    ) -> torch.Tensor:
        y, _ = _forward(mlp, x.reshape(-1, x.shape[-1]), mlp.saved(tensors), tile, seeds)
        return y.view(link.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        return dy, *(None for _ in ctx.needs_input_grad[1:])


def _apply(mlp: _Mlp, x: torch.Tensor, tile: Tile, tensors: Sequence[_Part]) -> torch.Tensor:
    seeds = tuple(draw_seed(x.device) if each else 0 for each in mlp.dropout)
    y: torch.Tensor = _Saving.apply(x, mlp, tile, seeds, *tensors)
    if tile.keep:
        return y
    return _Rest.apply(y, x.detach(), mlp, tile, seeds, *(None if each is None else each.detach() for each in tensors))


# ------------------------------------------------------------------------------------------------------------- public


def tiled_lora_mlp_of(
    width: int,
    dtype: torch.dtype,
    projections: tuple[Projection, ...],
    activation: str,
    low: torch.dtype | None,
    out: torch.dtype | None,
) -> Callable[[torch.Tensor, Tile], torch.Tensor]:
    """As `gated_mlp_of` of lora_mlp.py, by tiles, and with dropout too."""
    static, features = checked(width, dtype, projections, activation, low, out)
    mlp, tensors = _WithAdapters(static, activation, features, dtype), tensors_of(projections)
    return lambda x, tile: _apply(mlp, x, tile, tensors)


def tiled_mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    activation: str,
    tile: Tile,
) -> torch.Tensor:
    """down(act(gate(x)) * up(x)) of plain linear layers.

    Args:
        x: [..., K].
        weights, biases: of gate, up and down; or of gate_up, which holds gate before up, and down.
        activation: "silu", "gelu_tanh" or "gelu".
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if len(weights) not in (2, 3) or len(biases) != len(weights):
        raise ValueError(f"gate, up and down, or gate_up and down; got {len(weights)} weights, {len(biases)} biases")
    inner, both = weights[-1].shape[1], len(weights) == 2
    shapes = [(inner * (1 + both), x.shape[-1])] * (len(weights) - 1)
    if [tuple(each.shape) for each in weights[:-1]] != shapes:
        raise ValueError(f"weights must be {shapes} before [N, {inner}], got {[list(w.shape) for w in weights]}")
    kind = device_kind(x.device)
    dtype = x.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    elif {each.dtype for each in (*weights, *biases) if each is not None} != {dtype}:
        raise TypeError(f"x is {dtype}: weights and biases must be too, or run under torch.autocast")
    mlp = _Dense(activation, weights[-1].shape[0], dtype, len(weights))
    return _apply(mlp, x, tile, (*weights, *biases))
