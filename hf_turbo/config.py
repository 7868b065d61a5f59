"""What a user can choose: one field per feature."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from .policies.memory import Choice as Memory
from .policies.memory import budget_bytes

Choice = bool | Literal["auto"]
Bf16Weights = Literal["as_is", "exact_master", "stochastic_rounding"]
Optim = Literal[
    "auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"
]
# What a field may be, by its annotation.
_VALID: dict[Any, tuple[Any, ...]] = {
    "bool": (True, False),
    "Choice": (True, False, "auto"),
    "Memory": get_args(Memory),
    "Bf16Weights": get_args(Bf16Weights),
    "Optim": get_args(Optim),
}


@dataclass(frozen=True)
class TurboConfig:
    """Options of `enable()`, `session()`, `patch_model()` and `TurboCallback()`.

    Every feature takes ``"auto"`` (on where it is understood and safe, with the reason in the report where it is not),
    ``True`` (asked for by name: raises where it cannot be had) or ``False`` (leave stock).

    Attributes:
        norms: RMSNorm and LayerNorm modules run as one fused kernel each way.
        mlp: the gated MLP's activation and product run as one kernel; its product is recomputed, not stored.
        layers: in decoder layers the residual addition and the norm behind it are one kernel each way, unless norms are
            switched off; linear layers that are trained and read a norm's output do not keep it for backward, but have
            it made again.
        rope: rotary embedding of queries and keys in one kernel each way.
        loss: the language-model head and the loss are computed together, never holding the logits: the causal-LM loss
            of plain `Trainer` and the log-probabilities of the TRL trainers.
        lora: LoRA layers of PEFT and 4-bit layers of bitsandbytes are one function each; query, key and value
            projections, and whole gated MLPs, are one function together.
        expanded_weights: keep 4-bit weights expanded for the whole training instead of expanding them at every use:
            faster, for two bytes a weight more memory; "auto": where that is a small part of what is free.
        autocast: with float32 weights trained under bf16 or fp16 autocast, linear layers share the 16-bit copies of
            their inputs, and weights are cast once per optimizer step where memory for the copies is plainly free.
        embeddings: a trained weight that is embedding and head has one gradient from both, not two that are added.
        padding: the text backbone computes the tokens of a batch and not its padding, attention going by documents, and
            so in rows that the script has packed. "auto": where the loss is known to leave padding out.
        merging: with gradient accumulation, micro-batches share passes through the backbone, as many as memory allows.
        graphs: when adapters are trained, passes are recorded as CUDA graphs, one launch for thousands, for the sizes
            that come again; their memory is taken only where it is plainly free.
        max_tokens_per_pass: tokens that micro-batches sharing a pass may have together; None: chosen from measured
            memory.
        memory: what becomes of gradient checkpointing that the script asks for. "auto": layers are recomputed as far as
            memory is not plainly free, with the same bits either way; "max_speed": most of what is free is used;
            "as_is": every layer is recomputed, as the script says; "min_memory": as little as can be had is taken: all
            layers are recomputed, of scripts that do not checkpoint too, their inputs wait in host memory, MLPs are
            computed by tiles of rows, and nothing is kept, recorded or shared for speed.
        memory_budget: the most that this process may hold in tensors on the device when layers need not be recomputed:
            "8GiB", or a share of the device's memory such as 0.6; None: what is free. It lowers nothing that the script
            takes with all layers recomputed.
        checkpointing: where the script checkpoints without reentrant autograd, recomputation takes less host time.
        offload: where the script checkpoints, the layers' inputs wait for backward in pinned host memory, copied beside
            the computation; "auto" where the copies hide behind it. Where it does not, True has one of the two products
            that MLPs keep wait there, of as many layers as copies hide.
        optimizer: AdamW of torch and of bitsandbytes (8 and 32 bits, paged too), and clipping for it, take a few
            launches for all tensors together.
        optim: the AdamW of a Trainer. "auto": what its arguments name, or the paged form of the same where states would
            not fit; never less precise. A name as in `TrainingArguments(optim=)`, such as "paged_adamw_8bit": that one
            in its place, with checkpoints of its states.
        optimizer_in_backward: the optimizer steps within backward, a bucket of gradients at a time, which are let go
            of then: gradients of full fine-tuning never stand in memory all at once. For `Trainer` and its kin, without
            gradient accumulation, in one process. Unless `max_grad_norm` is 0, backward is gone through twice.
        bf16_weights: what AdamW of torch or bitsandbytes trains bf16 weights with. "as_is": updates smaller than what a
            weight is rounded to are lost, and the report says how many. "exact_master": each weight and 16 more bits
            are together the fp32 weight of an fp32 run, and torch's averages are fp32, too. "stochastic_rounding":
            weights, and averages in bf16, are rounded up or down by chance, right in the mean, at no cost in memory.
        host: less time on the host between steps: `train()`, `parameters()` and other walks over a model's modules take
            one loop each, Trainer's check for a NaN loss waits for the loss, not for the backward pass, and the next
            batches are fetched while the device computes.
        metrics: add `turbo/tokens_per_second`, `turbo/peak_memory_gib` and `turbo/mfu` to the Trainer's own logs.
        report: print the table of what was patched at train begin and write `hf_turbo_report.json` to `output_dir`.

    Raises:
        TypeError: an unknown option; the message lists the valid ones.
        ValueError: a value that is not one of the above.
    """

    norms: Choice = "auto"
    mlp: Choice = "auto"
    layers: Choice = "auto"
    rope: Choice = "auto"
    loss: Choice = "auto"
    lora: Choice = "auto"
    expanded_weights: Choice = "auto"
    autocast: Choice = "auto"
    embeddings: Choice = "auto"
    padding: Choice = "auto"
    merging: Choice = "auto"
    graphs: Choice = "auto"
    checkpointing: Choice = "auto"
    offload: Choice = "auto"
    optimizer: Choice = "auto"
    optim: Optim = "auto"
    optimizer_in_backward: bool = False
    bf16_weights: Bf16Weights = "as_is"
    host: Choice = "auto"
    memory: Memory = "auto"
    memory_budget: str | float | None = None
    max_tokens_per_pass: int | None = None
    metrics: bool = True
    report: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "max_tokens_per_pass":
                if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                    raise ValueError(f"hf_turbo option {field.name}={value!r}: a number of tokens, 1 or more, or None")
                continue
            if field.name == "memory_budget":
                if value is not None:
                    budget_bytes(value, 1)
                continue
            valid = _VALID[field.type]
            if not any(value is choice or (isinstance(value, str) and value == choice) for choice in valid):
                raise ValueError(f"hf_turbo option {field.name}={value!r}: choose one of {', '.join(map(repr, valid))}")

    @classmethod
    def from_options(cls, **options: Any) -> TurboConfig:
        """Builds a config from keyword options, with a helpful error for an unknown one."""
        valid = [field.name for field in fields(cls)]
        for name in options:
            if name not in valid:
                close = difflib.get_close_matches(name, valid, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"hf_turbo has no option {name!r}.{hint} Valid options: {', '.join(valid)}")
        return cls(**options)

    @classmethod
    def from_env(cls, value: str | None) -> TurboConfig | None:
        """Reads the environment variable HF_TURBO: a switch, or a JSON object of options.

        Returns:
            None where hf_turbo stays off (unset, empty, "0", "false", "off", "no").

        Raises:
            ValueError: neither a switch nor a JSON object. TypeError, ValueError: an unknown or impossible option.
        """
        text = (value or "").strip()
        if text.lower() in {"", "0", "false", "off", "no"}:
            return None
        if text.lower() in {"1", "true", "on", "yes"}:
            return cls()
        try:
            options = json.loads(text)
        except json.JSONDecodeError:
            options = None
        if not isinstance(options, dict):
            raise ValueError(f"HF_TURBO={value!r}: use 1, 0 or a JSON object such as '{{\"loss\": false}}'")
        return cls.from_options(**options)
