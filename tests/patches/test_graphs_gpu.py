"""CUDA graphs of passes: the numbers of what they replace, bounded memory, and a way back where recording fails."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_turbo.patches import graphs, padding

import hf_turbo
from tests.models import VOCABULARY, reference64, switch_on, tiny_model
from tests.patches.test_padding import error_of, state_of

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    yield
    hf_turbo.disable()


def adapted(family: str, dtype: torch.dtype, checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family).to("cuda", dtype)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).to(dtype)
    if checkpointing:
        inner = model.get_base_model()
        inner.enable_input_require_grads()
        switch_on(inner)
    return model.train()


def rows(seed: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """Eight of 20 to 60 tokens, padded, or all of one length."""
    draw = random.Random(seed)
    lengths = [length or draw.randint(20, 60) for _ in range(8)]
    ids = torch.randint(3, VOCABULARY, (8, length or 60), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    labels = torch.where(mask == 1, ids, -100)
    return {"input_ids": (ids * mask).cuda(), "attention_mask": mask.cuda(), "labels": labels.cuda()}


def step(model: Any, batch: dict[str, torch.Tensor], announced: bool) -> dict[str, torch.Tensor]:
    if announced:
        padding.batches_fetched(model, [batch], None)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def record(model: Any) -> Any:
    """All of hf_turbo, and recordings, which a trainer would have asked for."""
    hf_turbo.patch_model(model, padding=True, report=False)
    backbone = model.get_base_model().model
    assert graphs.conflict(backbone, "cuda") is None
    state_of(model).graphs = graphs.Graphs(backbone)
    return state_of(model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_as_exact_as_stock(family, dtype, checkpointing):
    """Over steps of different lengths, while the weights change."""
    batches = [rows(seed) for seed in range(10)]
    model = adapted(family, dtype, False)
    exact = []
    for batch in batches:
        loss, gradients = reference64(model, batch)
        exact.append({"loss": loss, **gradients})
    stock = [step(model, batch, False) for batch in batches]
    model = adapted(family, dtype, checkpointing)
    state = record(model)
    ours = [step(model, batch, True) for batch in batches]
    assert state.graphs.reason == ""
    assert state.graphs.replays >= 5
    assert error_of(ours, exact) <= 1.1 * error_of(stock, exact)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_equal_lengths_with_others_between(family):
    """What attention reads of a recording's documents is the recording's: others that came since do not matter."""
    model = adapted(family, torch.bfloat16, False)
    state = record(model)
    for seed in range(4):
        step(model, rows(seed, 64), True)
    replays = state.graphs.replays
    assert replays
    batches = [rows(seed, 64) for seed in range(10, 16)]
    replayed = []
    for i, batch in enumerate(batches):
        for length in range(72 + 24 * i, 72 + 24 * (i + 1), 8):
            step(model, rows(0, length), True)
        replayed.append(step(model, batch, True))
    assert state.graphs.replays >= replays + len(batches)
    hf_turbo.disable()
    model = adapted(family, torch.bfloat16, False)
    exact = []
    for batch in batches:
        loss, gradients = reference64(model, batch)
        exact.append({"loss": loss, **gradients})
    stock = [step(model, batch, False) for batch in batches]
    assert error_of(replayed, exact) <= 1.1 * error_of(stock, exact)


def test_weights_that_a_step_has_changed():
    """A recording reads the weights of now."""
    model = adapted("llama", torch.bfloat16, True)
    state = record(model)
    batch = rows(0)
    for _ in range(4):
        before = step(model, batch, True)
    assert state.graphs.replays >= 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    replayed = step(model, batch, True)
    state.graphs = None
    computed = step(model, batch, True)
    assert not torch.equal(before["loss"], replayed["loss"])
    for name, value in computed.items():
        torch.testing.assert_close(replayed[name], value, rtol=2e-2, atol=2e-2 * float(value.abs().max()))


def test_memory_comes_back():
    model = adapted("llama", torch.bfloat16, False)
    state = record(model)
    for seed in range(6):
        step(model, rows(seed), True)
    assert state.graphs.replays
    padding.end_training([model])
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    state.graphs = graphs.Graphs(model.get_base_model().model)
    for seed in range(6):
        step(model, rows(seed), True)
    assert state.graphs.replays
    padding.end_training([model])
    model.zero_grad()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_what_waits_for_the_device_is_computed():
    model = adapted("llama", torch.bfloat16, False)
    layer = model.get_base_model().model.layers[1].mlp
    stock = type(layer).forward

    class Waiting(type(layer)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return stock(self, x) * float(torch.ones((), device=x.device))

    layer.__class__ = Waiting
    state, stream = record(model), torch.cuda.current_stream()
    batch = rows(0)
    results = [step(model, batch, True) for _ in range(4)]
    assert state.graphs.reason == "it waits for the device"
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    assert state.graphs.replays == 0
    for each in results[1:]:
        torch.testing.assert_close(each["loss"], results[0]["loss"])
