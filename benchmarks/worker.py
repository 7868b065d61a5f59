"""Trains one workload with one system in this process and writes what it measured: `worker.py SPEC.json RESULT.json`.

Started by train.py. Prints one line per optimizer step, which is what train.py shows as progress.
"""

from __future__ import annotations

import bisect
import gc
import importlib.util
import json
import math
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from workloads import Workload

PROFILED_STEPS = 2
STEP_LINE = "train.py: step "
SYSTEMS = {
    "stock": "TRL as installed",
    "turbo": "the same with hf_turbo.enable()",
    "control": "stock with eager attention: the same mathematics in another order, a yardstick for the losses",
    "liger": "stock with Liger's kernels applied to the model",
    "unsloth": "the same run through Unsloth's loader",
}


def tokenizer() -> Any:
    """A tokenizer with the special tokens that SFTTrainer asks for; the data need no text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def build_model(workload: Workload, system: str, device: str) -> Any:
    """A causal language model with random weights, drawn on the device; NF4 the way transformers loads it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = AutoConfig.for_model(**workload.model_config())
    config.use_cache = False
    attention = "eager" if system == "control" else workload.model_config().get("attn_implementation", "sdpa")
    torch.manual_seed(0)
    with torch.device(device):
        dtype = getattr(torch, workload.weights)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if workload.nf4 and system != "unsloth":
        model = type(model).from_pretrained(
            None,
            config=config,
            state_dict=model.state_dict(),
            dtype=torch.bfloat16,
            attn_implementation=attention,
            device_map={"": device},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        )
    return model


def through_unsloth(model: Any, workload: Workload) -> Any:
    """The same weights in Unsloth's model, by way of a folder on disk: its loader takes nothing else."""
    import torch
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        faster, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=min(workload.cap, 65_536),
            dtype=getattr(torch, workload.weights),
            load_in_4bit=workload.nf4,
            full_finetuning=not workload.lora_rank,
        )
    if workload.lora_rank:
        targets = workload.lora_targets
        if targets == "all-linear":
            targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        faster = FastLanguageModel.get_peft_model(
            faster,
            r=workload.lora_rank,
            lora_alpha=workload.lora_rank,
            target_modules=list(targets),
            use_gradient_checkpointing="unsloth" if workload.checkpointing else False,
        )
    return faster


def step_timer(warmup: int, steps: int, device: str, profile: bool) -> Any:
    """A TrainerCallback that notes when each step ends, and profiles PROFILED_STEPS more after the timed ones.

    Of a GPU that is when it comes to the end: nothing waits for it, as nothing does in a training that is not measured.
    """
    import torch
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[Any] = []  # [0] is the start of the first step
            self.tokens: list[int] = []  # so far, with each step
            self.trainer: Any = None
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiled: dict[str, float] = {}

        def now(self) -> Any:
            if device == "cpu":
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.ends:
                self.ends.append(self.now())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends.append(self.now())
            self.tokens.append(self.trainer._total_train_tokens)
            print(f"{STEP_LINE}{state.global_step}", flush=True)
            if profile and state.global_step == warmup + steps:
                torch.cuda.synchronize()
                self.profiler.start()
            if profile and state.global_step == warmup + steps + PROFILED_STEPS:
                torch.cuda.synchronize()
                self.profiler.stop()
                self.profiled = device_time(self.profiler)

        def step_ms(self) -> list[float]:
            """Milliseconds of the timed steps, each from the end of the one before: data, logging and all."""
            ends = self.ends[warmup : warmup + steps + 1]
            if device == "cpu":
                return [1e3 * (b - a) for a, b in pairwise(ends)]
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairwise(ends)]

    return StepTimer()


