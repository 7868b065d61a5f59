"""Padding-free and shared passes on a GPU, where attention by documents is one kernel: the numbers of stock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_turbo.patches import padding

import hf_turbo
from tests.models import reference64, switch_on, switched_off, tiny_model
from tests.patches.test_padding import error_of, packed, padded, relabelled, results, state_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    yield
    hf_turbo.disable()


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: each.cuda() if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}


def drawn(model: Any, inputs: dict[str, Any], count: int) -> tuple[list[Any], list[Any]]:
    """Batches with other labels each, and the exact results for them."""
    batches = [on_gpu({**inputs, "labels": relabelled(inputs["labels"], seed)}) for seed in range(count)]
    exact = []
    for each in batches:
        loss, gradients = reference64(model, each)
        exact.append({"loss": loss, **gradients})
    return batches, exact


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [padded, lambda: padded(left=True), packed])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_as_exact_as_stock(family, dtype, make, checkpointing):
    model = tiny_model(family).to("cuda", dtype)
    batches, exact = drawn(model, make(), 8)
    if checkpointing:
        switch_on(model)
    stock = [results(model, each) for each in batches]
    hf_turbo.patch_model(model, **{**switched_off("padding"), "padding": True})
    ours = [results(model, each) for each in batches]
    assert state_of(model).tried
    assert error_of(ours, exact) <= 1.1 * error_of(stock, exact) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shared_passes(dtype):
    """Four micro-batches of a step in one pass: the sum of their gradients."""
    model = tiny_model("llama").to("cuda", dtype)
    batches, exact = drawn(model, padded(), 4)
    batches = [{**each, "input_ids": each["input_ids"].clone()} for each in batches]

    def summed(each: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        return [{name: sum(one[name].double() for one in each) for name in each[0]}]

    def gradients() -> list[dict[str, torch.Tensor]]:
        model.zero_grad()
        losses = []
        for each in batches:
            loss = model(**each).loss
            loss.backward()
            losses.append(loss.detach())
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return [{"loss": sum(losses), **found}]

    stock = gradients()
    hf_turbo.patch_model(model, **{**switched_off("padding"), "padding": True})
    padding.batches_fetched(model, batches, lambda tokens, worst, kept, may_share: [len(tokens)])
    ours = gradients()
    state = state_of(model)
    assert (state.passes, state.micro_batches) == (1, 4)
    assert state.kept_per_token > 0
    assert error_of(ours, summed(exact)) <= 1.1 * error_of(stock, summed(exact)) + torch.finfo(torch.float32).eps


def test_nothing_waits_for_the_device_within_a_step():
    """Lengths are read when the batches are fetched; from there to the end of backward the host runs ahead."""
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    backbone = model.model
    batch = on_gpu({name: each for name, each in padded().items() if name != "labels"})
    hf_turbo.patch_model(model, **{**switched_off("padding"), "padding": True})
    for step in range(2):
        padding.batches_fetched(model, [batch], None)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            backbone(**batch).last_hidden_state.square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert state_of(model).passes == 2


def test_a_loss_on_padding_is_noticed_a_step_later():
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    batch = on_gpu(padded())
    batch["labels"] = torch.where(batch["labels"] == -100, 7, batch["labels"])
    hf_turbo.patch_model(model, **{**switched_off("padding"), "padding": True})
    results(model, batch)
    with pytest.warns(RuntimeWarning, match="depends on the hidden states of padding"):
        results(model, batch)
    assert state_of(model).reason
