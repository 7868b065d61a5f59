"""Decoder layers fused: what is kept for backward, and what must go on as in stock around it.

That all gradients of all families are no further from fp64 than stock's is tested in test_parity.py.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from hf_turbo.kernels import linears as kernel
from hf_turbo.patches import checkpointing, decoder_layers, linears, lora, norms
from torch import nn
from transformers.models.llama import modeling_llama

import hf_turbo
from tests.fp64 import Errors, hold_to_rule, squared_errors
from tests.models import batch, loss_and_gradients, switch_on, switched_off, tiny_model
from tests.patches.test_parity import draw, run

ONLY = switched_off("layers", "norms")
PRE_NORM = ("llama-bias", "qwen3", "gemma2", "phi3", "granite", "glm4", "mixtral")


@pytest.fixture(autouse=True)
def off_again():
    yield
    hf_turbo.disable()


def row_of(report: Any, role: str = "layers") -> Any:
    return next(row for row in report.rows if row.role == role)


def kept_by(layer: nn.Module, hidden_states: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    """What one layer keeps for backward beside its parameters, one tensor for each storage."""
    own = {each.untyped_storage().data_ptr() for each in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    cos, sin = (torch.ones(1, hidden_states.shape[1], 16, dtype=hidden_states.dtype) for _ in range(2))
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with mixed, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held, so that no storage is freed and taken again.
        output = layer(hidden_states, position_embeddings=(cos, sin))
    del output
    return [tensor for pointer, tensor in kept.items() if pointer not in own]


@pytest.mark.parametrize("family", ["llama-bias", "phi3", "gemma2"])
def test_outputs_of_norms_are_not_kept(family):
    """Of the tensors of the hidden size, the two residual streams and what goes into o_proj."""
    model = tiny_model(family, torch.bfloat16, hidden_size=88)  # heads make 64, the MLP 80
    x = torch.randn(1, 11, 88, dtype=torch.bfloat16).requires_grad_()
    layer = model.model.layers[0]
    stock = sum(each.shape == x.shape for each in kept_by(layer, x))
    hf_turbo.patch_model(model)
    ours = sum(each.shape == x.shape for each in kept_by(layer, x))
    after = 2 if family == "gemma2" else 0  # what the norms behind attention and MLP read
    assert ours == 2 + after
    assert stock >= ours + 2


def test_under_autocast_norms_write_what_linear_layers_read(monkeypatch):
    """No 32-bit output of a norm, no cast of it, and nothing of either kept."""
    dtypes, op = [], decoder_layers.add_rms_norm
    monkeypatch.setattr(decoder_layers, "add_rms_norm", lambda *args: dtypes.append(args[-1]) or op(*args))
    model = tiny_model("llama", hidden_size=88)
    hf_turbo.patch_model(model, **switched_off("layers", "norms", "mlp"))
    x = torch.randn(1, 11, 88).requires_grad_()
    kept = kept_by(model.model.layers[0], x, autocast=True)
    assert dtypes == [torch.bfloat16] * 2
    assert [each.dtype for each in kept if each.shape == x.shape] == [torch.float32] * 2
    # A hook on the attention would see another dtype than in stock.
    dtypes.clear()
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *args: None)
    kept_by(model.model.layers[0], x, autocast=True)
    assert dtypes == [torch.float32, torch.bfloat16]


def test_switched_off(monkeypatch):
    """Of the MLP's projections too, which another role calls."""
    monkeypatch.setattr(linears, "linears", None)
    model = tiny_model("llama")
    assert row_of(hf_turbo.patch_model(model, layers=False)).patched == 0
    loss_and_gradients(model, batch())


@pytest.mark.parametrize("family", ["llama-bias", "gemma2", "olmo2", "mixtral"])
def test_norms_that_are_switched_off_are_called_as_in_stock(family, monkeypatch):
    """A wrong number is looked for by switching off: no kernel of ours may norm behind another role's name."""
    monkeypatch.setattr(decoder_layers, "add_rms_norm", None)
    calls, op = [], linears.linears
    monkeypatch.setattr(linears, "linears", lambda *args, **kwargs: calls.append(args[3]) or op(*args, **kwargs))
    model = tiny_model(family)
    loss, stock = loss_and_gradients(model, batch())
    for _ in range(2):  # met twice
        row = row_of(hf_turbo.patch_model(model, norms=False))
    assert (row.found, row.patched, row.kernel) == (2, 2, "linears")
    assert row.reason == "2 x norms=False: its norms stay stock"
    ours, gradients = loss_and_gradients(model, batch())
    torch.testing.assert_close((ours, gradients), (loss, stock))
    assert calls == [None] * (2 if family == "mixtral" else 4)


