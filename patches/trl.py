"""The loss of the TRL trainers (SFT, DPO, KTO, GRPO, RLOO): log-probabilities from hidden states and head.

TRL calls one autograd Function for all of them, by the name of a module global. Ours has its signature and computes a
frozen head's gradient in forward (two GEMMs instead of three), and for SFT, whose loss weights all rows alike, a
trained head's too (three instead of four).
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from hf_turbo.kernels.linear_cross_entropy import OPTIONAL_OUTPUTS, LogitTransform, linear_log_prob

from .engine import AttributePatch, Exactness, Finding, is_live, is_plain

MODULE = "trl.trainer.utils"
_NAME = "_ChunkedLogProbFunction"
_PARAMETERS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
# The supervised loss asks for these and no others (besides the log-probabilities).
_SUPERVISED = {"entropy", "is_top1"}


def _replacement(stock: Any) -> type:
    class ChunkedLogProbFunction:
        """Stands where TRL calls `ChunkedLogProbFunction.apply(...)`."""

        _hf_turbo = True

        @staticmethod
        def apply(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
        ) -> Any:
            same_dtype = hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type)
            if not (is_live() and same_dtype and is_plain(hidden, weight, bias)):
                return stock.apply(
                    hidden,
                    weight,
                    bias,
                    targets,
                    temperature,
                    chunk_size,
                    final_logit_softcapping,
                    logit_scale,
                    outputs,
                )
            extras = tuple(name for name in outputs if name in OPTIONAL_OUTPUTS)
            return linear_log_prob(
                hidden,
                weight,
                targets,
                bias,
                transform=LogitTransform(logit_scale, final_logit_softcapping or 0.0, 1.0 / temperature),
                outputs=extras,
                expect_uniform=set(extras) == _SUPERVISED,
            )

    return ChunkedLogProbFunction


def find() -> Finding:
    """The patch of TRL's module global, where TRL is imported and its Function has the known signature."""
    finding = Finding("loss", "linear_log_prob", Exactness.REASSOCIATED, found=1)
    module = sys.modules.get(MODULE)
    stock = getattr(module, _NAME, None)
    if module is None or stock is None:
        finding.refuse("this TRL has no fused language-model head")
    elif getattr(stock, "_hf_turbo", False):
        finding.patched = 1
    elif tuple(inspect.signature(stock.forward).parameters)[1:] != _PARAMETERS:
        finding.refuse("unknown signature of TRL's ChunkedLogProbFunction")
    else:
        finding.patched = 1
        finding.patches.append(AttributePatch(f"loss:{MODULE}", module, _NAME, _replacement(stock)))
    return finding
