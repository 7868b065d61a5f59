"""What attention gives out in a checkpointed layer, kept so that recomputing the layer leaves attention out.

Attention's forward costs the square of a document's length, and what its backward needs of it is small: its output and
the log-sum-exp of its scores, beside queries, keys and values, which recomputation makes. At 32,768 tokens of Llama-8B
it is 44 % of a layer's forward, for 8 of the 109 KiB a token that all of the layer takes.

Nothing is known here of single operators. In forward, `current()` calls one for whoever computes attention and looks
at what autograd saves of it: what lies in the memory of the operator's arguments is noted as such, the rest is kept
(output, log-sum-exp, and the state of random numbers, of which none are drawn). In recomputation the kept output is
handed out, and each slot of the region gets what it got in forward. Backward is then that of the operator which ran in
forward: the same bits.

An operator that keeps more than its output, or drops attention weights, runs again as ever; so does one that is called
with other shapes or at another place than in forward.

Who computes attention finds out by a variable of the thread, which recomputation.py sets around the layer's function,
in forward on the thread of the script and in recomputation on that of backward, and nowhere else: a checkpoint within
the layer has slots of its own, and none of this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

# An operator keeps its output and little else: log-sum-exp in float32 is 1/32 of heads of 64 in 16 bits. Of one that
# keeps its weights, or copies of queries and keys, more would be kept than it is worth.
MOST_OVER_OUTPUT = 1.5

Pack = Callable[[torch.Tensor], Any]
_THREAD = threading.local()


class _Place(NamedTuple):
    """A tensor in the memory of an argument."""

    argument: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Kept(NamedTuple):
    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Kept:
        return cls(tensor.detach(), tensor._version)

    @property
    def is_unchanged(self) -> bool:
        return self.tensor._version == self.version


class _Call(NamedTuple):
    """A call of an operator.

    Attributes:
        operator, arguments: that was called, and what the tensors among its arguments were like.
        slot: the number of the first tensor that it saved. saved: all of them.
        output: that it returned. needs_gradient: whether that is differentiated. is_tuple: whether it came first of
            several.
    """

    operator: Any
    arguments: list[Any]
    slot: int
    saved: list[_Place | _Kept]
    output: _Kept
    needs_gradient: bool
    is_tuple: bool


class Calls:
    """Those of one pass through one layer.

    Args:
        keeps: whether anything is kept, or only measured.

    Attributes:
        bytes: that are kept, or would be. flops: of their forward, about.
    """

    def __init__(self, keeps: bool):
        self.keeps, self.bytes, self.flops = keeps, 0, 0.0
        self._calls: list[_Call | None] = []

    def add(self, call: _Call | None) -> None:
        self._calls.append(call if self.keeps else None)

    def take(self, number: int) -> _Call | None:
        """A call; it is kept no longer: should backward come again, attention is computed again."""
        if number >= len(self._calls):
            return None
        call, self._calls[number] = self._calls[number], None
        return call


class _Keeper:
    """Calls operators of attention on behalf of a layer."""

    def __init__(self, calls: Calls, pack: Pack, position: Callable[[], int]):
        self._calls, self._pack, self._position = calls, pack, position

    def call(self, visible: int, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """`operator(*args, **kwargs)`, which returns its output, alone or first of several; only that is handed out.

        Args:
            visible: how many keys a token sees at most.
            operator: draws no random numbers, or is torch's `scaled_dot_product_attention`.
        """
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        # Somebody else sees what is saved: a checkpoint within the layer, or one who saves on the CPU.
        if hooks is None or hooks[0] != self._pack:
            return operator(*args, **kwargs)
        if operator is scaled_dot_product_attention:
            args, kwargs = _cast(args, kwargs)
        return self._call(visible, operator, args, kwargs)

    def _call(self, visible: int, operator: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def through(self, visible: int) -> Callable[..., Any]:
        """`call` for tokens that see so many keys at most."""
        return lambda operator, *args, **kwargs: self.call(visible, operator, *args, **kwargs)

    def watching(self) -> TorchFunctionMode:
        """A context in which torch's `scaled_dot_product_attention` is called by `call`."""
        return _Watching(self)


class _Watching(TorchFunctionMode):
    def __init__(self, keeper: _Keeper):
        super().__init__()
        self._keeper = keeper

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        key = args[1] if len(args) > 1 else kwargs["key"]
        return self._keeper.call(key.shape[-2], function, *args, **kwargs)


