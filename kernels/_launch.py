"""How every op in this folder is registered with torch and launched.

An op is a torch custom op, so that torch.compile and selective checkpointing see one node, with one implementation for
all devices: it asks `use_triton` and either launches its Triton kernel or computes its torch reference. The low-level
`torch.library.Library` is used rather than the `custom_op` decorator because the latter costs several times as much
host time per call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_LIBRARY = torch.library.Library("hf_turbo", "DEF")

# With TRITON_INTERPRET=1 Triton runs kernels in Python on CPU tensors: how the kernels are tested without a GPU.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def register_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `hf_turbo::<schema>` and returns the callable to use.

    It goes through the dispatcher only where somebody watches there: torch.compile, or a dispatch mode such as those of
    selective checkpointing and fake tensors. Otherwise it calls the implementation, which saves a third of the host
    time of a small op. Call it inside an autograd Function, where nothing is recorded.

    Args:
        schema: torch schema string, e.g. ``"scale(Tensor x, float factor) -> Tensor"``.
        implementation: runs on real tensors of any device; it must not return one of its inputs.
        fake: returns empty outputs of the right shapes, dtypes and strides, for tracing.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_turbo::{name}", fake, lib=_LIBRARY)
    registered = getattr(torch.ops.hf_turbo, name).default

    def op(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return registered(*args)
        return implementation(*args)

    return op


_TWICE = b"hf_turbo: second derivatives (create_graph=True) are not supported; switch it off where they are taken"


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients that are recorded (create_graph=True) raise where they are differentiated.

    torch's decorator of the same name has them raise only where the incoming gradient is recorded itself. A loss's own
    is not, and what depends on saved tensors would be missing without a word.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        results = results if isinstance(results, tuple) else (results,)
        error: Any = torch._C._functions.DelayedError(_TWICE, len(results))
        return error(*(None if each is None else each.detach().requires_grad_() for each in results))

    return once


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that computes in the dtypes of what it is given, where a script goes backward under autocast too."""

    @functools.wraps(backward)
    def plain(ctx: Any, *gradients: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return backward(ctx, *gradients)
        with torch._C._DisableAutocast():
            return backward(ctx, *gradients)

    return plain


def no_output(*_: Any) -> None:
    """`fake` of an op that fills its arguments."""


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on `tensor` launch Triton; otherwise they compute the torch reference.

    float64 takes the reference: kernels compute in float32, and nobody trains in float64 for speed.
    """
    on_device = tensor.is_cuda or (INTERPRET and tensor.device.type == "cpu")
    return on_device and tensor.dtype != torch.float64


def device_kind(device: torch.device) -> str:
    """The type of the device whose rules hold for sizes and dtypes. Tensors without data ("meta") stand for a GPU's:
    with them a training step can be gone through to see what memory it takes, and nothing else is done with them.
    """
    return "cuda" if device.type == "meta" else device.type


class _Compiled(NamedTuple):
    """A kernel compiled for some arguments, the values of its constexpr parameters, and what launches it, by grid."""

    kernel: Any
    constants: list[Any]
    runners: dict[tuple[int, ...], Callable[..., None]]


# By all that Triton compiles a kernel for.
_COMPILED: dict[tuple[Any, ...], _Compiled] = {}


class _IntegerKinds(dict[int, int]):
    """What Triton compiles for of an integer: divisibility by 16, being 1, its size. Looked up faster than made."""

    _MOST = 2**16

    def __missing__(self, integer: int) -> int:
        if len(self) >= self._MOST:  # seeds of dropout are new at every call
            self.clear()
        kind = self[integer] = (not integer & 15) | (integer == 1) << 1 | (integer >> 31 != 0) << 2
        return kind


_INTEGER_KINDS = _IntegerKinds()
_MOST_RUNNERS = 256  # batches of varying lengths have many grids


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, fp_fusion: Any = True, **meta: Any
) -> None:
    """Launches `kernel` on `device`, which need not be the current one (Triton launches on the current device).

    Triton's look-up of the compiled kernel takes as much host time as the launch; on a GPU it is done here, by the same
    properties of the arguments: dtype and alignment of tensors, size, divisibility by 16 and being 1 of integers.

    Fused multiply-add is asked for by name: its default changes with Triton 3.10, and 3.9 warns about that. Without it
    (`fp_fusion`, the same at every launch of a kernel) two kernels that say the same arithmetic do the same.
    """
    if device.type != "cuda":
        kernel[grid](*args, enable_fp_fusion=fp_fusion, **meta)
    elif device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, device, args, fp_fusion, meta)
    else:
        _launch(kernel, grid, device, args, fp_fusion, meta)


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, args: Any, fp_fusion: bool, meta: dict[str, Any]
) -> None:
    index = device.index
    key: list[Any] = [id(kernel), index, *meta.values()]
    for arg in args:
        kind = type(arg)
        if kind is int:
            key.append(_INTEGER_KINDS[arg])
        elif isinstance(arg, torch.Tensor):
            key += (arg.dtype, arg.data_ptr() & 15)
        else:
            key.append(kind)
    signature = tuple(key)
    compiled = _COMPILED.get(signature)
    if compiled is None:
        function = kernel[grid](*args, enable_fp_fusion=fp_fusion, **meta)
        constants = [meta[name] for name in kernel.arg_names[len(args) :]]
        _COMPILED[signature] = _Compiled(function, constants, {})
        return
    runner = compiled.runners.get(grid)
    if runner is None:
        if len(compiled.runners) >= _MOST_RUNNERS:
            compiled.runners.clear()
        runner = compiled.runners[grid] = compiled.kernel[(*grid, 1, 1)[:3]]
    # Without a stream it would look up the current device first.
    runner(*args, *compiled.constants, stream=torch._C._cuda_getCurrentRawStream(index))


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. `triton.cdiv` costs microseconds per call on the host."""
    return -(-a // b)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors; a small constant for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


class Rows(NamedTuple):
    """How the rows `x[..., :]` lie in memory, taken in memory order: row r starts at element
    `r // inner * outer_stride + r % inner * inner_stride`. Two strides describe every view that transformers makes of a
    projection: slices of a packed one, heads of it, and their transposes.
    """

    order: tuple[int, ...]  # the leading dimensions, outermost in memory first
    split: int  # order[:split] make the outer count, order[split:] the inner one
    inner: int
    outer_stride: int
    inner_stride: int


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy if its rows cannot be described as above."""
    return x if x.is_contiguous() or _find_rows(x) is not None else x.contiguous()


def rows_of(x: torch.Tensor) -> Rows:
    """The row layout of `x`, which has been through `with_rows`."""
    rows = _find_rows(x)
    if rows is None:
        raise ValueError(f"rows of strides {x.stride()}, shape {list(x.shape)} are more than two strides apart")
    return rows


def _find_rows(x: torch.Tensor) -> Rows | None:
    leading = x.ndim - 1
    if x.is_contiguous():
        return Rows(tuple(range(leading)), leading, 1, x.shape[-1], 0)
    shape, strides = x.shape, x.stride()
    if strides[-1] != 1 and shape[-1] > 1:
        return None
    order = tuple(sorted(range(leading), key=lambda dim: -strides[dim]))
    for split in range(leading, -1, -1):
        outer = _one_stride(shape, strides, order[:split])
        inner = _one_stride(shape, strides, order[split:])
        # Stride 0 is an expanded tensor, whose `empty_like` is in another order.
        if outer is None or inner is None or 0 in (outer[1], inner[1]):
            continue
        if inner[0] == 1:
            return Rows(order, split, 1, outer[1], 0)
        return Rows(order, split, inner[0], outer[1], inner[1])
    return None


def in_rows(tensor: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, int, int]:
    """`tensor`, copied only if it cannot be walked in the order of `rows`, and its outer and inner strides."""
    shape, strides = tensor.shape, tensor.stride()
    if strides[-1] == 1 or shape[-1] <= 1:
        outer = _one_stride(shape, strides, rows.order[: rows.split])
        inner = _one_stride(shape, strides, rows.order[rows.split :])
        if outer is not None and inner is not None:
            return tensor, outer[1], inner[1]
    dense = torch.empty_permuted(shape, (*rows.order, len(rows.order)), dtype=tensor.dtype, device=tensor.device)
    return dense.copy_(tensor), rows.inner * shape[-1], shape[-1]


def _one_stride(shape: Any, strides: Any, dims: tuple[int, ...]) -> tuple[int, int] | None:
    """Count and stride of `dims` walked as one dimension, or None if they cannot be; (1, 1) for a single row."""
    count, stride = 1, 1
    for dim in reversed(dims):
        if shape[dim] == 1:
            continue
        if count == 1:
            stride = strides[dim]
        elif strides[dim] != count * stride:
            return None
        count *= shape[dim]
    return count, stride