def test_projections_are_one_function(monkeypatch):
    calls, op = [], linears.linears
    monkeypatch.setattr(
        linears, "linears", lambda y, weights, *rest, **kw: calls.append(len(weights)) or op(y, weights, *rest, **kw)
    )
    for family, expected in (("llama", [3, 2]), ("phi3", [1, 1]), ("olmo2", [3, 2]), ("mixtral", [3])):
        calls.clear()
        model = tiny_model(family)
        hf_turbo.patch_model(model)
        loss_and_gradients(model, batch())
        assert calls == expected * 2, family
        hf_turbo.disable()


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_gradients_meet_in_the_dtype_that_they_meet_in_in_stock(family, monkeypatch):
    """Autocast rounds what 32-bit norms put out: autograd adds in 32 bits there, and in 16 behind 16-bit norms."""
    wide, op = [], linears.linears
    monkeypatch.setattr(linears, "linears", lambda *args: wide.append(args[-1]) or op(*args))
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family, dtype)
        hf_turbo.patch_model(model)
        run(model, batch(), autocast=True)
        assert set(wide) == {dtype == torch.float32}
        wide.clear()
        hf_turbo.disable()


@pytest.mark.parametrize("recomputed_by", ["hf_turbo", "torch", "torch, reentrant"])
@pytest.mark.parametrize("family", ["llama-bias", "gemma2", "phi3"])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_layers_give_the_same_bits(family, recomputed_by, autocast, monkeypatch):
    """Recomputed, and fused each time: the swaps of both roles stack."""
    calls, op = [], decoder_layers.add_rms_norm
    monkeypatch.setattr(decoder_layers, "add_rms_norm", lambda *args: calls.append(1) or op(*args))
    model = tiny_model(family)
    hf_turbo.patch_model(model, **ONLY)
    expected = {name: value.clone() for name, value in run(model, batch(), autocast).items()}
    assert len(calls) == 4
    hf_turbo.disable()
    calls.clear()
    switch_on(model, reentrant=recomputed_by == "torch, reentrant")
    options = switched_off("layers", "norms", "checkpointing") if recomputed_by == "hf_turbo" else ONLY
    report = hf_turbo.patch_model(model, **options)
    if recomputed_by == "hf_turbo":
        assert row_of(report, "checkpointing").patched == 2
        assert all(layer in checkpointing._RECOMPUTED for layer in model.model.layers)
    results = run(model, batch(), autocast)
    assert len(calls) == 8, "each twice"
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.parametrize("family", PRE_NORM)
def test_everything_is_put_back(family):
    model = switch_on(tiny_model(family))
    inputs = batch()
    classes = [type(module) for module in model.modules()]
    loss, stock = loss_and_gradients(model, inputs)
    stock = {name: gradient.clone() for name, gradient in stock.items()}
    hf_turbo.patch_model(model, **switched_off("layers", "checkpointing", "memory", "norms", "mlp"))
    assert [type(module) for module in model.modules()] != classes
    captured = model.model.layers[0].forward
    hf_turbo.disable()
    assert [type(module) for module in model.modules()] == classes
    assert captured.__self__ is model.model.layers[0]
    again, gradients = loss_and_gradients(model, inputs)
    assert torch.equal(again, loss)
    assert all(torch.equal(gradients[name], stock[name]) for name in stock)


def test_met_twice_and_beside_checkpointing_that_comes_later():
    model = tiny_model("llama")
    options = switched_off("layers", "norms", "checkpointing")
    assert row_of(hf_turbo.patch_model(model, **options)).patched == 2
    switch_on(model)
    report = hf_turbo.patch_model(model, **options)
    assert (row_of(report).patched, row_of(report, "checkpointing").patched) == (2, 2)
    layer = model.model.layers[0]
    assert type(copy.deepcopy(layer)) is type(layer).__mro__[2]
    hf_turbo.disable()
    assert all("_hf_turbo_difference" not in vars(type(module)) for module in model.modules())


# ------------------------------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize("place", ["input_layernorm", "post_attention_layernorm", "self_attn.k_proj", "mlp.up_proj"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_run_as_in_stock(place, kind):
    """And see what they would, to the bit, in float32: shapes, values in forward; gradients are near."""
    model, inputs = tiny_model("llama"), batch()
    seen: list[Any] = []

    def hook(module: nn.Module, *tensors: Any) -> None:
        seen.extend(each.detach().clone() for each in torch.utils._pytree.tree_leaves(tensors) if each is not None)

    getattr(model.get_submodule(f"model.layers.1.{place}"), f"register_{kind}_hook")(hook)
    _, stock = loss_and_gradients(model, inputs)
    stock = {name: gradient.clone() for name, gradient in stock.items()}
    expected, seen = seen, []
    hf_turbo.patch_model(model, **ONLY)
    _, gradients = loss_and_gradients(model, inputs)
    assert len(seen) == len(expected) > 0
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(gradients, stock)


