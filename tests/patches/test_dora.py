"""DoRA adapters of PEFT, patched and stock, by the fp64 rule of test_parity.py.

Adapters begin at random values and magnitudes away from the norms, so that every part of the formula counts.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_turbo.patches import lora as lora_patches
from hf_turbo.patches import mlp as mlp_patches
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_turbo
from tests.fp64 import Errors, hold_to_rule, squared_errors
from tests.models import Float64Mode, batch, loss_and_gradients, tiny_model
from tests.patches.test_parity import run

pytestmark = pytest.mark.newest

PRECISIONS = ("fp32", "bf16", "bf16-all", "autocast")
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of bitsandbytes
FAMILIES = ("llama", "qwen2")  # without biases, and with
LAYERS = 14  # seven linear layers in each of two blocks


def dora_config(**changes: Any) -> LoraConfig:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True, "init_lora_weights": False}
    return LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **changes})


def with_dora(model: nn.Module, seed: int = 0, cast: bool = True, **changes: Any) -> Any:
    """`cast`: PEFT's default, adapters in float32 whatever the model is in."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, dora_config(**changes), autocast_adapter_dtype=cast)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return peft.train()


def turbo_run(model: nn.Module, inputs: dict[str, Any], autocast: bool = False) -> dict[str, torch.Tensor]:
    """Loss and gradients with the lora role alone patched."""
    try:
        row = next(row for row in patched(model).rows if row.role == "lora")
        assert row.patched == row.found > 0, row.reason
        return run(model, inputs, autocast)
    finally:
        hf_turbo.disable()


def patched(model: nn.Module, *roles: str) -> Any:
    wanted = roles or ("lora",)
    options = {role: "auto" if role in wanted else False for role in ("norms", "mlp", "layers", "rope", "loss", "lora")}
    return hf_turbo.patch_model(model, **options)


