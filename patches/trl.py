"""The loss of the TRL trainers (SFT, DPO, KTO, GRPO, RLOO): log-probabilities from hidden states and head.

TRL calls one autograd Function for all of them, by the name of a module global. Ours has its signature and computes a
frozen head's gradient in forward (two GEMMs instead of three), and for SFT, whose loss weights all rows alike, a
trained head's too (three instead of four).
"""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import Any

import torch
from hf_turbo.kernels.linear_cross_entropy import OPTIONAL_OUTPUTS, LogitTransform, linear_log_prob

from .engine import AttributePatch, Exactness, Finding, Patch, is_live, is_plain
from .fingerprint import fingerprint
from .labelled_rows import MODULE, passes_labelled_rows_only, patches_of
from .trainer import method_of

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
# SFTTrainer.compute_loss of TRL 1.15 and 1.16: with loss_type "nll" the loss is the sum of all log-probabilities times
# one number, so every row has the same upstream gradient.
_UNIFORM_LOSSES = {"0a01dcdc58fb"}
# TRL's add_fused_lm_head, 1.15 and 1.16: it passes the labelled rows only, in 1.16 where `_use_triton(device)` says so.
# Elsewhere it passes all rows and masks what comes out, so that masked rows have an upstream gradient of zero.
_FUSED_HEADS = {"5b35e9d3c60c", "a3410d936edf"}
# Heads trained with such a loss, by id.
_UNIFORM_HEADS: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()


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
                uniform=_UNIFORM_HEADS.get(id(weight)) is weight and passes_labelled_rows_only(hidden.device),
            )

    return ChunkedLogProbFunction


class _UniformHead(Patch):
    """Notes that a head is trained with a loss that weights all rows alike."""

    id = "loss:uniform"

    def __init__(self, weight: torch.Tensor):
        self._key, self._weight = id(weight), weakref.ref(weight)

    def apply(self) -> None:
        weight = self._weight()
        if weight is not None:
            _UNIFORM_HEADS[self._key] = weight

    def revert(self) -> bool:
        _UNIFORM_HEADS.pop(self._key, None)
        return True


def _weights_rows_alike(trainer: Any) -> bool:
    return (
        fingerprint(sys.modules[MODULE].add_fused_lm_head) in _FUSED_HEADS
        and fingerprint(method_of(trainer, "compute_loss")) in _UNIFORM_LOSSES
        and getattr(trainer.args, "loss_type", None) == "nll"
        and getattr(trainer, "compute_loss_func", None) is None
        and getattr(trainer, "label_smoother", None) is None
    )


def find(trainer: Any) -> Finding:
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
    head = trainer.model.get_output_embeddings()
    if finding.patched and head is not None and _weights_rows_alike(trainer):
        finding.patches.append(_UniformHead(head.weight))
        if not trainer.args.torch_compile:
            finding.patches += patches_of(trainer.model)
    return finding


def end_training(trainer: Any) -> None:
    """The promise of equal weights ends with the training: the next trainer of this model may have another loss."""
    head = trainer.model.get_output_embeddings() if hasattr(trainer.model, "get_output_embeddings") else None
    if head is not None and hasattr(head, "weight"):
        _UNIFORM_HEADS.pop(id(head.weight), None)