def test_what_an_attention_reads_may_be_saved():
    """As what it is, without what it was made of."""
    seen = []
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    hf_turbo.patch_model(model, **ONLY)
    loss_and_gradients(model, batch())
    file = io.BytesIO()
    torch.save(seen[0].detach(), file)
    plain = file.tell()
    file = io.BytesIO()
    torch.save(seen[0], file)
    assert file.tell() <= plain + 500
    file.seek(0)
    assert torch.equal(torch.load(file), seen[0])


def test_backward_under_autocast():
    """As some scripts have it: what is computed there in float32 stays so."""

    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch()).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model = tiny_model("llama")
    hf_turbo.patch_model(model, **ONLY)
    within = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (within[name] - parameter.grad).norm() <= 0.02 * parameter.grad.norm(), name


def test_a_pass_that_failed_is_let_go():
    """What query's turn has computed for key and value, whose turns do not come."""

    class Saved:
        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor.detach()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError

    model, alive = tiny_model("qwen3"), weakref.WeakSet()
    hf_turbo.patch_model(model, **ONLY)
    model.model.layers[1].self_attn.q_norm.register_forward_pre_hook(fail)
    watched = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
    with contextlib.suppress(torch.OutOfMemoryError), watched:
        model(**batch())
    gc.collect()
    assert alive
    lora.forget_outputs()
    gc.collect()
    assert not alive


