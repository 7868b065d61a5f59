"""The patch mechanism, and each trap of patching modules that it has to avoid."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import types

import pytest
import torch
from hf_turbo.patches import engine
from hf_turbo.patches.engine import AttributePatch, ClassSwap, same_name_subclass
from torch import nn
from torch.autograd import forward_ad
from transformers.models.llama import modeling_llama

import hf_turbo
from tests.models import batch, loss_and_gradients, switched_off, tiny_model


class Doubler(nn.Module):
    """Stock forward of the tests."""

    def forward(self, x: torch.Tensor, *, offset: int = 0) -> torch.Tensor:
        """Doubles."""
        return 2 * x + offset


def make_triple(stock):
    def forward(self, *args, **kwargs):
        return 3 * args[0] if engine.is_live() else stock(self, *args, **kwargs)

    return forward


@pytest.fixture
def live():
    engine.switch(True)
    yield
    engine.switch(False)


def swapped(module: nn.Module) -> ClassSwap:
    patch = ClassSwap("test", module, same_name_subclass(type(module), make_triple))
    patch.apply()
    return patch


def test_swap_keeps_the_names_and_the_signature(live):
    module = Doubler()
    swapped(module)
    cls = type(module)
    assert cls is not Doubler
    assert issubclass(cls, Doubler)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (
        Doubler.__name__,
        Doubler.__qualname__,
        Doubler.__module__,
    )
    assert str(cls) == str(Doubler)
    assert inspect.signature(module.forward) == inspect.signature(Doubler().forward)
    assert module.forward.__doc__ == "Doubles."


def test_swap_sets_no_instance_forward_and_no_wrapped(live):
    """accelerate unwinds `__wrapped__`; an instance forward turns checkpointing of decoder layers off."""
    module = Doubler()
    swapped(module)
    assert "forward" not in module.__dict__
    assert not hasattr(type(module).forward, "__wrapped__")


def test_the_switch_turns_a_captured_forward_off(live):
    module = Doubler()
    swapped(module)
    captured = module.forward
    assert captured(1) == 3
    engine.switch(False)
    assert captured(1) == 2
    engine.switch(True)


def test_revert_restores_the_class_by_identity(live):
    module = Doubler()
    patch = swapped(module)
    assert patch.revert()
    assert type(module) is Doubler


def test_revert_leaves_a_class_that_changed_since(live):
    """As FSDP, which makes a class out of the one it finds."""
    module = Doubler()
    patch = swapped(module)
    wrapped = type("FSDPDoubler", (type(module),), {})
    module.__class__ = wrapped
    assert not patch.revert()
    assert type(module) is wrapped
    engine.switch(False)
    assert module(1) == 2
    engine.switch(True)


def make_quadruple(stock):
    def forward(self, *args, **kwargs):
        return 4 * args[0] if engine.is_live() else stock(self, *args, **kwargs)

    return forward


NAMED = property(lambda self: "named")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("made", ["before", "after"])
def test_swaps_of_one_module_stack_and_are_reverted_in_any_order(live, made, first):
    """Two roles patch one layer: its forward, and an attribute that checkpointing asks for."""
    module = Doubler()

    def forward_swap():
        return ClassSwap("forward", module, same_name_subclass(engine.stock_class(module), make_triple))

    def property_swap():
        return ClassSwap("property", module, same_name_subclass(engine.stock_class(module), name=NAMED))

    patches = [forward_swap(), property_swap()] if made == "before" else []
    if not patches:
        patches.append(forward_swap())
        patches[0].apply()
        patches.append(property_swap())
    else:
        patches[0].apply()
    patches[1].apply()
    assert (module(1), module.name) == (3, "named")
    assert engine.stock_class(module) is Doubler
    assert engine.has_forward(module, make_triple)
    assert not engine.has_forward(module, make_quadruple)
    assert type(copy.deepcopy(module)) is type(pickle.loads(pickle.dumps(module))) is Doubler
    assert patches[first].revert()
    assert module(1) == (2 if first == 0 else 3)
    assert hasattr(module, "name") == (first == 0)
    assert not patches[first].revert()
    assert patches[1 - first].revert()
    assert type(module) is Doubler


def test_two_forwards_stack(live):
    """The outer one falls back to stock code, not to the inner one."""
    module = Doubler()
    inner, outer = swapped(module), ClassSwap("outer", module, same_name_subclass(Doubler, make_quadruple))
    outer.apply()
    assert module(1) == 4
    assert inner.revert()
    assert module(1) == 4
    engine.switch(False)
    assert module(1) == 2
    engine.switch(True)
    assert outer.revert()
    assert type(module) is Doubler


def test_replacements_fall_back_to_the_forward_that_the_class_has(live, monkeypatch):
    """A script replaces it between two sessions."""
    assert swapped(Doubler()).revert()
    monkeypatch.setattr(Doubler, "forward", lambda self, x: 5 * x)
    module = Doubler()
    patch = swapped(module)
    engine.switch(False)
    assert module(1) == 5
    engine.switch(True)
    assert patch.revert()
    assert type(module) is Doubler


def test_a_patch_keeps_no_model_alive(live):
    import gc
    import weakref

    module = Doubler()
    patch, reference = swapped(module), weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None
    assert patch.revert()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_of_the_stock_class(live, duplicate):
    module = Doubler()
    swapped(module)
    assert type(duplicate(module)) is Doubler


def test_torch_save_of_a_patched_model_needs_no_hf_turbo():
    model = tiny_model("llama")
    hf_turbo.patch_model(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"hf_turbo" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is modeling_llama.LlamaForCausalLM


def test_attribute_patch_restores_by_identity_and_only_its_own():
    owner = types.SimpleNamespace(value=[1])
    original, replacement = owner.value, [2]
    patch = AttributePatch("test", owner, "value", replacement)
    patch.apply()
    assert owner.value is replacement
    assert patch.revert()
    assert owner.value is original
    patch.apply()
    owner.value = other = [3]
    assert not patch.revert()
    assert owner.value is other


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_stays_on(use_reentrant):
    """An instance forward on a decoder layer would silently turn it off in transformers 5.23."""
    model = tiny_model("llama")
    enable = getattr(model, "gradient_checkpointing_enable", None) or model.activation_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    hf_turbo.patch_model(model)
    loss_and_gradients(model, batch())
    assert len(calls) == 2 * len(model.model.layers), "each layer runs again in backward"


def test_checkpointed_gradients_are_those_without_checkpointing():
    """Recompute runs later, on other threads: nothing a replacement needs may travel outside its inputs."""
    model = tiny_model("qwen3")
    hf_turbo.patch_model(model)
    _, plain = loss_and_gradients(model, batch())
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    (getattr(model, "gradient_checkpointing_enable", None) or model.activation_checkpointing_enable)()
    _, checkpointed = loss_and_gradients(model, batch())
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_hidden_states_and_attentions_are_still_recorded():
    """transformers keys its recorders by the class's name; a renamed class loses them."""
    model = tiny_model("llama", attn_implementation="eager")
    stock = model(**batch(), output_hidden_states=True, output_attentions=True)
    hf_turbo.patch_model(model)
    turbo = model(**batch(), output_hidden_states=True, output_attentions=True)
    assert len(turbo.hidden_states) == len(stock.hidden_states) == 3
    assert len(turbo.attentions) == len(stock.attentions) == 2
    torch.testing.assert_close(turbo.hidden_states[-1], stock.hidden_states[-1])


