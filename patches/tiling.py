"""Which gated MLPs are computed by tiles of rows (kernels/tiled_mlp.py), and what of their layers is known for it.

An MLP that is the last of a checkpointed layer is not computed again when its layer is, but in backward, tile by tile.
Where the layer is called without checkpointing because memory is free (kept_layers.py), gate and up are saved, tile by
tile too, and the bits are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels._launch import device_kind, once_differentiable
from hf_turbo.kernels.tiled_mlp import Tile
from torch import nn

from . import lora, recomputation
from .engine import Patch, forward_of, is_plain
from .fingerprint import unwrapped

# Given the tokens of a pass, the columns of gate, and whether the MLP is computed again in backward anyway: how many
# rows are computed at a time, None for all.
Plan = Callable[[int, int, bool], int | None]


class Tiling(NamedTuple):
    """How MLPs are tiled.

    Attributes:
        plan: see above.
        by_calls: whether those that are no function of ours are, by calls of their modules for each tile.
        tell: given a note of what is not tiled though it should be.
    """

    plan: Plan
    by_calls: bool = False
    tell: Callable[[str], None] = lambda note: None


class _Place(NamedTuple):
    layer: weakref.ref[Any] | None
    is_last: bool
    tiling: Tiling


_PLACES: weakref.WeakKeyDictionary[nn.Module, _Place] = weakref.WeakKeyDictionary()
_KEEPS = False  # whether the layer that is called now keeps what backward needs
_WHOLE = False  # whether checkpointed layers are to be taken for others
# By layer: bytes per token of gate and up, of MLPs that did not save them in the layer's last forward.
_LEFT_OUT: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


class TilePatch(Patch):
    """Has one MLP computed by tiles.

    Args:
        layer: the decoder layer it is in, if any.
    """

    def __init__(self, id: str, mlp: nn.Module, layer: nn.Module | None, tiling: Tiling):
        self.id, self._mlp = id, weakref.ref(mlp)
        is_last = layer is not None and _is_last(layer, mlp)
        self._place = _Place(None if layer is None else weakref.ref(layer), is_last, tiling)

    def apply(self) -> None:
        mlp = self._mlp()
        if mlp is not None:
            _PLACES[mlp] = self._place

    def revert(self) -> bool:
        mlp = self._mlp()
        if mlp is not None:
            _PLACES.pop(mlp, None)
        return True


def _is_last(layer: Any, mlp: nn.Module) -> bool:
    """Whether the layer's forward calls none of its modules after this one, as far as its code tells."""
    name = next((name for name, child in layer._modules.items() if child is mlp), None)
    code = getattr(unwrapped(forward_of(type(layer))), "__code__", None)
    names = () if code is None else code.co_names  # in the order of first use
    return name in names and not any(
        each in layer._modules and not _passes_on(layer._modules[each]) for each in names[names.index(name) + 1 :]
    )


def _passes_on(module: nn.Module | None) -> bool:
    """Whether calling it saves nothing."""
    return module is None or isinstance(module, nn.Identity) or (type(module) is nn.Dropout and module.p == 0)