def reference64(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).double()
    with Float64Mode():
        loss, gradients = loss_and_gradients(model, inputs)
    return {"loss": loss, **gradients}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many projections each call of the fused function computed."""
    counted, make = [], lora_patches.dora_linears_of

    def dora_linears_of(width: int, dtype: Any, projections: Any, *args: Any) -> Any:
        function = make(width, dtype, projections, *args)

        def call(x: torch.Tensor) -> Any:
            counted.append(len(projections))
            return function(x)

        return call

    monkeypatch.setattr(lora_patches, "dora_linears_of", dora_linears_of)
    return counted


# --------------------------------------------------------------------------------------------------------- exactness


def make_draw(family: str, precision: str, seed: int) -> tuple[Errors, Errors]:
    """Errors of (turbo, stock)."""
    model = tiny_model(family, torch.bfloat16, seed)
    if precision in ("fp32", "autocast"):
        model = model.float()
    model = with_dora(model, seed, cast=precision != "bf16-all")
    inputs = batch(rows=4, seed=seed)
    reference = reference64(model, inputs)
    stock = run(model, inputs, precision == "autocast")
    turbo = turbo_run(model, inputs, precision == "autocast")
    assert turbo.keys() == stock.keys() == reference.keys()
    assert any("lora_magnitude_vector" in name for name in turbo)
    return squared_errors(turbo, reference), squared_errors(stock, reference)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family, precision):
    hold_to_rule(lambda seed: make_draw(family, precision, seed))


@cache
def nf4_model(compute: torch.dtype, dtype: torch.dtype, folder: Path, seed: int) -> Any:
    tiny_model("llama", torch.float32, seed, **SIZES).save_pretrained(folder)
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=compute)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=dtype
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # or evaluation repacks the weights, on such CPUs
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])  # bitsandbytes settles dtypes in its first call
    return model


def expanded64(model: nn.Module, seed: int) -> Any:
    """The same model in fp64 with dense weights."""
    functional = pytest.importorskip("bitsandbytes").functional
    dense = with_dora(tiny_model("llama", torch.float32, seed, **SIZES), seed).double()
    target = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = parameter
            if hasattr(parameter, "quant_state"):
                value = functional.dequantize_4bit(parameter.data, parameter.quant_state)
            target[name].copy_(value)
    return dense


@pytest.mark.parametrize(
    ("compute", "dtype", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
    ],
    ids=str,
)
def test_gradients_on_4_bit_weights(compute, dtype, autocast, tmp_path, calls):
    pytest.importorskip("bitsandbytes")

    def draw(seed: int) -> tuple[Errors, Errors]:
        model, inputs = with_dora(nf4_model(compute, dtype, tmp_path, seed), seed), batch(rows=4, seed=seed)
        dense = expanded64(model, seed)
        with Float64Mode():
            loss, gradients = loss_and_gradients(dense, inputs)
        reference = {"loss": loss, **gradients}
        stock = squared_errors(run(model, inputs, autocast), reference)
        calls.clear()
        turbo = squared_errors(turbo_run(model, inputs, autocast), reference)
        assert len(calls) == 10
        return turbo, stock

    hold_to_rule(draw)


def test_adapters_that_read_more_than_4_bit_weights(tmp_path, calls):
    """float32 inputs of float32 adapters, without autocast, and products with the weights in bfloat16."""
    pytest.importorskip("bitsandbytes")
    assert_stock_bits(with_dora(nf4_model(torch.bfloat16, torch.float32, tmp_path, 0)))
    assert not calls


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_output_dtype(quantised, cast, autocast, tmp_path, calls):
    """Under autocast of CUDA, 4-bit layers give what the magnitudes make of their output: float32 if cast."""
    if quantised:
        pytest.importorskip("bitsandbytes")
        model = with_dora(nf4_model(torch.bfloat16, torch.bfloat16, tmp_path, 0), cast=cast)
    else:
        model = with_dora(tiny_model("llama", torch.bfloat16, **SIZES), cast=cast)
    layer: Any = model.base_model.model.model.layers[0].self_attn.o_proj
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", autocast)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            stock = layer(x)
            patched(model)
            turbo = layer(x)
    finally:
        torch.set_autocast_enabled("cuda", before)
    assert calls == [1]
    assert turbo.dtype == stock.dtype == (torch.float32 if quantised and cast and autocast else torch.bfloat16)
    torch.testing.assert_close(turbo.float(), stock.float(), rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------------- what is fused


def test_projections_of_an_attention_are_computed_together(calls):
    model = with_dora(tiny_model("llama"))
    report = patched(model)
    assert [(row.found, row.patched, row.reason) for row in report.rows if row.role == "lora"] == [(LAYERS, LAYERS, "")]
    run(model, batch())
    assert calls == [3, 1, 1, 1, 1] * 2


def test_with_all_roles(calls, monkeypatch):
    """The MLP is not one function under DoRA: its projections and the product between them are one each."""
    products, glu = [], mlp_patches.glu
    monkeypatch.setattr(mlp_patches, "glu", lambda *args: products.append(1) or glu(*args))
    model, inputs = with_dora(tiny_model("llama")), batch()
    reference, stock = reference64(model, inputs), run(model, inputs)
    patched(model, "norms", "mlp", "rope", "loss", "lora")
    turbo = run(model, inputs)
    assert len(products) == 2
    assert calls == [3, 1, 1, 1, 1] * 2
    errors = squared_errors(turbo, reference)
    assert sum(e for e, _ in errors.values()) <= 2 * sum(e for e, _ in squared_errors(stock, reference).values())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "gate_proj"]], ids="+".join)
def test_some_projections(targets, calls):
    model, inputs = with_dora(tiny_model("qwen2"), target_modules=targets), batch()
    reference, stock = reference64(model, inputs), run(model, inputs)
    turbo = turbo_run(model, inputs)
    assert calls == ([2] if "q_proj" in targets else [1, 1]) * 2
    errors = squared_errors(turbo, reference)
    assert sum(e for e, _ in errors.values()) <= 2 * sum(e for e, _ in squared_errors(stock, reference).values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, precision, calls):
    """Recomputed layers run fused as well, and give the bits that they gave without recomputation."""
    model = with_dora(tiny_model("llama", torch.bfloat16 if precision == "bf16" else torch.float32))
    model.enable_input_require_grads()
    expected = {name: value.clone() for name, value in turbo_run(model, batch(), precision == "autocast").items()}
    assert len(calls) == 10
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    results = turbo_run(model, batch(), precision == "autocast")
    assert len(calls) == 30
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_norms_are_never_stale():
    """Weights and adapters may change in any way between two calls, `.data` among them."""
    model = with_dora(tiny_model("llama"))
    layer: Any = model.base_model.model.model.layers[0].self_attn.o_proj
    x = torch.randn(1, 5, 64)

    def differs() -> None:
        hf_turbo.disable()
        stock = layer(x)
        patched(model)
        torch.testing.assert_close(layer(x), stock)

    patched(model)
    before = layer(x)
    layer.base_layer.weight.data.mul_(3)
    after = layer(x)
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data * 5
    last = layer(x)
    assert not torch.allclose(before, after)
    assert not torch.allclose(after, last)
    differs()


def test_frozen_magnitudes(calls):
    model, inputs = with_dora(tiny_model("llama")), batch()
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.requires_grad_(False)
    reference, stock = reference64(model, inputs), run(model, inputs)
    turbo = turbo_run(model, inputs)
    assert calls
    assert turbo.keys() == stock.keys()
    errors = squared_errors(turbo, reference)
    assert sum(e for e, _ in errors.values()) <= 2 * sum(e for e, _ in squared_errors(stock, reference).values())


# ------------------------------------------------------------------------------------------------- what is left to PEFT


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: value.clone() for name, value in run(model, batch()).items()}


def assert_stock_bits(model: nn.Module) -> None:
    """Stock and patched give the same bits: PEFT computed both."""
    hf_turbo.disable()
    stock = bits(model)
    patched(model)
    for name, value in bits(model).items():
        assert torch.equal(value, stock[name]), name


def reason_of(model: nn.Module) -> str:
    row = next(row for row in patched(model).rows if row.role == "lora")
    assert row.patched == 0
    return row.reason


@pytest.mark.parametrize("training", [True, False])
def test_dropout(training, calls):
    """Its formula is another one. The report says so in evaluation too, where training may be prepared."""
    model = with_dora(tiny_model("llama"), lora_dropout=0.1).train(training)
    assert "DoRA with dropout" in reason_of(model)
    assert_stock_bits(model)
    assert not calls


def test_dropout_that_comes_later(calls):
    model = with_dora(tiny_model("llama"))
    patched(model)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.5)
    model.train()
    assert_stock_bits(model)
    assert not calls


def test_int8_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", **SIZES).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, device_map={"": "cpu"})
    assert "DoRA on 8-bit weights" in reason_of(with_dora(model))


def test_offloading():
    model = with_dora(tiny_model("llama"))
    for module in model.modules():
        if hasattr(module, "ephemeral_gpu_offload"):
            module.ephemeral_gpu_offload = True
    assert "ephemeral_gpu_offload" in reason_of(model)


def test_trained_weights(calls):
    model = with_dora(tiny_model("llama"))
    model.requires_grad_(True)
    assert "trained" in reason_of(model)
    assert_stock_bits(model)
    assert not calls


def test_other_variants():
    """A class derived from DoRA's may compute anything."""
    model = with_dora(tiny_model("llama"))
    for module in model.modules():
        variants = getattr(module, "lora_variant", None)
        if variants:
            variants["default"] = type("Mine", (type(variants["default"]),), {})()
    assert "variant: Mine" in reason_of(model)


