"""`hf-turbo plan`: what a fine-tuning run will take of a GPU's memory under hf_turbo, without a GPU, without weights.

The model is built without data and one training step gone through (dry_run.py); policies/footprint.py makes of it what
a GPU needs. A plan is for one process on one GPU, for batches without padding whose tokens all have labels: the most
that batches of this size take.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_turbo.patches import checkpointing, lora

from . import dry_run
from .policies import checkpointing as offloading
from .policies import footprint, memory, optimizers
from .timeline import draw

METHODS = ("full", "lora", "qlora")
DTYPES = ("bfloat16", "float16", "float32")
# All checkpointed layers recomputed.
_NOTHING: memory.Kept = (0, ())
# What is advised leaves at most this share of what is needed without it.
WORTHWHILE = 0.99
_GIB = 2**30
_SHOWN = _GIB // 200  # smaller parts would be 0.00 GiB


@dataclass(frozen=True)
class Run:
    """A fine-tuning run.

    Attributes:
        method: full, lora or qlora. batch: rows of a micro-batch. length: tokens of a row. rank: of the adapters.
        dtype: of the weights. optim: as in TrainingArguments. checkpointing: of every layer.
        memory, bf16_weights, optimizer_in_backward: options of hf_turbo. "min_memory" adds checkpointing.

    Raises:
        ValueError: options that the run could not have.
    """

    method: str
    batch: int
    length: int
    rank: int = 16
    dtype: str = "bfloat16"
    optim: str = "adamw_torch_fused"
    checkpointing: bool = True
    memory: memory.Choice = "auto"
    bf16_weights: str = "as_is"
    optimizer_in_backward: bool = False

    def __post_init__(self) -> None:
        if self.bf16_weights != "as_is" and (self.dtype != "bfloat16" or "adamw" not in self.optim):
            raise ValueError(f"--bf16-weights {self.bf16_weights} needs --dtype bfloat16 and an AdamW for --optim")
        if self.optimizer_in_backward and "adamw" not in self.optim and self.optim != "sgd":
            raise ValueError("--optimizer-in-backward needs an AdamW or sgd for --optim")
        if self.memory == "min_memory":
            object.__setattr__(self, "checkpointing", True)


class Planner:
    """Answers questions about runs of one model.

    Args:
        config: of transformers.
    """

    def __init__(self, config: Any):
        self._config = config
        self._models: dict[tuple[str, int, str], tuple[Any, dry_run.Sizes]] = {}
        self._steps: dict[Any, dry_run.Step] = {}

    @property
    def longest_context(self) -> int:
        """Tokens that the model is made for."""
        return int(getattr(self._config.get_text_config(), "max_position_embeddings", None) or 2**17)

    def model(self, run: Run) -> tuple[Any, dry_run.Sizes]:
        """The model of a run, without data, and what it takes."""
        key = run.method, run.rank, run.dtype
        if key not in self._models:
            model = dry_run.build(copy.deepcopy(self._config), run.method, run.rank, getattr(torch, run.dtype))
            self._models[key] = model, dry_run.sizes_of(model)
        return self._models[key]

    def layers(self, run: Run) -> int:
        return len(checkpointing.layers_of(self.model(run)[0]))

    def offloads(self, run: Run) -> bool:
        """Whether inputs of recomputed layers wait in host memory."""
        layer = next(iter(checkpointing.layers_of(self.model(run)[0]).values()), None)
        if layer is None or not run.checkpointing:
            return False
        bytes_per_token, flops_per_token = checkpointing.sizes_of(layer)
        if run.batch * run.length * bytes_per_token < checkpointing.MIN_BYTES:
            return False
        speeds = footprint.ASSUMED_FLOPS, footprint.ASSUMED_LINK
        hides = offloading.keep_on_device_reason(bytes_per_token, flops_per_token, *speeds) is None
        return hides or run.memory == "min_memory"

    def step(self, run: Run, kept: memory.Kept = _NOTHING) -> dry_run.Step:
        """One step, with so much kept of layers that are checkpointed."""
        model, _ = self.model(run)
        whole, attended = kept if run.checkpointing else _NOTHING
        recomputed = self.layers(run) - whole if run.checkpointing else None
        bucket = None
        if run.optimizer_in_backward:
            bucket = optimizers.bucket_bytes(footprint.gradient_bytes(self.model(run)[1].trained))
        key = id(model), run.batch, run.length, recomputed, attended, run.memory, bucket
        if key not in self._steps:
            options: dict[str, Any] = {"recomputed": recomputed, "attended": attended, "offloaded": self.offloads(run)}
            options["bucket"] = bucket
            with dry_run.patched(model, run.memory):
                self._steps[key] = dry_run.step(model, run.batch, run.length, **options)
        return self._steps[key]

    def footprint(self, run: Run, kept: memory.Kept = _NOTHING) -> footprint.Footprint:
        """What the run takes.

        Raises:
            ValueError: an optimizer whose states are not known; dry_run.Unsupported.
        """
        _, sizes = self.model(run)
        states, _ = footprint.optimizer_bytes(run.optim, sizes.trained, run.bf16_weights == "exact_master")
        resident = sizes.weights + sizes.adapters + states
        standing = optimizers.standing_bytes if run.optimizer_in_backward else footprint.gradient_bytes
        gradients = standing(sizes.trained)
        return footprint.Footprint(resident, gradients, states, self.step(run, kept).peak)

    def layer_sizes(self, run: Run) -> list[int]:
        """Bytes that each layer keeps for backward where it is not recomputed."""
        return self.step(dataclasses.replace(run, checkpointing=False, memory="auto")).kept

    def layer_costs(self, run: Run) -> list[memory.Layer]:
        """What each layer keeps and computes."""
        step = self.step(dataclasses.replace(run, checkpointing=False, memory="auto"))
        layers = checkpointing.layers_of(self.model(run)[0]).values()
        tokens = run.batch * run.length
        return [
            memory.layer(whole, attention or None, tokens * checkpointing.sizes_of(layer)[1], flops)
            for layer, whole, (attention, flops) in zip(layers, step.kept, step.attention, strict=True)
        ]

    def layers_kept(self, run: Run, total: int) -> memory.Kept:
        """How many of a checkpointed run's layers need no recomputation on a GPU of `total` bytes, and which none of
        attention.
        """
        if not run.checkpointing:
            return self.layers(run), ()
        needed = self.footprint(run)
        needed = needed._replace(resident=needed.resident + self.stays_expanded(run, total))
        return footprint.layers_kept(needed, self.layer_costs(run), total, run.memory)

    def stays_expanded(self, run: Run, total: int) -> int:
        """Bytes of 4-bit weights that stay expanded on a GPU of `total` bytes. A run that needs them gives them up."""
        model, sizes = self.model(run)
        expanded = lora.expanded_bytes(model)
        free = total - footprint.CONTEXT - sizes.weights - sizes.adapters
        return expanded if memory.keeps_expanded(expanded, free, run.memory) else 0

    def longest(self, run: Run, total: int) -> int:
        """The longest context that fits, with checkpointing; 0 where none does."""

        def fits(length: int) -> bool:
            longer = dataclasses.replace(run, length=length, checkpointing=True)
            return self.footprint(longer).needed <= total

        return footprint.longest(fits, self.longest_context)

    def advice(self, run: Run, total: int) -> list[tuple[str, int]]:
        """What to change until the run fits, one change on top of the other, and what the GPU needs then."""
        changes: list[tuple[str, dict[str, Any]]] = []
        if not run.checkpointing:
            changes.append(("gradient_checkpointing=True", {"checkpointing": True}))
        if run.batch > 1:
            change = f"per_device_train_batch_size=1, gradient_accumulation_steps={run.batch}"
            changes.append((change, {"batch": 1}))
        if run.memory != "min_memory":
            changes.append(('memory="min_memory"', {"memory": "min_memory"}))
        changes += [(f'optim="{optim}"', {"optim": optim}) for optim in ("adamw_8bit", "paged_adamw_8bit")]
        changes += [(f"--method {method}", {"method": method}) for method in METHODS[METHODS.index(run.method) + 1 :]]
        advice = []
        before = self.footprint(run).needed
        for text, fields in changes:
            changed = dataclasses.replace(run, **fields)
            needed = self.footprint(changed).needed
            if needed < WORTHWHILE * before:
                advice.append((text, needed))
                run, before = changed, needed
            if before <= total:
                break
        return advice


def describe(planner: Planner, run: Run, total: int) -> dict[str, Any]:
    """All that the command prints; bytes, tokens and numbers of layers."""
    model, sizes = planner.model(run)
    whole, step = planner.footprint(run), planner.step(run)
    gradients = step.parts.get("gradients", 0)
    in_pass = max(whole.in_pass, whole.gradients)
    at_end = in_pass > step.peak  # the most is there when the optimizer steps
    parts = {
        "weights": sizes.weights,
        "adapters": sizes.adapters,
        "optimizer states": whole.states,
        "gradients": whole.gradients if at_end else gradients,
        "kept for backward": 0 if at_end else step.parts.get("forward", 0),
        "head and loss": 0 if at_end else step.parts.get("loss", 0),
        "temporaries of backward": 0 if at_end else step.parts.get("backward", 0),
        "workspaces of products": footprint.WORKSPACES,
    }
    fits = whole.needed <= total
    layers = planner.layers(run)
    kept = planner.layers_kept(run, total) if fits else _NOTHING
    expanded = planner.stays_expanded(run, total) if fits else 0
    largest = max(planner.layer_sizes(run))
    longest = planner.longest(run, total)
    at_longest = dataclasses.replace(run, length=longest, checkpointing=True)
    return {
        "model": type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__,
        "run": dataclasses.asdict(run),
        "gpu_bytes": total,
        "peak_bytes_by_part": parts,
        "peak_bytes": whole.peak,
        "allowance_bytes": whole.needed - whole.peak,
        "needed_bytes": whole.needed,
        "fits": fits,
        "bytes_per_token_and_layer": largest / (run.batch * run.length),
        "layers": layers,
        "layers_not_recomputed": kept[0],
        "layers_recomputed_without_attention": len(kept[1]),
        "expanded_bytes": expanded,
        "peak_bytes_with_them": planner.footprint(run, kept).peak + expanded,
        "host_bytes": _host_bytes(planner, run),
        "longest_context": longest,
        "host_bytes_at_longest_context": _host_bytes(planner, at_longest) if longest else 0,
        "advice": [] if fits else [{"change": text, "needed_bytes": size} for text, size in planner.advice(run, total)],
    }


# What a step's phases leave, as in the table.
_NAMES = {
    "forward": "kept for backward",
    "loss": "head and loss",
    "backward": "temporaries of backward",
    "gradients": "gradients",
}


def plot(planner: Planner, run: Run, plan: dict[str, Any], path: Path) -> None:
    """Draws how memory fills in the course of a step, all layers recomputed if the run checkpoints.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    parts = plan["peak_bytes_by_part"]
    resident = {name: parts[name] for name in ("weights", "adapters", "optimizer states", "workspaces of products")}
    timeline = [{_NAMES[name]: size for name, size in each.items()} for each in planner.step(run).timeline]
    title = f"{plan['model']}: {run.method}, {run.batch} x {run.length:,} tokens, {run.optim}"
    draw(path, title, resident, timeline, plan["gpu_bytes"])


