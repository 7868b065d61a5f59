"""Whole fine-tuning runs through TRL, each system in a fresh process: time, memory, and whether the losses agree.

    python benchmarks/train.py --workload llama1b-full --systems stock,turbo
    python benchmarks/train.py --workload llama8b-qlora --systems stock,turbo,liger,unsloth --profile --json runs.jsonl
    python benchmarks/train.py --workload llama8b-qlora --tiny            # a dry run on the CPU, in seconds

What the columns mean:

    ms/step         wall time from the end of one optimizer step to the end of the next, device synchronised: data,
                    logging and optimizer included. Median and 95th percentile of the timed steps, warm-up left out.
    tokens/s        tokens that are not padding, over the sum of the timed steps.
    allocated       peak GiB in tensors (`torch.cuda.max_memory_allocated`), reserved: peak GiB held by the allocator.
                    Of the whole run, from the finished model on: trainer set-up, warm-up and timed steps. On a CPU:
                    peak resident memory of the process, which includes building the model.
    launches, busy  with --profile: kernels launched per optimizer step, and milliseconds of a step in which at least
                    one kernel ran; from two more steps, which are not timed.
    copies          with --profile: milliseconds of copies to and from pinned host memory in a step, and the share of
                    them that passed while a kernel ran.

The run fails (exit code 1) when a system other than the optional rivals fails, or when stock's and turbo's losses
disagree. See `disagreements` for the rule.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from worker import PROFILED_STEPS, STEP_LINE, SYSTEMS, spec
from workloads import WORKLOADS, Workload, parse

RIVALS = ("liger", "unsloth")
Result = dict[str, Any]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    systems = "\n".join(f"  {name:8} {text}" for name, text in SYSTEMS.items())
    workloads = "\n".join(f"  {name}" for name in WORKLOADS)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nsystems:\n{systems}\n\nworkloads:\n{workloads}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", required=True, choices=WORKLOADS, metavar="NAME")
    parser.add_argument("--systems", default="stock,turbo", help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="optimizer steps before those (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the workload"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of hf_turbo.enable(), for turbo"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="append the measurements to this file, one line a run"
    )
    parser.add_argument("--profile", action="store_true", help="also count launches and device time (CUDA)")
    parser.add_argument(
        "--gpu-gib", type=float, metavar="GIB", help="leave so much of the GPU's memory: as a smaller GPU has (CUDA)"
    )
    parser.add_argument("--tiny", action="store_true", help="shrink the model and the data to a dry run on the CPU")
    args = parser.parse_args(argv)
    args.systems = args.systems.split(",")
    unknown = [name for name in args.systems if name not in SYSTEMS]
    if unknown:
        parser.error(f"unknown systems {', '.join(unknown)}: choose from {', '.join(SYSTEMS)}")
    pairs = [text.partition("=") for text in args.option]
    if not all(separator for _, separator, _ in pairs):
        parser.error("--option takes NAME=VALUE")
    args.option = {name: parse(value) for name, _, value in pairs}
    if args.steps < 1 or args.warmup < 0:
        parser.error("--steps must be at least 1 and --warmup at least 0")
    return args


def occupied(gib: float | None) -> Any:
    """What keeps all but so much of the GPU's memory from other processes, as long as it lives."""
    if gib is None:
        return None
    import torch

    free, _ = torch.cuda.mem_get_info()
    size = free - int(gib * 2**30)
    if size < 0:
        raise ValueError(f"--gpu-gib {gib}: {free / 2**30:.1f} GiB are free")
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def run_system(system: str, workload: Workload, settings: dict[str, Any], on_step: Any) -> Result:
    """Trains in a fresh process. Returns its measurements, or `failed` (last line of the traceback) and `log`."""
    with tempfile.TemporaryDirectory() as folder:
        spec_path, result_path, log_path = (Path(folder, name) for name in ("spec.json", "result.json", "log"))
        spec_path.write_text(json.dumps(spec(system, workload, **settings)))
        worker = Path(__file__).with_name("worker.py")
        # HF_TURBO in the environment would turn stock into turbo. TRL refuses several GPUs in one process.
        environment = {name: value for name, value in os.environ.items() if name != "HF_TURBO"}
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
        with log_path.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(worker), str(spec_path), str(result_path)],
                cwd=folder,
                env={**environment, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(STEP_LINE):
                    on_step(int(line.removeprefix(STEP_LINE)))
                log.write(line)
                log.flush()
            code = process.wait()
        if code == 0:
            return json.loads(result_path.read_text())
        lines = [line for line in log_path.read_text().splitlines() if line.strip()]
        return {"failed": lines[-1] if lines else f"exit code {code}", "log": lines[-25:]}


def disagreements(stock: Result, turbo: Result, masked: float = 0.0) -> list[str]:
    """What stock and turbo do not agree on, empty when all is well. Every step is compared, warm-up included.

    Both compute the same mathematics in bf16, summed in another order. The yardstick is `--systems stock,control`:
    stock against stock with eager attention.

    Losses: rounding errors of single tokens are independent, so the mean over n labelled tokens is off by
    k * 2**-8 / sqrt(n), relative (2**-8 is bf16's spacing), root mean square over the steps. k grows with the spread of
    the logits and the depth: it was 0.1 in a 4-layer model of width 512 with random weights, and for the yardstick on
    Llama-8B, the largest model here, 2.0 with LoRA and 2.6 with QLoRA (H200, 14 steps). Allowed: k = 3.

    Gradient norms are bf16 numbers where the gradients are, with a spacing of up to 2**-7. Allowed: two of those.
    Tokens seen must be equal.
    """
    found = []
    if stock["tokens"] != turbo["tokens"]:
        found.append(f"tokens seen: {sum(stock['tokens']):.0f} and {sum(turbo['tokens']):.0f}")
    labelled = min(stock["tokens"]) * (1 - masked)
    apart = math.sqrt(statistics.fmean(d * d for d in relative_differences(stock["losses"], turbo["losses"])))
    allowed = 3 * 2**-8 / math.sqrt(labelled)
    if not apart <= allowed:
        found.append(f"losses: {apart:.1e} apart, root mean square over the steps, allowed {allowed:.1e}")
    norms = relative_differences(stock["grad_norms"], turbo["grad_norms"])
    if not max(norms) <= 2 * 2**-7:
        found.append(
            f"grad_norms: {max(norms):.1e} apart at step {norms.index(max(norms)) + 1}, allowed {2 * 2**-7:.1e}"
        )
    return found


def relative_differences(stock: list[float], other: list[float]) -> list[float]:
    """|other - stock| / |stock| at every step; infinite where one is not a number or a step is missing."""
    if len(stock) != len(other):
        return [math.inf]
    pairs = zip(stock, other, strict=True)
    return [abs(b - a) / abs(a) if math.isfinite(a) and math.isfinite(b) and a else math.inf for a, b in pairs]


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not pass, interpolated."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summary(name: str, args: argparse.Namespace, results: dict[str, Result]) -> Table:
    """One column per system that was measured, one row per figure."""
    measured = {system: result for system, result in results.items() if "step_ms" in result}
    stock = measured.get("stock")
    device = next((result["device"] for result in measured.values()), "nothing measured")
    title = f"{name}{', tiny' if args.tiny else ''}, {device}: {args.steps} steps after {args.warmup} of warm-up"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for system in measured:
        table.add_column(system, justify="right")

    def median(result: Result) -> float:
        return statistics.median(result["step_ms"])

    def apart(key: str) -> Callable[[Result], str]:
        return lambda result: (
            "" if stock is None or result is stock else f"{max(relative_differences(stock[key], result[key])):.1e}"
        )

    rows: dict[str, Callable[[Result], str]] = {
        "ms/step, median": lambda result: f"{median(result):,.1f}",
        "ms/step, 95th percentile": lambda result: f"{percentile(result['step_ms'], 0.95):,.1f}",
        "times as fast as stock": lambda result: f"{median(stock) / median(result):.2f}" if stock else "",
        "tokens/s, padding not counted": lambda result: f"{result['tokens_per_second']:,.0f}",
        "peak GiB allocated": lambda result: f"{result['peak_allocated_gib']:.2f}",
        "peak GiB reserved": lambda result: f"{result['peak_reserved_gib']:.2f}",
        "peak GiB resident": lambda result: f"{result['peak_rss_gib']:.2f}",
        "launches per step": lambda result: f"{result['launches_per_step']:,.0f}",
        "GPU busy, ms per step": lambda result: f"{result['gpu_busy_ms_per_step']:,.1f}",
        "copies with the host, ms per step (hidden)": lambda result: (
            f"{result['host_copies_ms_per_step']:,.1f}"
            f" ({result['hidden_copies_ms_per_step'] / max(1e-9, result['host_copies_ms_per_step']):.0%})"
        ),
        "loss of the first step": lambda result: f"{result['losses'][0]:.5f}",
        "loss of the last step": lambda result: f"{result['losses'][-1]:.5f}",
        "largest difference of a loss": apart("losses"),
        "largest difference of a gradient norm": apart("grad_norms"),
    }
    for label, cell in rows.items():
        try:
            table.add_row(label, *(cell(result) for result in measured.values()))
        except KeyError:  # a figure of the other kind of device, or of --profile
            continue
    return table


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = Console()
    workload = WORKLOADS[args.workload]
    if args.tiny:
        workload = workload.tiny()
    try:
        workload = workload.change(args.set)
        held = occupied(args.gpu_gib)
    except ValueError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    settings = {
        "steps": args.steps,
        "warmup": args.warmup,
        "profile": args.profile,
        "cpu": args.tiny,
        "options": args.option,
    }
    total = args.warmup + args.steps + (PROFILED_STEPS if args.profile and not args.tiny else 0)
    results: dict[str, Result] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for system in args.systems:
            task = progress.add_task(f"{args.workload}: {system}", total=total)
            results[system] = run_system(system, workload, settings, lambda n, t=task: progress.update(t, completed=n))

    del held
    if any("step_ms" in result for result in results.values()):
        console.print(summary(args.workload, args, results))
    problems = []
    for system, result in results.items():
        if "skipped" in result:
            console.print(f"{system} skipped: {result['skipped']}")
        if "failed" in result:
            console.print("\n".join([f"{system} failed:", *result["log"]]), style="dim", markup=False, soft_wrap=True)
            if system not in RIVALS:
                problems.append(f"{system} failed: {result['failed']}")
    if all("losses" in results.get(system, {}) for system in ("stock", "turbo")):
        problems += [
            f"stock and turbo disagree on {text}"
            for text in disagreements(results["stock"], results["turbo"], workload.masked)
        ]
    if args.json:
        run = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "workload": args.workload,
            "tiny": args.tiny,
            "settings": asdict(workload),
            "options": args.option,
            "gpu_gib": args.gpu_gib,
            "steps": args.steps,
            "warmup": args.warmup,
            "systems": results,
            "problems": problems,
        }
        with args.json.open("a") as lines:
            lines.write(json.dumps(run) + "\n")
    for problem in problems:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
