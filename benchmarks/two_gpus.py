"""Two processes, stock and turbo: DDP and FSDP2 as `accelerate launch` starts them, through TRL's SFTTrainer.

    python benchmarks/two_gpus.py           Llama-3.2-1B, full fine-tuning, lengths of Alpaca, 4 times 2 rows a step
    python benchmarks/two_gpus.py --tiny    a dry run on the CPU: DDP alone, over gloo

Each run is two fresh processes with configs/ddp.yaml or configs/fsdp2.yaml, whose `hf_turbo: true` makes it turbo; for
stock HF_TURBO=0 is set. Both see the same samples, of uneven lengths, so that each process would share passes in its
own way. Losses and gradient norms have to agree by the rule of train.py; where they do not, where a run fails, or where
turbo shared no passes, the exit code is 1. Times are those of rank 0, memory is that of the rank that took most.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import worker
from workloads import WORKLOADS, Workload

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SECONDS = 150  # for one run; it takes about 40
WORKLOAD = dataclasses.replace(WORKLOADS["llama1b-full"], batch_size=2, accumulation=4, median=120, sigma=0.8, cap=1024)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """What each process does; returns its measurements."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    workload, steps, warmup, cpu = Workload(**spec["workload"]), spec["steps"], spec["warmup"], spec["cpu"]
    device = "cpu" if cpu else f"cuda:{os.environ['LOCAL_RANK']}"
    if cpu:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    model = worker.build_model(workload, spec["system"], device)
    count = int(os.environ["WORLD_SIZE"]) * (warmup + steps) * workload.accumulation * workload.batch_size
    timer = worker.step_timer(warmup, steps, device, profile=False)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=spec["output_dir"],
            max_steps=warmup + steps,
            per_device_train_batch_size=workload.batch_size,
            gradient_accumulation_steps=workload.accumulation,
            gradient_checkpointing=False,
            max_length=None,
            optim=workload.optim,
            learning_rate=workload.learning_rate,
            lr_scheduler_type="constant",
            bf16=True,
            use_cpu=cpu,
            seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({"ddp_backend": "gloo"} if cpu else {}),
        ),
        train_dataset=Dataset.from_dict(workload.samples(count, model.config.vocab_size)),
        processing_class=worker.tokenizer(),
        callbacks=[timer],
    )
    del model
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = [0.0, *(entry["num_tokens"] for entry in logs)]
    milliseconds = timer.step_ms()
    report = Path(spec["output_dir"], "hf_turbo_report.json")
    return {
        "device": "cpu" if cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "wrapped": type(trainer.model_wrapped).__name__,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "step_ms": milliseconds,
        "tokens_per_second": 1e3 * (tokens[-1] - tokens[warmup]) / sum(milliseconds),
        "tokens": [b - a for a, b in pairwise(tokens)],
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [entry["grad_norm"] for entry in logs],
        "peak_allocated_gib": 0.0 if cpu else torch.cuda.max_memory_allocated() / 2**30,
        "turbo_report": json.loads(report.read_text()) if report.exists() else None,
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(strategy: str, system: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Two processes; the measurements of rank 0, with the larger peak, or `failed` and the end of what they printed."""
    with tempfile.TemporaryDirectory() as folder:
        spec = {**spec, "system": system, "output_dir": f"{folder}/output", "results": folder}
        Path(folder, "spec.json").write_text(json.dumps(spec))
        if spec["cpu"]:
            launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        else:
            launcher = ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{strategy}.yaml")]
            launcher += ["--num_processes", "2", "--main_process_port", str(free_port())]
        environment = {name: value for name, value in os.environ.items() if name != "HF_TURBO"}
        environment |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("HF_HUB_OFFLINE", "1")
        if system == "stock" or spec["cpu"]:
            environment["HF_TURBO"] = "0" if system == "stock" else "1"
        command = [sys.executable, "-m", *launcher, __file__, "--worker", f"{folder}/spec.json"]
        log_path = Path(folder, "log")
        with log_path.open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            try:
                code: int | str = process.wait(spec["seconds"])
            except subprocess.TimeoutExpired:
                code = f"nothing after {spec['seconds']} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        paths = [Path(folder, f"rank{rank}.json") for rank in range(2)]
        if code or not all(path.exists() for path in paths):
            return {"failed": str(code), "log": log_path.read_text().splitlines()[-40:]}
        ranks = [json.loads(path.read_text()) for path in paths]
        return {**ranks[0], "peak_allocated_gib": max(rank["peak_allocated_gib"] for rank in ranks)}


def shared_passes(result: dict[str, Any]) -> str | None:
    """The report's note on passes that micro-batches shared, or None."""
    notes = (result["turbo_report"] or {}).get("notes", [])
    return next((note for note in notes if "passes instead of" in note), None)


def compare(strategy: str, arguments: argparse.Namespace, spec: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Stock and turbo, printed; the measurements, and what is wrong."""
    import train as one_gpu
    from rich.console import Console

    console = Console(width=120)
    results, problems = {}, []
    for system in ("stock", "turbo"):
        results[system] = run(strategy, system, spec)
        if "failed" in results[system]:
            problems.append(f"{strategy}, {system} failed: {results[system]['failed']}")
            console.print("\n".join(results[system]["log"]), markup=False, highlight=False, soft_wrap=True)
            return results, problems
    title = f"{strategy}, 2 x {WORKLOAD.model}"
    console.print(one_gpu.summary(title, arguments, results))
    note = shared_passes(results["turbo"])
    print(f"{results['turbo']['distributed_type']}, {results['turbo']['wrapped']}; {note}", flush=True)
    for row in (results["turbo"]["turbo_report"] or {}).get("rows", []):
        print(f"    {row['role']}: {row['patched']} of {row['found']} patched; {row['reason']}", flush=True)
    if note is None:
        problems.append(f"{strategy}: turbo shared no passes")
    found = one_gpu.disagreements(results["stock"], results["turbo"])
    return results, problems + [f"{strategy}: stock and turbo disagree on {text}" for text in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", default="ddp,fsdp2", help="with commas between (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="optimizer steps before those (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for each run (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, DDP alone")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        spec = json.loads(arguments.worker.read_text())
        result = train(spec)
        Path(spec["results"], f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
        return 0

    strategies = arguments.strategies.split(",")
    workload = WORKLOAD
    if arguments.tiny:
        workload = dataclasses.replace(WORKLOAD.tiny(), optim="adamw_torch")
        strategies = [name for name in strategies if name != "fsdp2"]
        print("FSDP2 is left out: accelerate has it on accelerators only")
    spec = {
        "workload": dataclasses.asdict(workload),
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "seconds": arguments.seconds,
        "cpu": arguments.tiny,
    }
    results, problems = {}, []
    for strategy in strategies:
        results[strategy], found = compare(strategy, arguments, spec)
        problems += found
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"spec": spec, "results": results, "problems": problems}, indent=1) + "\n")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
