"""One optimizer step of the 448 LoRA tensors of Llama-8B at rank 16: clipping, update, and both, stock and turbo.

    python benchmarks/kernels/bench_adamw.py [--json FILE] [--tiny] [--only NAMES] [--tensors lora,full] [--dtypes ...]

With --tensors full: all 1.24e9 parameters of Llama-1B, in bf16 also with exact masters and rounded by chance, which are
ours alone. Where the norm is below the limit, clipping reads and does not write: "clip, no scale".

Host time counts: so many small tensors keep a slow host busy for longer than the device. `wall` is what a step takes
with a synchronisation around 20 of them, `host` what the host alone takes, `device` what the device alone takes (left
out for bitsandbytes, which waits for the device after every tensor). The floor is the bytes of parameters, gradients
and states at copy speed; clipping reads the gradients once more to sum and once more to scale.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copy_bandwidth, default_device, host_us, time_ms
from hf_turbo.patches import engine, optimizers

BF16, FP32 = torch.bfloat16, torch.float32
Shapes = list[tuple[int, int]]


def lora_shapes(layers: int = 32, rank: int = 16, hidden: int = 4096, kv: int = 1024, mlp: int = 14336) -> Shapes:
    """A and B of query, key, value, output, gate, up and down projections, layer by layer."""
    attention = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    linears = [*attention, (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    return [shape for k, n in linears for shape in ((rank, k), (n, rank))] * layers


TENSORS: dict[str, Shapes] = {
    "lora": lora_shapes(),
    "full": [(128256, 2048), *[(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), *[(8192, 2048)] * 3] * 16],
    "tiny": lora_shapes(layers=2, rank=4, hidden=64, kv=32, mlp=128),
}


def bitsandbytes_optimizer(name: str, **options: Any) -> Callable[..., Any] | None:
    try:
        import bitsandbytes
    except ImportError:
        return None
    return lambda params: getattr(bitsandbytes.optim, name)(params, lr=1e-4, **options)


# What bf16 weights are trained with, by the end of an optimizer's name.
WEIGHTS = {"exact": "exact_master", "chance": "stochastic_rounding"}


def makers() -> dict[str, tuple[Callable[..., Any] | None, Callable[[torch.dtype], float]]]:
    """Optimizers, each with the bytes of its states per element of a dtype, a remainder among them."""
    return {
        "torch fused": (lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True), lambda dtype: 2 * dtype.itemsize),
        "torch foreach": (lambda p: torch.optim.AdamW(p, lr=1e-4), lambda dtype: 2 * dtype.itemsize),
        "torch fused, exact": (lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True), lambda dtype: 8 + 2),
        "torch fused, chance": (lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True), lambda dtype: 2 * dtype.itemsize),
        "bitsandbytes 8-bit": (bitsandbytes_optimizer("AdamW8bit"), lambda dtype: 2),
        "bitsandbytes 8-bit, exact": (bitsandbytes_optimizer("AdamW8bit"), lambda dtype: 2 + 2),
        "bitsandbytes 8-bit, chance": (bitsandbytes_optimizer("AdamW8bit"), lambda dtype: 2),
        "bitsandbytes 32-bit": (bitsandbytes_optimizer("AdamW"), lambda dtype: 8),
    }


@dataclass(frozen=True)
class Result:
    tensors: str
    dtype: str
    optimizer: str
    what: str
    turbo: bool
    wall_ms: float
    host_ms: float
    device_ms: float | None
    percent_of_floor: float | None

    HEADER = (
        f"{'tensors':<8} {'dtype':<9} {'optimizer':<26} {'what':<14} {'':<6} {'wall ms':>8} {'host ms':>8}"
        f" {'device ms':>9} {'% floor':>8}"
    )

    def __str__(self) -> str:
        device = "" if self.device_ms is None else f"{self.device_ms:.3f}"
        floor = "" if self.percent_of_floor is None else f"{self.percent_of_floor:.0f}"
        system = "turbo" if self.turbo else "stock"
        return (
            f"{self.tensors:<8} {self.dtype:<9} {self.optimizer:<26} {self.what:<14} {system:<6} {self.wall_ms:>8.3f}"
            f" {self.host_ms:>8.3f} {device:>9} {floor:>8}"
        )


@contextmanager
def patched(optimizer: Any, turbo: bool, weights: Any) -> Iterator[None]:
    """With `turbo`, the optimizer is patched inside; on the CPU too."""
    patches = optimizers.find(optimizer, lambda note: None, True, weights).patches if turbo else []
    engine.switch(True)
    try:
        for patch in patches:
            patch.apply()
        yield
    finally:
        for patch in reversed(patches):
            patch.revert()
        engine.switch(False)


def wall_ms(function: Callable[[], Any], calls: int) -> float:
    """The best of three rounds."""
    best = float("inf")
    for _ in range(3):
        _synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        _synchronize()
        best = min(best, (time.perf_counter() - start) / calls * 1e3)
    return best


def measure(name: str, dtype: torch.dtype, optimizer_name: str, turbo: bool, calls: int = 20) -> Iterator[Result]:
    """Four results: clipping, with and without anything to scale, step, clipping and step."""
    make, state_bytes = makers()[optimizer_name]
    weights = WEIGHTS.get(optimizer_name.rpartition(", ")[2], "as_is")
    if make is None or (weights != "as_is" and (dtype != BF16 or not turbo)):
        return
    device = default_device()
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype) * 0.02) for shape in TENSORS[name]]
    for param in params:
        param.grad = torch.randn_like(param) * 0.01
    elements, optimizer = sum(param.numel() for param in params), make(params)

    def clip() -> None:
        # Scales at every call: what was clipped to 1 is multiplied by 1 / (1 + 1e-6) next time.
        torch.nn.utils.clip_grad_norm_(params, 1.0)

    def look() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1e9)

    def both() -> None:
        clip()
        optimizer.step()

    with patched(optimizer, turbo, weights):
        both()
        waits = "bitsandbytes" in optimizer_name and not turbo
        sizes = {"clip": 3 * dtype.itemsize, "step": 3 * dtype.itemsize + 2 * state_bytes(dtype)}
        for what, function, bytes_each in (
            ("clip", clip, sizes["clip"]),
            ("clip, no scale", look, dtype.itemsize),
            ("step", optimizer.step, sizes["step"]),
            ("clip + step", both, sizes["clip"] + sizes["step"]),
        ):
            on_device = None if waits and "step" in what else time_ms(function, calls=5, repetitions=5)
            floor_ms = elements * bytes_each / copy_bandwidth(device) * 1e3
            yield Result(
                tensors=name,
                dtype=str(dtype).removeprefix("torch."),
                optimizer=optimizer_name,
                what=what,
                turbo=turbo,
                wall_ms=wall_ms(function, calls),
                host_ms=host_us(function) * 1e-3,
                device_ms=on_device,
                percent_of_floor=None if on_device is None else 100 * floor_ms / on_device,
            )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.mark.parametrize("turbo", [False, True], ids=["stock", "turbo"])
@pytest.mark.parametrize("optimizer", list(makers()))
def test_adamw(optimizer, turbo):
    """Prints what the script does (pytest -s)."""
    on_gpu = torch.cuda.is_available()
    for result in measure("lora" if on_gpu else "tiny", BF16 if on_gpu else FP32, optimizer, turbo):
        print(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument(
        "--only", default="", help="optimizers whose names begin with one of these, with commas between"
    )
    parser.add_argument("--dtypes", default="bfloat16,float32", help="with commas between")
    parser.add_argument("--tensors", default="lora", help="lora, full (all of Llama-1B), with commas between")
    parser.add_argument("--tiny", action="store_true", help="a few small tensors: a dry run")
    arguments = parser.parse_args()

    device = default_device()
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{title}, torch {torch.__version__}: copy {copy_bandwidth(device) * 1e-9:.0f} GB/s")
    print(Result.HEADER, flush=True)
    results = []
    for name in ["tiny"] if arguments.tiny else arguments.tensors.split(","):
        for dtype in (getattr(torch, dtype) for dtype in arguments.dtypes.split(",")):
            for optimizer in makers():
                if not optimizer.startswith(tuple(arguments.only.split(","))):
                    continue
                for turbo in (False, True):
                    for result in measure(name, dtype, optimizer, turbo, calls=3 if arguments.tiny else 20):
                        results.append(result)
                        print(result, flush=True)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
