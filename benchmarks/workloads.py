"""The fine-tuning runs that `train.py` measures: models of real shapes with random weights, data of real lengths.

Nothing is downloaded: weights are drawn on the device, and the data are random token ids. A step costs the same as
with trained weights and real text of the same lengths; the losses mean nothing beyond "did both systems compute the
same thing". One exception to "the same cost": a trained mixture of experts routes unevenly, a random one evenly.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

FIRST_TOKEN = 3  # 0 pad, 1 end of sequence, 2 unknown

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Published shapes. `AutoConfig.for_model(**MODELS[name])` builds the config.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "gemma-2-2b": {  # its model card asks for eager attention, which caps the scores
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
    },
    "qwen3-moe-12-layers": {  # Qwen3-30B-A3B with 12 of its 48 layers
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": False,
    },
}

# --tiny: the same architecture in a size that a CPU trains in seconds.
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Workload:
    """One fine-tuning run, as a user of TRL's SFTTrainer would set it up.

    Attributes:
        model: a key of MODELS.
        batch_size: samples per micro-batch. accumulation: micro-batches per optimizer step.
        median: median length of a sample in tokens.
        sigma: spread of the log-normal distribution of lengths (standard deviation of the logarithm); 0: all the same.
        cap: the longest a sample may be; longer ones are cut.
        packed: tokens of a row into which TRL packs samples (`packing=True`); 0: no packing.
        masked: share of each sample, from its start, that carries no loss (the prompt).
        lora_rank: 0 trains every weight. lora_targets: PEFT's `target_modules`.
        weights: dtype of the weights; float32 ones are trained under bf16 autocast, as `SFTConfig` has it by default.
        nf4: base weights quantised to NF4 with double quantisation (QLoRA).
        checkpointing: gradient checkpointing of every layer.
        optim, max_grad_norm: as in `TrainingArguments`. learning_rate: constant.
        logging_steps: 1 to compare every loss, for which the host waits at every step; TRL's own is 10.
        config: changes to the model's config.
    """

    model: str
    batch_size: int
    median: int
    accumulation: int = 1
    sigma: float = 0.0
    cap: int = 1 << 20
    packed: int = 0
    masked: float = 0.0
    lora_rank: int = 0
    lora_targets: str | tuple[str, ...] = "all-linear"
    weights: str = "bfloat16"
    nf4: bool = False
    checkpointing: bool = False
    optim: str = "adamw_8bit"
    learning_rate: float = 2e-5
    max_grad_norm: float = 1.0
    logging_steps: int = 1
    config: dict[str, Any] = field(default_factory=dict)

    def model_config(self) -> dict[str, Any]:
        """Keyword arguments for `AutoConfig.for_model`."""
        return {**MODELS[self.model], **self.config}

    def tiny(self) -> Workload:
        """The same run shrunk to seconds on a CPU."""
        config = {**TINY, **(TINY_EXPERTS if "num_experts" in MODELS[self.model] else {})}
        shrink = max(16, self.median // 64)
        return dataclasses.replace(
            self,
            median=max(16, self.median // shrink),
            cap=max(32, min(self.cap, 4096) // shrink),
            packed=self.packed // shrink,
            config={**config, **self.config},
        )

    def change(self, assignments: list[str]) -> Workload:
        """Applies `field=value` and `config.field=value` strings.

        Raises:
            ValueError: no such field, or not an assignment.
        """
        changed = self
        for assignment in assignments:
            name, separator, text = assignment.partition("=")
            known = {f.name: getattr(changed, f.name) for f in dataclasses.fields(changed)}
            if not separator or (name not in known and not name.startswith("config.")) or name == "config":
                raise ValueError(
                    f"{assignment!r}: use field=value with one of {', '.join(known)}, or config.NAME=value"
                )
            if name.startswith("config."):
                changed = dataclasses.replace(changed, config={**changed.config, name[len("config.") :]: parse(text)})
            else:
                changed = dataclasses.replace(changed, **{name: type(known[name])(parse(text))})
        return changed

    def samples(self, count: int, vocab_size: int, seed: int = 0) -> dict[str, list[list[int]]]:
        """Columns of an already tokenised dataset: `input_ids`, and `labels` where part of a sample is masked."""
        draw = random.Random(seed)
        lengths = [self.median] * count
        if self.sigma:
            lengths = [max(8, round(self.median * draw.lognormvariate(0.0, self.sigma))) for _ in range(count)]
        lengths = [min(length, self.cap) for length in lengths]
        rows = [draw.choices(range(FIRST_TOKEN, vocab_size), k=length) for length in lengths]
        columns = {"input_ids": rows}
        if self.masked:
            prompts = [int(length * self.masked) for length in lengths]
            columns["labels"] = [[-100] * prompt + row[prompt:] for prompt, row in zip(prompts, rows, strict=True)]
        return columns


def parse(text: str) -> Any:
    """'3' -> 3, '0.5' -> 0.5, 'true' -> True, 'none' -> None, anything else stays text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


