"""The causal-LM loss of plain loops: what runs fused, what stays stock, and logits on demand."""

from __future__ import annotations

import pytest
import torch
from hf_turbo.patches import head as head_patches
from hf_turbo.patches import trainer as trainer_patches
from hf_turbo.patches.logits import LazyLogits
from torch import nn
from transformers import Trainer

import hf_turbo
from tests.models import batch, loss_and_gradients, tiny_model


@pytest.fixture
def fused_calls(monkeypatch):
    """Counts calls of the fused op."""
    calls, op = [], head_patches.linear_cross_entropy
    monkeypatch.setattr(head_patches, "linear_cross_entropy", lambda *a, **k: calls.append(1) or op(*a, **k))
    return calls


def loss_row(report):
    return next(row for row in report.rows if row.role == "loss")


def test_training_step_is_fused_and_right(fused_calls):
    model = tiny_model("llama")
    stock_loss, stock = loss_and_gradients(model, batch())
    stock = {name: gradient.clone() for name, gradient in stock.items()}
    assert loss_row(hf_turbo.patch_model(model)).patched == 1
    loss, gradients = loss_and_gradients(model, batch())
    assert fused_calls == [1]
    torch.testing.assert_close(loss, stock_loss)
    for name, gradient in stock.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, b: m.eval()(**b),
        lambda m, b: torch.no_grad()(m)(**b),
        lambda m, b: m(input_ids=b["input_ids"]),
        lambda m, b: m(input_ids=b["input_ids"], logits_to_keep=3),
        lambda m, b: m(b["input_ids"], b["attention_mask"], labels=b["labels"]),
        lambda m, b: m(**b, return_dict=False),
    ],
    ids=["eval", "no-grad", "no-labels", "logits-to-keep", "positional", "tuple"],
)
def test_everything_else_is_stock(fused_calls, call):
    model, inputs = tiny_model("llama"), batch()
    stock = call(model.train(), inputs)
    hf_turbo.patch_model(model, norms=False, mlp=False, rope=False)
    turbo = call(model.train(), inputs)
    assert fused_calls == []
    for a, b in zip(
        stock[:1] if isinstance(stock, tuple) else [stock.logits],
        turbo[:1] if isinstance(turbo, tuple) else [turbo.logits],
        strict=True,
    ):
        assert torch.equal(a, b)
        assert type(b) is torch.Tensor


def test_labels_with_logits_to_keep_fail_as_stock():
    model = tiny_model("llama")
    hf_turbo.patch_model(model)
    with pytest.raises(ValueError, match="batch_size"):
        model(**batch(), logits_to_keep=3)


def test_a_custom_loss_function_stays_stock(fused_calls):
    model = tiny_model("llama")
    model.loss_function = lambda logits, labels, vocab_size, **kw: logits.float().pow(2).mean()
    expected = model(**batch()).loss
    hf_turbo.patch_model(model, norms=False, mlp=False, rope=False)
    assert torch.equal(model(**batch()).loss, expected)
    assert fused_calls == []


def test_router_loss_stays_stock(fused_calls):
    model = tiny_model("mixtral")
    hf_turbo.patch_model(model)
    assert model(**batch(), output_router_logits=True).aux_loss is not None
    assert fused_calls == []
    model(**batch())
    assert fused_calls == [1]


def test_num_items_shift_labels_and_ignore_index():
    model, inputs = tiny_model("llama"), batch()
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    variants = [
        {**inputs, "num_items_in_batch": torch.tensor(77)},
        {**inputs, "num_items_in_batch": 77},
        {**inputs, "num_items_in_batch": torch.tensor(77.0)},
        {**inputs, "shift_labels": shifted},
    ]
    stock = [model(**variant).loss for variant in variants]
    hf_turbo.patch_model(model)
    for expected, variant in zip(stock, variants, strict=True):
        torch.testing.assert_close(model(**variant).loss, expected)


def test_logits_on_demand():
    model, inputs = tiny_model("gemma2"), batch()
    stock = model(**inputs)
    hf_turbo.patch_model(model)
    outputs = model(**inputs)
    logits = outputs.logits
    assert type(logits) is LazyLogits
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == stock.logits.shape
    assert logits.dtype == stock.logits.dtype
    assert logits._logits is None, "shape and dtype cost nothing"
    assert logits.float()._logits is None
    torch.testing.assert_close(logits.float() + 0, stock.logits)
    torch.testing.assert_close(logits[:, -1].argmax(-1), stock.logits[:, -1].argmax(-1))
    torch.testing.assert_close(torch.cat([logits, logits]), torch.cat([stock.logits, stock.logits]))
    assert "LazyLogits" not in repr(logits)


def test_gradients_flow_through_logits_that_are_read():
    model, inputs = tiny_model("llama"), batch()

    def extra_loss():
        model.zero_grad()
        outputs = model(**inputs)
        (outputs.loss + outputs.logits.float().pow(2).mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    stock = extra_loss()
    hf_turbo.patch_model(model)
    for name, gradient in extra_loss().items():
        torch.testing.assert_close(gradient, stock[name], msg=name)


def test_heads_that_stay_stock_say_why():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", "lm_head"], r=4))
    saved = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=4))
    for model, reason in ((adapted, "peft.Linear"), (saved, "modules_to_save")):
        row = loss_row(hf_turbo.patch_model(model))
        assert row.patched == 0
        assert reason in row.reason
        hf_turbo.disable()


