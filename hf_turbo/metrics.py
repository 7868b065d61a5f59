"""turbo/* figures in the Trainer's own logs: tokens per second, peak memory, model FLOPs utilisation.

Conventions: tokens are real ones, padding not counted, of this process. MFU counts, for each real token, 6 FLOP per
trained and 4 per frozen weight of a linear layer (forward, input gradient, weight gradient), of experts only the share
that a token visits, and for each causal pair of tokens in one document 12 x heads x head_dim x layers; recomputation is
not counted; over the device's dense bf16 peak. It is left out where the peak is unknown.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

# Dense bf16 TFLOP/s by a part of the device's name, from the vendors' datasheets. First match counts.
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
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS if part in name), None)


def flops_per_token(model: nn.Module) -> float:
    """FLOP per token of forward and backward in the linear layers, attention scores left out."""
    config = getattr(model, "config", None)
    total = 0.0
    for module in model.modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not any(module.children()):
            weight = getattr(module, "weight", None)
            trained = weight is not None and weight.requires_grad
            total += int(module.in_features) * int(module.out_features) * (6 if trained else 4)  # type: ignore[arg-type]
        else:
            for bank in module.parameters(recurse=False):
                if bank.ndim == 3:
                    text = config.get_text_config() if config is not None else None
                    visited = getattr(text, "num_experts_per_tok", bank.shape[0]) / bank.shape[0]
                    total += bank.numel() * visited * (6 if bank.requires_grad else 4)
    return total


def flops_per_pair(model: nn.Module) -> float:
    """FLOP of forward and backward of the attention scores for one pair of tokens, over all layers."""
    config = getattr(model, "config", None)
    if config is None:
        return 0.0
    text = config.get_text_config()
    heads, layers = getattr(text, "num_attention_heads", 0), getattr(text, "num_hidden_layers", 0)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return 12.0 * heads * head_dim * layers


def _peak_memory_gib(device: torch.device) -> float:
    """Peak allocated device memory, or the process's peak resident set on CPU."""
    if device.type == "cuda":
        # torch.cuda.max_memory_allocated flattens and sorts all statistics first: a millisecond of every logged step.
        return torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"] / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsCallback(TrainerCallback):
    """Counts tokens of fetched batches without waiting for the device, and adds the figures when the Trainer logs."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device, self._peak = model, device, peak_flops(device)
        self._counts: torch.Tensor | None = None  # tokens, pairs
        self._flops: tuple[float, float] | None = None  # per token, per pair
        self._since: float | None = None

    def count(self, batches: list[Any]) -> None:
        """Adds the micro-batches of one optimizer step: real tokens, and causal pairs within documents."""
        if self._since is None:
            self._since = time.perf_counter()
        for batch in batches:
            if not hasattr(batch, "get"):
                continue
            mask, ids, positions = (batch.get(key) for key in ("attention_mask", "input_ids", "position_ids"))
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                lengths = mask.sum(-1)
            elif isinstance(ids, torch.Tensor):
                lengths = ids.new_full((ids.shape[0],), ids.shape[-1])
            else:
                continue
            if mask is None and isinstance(positions, torch.Tensor):
                counts = torch.stack([lengths.sum(), (positions + 1).sum()])
            else:
                counts = torch.stack([lengths, lengths * (lengths + 1) // 2]).sum(-1)
            self._counts = counts if self._counts is None else self._counts + counts

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or self._since is None:
            return
        tokens, pairs = (0, 0) if self._counts is None else self._counts.tolist()
        now = time.perf_counter()
        seconds = now - self._since
        figures = {"turbo/tokens_per_second": tokens / seconds, "turbo/peak_memory_gib": _peak_memory_gib(self._device)}
        if self._peak is not None:
            if self._flops is None:
                self._flops = flops_per_token(self._model), flops_per_pair(self._model)
            figures["turbo/mfu"] = (tokens * self._flops[0] + pairs * self._flops[1]) / seconds / self._peak
        figures = {name: float(f"{value:.4g}") for name, value in figures.items()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        self._counts, self._since = None, now
