"""What a training step costs the host: Python, autograd and launches, without a GPU.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --checkpointing --four-bit

Where a GPU waits for its host, this is what a step takes. A Llama with PEFT adapters on all linear layers, so small
that arithmetic does not count, runs forward and backward on the CPU: stock, and with hf_turbo on the paths that it
takes on a GPU, except that Triton kernels are counted and not run. The driver's part of a launch is left out. Each
system runs in processes of its own, in turns; the fastest step counts, as other programs can only slow one down.

Compare builds with it. On 4-bit weights it is no measure of stock against hf_turbo: stock's kernels do run here, and
those of bitsandbytes on a CPU are not those of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

LAYERS, TOKENS = 16, 8


def build(four_bit: bool, checkpointing: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        how = None
        if four_bit:
            nested = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
            how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **nested)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=how, device_map={"": "cpu"} if four_bit else None
        )
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def patch(model: Any) -> list[int]:
    """Switches hf_turbo on as on a GPU; returns what counts the launches."""
    from hf_turbo.kernels import _launch

    import hf_turbo

    launches = [0]

    def count(*args: Any, **meta: Any) -> None:
        launches[0] += 1

    hf_turbo.patch_model(model)
    _launch.INTERPRET = True  # Triton kernels are for CPU tensors too
    for name, module in list(sys.modules.items()):
        if name.startswith("hf_turbo.kernels.") and hasattr(module, "launch"):
            module.launch = count
    return launches


def measure(system: str, four_bit: bool, checkpointing: bool, steps: int) -> dict[str, float]:
    """Microseconds per layer of the fastest forward and the fastest backward."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(four_bit, checkpointing)
    launches = patch(model) if system == "turbo" else [0]
    ids = torch.randint(128, (1, TOKENS))
    forward, backward = [], []
    for _ in range(steps):
        launches[0] = 0
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        middle = time.perf_counter()
        loss.backward()
        forward.append(middle - begin)
        backward.append(time.perf_counter() - middle)
    scale = 1e6 / LAYERS
    return {"forward": min(forward) * scale, "backward": min(backward) * scale, "launches": launches[0] / LAYERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--four-bit", action="store_true", help="NF4 weights with nested absmax")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, not reentrant")
    parser.add_argument("--steps", type=int, default=60, help="steps in each process")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each system")
    parser.add_argument("--system", choices=("stock", "turbo"), help="measure this one here and print JSON")
    arguments = parser.parse_args()
    if arguments.system:
        print(json.dumps(measure(arguments.system, arguments.four_bit, arguments.checkpointing, arguments.steps)))
        return

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console, best = Console(), {}
    for system in track(["stock", "turbo"] * arguments.rounds, "measuring", console=console, transient=True):
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--system", system]
        environment = os.environ | {"HF_TURBO": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # Not in the repository's root, whose folder `kernels` bitsandbytes would take for another package.
        run = subprocess.run(command, env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        result = json.loads(run.stdout.splitlines()[-1])
        best[system] = {key: min(value, best.get(system, result)[key]) for key, value in result.items()}
    table = Table(title="host time, microseconds per layer", title_justify="left")
    for column in ("", "forward", "backward", "both", "Triton launches"):
        table.add_column(column, justify="right" if column else "left")
    for system, row in best.items():
        cells = (row["forward"], row["backward"], row["forward"] + row["backward"])
        table.add_row(system, *(f"{cell:,.0f}" for cell in cells), f"{row['launches']:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