def _host_bytes(planner: Planner, run: Run) -> int:
    """Pageable states of the optimizer, and inputs of layers while all are recomputed."""
    model, sizes = planner.model(run)
    _, paged = footprint.optimizer_bytes(run.optim, sizes.trained, run.bf16_weights == "exact_master")
    if not planner.offloads(run):
        return paged
    layer = next(iter(checkpointing.layers_of(model).values()))
    size = run.batch * run.length * checkpointing.sizes_of(layer)[0]
    return paged + planner.layers(run) * (1 << (size - 1).bit_length())  # pinned memory comes in powers of two


def show(plan: dict[str, Any]) -> None:
    """Prints a plan as a table and what follows from it."""
    from rich.console import Console
    from rich.table import Table

    run, total, fits = plan["run"], plan["gpu_bytes"], plan["fits"]
    settings = f"{run['method']}, {run['batch']} x {run['length']:,} tokens, {run['dtype']}, {run['optim']}, "
    settings += "with checkpointing" if run["checkpointing"] else "without checkpointing"
    for name, default in (("memory", "auto"), ("bf16_weights", "as_is"), ("optimizer_in_backward", False)):
        if run[name] != default:
            settings += f", {name}={run[name]}"
    if run["method"] != "full":
        settings += f", rank {run['rank']}"
    table = Table(title=f"{plan['model']}: {settings}", title_justify="left")
    table.add_column("on the GPU at the peak")
    table.add_column("GiB", justify="right")
    for name, size in plan["peak_bytes_by_part"].items():
        if size >= _SHOWN:
            table.add_row(name, _gib(size))
    table.add_section()
    table.add_row("in tensors (torch's max_memory_allocated)", _gib(plan["peak_bytes"]))
    table.add_row("CUDA context, and blocks that stay unfilled", _gib(plan["allowance_bytes"]))
    table.add_section()
    colour = "green" if fits else "red"
    table.add_row("needed", f"[{colour}]{_gib(plan['needed_bytes'])}[/]")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    verdict = "fits" if fits else "does not fit"
    console.print(f"[{colour}]It {verdict} on a GPU of {_gib(total)} GiB.[/]")
    if plan["expanded_bytes"]:
        console.print(f"4-bit weights stay expanded there, in {_gib(plan['expanded_bytes'])} GiB of what is free.")
    if fits and run["checkpointing"] and run["memory"] in memory.SHARE_OF_FREE_MEMORY:
        attended = plan["layers_recomputed_without_attention"]
        console.print(
            f"Of {plan['layers']} layers {plan['layers_not_recomputed']} need no recomputation there"
            f"{f', and {attended} none of attention' if attended else ''}."
        )
    if plan["peak_bytes_with_them"] > plan["peak_bytes"]:
        console.print(f"In tensors it is {_gib(plan['peak_bytes_with_them'])} GiB with all that.")
    console.print(f"A layer that is not recomputed keeps {plan['bytes_per_token_and_layer'] / 1024:.1f} KiB a token.")
    if plan["host_bytes"] >= _SHOWN:
        console.print(f"Up to {_gib(plan['host_bytes'])} GiB of host memory are used beside it.")
    if plan["longest_context"]:
        console.print(
            f"Longest context that fits, with checkpointing and {run['batch']} in a batch: {plan['longest_context']:,} "
            f"tokens, with {_gib(plan['host_bytes_at_longest_context'])} GiB of host memory."
        )
    else:
        console.print("With checkpointing no context fits.")
    if not fits:
        console.print("To make it fit, one after the other:" if plan["advice"] else "Nothing that is known here helps.")
        for each in plan["advice"]:
            console.print(f"  {each['change']}: {_gib(each['needed_bytes'])} GiB needed")
        if plan["advice"] and plan["advice"][-1]["needed_bytes"] > total:
            console.print("  That is not enough: use a larger GPU, a smaller model or shorter rows.")


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"


