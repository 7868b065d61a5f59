"""The causal-LM loss of plain `Trainer` and Accelerate loops: head and loss in one op, inside `lm_head.__call__`.

The model's class is swapped for one whose training forward hands labels to `lm_head`; `lm_head`'s class is swapped for
a linear layer that, given labels, returns the loss. Computing it inside `lm_head.__call__` keeps the hooks of FSDP and
others firing around the use of its weight. Evaluation, generation and everything unexpected go through stock.

TRL trainers compute their losses elsewhere; see trl.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels.linear_cross_entropy import linear_cross_entropy
from torch import nn

from .conflicts import module_conflict
from .engine import (
    ClassSwap,
    Exactness,
    Finding,
    forward_of,
    is_live,
    is_plain,
    is_swapped,
    same_name_subclass,
    stock_class,
)
from .fingerprint import fingerprint
from .logits import LazyLogits, in_forward_context


class _Tail(NamedTuple):
    """What a CausalLM does with its logits before the loss, and what it returns."""

    divisor: str | None = None  # config field: logits / divisor
    factor: str | None = None  # model attribute: logits * factor
    softcap: str | None = None  # config field: softcap * tanh(logits / softcap), None for none
    mixture: bool = False  # MoE output class
    auxiliary: bool = False  # adds a router loss when asked for router logits


_PLAIN, _SOFTCAP, _GRANITE = _Tail(), _Tail(softcap="final_logit_softcapping"), _Tail(divisor="logits_scaling")
_MOE, _COHERE = _Tail(mixture=True, auxiliary=True), _Tail(factor="logit_scale")
_TAILS = {
    # transformers 5.23 and 5.17
    "64a148871679": _PLAIN,
    "945d1befa600": _PLAIN,  # DeepSeek-V3 of 5.17 shares it: its output class follows from the backbone's
    "683d4428cf93": _Tail(mixture=True),
    "856fef0e4c14": _SOFTCAP,
    "8fd2618cd088": _SOFTCAP,
    "986058df4ea8": _GRANITE,
    "27070dafdb62": _GRANITE,
    "8867f520465a": _MOE,
    "891e00d2edb1": _MOE,
    "7c226c9ea83b": _COHERE,
    "bedb4f9dd222": _COHERE,
}


# The CausalLMs inside a model that was patched; those whose loss is fused wherever they are called; those in the
# training step of a trainer that does not look at the logits. A callback, or a loop behind `train()`, may do so.
_OF_MODEL: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
_EVERYWHERE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_IN_STEP: weakref.WeakSet[nn.Module] = weakref.WeakSet()

_LOSS_OPTIONS = ("shift_labels", "num_items_in_batch", "ignore_index")


@dataclass(frozen=True)
class _LossRequest:
    """What `lm_head` needs to return a loss instead of logits.

    `stock_loss` takes the head's logits; for a weight that turns out, inside the call, not to be a plain tensor.
    """

    stock_loss: Callable[[torch.Tensor], torch.Tensor]
    labels: torch.Tensor
    shift_labels: torch.Tensor | None
    num_items_in_batch: torch.Tensor | float | None
    ignore_index: int
    logit_scale: float
    softcap: float | None


def _make_head_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, input: torch.Tensor, *, _hf_turbo_request: _LossRequest | None = None) -> torch.Tensor:
        request = _hf_turbo_request
        if request is None:
            return stock(self, input)
        if not is_plain(input, self.weight, self.bias):
            return request.stock_loss(stock(self, input))
        labels = request.shift_labels
        if labels is None:
            # As ForCausalLMLoss: the label of a position is the next token, the last position has none.
            labels = nn.functional.pad(request.labels, (0, 1), value=request.ignore_index)[..., 1:]
        num_items = request.num_items_in_batch
        return linear_cross_entropy(
            input,
            self.weight,
            labels.to(input.device),
            self.bias,
            num_items=num_items.to(input.device) if isinstance(num_items, torch.Tensor) else num_items,
            ignore_index=request.ignore_index,
            logit_scale=request.logit_scale,
            softcap=request.softcap,
        )

    return forward


def _scale_and_softcap(model: Any, tail: _Tail) -> tuple[float, float | None]:
    scale = 1.0
    if tail.divisor is not None:
        scale = 1.0 / getattr(model.config, tail.divisor)
    if tail.factor is not None:
        scale = getattr(model, tail.factor)
    return scale, None if tail.softcap is None else getattr(model.config, tail.softcap)


def _can_fuse(model: Any, tail: _Tail, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call is a training step whose loss is understood. Cheap: it runs on every forward."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    labels, head = kwargs.get("labels"), model.lm_head
    logits_to_keep = kwargs.get("logits_to_keep", 0)
    router_logits = kwargs.get("output_router_logits")
    if router_logits is None:
        router_logits = getattr(model.config, "output_router_logits", False)
    return bool(
        is_live()
        and model.training
        and (model in _IN_STEP or model in _EVERYWHERE)
        and not args
        and torch.is_grad_enabled()
        and isinstance(labels, torch.Tensor)
        and isinstance(logits_to_keep, int)
        and logits_to_keep == 0
        and not (tail.auxiliary and router_logits)
        and kwargs.get("return_dict") in (None, True)
        and getattr(model.config, "return_dict", True)
        and not getattr(model, "_is_replica", False)  # nn.DataParallel gathers every output
        and model.loss_function is ForCausalLMLoss
        and getattr(type(head), "_hf_turbo_stock_forward", None) is nn.Linear.forward
        and "forward" not in head.__dict__
        and not _has_foreign_hooks(head)
        and _fit(kwargs, labels)
        and head.out_features == getattr(model, "vocab_size", model.config.vocab_size) == model.config.vocab_size
    )


def _fit(kwargs: dict[str, Any], labels: torch.Tensor) -> bool:
    """Whether labels lie as the tokens do; stock flattens both and takes any layout."""
    tokens, shift_labels = kwargs.get("input_ids"), kwargs.get("shift_labels")
    if tokens is None:
        embeds = kwargs.get("inputs_embeds")
        tokens = None if embeds is None else embeds[..., 0]
    return (
        tokens is not None
        and labels.shape == tokens.shape
        and (shift_labels is None or shift_labels.shape == tokens.shape)
    )


def _has_foreign_hooks(head: nn.Module) -> bool:
    """Whether somebody watches or changes the head's logits. Sharding wrappers hook it too, for its weight."""
    hooks = [*head._forward_hooks.values(), *head._forward_pre_hooks.values(), *head._backward_hooks.values()]
    own = ("torch.distributed", "accelerate", "deepspeed")
    return any(not (getattr(hook, "__module__", None) or type(hook).__module__).startswith(own) for hook in hooks)