LORA, CHAT, ALPACA = (
    {"learning_rate": 2e-4, "lora_rank": 16},
    {"median": 400, "sigma": 0.7, "cap": 2048, "masked": 0.4},
    {"median": 120, "sigma": 0.8, "cap": 1024},
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

WORKLOADS: dict[str, Workload] = {
    "llama1b-full": Workload("llama-3.2-1b", batch_size=4, median=2048, optim="adamw_torch_fused"),
    "llama1b-full-fp32": Workload(  # TRL's defaults
        "llama-3.2-1b",
        batch_size=4,
        median=2048,
        weights="float32",
        checkpointing=True,
        optim="adamw_torch_fused",
    ),
    "llama8b-lora": Workload("llama-3.1-8b", batch_size=2, median=2048, **LORA),
    "gemma2-2b-lora": Workload("gemma-2-2b", batch_size=4, median=2048, **LORA),
    "gemma2-2b-lora-chat": Workload("gemma-2-2b", batch_size=8, **LORA, **CHAT),
    "llama8b-qlora": Workload("llama-3.1-8b", batch_size=2, median=2048, nf4=True, checkpointing=True, **LORA),
    "llama8b-qlora-nockpt": Workload("llama-3.1-8b", batch_size=2, median=2048, nf4=True, **LORA),
    "llama8b-qlora-chat": Workload("llama-3.1-8b", batch_size=8, nf4=True, checkpointing=True, **LORA, **CHAT),
    "llama8b-qlora-alpaca": Workload(
        "llama-3.1-8b",
        batch_size=2,
        accumulation=4,
        nf4=True,
        checkpointing=True,
        **{**LORA, "lora_rank": 32},
        **ALPACA,
    ),
    "llama8b-lora-alpaca": Workload(
        "llama-3.1-8b", batch_size=2, accumulation=4, **{**LORA, "lora_rank": 32}, **ALPACA
    ),
    "llama8b-qlora-32k": Workload("llama-3.1-8b", batch_size=1, median=32_768, nf4=True, checkpointing=True, **LORA),
    "llama8b-qlora-131k": Workload("llama-3.1-8b", batch_size=1, median=131_072, nf4=True, checkpointing=True, **LORA),
    "llama1b-lora-packed-64k": Workload(
        "llama-3.2-1b", batch_size=1, packed=65_536, checkpointing=True, **LORA, **{**CHAT, "median": 1500, "cap": 8192}
    ),
    "llama8b-full": Workload("llama-3.1-8b", batch_size=1, median=2048, checkpointing=True, optim="paged_adamw_8bit"),
    "qwen3-4b-full": Workload("qwen3-4b", batch_size=2, median=2048, checkpointing=True),
    "qwen3-moe-lora": Workload("qwen3-moe-12-layers", batch_size=2, median=2048, lora_targets=ATTENTION, **LORA),
}
