"""Loss curves of a small Llama in bf16, trained from scratch on real text: what becomes of small updates.

    python benchmarks/bf16_weights.py [--steps 500] [--seeds 3] [--jobs 1] [--lr 5e-5] [--out build/bf16_weights]
    python benchmarks/bf16_weights.py --write-text FILE      for a machine that lacks the text; there: --text FILE

Four ways to train the same bf16 model on the same batches of human dialogues (chitchat-dataset, read as bytes):

    fp32_master           fp32 copies of the weights, stepped by torch's AdamW, cast to bf16 after each step
    exact_master          bf16_weights="exact_master": 16 bits more beside each weight
    stochastic_rounding   bf16_weights="stochastic_rounding": weights and averages in bf16, rounded by chance
    plain_bf16            torch's AdamW on the bf16 weights

A seed is another initialisation, another order of the text, and other draws; how far runs of fp32_master with several
seeds lie apart is the noise by which the others are judged, seed by seed. Writes results.json and curves.png to --out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hf_turbo.patches import engine, optimizers
from transformers import LlamaConfig, LlamaForCausalLM

SYSTEMS = ("fp32_master", "exact_master", "stochastic_rounding", "plain_bf16")
SEPARATOR = 0  # a byte that no text has, between dialogues
HELD_OUT = 64  # rows that nothing is trained on
SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def text_of_package() -> bytes:
    from chitchat_dataset import Dataset

    dialogues = []
    for dialogue in Dataset().values():
        turns = [" ".join(message["text"].strip() for message in turn).strip() for turn in dialogue["messages"]]
        dialogues.append("\n".join(turns).encode())
    random.Random(0).shuffle(dialogues)
    return bytes([SEPARATOR]).join(dialogues)


def rows_of(text: bytes, length: int) -> torch.Tensor:
    """[rows, length] of bytes."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tokens[: len(tokens) // length * length].view(-1, length)