@cache
def _make_model_forward_of(tail: _Tail) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not _can_fuse(self, tail, args, kwargs):
                return stock(self, *args, **kwargs)
            return _fused_forward(self, tail, kwargs)

        return forward

    return make_forward


def _fused_forward(model: Any, tail: _Tail, kwargs: dict[str, Any]) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

    backbone_kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep", "return_dict")}
    outputs = model.model(**backbone_kwargs)
    hidden_states, head = outputs.last_hidden_state, model.lm_head
    scale, softcap = _scale_and_softcap(model, tail)

    def transform(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if scale == 1.0 else logits * scale
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def stock_loss(logits: torch.Tensor) -> torch.Tensor:
        loss_kwargs = {k: v for k, v in backbone_kwargs.items() if k in _LOSS_OPTIONS}
        return model.loss_function(transform(logits), kwargs["labels"], model.config.vocab_size, **loss_kwargs)

    request = _LossRequest(
        stock_loss,
        kwargs["labels"],
        kwargs.get("shift_labels"),
        kwargs.get("num_items_in_batch"),
        kwargs.get("ignore_index", -100),
        scale,
        softcap,
    )
    loss = head(hidden_states, _hf_turbo_request=request)
    device_type = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device_type)
    logits = LazyLogits(
        in_forward_context(
            lambda: transform(head(hidden_states)), [p for p in (head.weight, head.bias) if p is not None]
        ),
        torch.Size((*hidden_states.shape[:-1], head.out_features)),
        torch.get_autocast_dtype(device_type) if autocast else hidden_states.dtype,
        hidden_states.device,
    )
    if tail.mixture:
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=getattr(outputs, "router_logits", None),
        )
    return CausalLMOutputWithPast(
        loss=loss,
        logits=logits,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


@contextmanager
def training_step(models: list[nn.Module]) -> Iterator[None]:
    """Around a training step whose loss does not look at the logits of these models."""
    causal_lms = [each for model in models for each in _OF_MODEL.get(model, ())]
    _IN_STEP.update(causal_lms)
    try:
        yield
    finally:
        _IN_STEP.difference_update(causal_lms)


def find(model: nn.Module, everywhere: bool = True) -> Finding:
    """Class swaps of every CausalLM whose tail is understood, and of its head.

    Args:
        everywhere: whether the loss is fused wherever they are called; else within `training_step` alone.
    """
    finding = Finding("loss", "linear_cross_entropy", Exactness.REASSOCIATED)
    for name, module in model.named_modules():
        cls = stock_class(module)
        if not cls.__name__.endswith("ForCausalLM") or not hasattr(module, "config"):
            continue
        if "peft" in cls.__module__:  # a wrapper; the model inside it is the one to patch
            continue
        finding.found += 1
        reason = None if is_swapped(module) else _refusal(module, cls)
        if reason is not None:
            finding.refuse(reason)
            continue
        finding.patched += 1
        _OF_MODEL.setdefault(model, weakref.WeakSet()).add(module)
        _EVERYWHERE.add(module) if everywhere else _EVERYWHERE.discard(module)
        if is_swapped(module):
            continue
        tail = _TAILS[fingerprint(forward_of(cls)) or ""]
        head = module.lm_head
        finding.patches.append(ClassSwap(f"loss:{name}", module, same_name_subclass(cls, _make_model_forward_of(tail))))
        finding.patches.append(
            ClassSwap(f"loss:{name}.lm_head", head, same_name_subclass(nn.Linear, _make_head_forward))
        )
    return finding


def _refusal(module: nn.Module, cls: type) -> str | None:
    if (fingerprint(forward_of(cls)) or "") not in _TAILS:
        return f"unknown forward of {cls.__name__}"
    head = getattr(module, "lm_head", None)
    if head is None or not hasattr(module, "model"):
        return "no lm_head or no backbone called `model`"
    kind = type(head).__name__
    if kind == "ModulesToSaveWrapper":
        return "lm_head is in PEFT's modules_to_save"
    if stock_class(head) is not nn.Linear:
        return f"lm_head is {type(head).__module__.partition('.')[0]}.{kind}, not a plain linear layer"
    return module_conflict(module) or module_conflict(head)
