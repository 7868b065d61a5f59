"""Every kernel test runs on three backends: the torch reference, Triton's interpreter, Triton on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_turbo.kernels import _launch
from hf_turbo.patches.sums import full_sums

_INTERPRET = _launch.INTERPRET


@pytest.fixture(params=["torch", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where the tensors of a test live; sets which implementation the ops choose there."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if _INTERPRET:
            pytest.skip("TRITON_INTERPRET=1 interprets kernels on the GPU too")
        with full_sums():
            yield torch.device("cuda", torch.cuda.current_device())
        return
    if request.param == "interpreter" and not _INTERPRET:
        pytest.skip("needs TRITON_INTERPRET=1")
    monkeypatch.setattr(_launch, "INTERPRET", request.param == "interpreter")
    yield torch.device("cpu")


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """For tests that only make sense on a GPU; mark them gpu."""
    if not torch.cuda.is_available() or _INTERPRET:
        pytest.skip("needs a CUDA device and no TRITON_INTERPRET")
    with full_sums():
        yield torch.device("cuda", torch.cuda.current_device())


def _round_to_bfloat16() -> None:
    """Triton's interpreter cuts float32 to bfloat16 where GPUs round to nearest even; makes it round."""
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.tensor(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, dtype.scalar)
        return stock(self, source, dtype)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def _widen_bfloat16_products() -> None:
    """Triton's interpreter holds bfloat16 as uint16 and its dot multiplies those integers; makes it multiply numbers.

    float32 holds every bfloat16, and every product of two, so that this is what tensor cores compute.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    stock = getattr(interpreter.InterpreterBuilder, "create_dot", None)
    if stock is None:
        return

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(torch.tensor(handle.data).view(torch.bfloat16).float().numpy(), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(self, widen(a), widen(b), *args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = create_dot


if _INTERPRET:
    _round_to_bfloat16()
    _widen_bfloat16_products()