def hook_the_magnitude(layer: Any) -> None:
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)


def hook_the_base(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda *_: None)


def offload(layer: Any) -> None:
    layer.ephemeral_gpu_offload = True


def drop(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.5)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("change", [hook_the_magnitude, hook_the_base, offload, drop, None])
def test_at_a_call(change, before, calls):
    """Found out when it happens, also where a call was fused before: PEFT's own forward runs, with hooks and all."""
    model = with_dora(tiny_model("llama"))
    layer: Any = model.base_model.model.model.layers[0].self_attn.o_proj
    patched(model)
    if before:
        layer(torch.randn(2, 3, 64))
        assert calls == [1]
        calls.clear()
    x = torch.randn(64) if change is None else torch.randn(2, 3, 64)
    if change is not None:
        change(layer)
    torch.manual_seed(0)
    turbo = layer(x)
    hf_turbo.disable()
    torch.manual_seed(0)
    assert torch.equal(turbo, layer(x))
    assert not calls


def test_magnitudes_that_change(calls):
    """In place, by `.data`, or for another parameter: the next call sees them."""
    model = with_dora(tiny_model("llama"))
    layer: Any = model.base_model.model.model.layers[0].self_attn.o_proj
    patched(model)
    x, module = torch.randn(2, 3, 64), layer.lora_magnitude_vector["default"]
    stock = type(layer).__mro__[1]
    layer(x)
    with torch.no_grad():
        module.weight.mul_(2)
    results = [(layer(x), stock.forward(layer, x))]
    module.weight.data = module.weight.data * 3
    results.append((layer(x), stock.forward(layer, x)))
    module.weight = nn.Parameter(module.weight.detach() * 5)
    results.append((layer(x), stock.forward(layer, x)))
    for turbo, expected in results:
        torch.testing.assert_close(turbo, expected)
    assert calls == [1] * 4


