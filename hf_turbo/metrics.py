"""turbo/* figures in the Trainer's own logs: tokens per second, peak memory, model FLOPs utilisation.

Conventions: tokens are real ones, padding not counted, of this process. MFU counts, for each real token, 6 FLOP per
trained and 4 per frozen weight of a linear layer (forward, input gradient, weight gradient), of experts only the share
that a token visits, and for each causal pair of tokens in one document 12 x heads x head_dim x layers; recomputation is
not counted; over the device's dense bf16 peak. It is left out where the peak or the model's sizes are unknown. Seconds
are all that passed since the last log, evaluation and saving included.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hf_turbo.patches import device_memory

_EXPERT_BANKS = {"gate_up_proj", "gate_proj", "up_proj", "down_proj"}

# Dense bf16 TFLOP/s by words of the device's name, from the vendors' datasheets. First match counts.
_PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device, None where unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for words, tflops in _PEAK_TFLOPS if re.search(rf"\b{words}\b", name)), None)


def flops_per_token(model: nn.Module) -> float:
    """FLOP per token of forward and backward in the linear layers, attention scores left out."""
    visits = getattr(_text_config(model), "num_experts_per_tok", None)
    total = 0.0
    for module in model.modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not any(module.children()):
            weight = getattr(module, "weight", None)
            trained = weight is not None and weight.requires_grad
            total += int(module.in_features) * int(module.out_features) * (6 if trained else 4)  # type: ignore[arg-type]
            continue
        for name, bank in module.named_parameters(recurse=False):
            if name in _EXPERT_BANKS and bank.ndim == 3:
                share = visits / bank.shape[0] if isinstance(visits, int) else 1.0
                total += bank.numel() * share * (6 if bank.requires_grad else 4)
    return total


def flops_per_pair(model: nn.Module) -> float | None:
    """FLOP of forward and backward of the attention scores for one pair of tokens, over all layers.

    None where the config does not say: no text config, or sizes that differ by layer.
    """
    config = _text_config(model)
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    head_dim, width = getattr(config, "head_dim", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(layers, int) or not heads:
        return None
    if not isinstance(head_dim, int):
        if not isinstance(width, int):
            return None
        head_dim = width // heads
    return 12.0 * heads * head_dim * layers


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    try:
        return config.get_text_config()
    except ValueError:  # several text configs: an encoder and a decoder
        return None


def _peak_memory_gib(device: torch.device) -> float:
    """Peak allocated device memory, or the process's peak resident set on CPU."""
    peak = device_memory.peak_allocated(device)
    if peak is not None:
        return peak / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsCallback(TrainerCallback):
    """Counts tokens of fetched batches without waiting for the device, and adds the figures when the Trainer logs.

    Attributes:
        retried_steps: that ran out of memory and were done again, since the beginning, in whichever process.
        before_log: called first, if anything.
    """

    def __init__(self, device: torch.device):
        self._device, self._peak = device, peak_flops(device)
        self._tokens = self._pairs = 0
        self._counts: torch.Tensor | None = None  # tokens and pairs that the device alone knows
        self._flops: tuple[float, float | None] | None = None  # per token, per pair
        self._since: float | None = None
        self.retried_steps = 0
        self.before_log: Callable[[], None] | None = None

    def count(self, batches: list[Any], lengths: list[list[int] | None]) -> None:
        """Adds the micro-batches of one optimizer step: real tokens, and causal pairs within documents.

        Args:
            lengths: in tokens, of the documents of those that are known; may be shorter than `batches`.
        """
        if self._since is None:
            self._since = time.perf_counter()
        for batch, known in zip_longest(batches, lengths):
            if known is not None:
                self._tokens += sum(known)
                self._pairs += sum(length * (length + 1) // 2 for length in known)
                continue
            if not hasattr(batch, "get"):
                continue
            mask, ids, positions = (batch.get(key) for key in ("attention_mask", "input_ids", "position_ids"))
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                rows = mask.sum(-1)
            elif isinstance(ids, torch.Tensor):
                rows = ids.new_full((ids.shape[0],), ids.shape[-1])
            else:
                continue
            if mask is None and isinstance(positions, torch.Tensor):
                counts = torch.stack([rows.sum(), (positions + 1).sum()])
            else:
                counts = torch.stack([rows, rows * (rows + 1) // 2]).sum(-1)
            self._counts = counts if self._counts is None else self._counts + counts

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or self._since is None:
            return
        if self.before_log is not None:
            self.before_log()
        more = (0, 0) if self._counts is None else self._counts.tolist()
        tokens, pairs = self._tokens + more[0], self._pairs + more[1]
        now = time.perf_counter()
        seconds = now - self._since
        figures = {"turbo/tokens_per_second": tokens / seconds, "turbo/peak_memory_gib": _peak_memory_gib(self._device)}
        if self.retried_steps:
            figures["turbo/retried_steps"] = self.retried_steps
        mfu = self._mfu(kwargs.get("model"), tokens, pairs, seconds)
        if mfu is not None:
            figures["turbo/mfu"] = mfu
        figures = {name: float(f"{value:.4g}") for name, value in figures.items()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        self._tokens, self._pairs, self._counts, self._since = 0, 0, None, now

    def _mfu(self, model: Any, tokens: int, pairs: int, seconds: float) -> float | None:
        if self._peak is None or model is None:
            return None
        if self._flops is None:
            model = getattr(model, "module", model)  # DDP
            self._flops = flops_per_token(model), flops_per_pair(model)
        per_token, per_pair = self._flops
        return None if per_pair is None else (tokens * per_token + pairs * per_pair) / seconds / self._peak