class _Recorder(_Keeper):
    """In forward."""

    def __init__(self, calls: Calls, pack: Pack, unpack: Callable[[Any], torch.Tensor], position: Callable[[], int]):
        super().__init__(calls, pack, position)
        self._unpack = unpack

    def _call(self, visible: int, operator: Any, args: Any, kwargs: Any) -> Any:
        if _drops(operator, args, kwargs):
            self._calls.add(None)
            return operator(*args, **kwargs)
        arguments = _tensors(args, kwargs)
        # Autograd holds on to `pack` as long as to what it packed: it must lead to no tensor.
        places = {
            (each.untyped_storage()._cdata, each.dtype): number for number, each in reversed(list(enumerate(arguments)))
        }
        slot, noted, pack_slot = self._position(), list[_Place | _Kept](), self._pack

        def pack(tensor: torch.Tensor) -> Any:
            number = places.get((tensor.untyped_storage()._cdata, tensor.dtype))
            if number is None:
                noted.append(_Kept.of(tensor))
            else:
                noted.append(_Place(number, tensor.shape, tensor.stride(), tensor.storage_offset()))
            return pack_slot(tensor)

        with saved_tensors_hooks(pack, self._unpack):
            result = operator(*args, **kwargs)
        saved = list(noted)
        noted.clear()
        is_tuple = isinstance(result, tuple)
        output = result[0] if is_tuple else result
        kept = [each.tensor for each in saved if isinstance(each, _Kept)] + [output]
        size = sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in kept}.values())
        if size > MOST_OVER_OUTPUT * output.numel() * output.element_size():
            self._calls.add(None)
            return result
        self._calls.bytes += size
        self._calls.flops += 4 * output.numel() * visible / 2  # two products; a token sees half of them on average
        described, needs = [_described(each) for each in arguments], output.requires_grad
        self._calls.add(_Call(operator, described, slot, saved, _Kept.of(output), needs, is_tuple))
        return result


class _Player(_Keeper):
    """In recomputation."""

    _number = -1

    def _call(self, visible: int, operator: Any, args: Any, kwargs: Any) -> Any:
        self._number += 1
        call = self._calls.take(self._number)
        arguments = _tensors(args, kwargs)
        if (
            call is None
            or call.operator != operator
            or call.slot != self._position()
            or call.arguments != [_described(each) for each in arguments]
            or not all(each.is_unchanged for each in (call.output, *call.saved) if isinstance(each, _Kept))
        ):
            return operator(*args, **kwargs)
        for each in call.saved:
            if isinstance(each, _Kept):
                self._pack(each.tensor)
            else:
                self._pack(arguments[each.argument].detach().as_strided(each.size, each.stride, each.offset))
        output = call.output.tensor
        if call.needs_gradient:
            output = _HandOut.apply(torch.empty(0, requires_grad=True), output)
        return (output, *4 * [None]) if call.is_tuple else output


class _HandOut(torch.autograd.Function):
    """A tensor as if it had been computed from others that need gradients."""

    @staticmethod
    def forward(ctx: Any, node: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise AssertionError("nothing is differentiated through a recomputation")


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]


def _described(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage().nbytes()
    place = tensor.shape, tensor.stride(), tensor.storage_offset()
    return *place, tensor.dtype, tensor.device, tensor.requires_grad, storage


def _drops(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether attention weights are dropped: then random numbers are drawn that later ones depend on."""
    is_torch = operator is scaled_dot_product_attention
    return is_torch and bool(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))


def _cast(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `scaled_dot_product_attention` as autocast makes them: what it saves are these."""

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        device = value.device.type
        may = value.is_floating_point() and value.dtype != torch.float64 and torch.amp.is_autocast_available(device)
        return value.to(torch.get_autocast_dtype(device)) if may and torch.is_autocast_enabled(device) else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def current() -> _Keeper | None:
    """Who calls operators of attention for the layer that this thread is in; None where nothing is kept of it."""
    return None if torch.compiler.is_compiling() else getattr(_THREAD, "keeper", None)


@contextmanager
def _as_current(keeper: _Keeper | None) -> Iterator[None]:
    before = current()
    _THREAD.keeper = keeper
    try:
        yield
    finally:
        _THREAD.keeper = before


def recording(
    calls: Calls | None, pack: Pack, unpack: Callable[[Any], torch.Tensor], position: Callable[[], int]
) -> Any:
    """Around the forward of a layer, inside the hooks given.

    Args:
        calls: to be filled; None where nothing is kept.
        pack, unpack: of what autograd saves.
        position: how many tensors it has saved.
    """
    if calls is None and current() is None:
        return nullcontext()
    return _as_current(None if calls is None else _Recorder(calls, pack, unpack, position))


def playing(calls: Calls | None, pack: Pack, position: Callable[[], int]) -> Any:
    """Around the recomputation of a layer, likewise."""
    if calls is None and current() is None:
        return nullcontext()
    return _as_current(None if calls is None else _Player(calls, pack, position))