def test_adapter_on_the_head_trains_as_stock():
    """A fused loss that reads lm_head.weight would drop the adapter silently."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    expected, stock = loss_and_gradients(model, batch())
    stock = {name: gradient.clone() for name, gradient in stock.items()}
    hf_turbo.patch_model(model)
    loss, gradients = loss_and_gradients(model, batch())
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == stock.keys()
    for name, gradient in stock.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_peft_model_with_a_plain_head_is_fused(fused_calls):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=4))
    expected = model(**batch()).loss
    assert loss_row(hf_turbo.patch_model(model)).patched == 1
    torch.testing.assert_close(model(**batch()).loss, expected)
    assert fused_calls == [1]


def test_tied_embeddings_get_both_gradients():
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _, stock = loss_and_gradients(model, batch())
    stock = {name: gradient.clone() for name, gradient in stock.items()}
    hf_turbo.patch_model(model)
    _, gradients = loss_and_gradients(model, batch())
    torch.testing.assert_close(gradients["model.embed_tokens.weight"], stock["model.embed_tokens.weight"])


def test_resized_head_stays_stock(fused_calls):
    """Stock reshapes logits by the config's vocabulary size; a head of another size is not ours to interpret."""
    model = tiny_model("llama")
    hf_turbo.patch_model(model)
    model.config.vocab_size += 1
    with pytest.raises(RuntimeError):
        model(**batch())
    assert fused_calls == []


def test_label_outside_the_vocabulary_is_a_clear_error():
    model, inputs = tiny_model("llama"), batch()
    inputs["labels"][0, 5] = 4000
    hf_turbo.patch_model(model)
    with pytest.raises(IndexError, match="outside the vocabulary"):
        model(**inputs)


def test_all_labels_masked_is_as_stock():
    model, inputs = tiny_model("llama"), batch()
    inputs["labels"].fill_(-100)
    for num_items in (None, torch.tensor(0), torch.tensor(9)):
        hf_turbo.disable()
        stock, stock_gradients = loss_and_gradients(model, {**inputs, "num_items_in_batch": num_items})
        stock_gradients = {name: gradient.clone() for name, gradient in stock_gradients.items()}
        hf_turbo.patch_model(model)
        loss, gradients = loss_and_gradients(model, {**inputs, "num_items_in_batch": num_items})
        torch.testing.assert_close(loss, stock, equal_nan=True)
        for name, gradient in stock_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, equal_nan=True, msg=name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_activations_behave_as_stock(poison):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 2] = poison
    stock, stock_gradients = loss_and_gradients(model, batch())
    stock_gradients = {name: gradient.clone() for name, gradient in stock_gradients.items()}
    hf_turbo.patch_model(model)
    loss, gradients = loss_and_gradients(model, batch())
    assert loss.isnan() == stock.isnan()
    for name, gradient in stock_gradients.items():
        assert torch.equal(gradients[name].isnan(), gradient.isnan()), name


def test_logits_read_after_the_step_are_an_error_not_other_numbers():
    model = tiny_model("llama")
    hf_turbo.patch_model(model)
    outputs = model(**batch())
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="before optimizer"):
        outputs.logits.argmax(-1)


def test_a_first_look_without_gradients_does_not_lose_the_graph():
    model = tiny_model("llama")
    hf_turbo.patch_model(model)
    logits = model(**batch()).logits
    with torch.no_grad():
        logits.argmax(-1)
    assert (logits * 1).requires_grad


def test_logits_keep_the_autocast_of_their_forward():
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch()).logits
        hf_turbo.patch_model(model, norms=False, mlp=False, rope=False)
        logits = model(**batch()).logits
    assert logits.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(logits + 0, expected)


def test_a_hook_on_the_head_sees_logits(fused_calls):
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    expected = model(**batch()).loss
    hf_turbo.patch_model(model, norms=False, mlp=False, rope=False)
    assert torch.equal(model(**batch()).loss, expected)
    assert fused_calls == []


def test_flattened_labels_stay_stock(fused_calls):
    model, inputs = tiny_model("llama"), batch(rows=1)
    inputs["labels"] = inputs["labels"].flatten()
    expected = model(**inputs).loss
    hf_turbo.patch_model(model, norms=False, mlp=False, rope=False)
    assert torch.equal(model(**inputs).loss, expected)
    assert fused_calls == []


def test_ddp_that_looks_for_unused_parameters_does_not_compute_logits(monkeypatch, tmp_path):
    """The Trainer's default under DDP; DDP then clones every output that has no graph of its own."""
    computed, stock = [], LazyLogits.materialize
    monkeypatch.setattr(LazyLogits, "materialize", lambda self: computed.append(1) or stock(self))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        hf_turbo.patch_model(model)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        wrapped(**batch()).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert computed == []


def test_a_compute_loss_set_on_the_trainer_stays_stock():
    trainer = object.__new__(Trainer)
    trainer.compute_loss = lambda model, inputs: model(**inputs).logits.mean()
    against = trainer_patches.loss_conflict(trainer)
    assert against is not None
    assert against.endswith("may read the logits")