def tile_of(mlp: Any, x: torch.Tensor) -> Tile | None:
    """How this MLP computes `x`; None for all rows at once."""
    place, width = _PLACES.get(mlp), getattr(mlp.down_proj, "in_features", 0)
    if place is None or not width or torch.compiler.is_compiling():
        return None
    layer = None if place.layer is None else place.layer()
    rows = place.tiling.plan(x.numel() // x.shape[-1], width, place.is_last and _is_checkpointed(layer))
    if layer is not None and not _KEEPS:
        _LEFT_OUT[layer] = 0 if rows is None else 2 * width * _itemsize(x)
    return None if rows is None else Tile(rows, _KEEPS)


def _is_checkpointed(layer: Any) -> bool:
    """Whether backward will run the layer's forward again, as far as its last saved tensor."""
    if layer is None or _WHOLE or not (layer.training and layer.gradient_checkpointing):
        return False
    # With reentrant autograd it runs to its end.
    return not recomputation.is_reentrant(layer.__dict__.get("_gradient_checkpointing_func"))


def may_call(mlp: nn.Module, projections: Sequence[nn.Module]) -> bool:
    """Whether an MLP whose activation is known may be tiled by calls of its projections.

    Gradients of tiles are rounded to the dtype of what they belong to before they are added up.
    """
    place = _PLACES.get(mlp)
    if place is None or not place.tiling.by_calls:
        return False
    trained = [each for each in mlp.parameters() if each.requires_grad] if torch.is_grad_enabled() else []
    reason = next(filter(None, map(lora.rows_conflict, projections)), None)
    if reason is None and not is_plain(*trained):
        reason = "trained weights are sharded or partitioned"
    if reason is None and any(each.itemsize < 4 for each in trained):
        reason = "trained weights have 16 bits, to which the gradient of each tile would be rounded"
    if reason is not None:
        place.tiling.tell(f"memory='min_memory': {type(mlp).__name__} is computed at once: {reason}")
    return reason is None


def _itemsize(x: torch.Tensor) -> int:
    kind = device_kind(x.device)
    return torch.get_autocast_dtype(kind).itemsize if torch.is_autocast_enabled(kind) else x.itemsize


@contextmanager
def keeping() -> Iterator[None]:
    """While a checkpointed layer is called without checkpointing, to keep what backward needs."""
    global _KEEPS
    before, _KEEPS = _KEEPS, True
    try:
        yield
    finally:
        _KEEPS = before


@contextmanager
def not_checkpointed() -> Iterator[None]:
    """While layers whose checkpointing is switched on to watch them stand for layers without it."""
    global _WHOLE
    _WHOLE = True
    try:
        yield
    finally:
        _WHOLE = False


def left_out(layer: nn.Module, tokens: int) -> float:
    """Bytes that the MLPs of a layer would keep for backward of so many tokens, and did not."""
    return _LEFT_OUT.get(layer, 0.0) * tokens


# -------------------------------------------------------------------------------------------------------- by calls


class _Calls:
    """One call of an MLP, tile by tile."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], rows: int, device: torch.device):
        self.function, self.rows, self._device = function, rows, device
        self._random: list[list[torch.Tensor]] = []
        kind = device_kind(device)
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of rows [T, K], without a graph."""
        outputs = []
        for rows in x.split(self.rows):
            self._random.append(recomputation.random_states(self._device))
            outputs.append(self.function(rows))
        return torch.cat(outputs)

    def backward(self, x: torch.Tensor, dy: torch.Tensor, need_x: bool, parameters: list[Any]) -> list[Any]:
        """The gradients of x and of those parameters; None for what was not used."""
        dx = torch.empty_like(x) if need_x else None
        sums: list[Any] = [None] * len(parameters)
        now, start = recomputation.random_states(self._device), 0
        for rows, given, random in zip(x.split(self.rows), dy.split(self.rows), self._random, strict=True):
            recomputation.set_random_states(random, self._device)
            with torch.enable_grad(), torch.autocast(*self._autocast):
                part = rows.detach().requires_grad_(need_x)
                y = self.function(part)
            wanted = [part, *parameters] if need_x else parameters
            gradients = list(torch.autograd.grad(y, wanted, given.to(y.dtype), allow_unused=True))
            if dx is not None:
                dx[start : start + len(rows)] = gradients.pop(0)
            for i, each in enumerate(gradients):
                # A copy of the first: autograd returns one tensor for several parameters that have the same gradient.
                if each is not None:
                    sums[i] = each.clone() if sums[i] is None else sums[i].add_(each)
            start += len(rows)
        recomputation.set_random_states(now, self._device)
        return [dx, *sums]


class _Saving(torch.autograd.Function):
    """Saves x, and gives an empty stand-in for y: see kernels/tiled_mlp.py."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, calls: _Calls, like: torch.Tensor, features: int, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.calls, ctx.parameters = calls, parameters
        ctx.save_for_backward(x)
        return like.expand(*x.shape[:-1], features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        flat, given = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx, *others = ctx.calls.backward(flat, given, need_x, list(ctx.parameters))
        return None if dx is None else dx.view(x.shape), None, None, None, *others


class _Rest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: torch.Tensor, x: torch.Tensor, calls: _Calls) -> torch.Tensor:
        return calls.forward(x.reshape(-1, x.shape[-1])).view(link.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        return dy, None, None


def by_calls(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    rows: int,
    features: int,
    dtype: torch.dtype,
    parameters: Sequence[torch.Tensor],
) -> torch.Tensor:
    """`function(x)`, row by row the same, by tiles; in backward each is computed again, with the same random numbers.

    Args:
        features, dtype: columns of the result, and its dtype.
        parameters: those that get a gradient.
    """
    calls = _Calls(function, rows, x.device)
    link = _Saving.apply(x, calls, x.new_empty((), dtype=dtype), features, *parameters)
    return _Rest.apply(link, x.detach(), calls)
