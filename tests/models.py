"""Tiny models of many families, random weights, and the fp64 reference to judge numbers by."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hf_turbo import TurboConfig

VOCABULARY = 97

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# family: (modelling module, class prefix, config fields beyond the common sizes)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama-bias": ("llama", "Llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", "Mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen3": ("qwen3", "Qwen3", {}),
    "gemma": ("gemma", "Gemma", {}),
    "gemma2": ("gemma2", "Gemma2", {"final_logit_softcapping": 5.0, "attn_implementation": "eager"}),
    "gemma3": ("gemma3", "Gemma3", {"sliding_window": 8}),
    "phi3": ("phi3", "Phi3", {"partial_rotary_factor": 0.5}),
    "olmo2": ("olmo2", "Olmo2", {}),
    "smollm3": ("smollm3", "SmolLM3", {}),
    "granite": ("granite", "Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.25}),
    "glm4": ("glm4", "Glm4", {"partial_rotary_factor": 0.5}),
    "mixtral": ("mixtral", "Mixtral", _EXPERTS),
    "qwen3-moe": ("qwen3_moe", "Qwen3Moe", _EXPERTS),
    "cohere2": ("cohere2", "Cohere2", {"logit_scale": 0.25}),
}

# Families of which attention alone is looked at.
ATTENTION = {"gpt-oss": ("gpt_oss", "GptOss", {**_EXPERTS, "sliding_window": 8, "attn_implementation": "eager"})}

# Roles that hf_turbo leaves stock in a family: Cohere rotates in fp32 by a body of its own, and its layers have one
# norm; experts are no MLP modules.
STOCK_ROLES = {"cohere2": {"rope", "layers"}, "mixtral": {"mlp"}, "qwen3-moe": {"mlp"}}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A CausalLM of the family with random weights, norm weights included, in training mode."""
    module, prefix, extra = {**FAMILIES, **ATTENTION}[family]
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    modelling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config_cls = next(
        getattr(configuration, name)
        for name in (f"{prefix}TextConfig", f"{prefix}Config")
        if hasattr(configuration, name)
    )
    config = config_cls(**{**_SIZES, **extra, **changes})
    torch.manual_seed(seed)
    model = getattr(modelling, f"{prefix}ForCausalLM")(config)
    if hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # grouped_mm has no fp64, and no small sizes
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).train()


def batch(rows: int = 3, length: int = 21, seed: int = 0, masked: bool = True) -> dict[str, torch.Tensor]:
    """Token ids with right padding, and labels of which some are masked."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    if masked:
        for row in range(1, rows):
            attention_mask[row, length - 3 * row :] = 0
        labels[attention_mask == 0] = -100
        labels[:, :4] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class Float64Mode(TorchFunctionMode):
    """Stock code written for fp32 statistics, in fp64: every request for float32 becomes one for float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*tree_map(widen, args), **tree_map(widen, kwargs or {}))


def loss_and_gradients(model: nn.Module, inputs: dict[str, Any], scale: float = 1.0) -> tuple[Any, dict[str, Any]]:
    """One forward and backward; returns the loss and every parameter's gradient."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    (loss * scale).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def reference64(model: nn.Module, inputs: dict[str, Any], scale: float = 1.0) -> tuple[Any, dict[str, Any]]:
    """The same in fp64 from the same weights, by stock code. `model` must not be patched."""
    import copy

    model = copy.deepcopy(model).double()
    with Float64Mode():
        return loss_and_gradients(model, inputs, scale)


def quantised(model: Any, kind: str, compute: torch.dtype = torch.float32) -> Any:
    """The model with bitsandbytes layers in place of all linear ones but the head.

    Args:
        kind: nf4, fp4, nf4-double, fp4-double or int8.
        compute: dtype of the products, for 4 bits.
    """
    from bitsandbytes import nn as bnb

    four_bit, double = kind != "int8", kind.endswith("-double")
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or ".layers." not in name:
            continue
        shape, has_bias = (module.in_features, module.out_features), module.bias is not None
        if four_bit:
            settings: dict[str, Any] = {"compress_statistics": double, "quant_type": kind.removesuffix("-double")}
            packed = bnb.Linear4bit(*shape, has_bias, compute_dtype=compute, **settings)
            packed.weight = bnb.Params4bit(module.weight.data, requires_grad=False, module=packed, **settings)
            # On some CPUs bitsandbytes repacks the weights at the first evaluation, after which nothing can be trained.
            packed.support_avx512bf16_for_cpu = False
        else:
            packed = bnb.Linear8bitLt(*shape, has_bias, has_fp16_weights=False, threshold=6.0)
            packed.weight = bnb.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        packed.bias = module.bias
        model.set_submodule(name, packed.to("cpu"))
    setattr(model, "is_loaded_in_4bit" if four_bit else "is_loaded_in_8bit", True)  # what PEFT looks at
    return model.requires_grad_(False)


def with_dense_weights(model: Any) -> Any:
    """A copy of the model with the weights, in float32, that its bitsandbytes layers stand for."""
    import copy

    import bitsandbytes as bnb

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.float() * (module.weight.SCB.float() / 127)[:, None]
        else:
            continue
        dense = nn.Linear(module.in_features, module.out_features, bias=False)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias = module.bias
        model.set_submodule(name, dense)
    return model


def switched_off(*but: str) -> dict[str, bool | str]:
    """Options that leave every feature stock, except those named, which are not among them."""
    switches = [field.name for field in fields(TurboConfig) if isinstance(field.default, (bool, str))]
    choices = {"memory": "as_is", "bf16_weights": "as_is", "optim": "auto"}
    off: dict[str, bool | str] = {**dict.fromkeys(switches, False), **choices}
    return {name: value for name, value in off.items() if name not in but}


def switch_on(model: Any, reentrant: bool = False, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """The model with gradient checkpointing; `settings` are torch's, and the rest is transformers'."""
    # Renamed after transformers 5.17.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant, **(settings or {})}, **kwargs)
    return model