def test_fsdp_wrap_policies_still_find_the_layers():
    """accelerate looks for a class of that name, finds the first layer's, and wraps the instances of it."""
    from accelerate.utils.dataclasses import get_module_class_from_name

    model = tiny_model("llama")
    before = get_module_class_from_name(model, "LlamaDecoderLayer")
    hf_turbo.patch_model(model)
    after = get_module_class_from_name(model, "LlamaDecoderLayer")
    assert issubclass(after, before)
    assert all(isinstance(layer, after) for layer in model.model.layers)


def by_torch_func(model):
    def loss(parameters):
        return torch.func.functional_call(model, parameters, (), batch()).loss

    return torch.func.grad(loss)({name: parameter.detach() for name, parameter in model.named_parameters()})


def forward_mode(model):
    embeds = model.get_input_embeddings()(batch()["input_ids"]).detach()
    with forward_ad.dual_level():
        logits = model(inputs_embeds=forward_ad.make_dual(embeds, torch.ones_like(embeds))).logits
        return forward_ad.unpack_dual(logits).tangent


@pytest.mark.parametrize("derivative", [by_torch_func, forward_mode])
@pytest.mark.parametrize("family", ["llama-bias", "phi3"])
def test_other_ways_to_differentiate_are_stock(family, derivative):
    """Autograd functions of ours are for backward alone."""
    model = tiny_model(family, attn_implementation="eager")
    expected = derivative(model)
    hf_turbo.patch_model(model)
    torch.testing.assert_close(derivative(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("role", ["norms", "mlp", "layers", "rope", "loss", "embeddings"])
def test_second_derivatives_raise(role):
    """A penalty on gradients would lose its terms silently; the gradients themselves are those without a graph."""
    model = tiny_model("llama-bias", attn_implementation="eager")
    hf_turbo.patch_model(model, **switched_off(role))
    _, expected = loss_and_gradients(model, batch())
    gradients = torch.autograd.grad(model(**batch()).loss, list(model.parameters()), create_graph=True)
    torch.testing.assert_close(dict(zip(expected, gradients, strict=True)), expected)
    with pytest.raises(RuntimeError, match="second derivatives"):
        sum(gradient.square().sum() for gradient in gradients).backward()


def test_unknown_forward_stays_stock_with_a_reason():
    class LlamaRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.5

    model = tiny_model("llama")
    model.model.norm = LlamaRMSNorm(model.config.hidden_size)
    report = hf_turbo.patch_model(model)
    row = next(row for row in report.rows if row.role == "norms")
    assert row.patched == row.found - 1
    assert row.reason == "unknown forward of LlamaRMSNorm"
    assert type(model.model.norm) is LlamaRMSNorm


def test_modules_with_an_instance_forward_are_left_alone():
    model = tiny_model("llama")
    norm = model.model.norm
    norm.forward = types.MethodType(lambda self, x: x, norm)
    report = hf_turbo.patch_model(model)
    row = next(row for row in report.rows if row.role == "norms")
    assert row.patched == row.found - 1
    assert "forward replaced on the instance" in row.reason


def test_accelerate_device_hooks_are_left_alone():
    """`_old_forward` is a bound method of the stock class: a swap under it would never be called."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny_model("llama")
    add_hook_to_module(model.model.layers[0].mlp, ModelHook())
    report = hf_turbo.patch_model(model)
    row = next(row for row in report.rows if row.role == "mlp")
    assert (row.patched, row.found) == (1, 2)
    assert row.reason == "accelerate device hooks"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: setattr(m, "_use_kernels", True), "use_kernels"),
        (lambda m: setattr(m.model.norm, "forward", _forward_from("liger_kernel.ops")), "Liger-Kernel"),
        (lambda m: setattr(m.model.norm, "forward", _forward_from("unsloth.models.llama")), "Unsloth"),
    ],
)
def test_yields_to_rivals(spoil, reason):
    model = tiny_model("llama")
    spoil(model)
    report = hf_turbo.patch_model(model)
    assert report.patched == 0
    assert all(reason in row.reason for row in report.rows)


def _forward_from(module: str):
    def forward(x):
        return x

    forward.__module__ = module
    return forward


def test_kernelized_rotary_function_is_left_alone(monkeypatch):
    """With the `kernels` package apply_rotary_pos_emb is a module instance, not a function."""
    module = nn.Identity()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", module)
    report = hf_turbo.patch_model(tiny_model("llama"))
    row = next(row for row in report.rows if row.role == "rope")
    assert row.patched == 0
    assert modeling_llama.apply_rotary_pos_emb is module


def test_torch_compile_sees_a_patched_norm():
    norm = modeling_llama.LlamaRMSNorm(32)
    x = torch.randn(4, 32, requires_grad=True)
    expected = norm(x)
    hf_turbo.patch_model(norm)
    torch._dynamo.reset()
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert x.grad is not None
