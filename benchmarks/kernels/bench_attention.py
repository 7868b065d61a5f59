"""Causal attention over documents, every way that there is to compute it: forward, backward, memory, and its set-up.

    python benchmarks/kernels/bench_attention.py [--json FILE] [--only WAYS] [--tiny]

The ways, all of them given [H, T, D] and the lengths of the documents:

    turbo     kernels/varlen_attention.py as it chooses
    flash     torch's FlashAttention for documents of any lengths, in one call
    runs      one call of scaled_dot_product_attention for each run of documents of one length
    padded    one call over all documents, filled up to the longest; causal, so that no mask is needed; moves included
    flex      FlexAttention, compiled, with a document mask, and for capped scores a score_mod
    eager     transformers' eager attention over padded rows, with the mask that it adds; what stock does with a cap

Times are those of the device, as in conftest.py. `% floor` is of the products over what is visible at the speed of a
large bf16 product, and the bytes of inputs and outputs at copy speed. `set-up` is what a pass pays once, before its
first layer, in wall milliseconds: flex's block mask. `apart` is how far output and gradients are from turbo's,
relative: roundings of bf16 are about 0.005. A way that cannot be had (no compiler, no such kernel, no memory) gets a
line that says why.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from conftest import copy_bandwidth, default_device, extra_gib, matrix_speed, time_ms
from hf_turbo.kernels import varlen_attention as kernels
from hf_turbo.kernels.varlen_attention import varlen_attention
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.helpers import randn, relative_error

BF16 = torch.bfloat16
MOST_EAGER_BYTES = 16 << 30  # of one float32 tensor of scores; eager attention holds several


def spread(count: int, shortest: int, longest: int, total: int | None = None) -> list[int]:
    """Lengths spread evenly over their logarithms, shuffled; the last takes what lacks to the total."""
    ratio = (longest / shortest) ** (1 / max(count - 1, 1))
    lengths = [round(shortest * ratio**i) for i in range(count)]
    random.Random(0).shuffle(lengths)
    if total is not None:
        lengths[-1] = max(1, total - sum(lengths[:-1]))
    return lengths


@dataclass(frozen=True)
class Shape:
    """Documents, and the heads that attend within them."""

    name: str
    lengths: list[int]
    heads: int = 32
    groups: int = 8
    width: int = 128
    softcap: float | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def operations(self, backward: bool) -> int:
        """Of two products forward, and of five backward, over the visible pairs."""
        pairs = sum(n * (n + 1) // 2 for n in self.lengths)
        return 2 * (5 if backward else 2) * self.heads * self.width * pairs

    def bytes(self, backward: bool) -> int:
        elements = self.tokens * self.width * 2 * (self.heads + self.groups)
        return elements * BF16.itemsize * (2 if backward else 1)


SHAPES = [
    Shape("8 x 512", [512] * 8),
    Shape("2 x 2048", [2048] * 2),
    Shape("20 of 100 to 1,500", spread(20, 100, 1500)),
    Shape("15 of 500 to 8,000", spread(15, 500, 8000)),
    Shape("1 x 32,768", [32_768]),
    Shape("8 of 56 to 360", spread(8, 56, 360), width=64),
    Shape("20 of 100 to 1,500", spread(20, 100, 1500), width=64),
    # Gemma 2 9B
    Shape("8 x 512", [512] * 8, 16, 8, 256, softcap=50.0),
    Shape("20 of 100 to 1,500", spread(20, 100, 1500), 16, 8, 256, softcap=50.0),
    Shape("2 x 4096", [4096] * 2, 16, 8, 256, softcap=50.0),
]
TINY = [
    Shape("3 x 8", [8] * 3, 4, 2, 16),
    Shape("4 of 3 to 20", spread(4, 3, 20), 4, 2, 16),
    Shape("4 of 3 to 20", spread(4, 3, 20), 4, 2, 16, softcap=5.0),
]

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Way:
    """How to compute attention at one shape.

    Attributes:
        attend: [H, T, D], [G, T, D], [G, T, D] to [T, H, D].
        set_up: what a pass does once, before its first layer; None for nothing.
        note: what came of making it.
        goes_backward: whether it can be differentiated here.
    """

    attend: Attention
    set_up: Callable[[], Any] | None = None
    note: str = ""
    goes_backward: bool = True


class Unavailable(Exception):
    """A way that cannot be had here, and why."""


# --------------------------------------------------------------------------------------------------------------- ways


def starts_of(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def turbo(shape: Shape, device: torch.device, tiny: bool) -> Way:
    starts, longest = starts_of(shape.lengths, device), max(shape.lengths)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return varlen_attention(q, k, v, shape.lengths, starts=starts, longest=longest, softcap=shape.softcap)

    return Way(attend)


def flash(shape: Shape, device: torch.device, tiny: bool) -> Way:
    if shape.softcap is not None:
        raise Unavailable("torch's operator takes no cap")
    if not kernels._flash_can(*(torch.empty(1, 1, shape.width, dtype=BF16, device=device) for _ in range(2))):
        raise Unavailable("torch's FlashAttention does not run on this device")
    starts, longest = starts_of(shape.lengths, device), max(shape.lengths)
    return Way(lambda q, k, v: kernels._flash(q, k, v, starts, longest, None, True, None, 0.0, kernels._plainly))


def runs(shape: Shape, device: torch.device, tiny: bool) -> Way:
    if shape.softcap is not None:
        raise Unavailable("scaled_dot_product_attention takes no cap")
    return Way(lambda q, k, v: kernels._by_runs(q, k, v, shape.lengths, None, True, None, 0.0, kernels._plainly))


class Rows:
    """Documents as padded rows, and back."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.rows, self.longest = len(lengths), max(lengths)
        places = [torch.arange(length) + row * self.longest for row, length in enumerate(lengths)]
        self._places = torch.cat(places).to(device)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[heads, T, D] to [rows, heads, longest, D]."""
        padded = x.new_zeros(self.rows * self.longest, x.shape[0], x.shape[-1])
        padded = padded.index_copy(0, self._places, x.transpose(0, 1))
        return padded.unflatten(0, (self.rows, self.longest)).transpose(1, 2)

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, heads, longest, D] to [T, heads, D]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self._places)


def padded(shape: Shape, device: torch.device, tiny: bool) -> Way:
    if shape.softcap is not None:
        raise Unavailable("scaled_dot_product_attention takes no cap")
    rows = Rows(shape.lengths, device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (rows.pad(each) for each in (q, k, v))
        return rows.flat(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))

    return Way(attend)


def eager(shape: Shape, device: torch.device, tiny: bool) -> Way:
    """As transformers' Gemma 2 does. The moves to padded rows and back are in it, which stock has not."""
    rows, groups = Rows(shape.lengths, device), shape.heads // shape.groups
    needed = 4 * rows.rows * shape.heads * rows.longest**2
    if needed > MOST_EAGER_BYTES:
        raise Unavailable(f"its scores take {needed / 2**30:.0f} GiB in float32")
    mask = torch.full((rows.longest, rows.longest), torch.finfo(BF16).min, dtype=BF16, device=device).triu(1)
    mask = mask.expand(rows.rows, 1, -1, -1).contiguous()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (rows.pad(each) for each in (q, k, v))
        k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
        scores = q @ k.transpose(2, 3) * shape.width**-0.5
        if shape.softcap is not None:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        weights = torch.softmax(scores + mask, -1, dtype=torch.float32).to(q.dtype)
        return rows.flat(weights @ v)

    return Way(attend)