class Run:
    """One model and what trains it."""

    def __init__(self, system: str, seed: int, arguments: argparse.Namespace, device: torch.device):
        self.system, self.arguments = system, arguments
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=256, max_position_embeddings=arguments.length, **SIZES[arguments.size])
        self.model = LlamaForCausalLM(config).to(device, torch.bfloat16).train()
        self.params = list(self.model.parameters())
        self.masters = [param.detach().float() for param in self.params] if system == "fp32_master" else []
        trained: Any = [m.requires_grad_() for m in self.masters] or self.params
        self.optimizer = torch.optim.AdamW(trained, lr=arguments.lr, weight_decay=0.0, betas=(0.9, 0.999))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.patches: list[Any] = []
        if system in ("exact_master", "stochastic_rounding"):
            finding = optimizers.find(self.optimizer, print, True, system, seed)  # type: ignore[arg-type]
            self.patches = finding.patches
            for patch in self.patches:
                patch.apply()
        self.lost: float | None = None

    def _rate(self, step: int) -> float:
        warmup, steps = min(20, self.arguments.steps // 10), self.arguments.steps
        return min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        tokens = rows.long()
        return self.model(input_ids=tokens, labels=tokens).loss

    def step(self, rows: torch.Tensor, count: bool) -> torch.Tensor:
        loss = self.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        before = [param.detach().clone() for param in self.params] if count else []
        for master, param in zip(self.masters, self.params, strict=bool(self.masters)):
            master.grad = param.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for master, param in zip(self.masters, self.params, strict=bool(self.masters)):
                param.copy_(master)
        if count:
            given = sum(int((param.grad != 0).sum()) for param in self.params)
            pairs = zip(self.params, before, strict=True)
            same = sum(int(((param == old) & (param.grad != 0)).sum()) for param, old in pairs)
            self.lost = same / max(1, given)
        self.model.zero_grad()
        self.scheduler.step()
        return loss.detach()

    @torch.no_grad()
    def held_out(self, rows: torch.Tensor) -> float:
        return statistics.fmean(float(self.loss(some)) for some in rows.split(self.arguments.batch))

    def close(self) -> None:
        engine.revert_all(self.patches)


def train(system: str, seed: int, rows: torch.Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    start, run = time.perf_counter(), Run(system, seed, arguments, device)
    held_out, rest = rows[:HELD_OUT].to(device), rows[HELD_OUT:]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    losses = []
    for step in range(arguments.steps):
        chosen = torch.arange(step * arguments.batch, (step + 1) * arguments.batch) % len(rest)
        losses.append(run.step(rest[order[chosen]].to(device), count=step == arguments.steps // 2))
    result = {
        "system": system,
        "seed": seed,
        "losses": torch.stack(losses).float().tolist(),
        "held_out": run.held_out(held_out),
        "weights_unchanged_in_the_middle_step": run.lost,
        "seconds": time.perf_counter() - start,
    }
    run.close()
    return result


def judge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out losses, and how far each way is from fp32_master with the same seed, in units of the noise."""
    by_system = {s: {r["seed"]: r["held_out"] for r in results if r["system"] == s} for s in SYSTEMS}
    master = by_system["fp32_master"]
    noise = statistics.stdev(master.values()) if len(master) > 1 else None
    table: dict[str, Any] = {"noise": noise}
    for system, losses in by_system.items():
        if losses:
            apart = statistics.fmean(losses[seed] - master[seed] for seed in losses)
            in_noise = apart / noise if noise else None
            table[system] = {"held_out": statistics.fmean(losses.values()), "above_fp32": apart, "in_noise": in_noise}
    return table


def plot(results: list[dict[str, Any]], arguments: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    width = max(1, arguments.steps // 25)

    def smooth(losses: list[float]) -> torch.Tensor:
        return torch.tensor(losses).unfold(0, width, 1).mean(1)

    reference = {r["seed"]: smooth(r["losses"]) for r in results if r["system"] == "fp32_master"}
    for system in SYSTEMS:
        runs = [r for r in results if r["system"] == system]
        curves = torch.stack([smooth(r["losses"]) for r in runs])
        steps = range(width, width + curves.shape[1])
        (line,) = left.plot(steps, curves.mean(0), label=system, linewidth=1.2)
        apart = torch.stack([smooth(r["losses"]) - reference[r["seed"]] for r in runs])
        right.plot(steps, apart.mean(0), color=line.get_color(), linewidth=1.2, label=system)
    if len(reference) > 1:
        noise = torch.stack(list(reference.values())).std(0)
        steps = range(width, width + len(noise))
        right.fill_between(steps, -noise, noise, color="grey", alpha=0.25, label="noise: seeds of fp32_master")
    left.set_ylabel("training loss")
    right.set_ylabel("training loss above fp32_master, same seed")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
    figure.suptitle(f"bf16 weights, Llama ({arguments.size}) from scratch, bytes of dialogues, lr {arguments.lr:g}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=Path, help="bytes to train on, instead of those of the package")
    parser.add_argument("--write-text", type=Path, help="write the package's text there, and no more")
    parser.add_argument("--out", type=Path, default=Path("build/bf16_weights"))
    arguments = parser.parse_args()
    text = arguments.text.read_bytes() if arguments.text else text_of_package()
    if arguments.write_text:
        arguments.write_text.write_bytes(text)
        return 0

    rows, results = rows_of(text, arguments.length), []
    seeds = [seed for seed in range(arguments.seeds) for _ in SYSTEMS]
    # Processes of their own: a GPU waits for the host at this size.
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), engine.switch, (True,)) as pool:
        for last in pool.map(train, SYSTEMS * arguments.seeds, seeds, repeat(rows), repeat(arguments)):
            results.append(last)
            print(
                f"seed {last['seed']} {last['system']:<20} held out {last['held_out']:.4f}, unchanged in the middle "
                f"step {last['weights_unchanged_in_the_middle_step']:.1%}, {last['seconds']:.0f} s",
                flush=True,
            )
    verdict = judge(results)
    print(f"noise between seeds: {verdict['noise']}")
    for system in SYSTEMS:
        print(f"{system:<20} {verdict[system]}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    figures = {"torch": torch.__version__, "options": options, "verdict": verdict, "results": results}
    if arguments.device.startswith("cuda"):
        figures["device"] = torch.cuda.get_device_name()
    (arguments.out / "results.json").write_text(json.dumps(figures) + "\n")
    plot(results, arguments, arguments.out / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