def test_changed_in_place_is_no_longer_what_the_norm_gave():
    """A script's pre-hook that scales the attention's input where it lies: the layers must read what is there."""

    def scale(module: nn.Module, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["hidden_states"].mul_(2)

    model, inputs = tiny_model("llama"), batch()
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(scale, with_kwargs=True)
    _, stock = loss_and_gradients(model, inputs)
    stock = {name: gradient.clone() for name, gradient in stock.items()}
    hf_turbo.patch_model(model, **ONLY)
    _, gradients = loss_and_gradients(model, inputs)
    torch.testing.assert_close(gradients, stock)


def test_a_layer_of_a_mixed_dtype_complains_as_in_stock():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj.to(torch.bfloat16)
    hf_turbo.patch_model(model, **ONLY)
    with pytest.raises(RuntimeError, match="dtype"):
        loss_and_gradients(model, batch())


def test_output_hidden_states_generation_and_evaluation_are_as_in_stock():
    model, inputs = tiny_model("llama").eval(), batch(masked=False)
    del inputs["labels"]
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True)
    tokens = model.generate(inputs["input_ids"][:, :5], max_new_tokens=4, do_sample=False)
    hf_turbo.patch_model(model, **ONLY)
    with torch.no_grad():
        ours = model(**inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == len(stock.hidden_states) == 3
    torch.testing.assert_close(ours.hidden_states, stock.hidden_states)
    torch.testing.assert_close(ours.logits, stock.logits)
    assert torch.equal(model.generate(inputs["input_ids"][:, :5], max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj"], "all-linear"])
def test_beside_adapters(targets):
    """Attention with an adapter is lora.py's; the other projections may be plain."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("llama"), config)
    _, stock = loss_and_gradients(model, batch())
    stock = {name: gradient.clone() for name, gradient in stock.items()}
    report = hf_turbo.patch_model(model)
    assert row_of(report).patched == 2
    _, gradients = loss_and_gradients(model, batch())
    torch.testing.assert_close(gradients, stock)


def test_adapters_that_come_later():
    """A layer of ours as the base of an adapter is a plain linear layer still."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    hf_turbo.patch_model(model)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    report = hf_turbo.patch_model(model)
    row = row_of(report, "lora")
    assert (row.found, row.patched) == (14, 14)
    _, gradients = loss_and_gradients(model, batch())
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    hf_turbo.disable()
    torch.testing.assert_close(gradients, loss_and_gradients(model, batch())[1])


def test_unknown_layers_and_norms_stay_stock_with_a_reason():
    model = tiny_model("cohere2")
    row = row_of(hf_turbo.patch_model(model))
    assert (row.found, row.patched, row.reason) == (2, 0, "2 x unknown forward of Cohere2DecoderLayer")
    hf_turbo.disable()
    model = tiny_model("llama")
    model.model.layers[0].post_attention_layernorm = nn.LayerNorm(48)
    model.model.layers[1].forward = model.model.layers[1].forward
    row = row_of(hf_turbo.patch_model(model))
    assert (row.found, row.patched) == (2, 0)
    hf_turbo.disable()
    del model.model.layers[1].forward
    partly = row_of(hf_turbo.patch_model(model))
    assert partly.patched == 0
    assert "another layer of its class stays stock" in partly.reason
    assert "no kernel for a LayerNorm here" in row.reason
    assert "forward replaced on the instance" in row.reason


def test_who_reads_an_attentions_input():
    reads = decoder_layers._reads_by_projections
    for family in ("llama", "qwen3", "gemma3", "phi3", "granite", "mixtral"):
        assert reads(type(tiny_model(family).model.layers[0].self_attn).forward), family

    class Curious(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return self.q_proj(hidden_states) + hidden_states.mean()

    assert not reads(Curious.forward)


def as_buffers(model: nn.Module, part: str, name: str) -> None:
    """A parameter of some modules becomes a buffer of the same name, as scripts freeze weights."""
    for path, module in model.named_modules():
        if part in path and name in module._parameters:
            value = getattr(module, name).data
            delattr(module, name)
            module.register_buffer(name, value)


@pytest.mark.parametrize(("part", "name"), [("norm", "weight"), ("q_proj", "bias")])
def test_parameters_that_are_buffers(part, name):
    model = tiny_model("llama-bias")
    as_buffers(model, part, name)
    loss, stock = loss_and_gradients(model, batch())
    hf_turbo.patch_model(model, **ONLY)
    ours, gradients = loss_and_gradients(model, batch())
    torch.testing.assert_close((ours, gradients), (loss, stock))


@pytest.mark.parametrize("role", ["norms", "layers"])
def test_a_norm_that_a_script_replaces_between_two_sessions(role, monkeypatch):
    """The class is the same one then: what was known of it is not."""
    options = ONLY if role == "layers" else switched_off("norms")
    hf_turbo.patch_model(tiny_model("llama"), **options)
    hf_turbo.disable()
    forward = modeling_llama.LlamaRMSNorm.forward
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: 1.5 * forward(self, x))
    model = tiny_model("llama")
    loss, stock = loss_and_gradients(model, batch())
    hf_turbo.patch_model(model, **options)
    ours, gradients = loss_and_gradients(model, batch())
    torch.testing.assert_close((ours, gradients), (loss, stock))


def test_an_attention_that_a_script_replaces_reads_what_it_would(monkeypatch):
    """Under autocast, where the projections of stock's are given what they would cast to."""
    cls, dtypes = modeling_llama.LlamaAttention, []
    forward = cls.forward

    def attention(self, hidden_states, *args, **kwargs):
        dtypes.append(hidden_states.dtype)
        return forward(self, hidden_states, *args, **kwargs)

    for replaced in (forward, attention, functools.wraps(forward)(attention)):
        monkeypatch.setattr(cls, "forward", replaced)
        model = tiny_model("llama")
        hf_turbo.patch_model(model, **ONLY)
        run(model, batch(), autocast=True)
        hf_turbo.disable()
    assert dtypes == [torch.float32] * 4


@pytest.mark.xdist_group("parity")
@pytest.mark.parametrize("frozen", ["norm", "q_proj", "k_proj", "mlp", "self_attn", "layers.0"])
def test_frozen_parts(frozen):
    """No gradient for what is frozen; for the rest as near to fp64 as stock."""

    def pair(seed: int) -> tuple[Errors, Errors]:
        made = draw("llama-bias", seed)
        model = copy.deepcopy(made.models["fp32"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        hf_turbo.patch_model(model, **ONLY)
        results = run(model, made.inputs)
        hf_turbo.disable()
        assert results.keys() - {"loss"} == {name for name, p in model.named_parameters() if p.requires_grad}
        return squared_errors(results, made.reference), made.stock["fp32"]

    hold_to_rule(pair)


def test_a_norm_without_a_gradient(monkeypatch):
    """Frozen up to the MLP of the last layer: nothing else keeps what the norm was given, so its output may be kept."""
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    sources, op = [], linears.linears
    monkeypatch.setattr(linears, "linears", lambda *args, **kw: sources.append(args[3]) or op(*args, **kw))
    _, stock = loss_and_gradients(model, batch())
    stock = {name: gradient.clone() for name, gradient in stock.items()}
    hf_turbo.patch_model(model)
    _, gradients = loss_and_gradients(model, batch())
    torch.testing.assert_close(gradients, stock)
    assert sources == [None]


def test_asked_for_by_name():
    with pytest.raises(RuntimeError, match="layers=True was asked for"):
        hf_turbo.patch_model(tiny_model("cohere2"), layers=True)


def test_norms_that_are_understood():
    assert norms.understood(tiny_model("gemma").model.norm) == (1e-6, 1.0, False)
    assert norms.understood(nn.LayerNorm(4)) is None
    assert norms.understood(tiny_model("cohere2").model.norm) is None
    frozen = tiny_model("gemma").model.norm
    weight = frozen.weight.data
    del frozen.weight
    frozen.register_buffer("weight", weight)
    assert norms.understood(frozen) is None


def test_backward_through_a_layer_twice():
    model = tiny_model("llama")
    hf_turbo.patch_model(model, **ONLY)
    loss = model(**batch()).loss
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert kernel.Source._fields == ("h", "weight", "norm", "dtype")