def load_config(name: str) -> Any:
    """A config by the folder or file it is in, or by its name on the hub.

    Raises:
        dry_run.Unsupported: there is none, or none that transformers knows.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(Path(name).parent if name.endswith(".json") else name)
    except (OSError, ValueError) as error:
        raise dry_run.Unsupported(
            f"no config for --model {name}: give a folder with a config.json, or the name of a model on the hub that "
            f"this machine can reach or has cached. {str(error).splitlines()[0]}"
        ) from error


def run(model: str, gpu: str, settings: dict[str, Any], *, as_json: bool = False, picture: Path | None = None) -> int:
    """Prints the plan of a Run, and draws it; returns 0 if the run fits, 1 if it does not, 2 if there is none.

    Args:
        settings: what a Run is made of.
    """
    from transformers.utils import logging as transformers_logging

    # They speak of kernels and settings of a training that does not happen here.
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        training, planner = Run(**settings), Planner(load_config(model))
        plan = describe(planner, training, memory.budget_bytes(gpu, 0))
        if picture is not None:
            plot(planner, training, plan, picture)
    except ImportError as error:
        print(f"hf-turbo plan: --plot needs matplotlib: pip install matplotlib ({error})", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"hf-turbo plan: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(plan, indent=2))
    else:
        show(plan)
    return 0 if plan["fits"] else 1