def test_what_peft_does_with_an_adapter(tmp_path):
    """Disabling, merging, saving and loading, in a patched model as in a stock one, to the bit."""
    stock, turbo = (with_dora(tiny_model("qwen2")) for _ in range(2))
    patched(turbo)
    run(turbo, batch())
    inputs = {"input_ids": torch.arange(3, 20)[None]}
    with stock.disable_adapter(), turbo.disable_adapter():
        assert torch.equal(stock(**inputs).logits, turbo(**inputs).logits)
    saved = [get_peft_model_state_dict(model) for model in (stock, turbo)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    turbo.save_pretrained(tmp_path)
    assert b"hf_turbo" not in (tmp_path / "adapter_config.json").read_bytes()
    for model in (stock, turbo):
        model.merge_adapter()
    assert torch.equal(stock(**inputs).logits, turbo(**inputs).logits)
    for model in (stock, turbo):
        model.unmerge_adapter()
    stock, turbo = stock.merge_and_unload(), turbo.merge_and_unload()
    weights = turbo.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in stock.state_dict().items())


def test_second_adapter(calls):
    """Another adapter, without DoRA, is computed as LoRA; both at once are PEFT's."""
    model = with_dora(tiny_model("llama"))
    model.add_adapter("plain", dora_config(use_dora=False))
    model.set_adapter("plain")
    patched(model)
    run(model, batch())
    model.base_model.set_adapter(["default", "plain"])
    both = bits(model)
    assert not calls
    model.set_adapter("default")
    run(model, batch())
    assert len(calls) == 10
    hf_turbo.disable()
    model.base_model.set_adapter(["default", "plain"])
    for name, value in bits(model).items():
        assert torch.equal(value, both[name]), name


def test_off(calls):
    model = with_dora(tiny_model("llama"))
    before = bits(model)
    patched(model)
    hf_turbo.disable()
    after = bits(model)
    assert not calls
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [False, True])
def test_on_a_gpu(quantised, tmp_path, calls):
    """As Trainer runs it: float32 adapters under autocast; the same output dtype, and gradients as near as stock's."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
    small = tiny_model("llama", torch.bfloat16, **sizes)
    if quantised:
        pytest.importorskip("bitsandbytes")
        small.save_pretrained(tmp_path)
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        small = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=how, device_map={"": 0}, dtype=torch.bfloat16
        )
    model = with_dora(small.cuda() if not quantised else small)
    inputs = {name: value.cuda() for name, value in batch(rows=8, length=128).items()}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    x = torch.randn(2, 5, 512, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        dtype = layer(x).dtype
    stock = gradients()
    patched(model)
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x).dtype == dtype
    turbo = gradients()
    assert len(calls) == 11
    assert turbo.keys() == stock.keys()
    for name, value in stock.items():
        difference = torch.linalg.vector_norm((turbo[name] - value).double())
        assert difference <= 0.05 * torch.linalg.vector_norm(value.double()), name
