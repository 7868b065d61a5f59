"""Which rows of a micro-batch are labelled, asked of the device once, when its batch is fetched.

The models of TRL's SFTTrainer score labelled rows alone, `hidden_states[labels != -100]`. How many these are only the
device knows, so the host waits for it: in front of the head, and again in backward, where what was spread over all rows
is gathered; the device then waits for the host. Here the rows are found between two steps, where the host knows the
labels (host_copies.py) or waits anyway, and noted beside the labels. A forward that is given labels without a note, or
anything else that is not understood, is TRL's own.
"""

from __future__ import annotations

import inspect
import sys
import types
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels.linear_cross_entropy import select_rows
from torch import nn

from . import host_copies
from .engine import Patch, is_live, is_plain, look_like

MODULE = "trl.trainer.utils"
_IGNORED = -100

# What TRL's forward closes over.
_CLOSURE = {
    "backbone_attr",
    "cast_lm_head_to_fp32",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
    "temperature",
    "text_config",
}


class _Rows(NamedTuple):
    """Labelled rows of a micro-batch [B, S].

    Attributes:
        labels: that they are those of. version: of these.
        places: [n] int64, the rows among B * S that predict a label.
        targets: [n] int64, the labels that they predict.
    """

    labels: weakref.ref[torch.Tensor]
    version: int
    places: torch.Tensor
    targets: torch.Tensor


# By the id of the labels, as long as they live.
_NOTES: dict[int, _Rows] = {}
_PATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def passes_labelled_rows_only(device: torch.device) -> bool:
    """Whether TRL does; 1.16 does where Triton runs."""
    use_triton = getattr(sys.modules[MODULE], "_use_triton", None)
    return use_triton is None or bool(use_triton(device))


def note(batches: list[Any]) -> None:
    """Finds the labelled rows of the micro-batches of the next step, if a model waits for them."""
    if not _PATCHED:
        return
    for batch in batches:
        labels = batch.get("labels") if hasattr(batch, "get") else None
        if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or "shift_labels" in batch:
            continue
        if labels.is_inference():  # whether it is written to is not known
            continue
        if not passes_labelled_rows_only(labels.device):
            continue
        values = host_copies.known(labels)
        values = labels if values is None else values
        labelled = values != _IGNORED
        labelled[:, :1] = False  # the first of a row is predicted by nothing
        places = labelled.flatten().nonzero().squeeze(-1)
        found = torch.stack([places - 1, values.flatten().index_select(0, places)])
        if found.device != labels.device:
            found = (found.pin_memory() if labels.is_cuda else found).to(labels.device, non_blocking=True)
        _NOTES[id(labels)] = _Rows(_reference(labels), labels._version, *found)


def _reference(labels: torch.Tensor) -> weakref.ref[torch.Tensor]:
    key = id(labels)
    return weakref.ref(labels, lambda _: _NOTES.pop(key, None))


def _noted(labels: torch.Tensor | None) -> _Rows | None:
    rows = _NOTES.get(id(labels))
    if rows is None or labels is None or rows.labels() is not labels or rows.version != labels._version:
        return None
    return rows


def _make_forward(stock: Callable[..., Any], closure: dict[str, Any]) -> Callable[..., Any]:
    trl, text_config = sys.modules[MODULE], closure["text_config"]

    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Any = None,
        shift_labels: Any = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        # torch.compile would compile anew for the id of each batch's labels.
        may_know = fused_lm_head and shift_labels is None and not torch.compiler.is_compiling() and is_live()
        rows = _noted(labels) if may_know else None
        head = self.get_output_embeddings()
        if (
            rows is None
            or not is_plain(head.weight, head.bias)
            or head.weight.device != labels.device
            or getattr(text_config, "output_router_logits", False)
            or kwargs.get("output_router_logits")
        ):
            of_loss = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return stock(self, *args, fused_lm_head=fused_lm_head, **of_loss, **kwargs)
        kwargs["use_cache"] = False
        hidden_states = getattr(self, closure["backbone_attr"])(*args, **kwargs).last_hidden_state
        hidden_states = hidden_states.to(head.weight.device).flatten(0, 1)
        per_token = trl._ChunkedLogProbFunction.apply(
            select_rows(hidden_states, rows.places),
            head.weight,
            head.bias,
            rows.targets,
            closure["temperature"],
            trl._CHUNKED_LOGPROB_CHUNK_SIZE,
            closure["final_logit_softcapping"],
            closure["logit_scale"],
            closure["outputs"],
        )

        def spread(values: torch.Tensor | None) -> torch.Tensor | None:
            """[n] to [B, S - 1], zeros elsewhere."""
            if values is None:
                return None
            return values.new_zeros(labels.numel()).index_copy(0, rows.places, values).view(labels.shape)[:, :-1]

        log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 = map(spread, per_token)
        mask = labels[:, 1:] != _IGNORED
        assert log_probs is not None
        return trl.FusedCausalLMOutput(
            loss=-log_probs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch),
            log_probs=log_probs,
            entropy=entropy,
            log_sum_sq_probs=log_sum_sq_probs,
            mean_logits=mean_logits,
            is_top1=is_top1,
            label_mask=mask,
        )

    return forward


@cache
def _forward_code() -> types.CodeType | None:
    """Of the forward that TRL gives a model."""
    constants: tuple[Any, ...] = sys.modules[MODULE].add_fused_lm_head.__code__.co_consts
    codes = [each for each in constants if isinstance(each, types.CodeType) and each.co_name == "_fused_forward"]
    return codes[0] if len(codes) == 1 else None


def _fused_forward(model: nn.Module) -> Any:
    """The forward that TRL has given a model; None of any other."""
    forward = getattr(vars(model).get("forward"), "__func__", None)
    return forward if forward is not None and getattr(forward, "__code__", None) is _forward_code() else None


class _ForwardPatch(Patch):
    """The forward that TRL has set on a model: TRL's and ours are held by the model alone, which both hold on to."""

    id = "loss:labelled rows"

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._replacement: Callable[[], Any] = lambda: None  # weakly
        self._stock: Callable[[], Any] = lambda: None

    def apply(self) -> None:
        model = self._model()
        stock = None if model is None else _fused_forward(model)
        if model is None or stock is None:
            return
        replacement: Any = _make_forward(stock, _closure(stock))
        look_like(replacement, stock)
        model.forward = types.MethodType(replacement, model)
        self._replacement, self._stock = weakref.ref(replacement), weakref.ref(stock)
        _PATCHED.add(model)

    def revert(self) -> bool:
        model, replacement, stock = self._model(), self._replacement(), self._stock()
        if model is None or replacement is None or stock is None:
            return True
        _PATCHED.discard(model)
        if getattr(vars(model).get("forward"), "__func__", None) is replacement:
            model.forward = types.MethodType(stock, model)
            return True
        # Accelerate has wrapped it, and keeps what it wraps. Without notes it is TRL's own.
        return getattr(vars(model).get("_original_forward"), "__func__", None) is replacement


def patches_of(model: nn.Module) -> list[Patch]:
    """For a model whose trainer is known to pass on labelled rows only."""
    forwards = ((module, _fused_forward(module)) for module in model.modules())
    return [_ForwardPatch(module) for module, forward in forwards if forward is not None and _is_understood(forward)]


def _is_understood(forward: Any) -> bool:
    names = inspect.getclosurevars(forward).nonlocals
    return names.keys() >= _CLOSURE and not names["cast_lm_head_to_fp32"]


def _closure(forward: Any) -> dict[str, Any]:
    names = inspect.getclosurevars(forward).nonlocals
    return {name: names[name] for name in _CLOSURE}