def flex(shape: Shape, device: torch.device, tiny: bool) -> Way:
    """The dry run is not compiled: a compiler for CPUs may lack, and takes long. There is no backward on a CPU."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise Unavailable(str(error)) from error
    document = torch.repeat_interleave(torch.arange(len(shape.lengths)), torch.tensor(shape.lengths)).to(device)
    make, call, tokens = create_block_mask, flex_attention, shape.tokens
    if not tiny:
        torch._functorch.config.donated_buffer = False  # backward is timed again and again on one graph
        torch._dynamo.config.recompile_limit = 64  # beyond it a call would silently make all tokens by all tokens
        make, call = torch.compile(create_block_mask), torch.compile(flex_attention, dynamic=_DYNAMIC)

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (document[q] == document[k])

    def capped(s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return shape.softcap * torch.tanh(s / shape.softcap)

    def set_up() -> Any:
        return make(visible, None, None, tokens, tokens, device=str(device))

    start = time.perf_counter()
    block_mask = set_up()
    score_mod = None if shape.softcap is None else capped

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (each[None] for each in (q, k, v))
        output = call(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=True)
        return output[0].transpose(0, 1).contiguous()

    if tiny:
        return Way(attend, set_up, "not compiled", goes_backward=device.type != "cpu")
    _gradients(attend, _inputs(shape, device))  # compiles
    return Way(attend, set_up, f"compiled in {time.perf_counter() - start:.0f} s")


_DYNAMIC: bool | None = None  # torch.compile's own choice: the first shape as it is, further ones for any length
WAYS: dict[str, Callable[[Shape, torch.device, bool], Way]] = {
    "turbo": turbo,
    "flash": flash,
    "runs": runs,
    "padded": padded,
    "flex": flex,
    "eager": eager,
}


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Result:
    way: str
    documents: str
    tokens: int
    heads: str
    softcap: float | None
    forward_us: float
    backward_us: float | None
    forward_percent_of_floor: float
    backward_percent_of_floor: float | None
    set_up_ms: float | None
    extra_gib: float  # the most memory that forward and backward take beyond the inputs; 0 on a CPU
    apart: float
    note: str = field(default="")

    HEADER = (
        f"{'documents':<20} {'heads':<10} {'cap':>4} {'way':<7} {'forward us':>10} {'% floor':>7} {'backward us':>11}"
        f" {'% floor':>7} {'set-up ms':>9} {'GiB':>5} {'apart':>7}  note"
    )

    def __str__(self) -> str:
        cap = "" if self.softcap is None else f"{self.softcap:g}"
        set_up = "" if self.set_up_ms is None else f"{self.set_up_ms:.2f}"
        backward, percent = self.backward_us or 0, self.backward_percent_of_floor or 0
        return (
            f"{self.documents:<20} {self.heads:<10} {cap:>4} {self.way:<7} {self.forward_us:>10,.0f}"
            f" {self.forward_percent_of_floor:>7.1f} {backward:>11,.0f} {percent:>7.1f}"
            f" {set_up:>9} {self.extra_gib:>5.2f} {self.apart:>7.0e}  {self.note}"
        )


def _heads(shape: Shape) -> str:
    return f"{shape.heads}/{shape.groups}x{shape.width}"


def _inputs(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """As a layer has them: [tokens, heads, D] in memory, seen transposed."""
    heads = (shape.heads, shape.groups, shape.groups)
    return [
        randn(shape.tokens, h, shape.width, device=device, dtype=BF16, seed=i).transpose(0, 1).requires_grad_()
        for i, h in enumerate(heads)
    ]


def _gradients(attend: Attention, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    output = attend(*inputs)
    start = randn(*output.shape, device=output.device, dtype=output.dtype, seed=9)
    return [output.detach(), *torch.autograd.grad(output, inputs, start)]


def wall_ms(function: Callable[[], Any], calls: int = 5) -> float:
    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    function()
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
        synchronize()
    return (time.perf_counter() - start) / calls * 1e3


def measure(name: str, shape: Shape, device: torch.device, tiny: bool, expected: list[torch.Tensor]) -> Result:
    """Times one way at one shape.

    Args:
        expected: output and gradients to compare with.

    Raises:
        Unavailable: it cannot be had here.
    """
    way = WAYS[name](shape, device, tiny)
    inputs = _inputs(shape, device)
    if not way.goes_backward:
        inputs = [each.detach() for each in inputs]
    found = _gradients(way.attend, inputs) if way.goes_backward else [way.attend(*inputs)]
    apart = max(relative_error(ours, theirs.double()) for ours, theirs in zip(found, expected, strict=False))
    del found
    timing = {"calls": 5, "repetitions": 3 if tiny else 5}
    with torch.no_grad():
        forward = time_ms(lambda: way.attend(*inputs), **timing)
    backward, memory = None, 0.0
    if way.goes_backward:
        output = way.attend(*inputs)
        start = torch.randn_like(output)
        backward = time_ms(lambda: torch.autograd.grad(output, inputs, start, retain_graph=True), **timing)
        del output
        memory = extra_gib(lambda: torch.autograd.grad(way.attend(*inputs), inputs, start), device)

    def percent_of_floor(ms: float, backward: bool) -> float:
        floor = shape.operations(backward) / matrix_speed(device) + shape.bytes(backward) / copy_bandwidth(device)
        return 100 * floor * 1e3 / ms

    return Result(
        way=name,
        documents=shape.name,
        tokens=shape.tokens,
        heads=_heads(shape),
        softcap=shape.softcap,
        forward_us=forward * 1e3,
        backward_us=None if backward is None else backward * 1e3,
        forward_percent_of_floor=percent_of_floor(forward, False),
        backward_percent_of_floor=None if backward is None else percent_of_floor(backward, True),
        set_up_ms=None if way.set_up is None else wall_ms(way.set_up),
        extra_gib=memory,
        apart=apart,
        note=way.note,
    )


def measure_all(shape: Shape, device: torch.device, tiny: bool, names: Sequence[str]) -> list[Result | str]:
    """One result for each way, or a line that says why there is none; printed as they come."""
    expected = _gradients(turbo(shape, device, tiny).attend, _inputs(shape, device))
    results: list[Result | str] = []
    for name in names:
        if name == "eager" and shape.softcap is None and not tiny:
            continue  # stock is scaled_dot_product_attention there
        try:
            results.append(measure(name, shape, device, tiny, expected))
        except Unavailable as error:
            results.append(f"{shape.name:<20} {_heads(shape):<10} {name}: {error}")
        except Exception as error:  # whatever a compiler, or its lack, raises
            text = " ".join(f"{type(error).__name__}: {error}".split())
            results.append(f"{shape.name:<20} {_heads(shape):<10} {name} failed: {text[:200]}")
        print(results[-1], flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


@pytest.mark.parametrize("way", list(WAYS))
def test_attention(way):
    """Prints what the script does (pytest -s)."""
    tiny = not torch.cuda.is_available()
    for shape in TINY if tiny else SHAPES:
        measure_all(shape, default_device(), tiny, [way])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--only", default=",".join(WAYS), help="ways, with commas between (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, nothing compiled: a dry run")
    arguments = parser.parse_args()

    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    speeds = f"copy {copy_bandwidth(device) * 1e-9:.0f} GB/s, product {matrix_speed(device) * 1e-12:.1f} TFLOP/s"
    print(f"{name}, torch {torch.__version__}: {speeds}")
    print(Result.HEADER, flush=True)
    results = []
    for shape in TINY if arguments.tiny else SHAPES:
        results += measure_all(shape, device, arguments.tiny, arguments.only.split(","))
    if arguments.json:
        figures = {
            "device": name,
            "torch": torch.__version__,
            "copy_gb_per_s": copy_bandwidth(device) * 1e-9,
            "product_tflop_per_s": matrix_speed(device) * 1e-12,
            "results": [asdict(each) for each in results if isinstance(each, Result)],
            "unavailable": [each for each in results if isinstance(each, str)],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    measured = [each for each in results if isinstance(each, Result)]
    return 1 if any(not each.apart <= 0.05 for each in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