def device_time(profiler: Any) -> dict[str, float]:
    """Per step: kernel launches, milliseconds in which at least one kernel ran, milliseconds of copies to and from
    pinned host memory, and how many of those passed while a kernel ran.
    """
    from torch.autograd import DeviceType

    kernels, copies = [], []
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        span = (event.time_range.start, event.time_range.end)  # microseconds
        if not event.name.startswith(("Memcpy", "Memset")):
            kernels.append(span)
        elif "Pinned" in event.name:
            copies.append(span)
    busy = _union(kernels)
    figures = {
        "launches_per_step": len(kernels),
        "gpu_busy_ms_per_step": sum(end - start for start, end in busy) / 1e3,
        "host_copies_ms_per_step": sum(end - start for start, end in copies) / 1e3,
        "hidden_copies_ms_per_step": sum(_overlap(copy, busy) for copy in copies) / 1e3,
    }
    return {name: figure / PROFILED_STEPS for name, figure in figures.items()}


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The time that at least one of them covers, as spans that do not touch, in order."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def _overlap(span: tuple[float, float], union: list[tuple[float, float]]) -> float:
    first = max(0, bisect.bisect_right(union, (span[0], math.inf)) - 1)
    overlap = 0.0
    for start, end in union[first:]:
        if start >= span[1]:
            break
        overlap += max(0.0, min(end, span[1]) - max(start, span[0]))
    return overlap


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs the workload once and returns the measurements."""
    system, steps, warmup = spec["system"], spec["steps"], spec["warmup"]
    workload = Workload(**spec["workload"])
    needs = {"liger": "liger_kernel", "unsloth": "unsloth"}.get(system)
    if needs and importlib.util.find_spec(needs) is None:
        return {"skipped": f"{needs} is not installed"}
    if system == "unsloth":
        import unsloth  # noqa: F401  patches trl, and wants to be first
    if system == "turbo":
        import hf_turbo

        hf_turbo.enable(**spec.get("options", {}))

    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    device = "cuda:0" if torch.cuda.is_available() and not spec["cpu"] else "cpu"
    model = build_model(workload, system, device)
    peft_config = None
    if system == "unsloth":
        model = through_unsloth(model, workload)
    elif workload.lora_rank:
        targets = workload.lora_targets
        peft_config = LoraConfig(
            r=workload.lora_rank,
            lora_alpha=workload.lora_rank,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
    if system == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)  # TRL has its own

    if device != "cpu":  # drawing and quantising random weights is no part of a training run
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    profile = spec["profile"] and device != "cpu"
    total = warmup + steps + (PROFILED_STEPS if profile else 0)
    count = total * workload.accumulation * workload.batch_size
    if workload.packed:
        count *= 2 * -(-workload.packed // workload.median)  # rows enough, whatever the lengths turn out to be
    samples = workload.samples(count, model.config.vocab_size)
    timer = step_timer(warmup, steps, device, profile)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=output_dir,
                max_steps=total,
                per_device_train_batch_size=workload.batch_size,
                gradient_accumulation_steps=workload.accumulation,
                gradient_checkpointing=workload.checkpointing,
                max_length=workload.packed or None,
                packing=workload.packed > 0,
                optim=workload.optim,
                learning_rate=workload.learning_rate,
                max_grad_norm=workload.max_grad_norm,
                lr_scheduler_type="constant",
                bf16=True,
                use_cpu=device == "cpu",
                seed=0,
                logging_steps=workload.logging_steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(samples),
            processing_class=tokenizer(),
            peft_config=peft_config,
            callbacks=[timer],
        )
        timer.trainer = trainer
        trainer.train()
        patched = Path(output_dir, "hf_turbo_report.json")
        turbo_report = json.loads(patched.read_text()) if patched.exists() else None

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = [0, *timer.tokens]
    milliseconds = timer.step_ms()
    timed_tokens = tokens[warmup + steps] - tokens[warmup]
    if device == "cpu":
        memory = {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30}
    else:
        memory = {
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    packages = (torch, transformers, trl, peft)
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "versions": {package.__name__: package.__version__ for package in packages},
        "step_ms": milliseconds,
        "tokens_per_second": 1e3 * timed_tokens / sum(milliseconds),
        "tokens": [b - a for a, b in pairwise(tokens)],
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [entry["grad_norm"] for entry in logs],
        **memory,
        **timer.profiled,
        "turbo_report": turbo_report,
    }


def main() -> None:
    spec_path, result_path = sys.argv[1:]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = train(json.loads(Path(spec_path).read_text()))
    Path(result_path).write_text(json.dumps(result))


def spec(system: str, workload: Workload, **settings: Any) -> dict[str, Any]:
    """What `train` takes, as JSON."""
    return {"system": system, "workload": asdict(workload), **settings}


if __name__ == "__main__":
    main()
