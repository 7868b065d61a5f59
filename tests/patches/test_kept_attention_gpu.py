"""Attention kept by layers that are recomputed, on a GPU: the tensors that backward gets, the memory, and graphs."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_turbo.kernels.varlen_attention import varlen_attention
from hf_turbo.patches import graphs, kept_attention, kept_layers, recomputation
from hf_turbo.patches.kept_layers import Kept
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hf_turbo
from tests.models import switch_on, switched_off, tiny_model
from tests.patches.test_graphs_gpu import adapted, rows
from tests.patches.test_graphs_gpu import step as trained_step
from tests.patches.test_padding import padded, state_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS = 3
ALL = tuple(range(LAYERS))
HEADS, GROUPS, WIDTH = 8, 2, 64


def dense(gqa: bool, keeper: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if not gqa:
        k, v = (each.repeat_interleave(HEADS // GROUPS, 1) for each in (k, v))
    call = keeper.through(512) if keeper else lambda operator, *args, **kwargs: operator(*args, **kwargs)
    output = call(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=gqa)
    return output.transpose(1, 2).flatten(2)


def by_documents(lengths: list[int], keeper: Any, q: Any, k: Any, v: Any, **options: Any) -> torch.Tensor:
    q, k, v = (each.transpose(1, 2).flatten(0, 1).transpose(0, 1) for each in (q, k, v))
    through = keeper and keeper.through(max(lengths))
    return varlen_attention(q, k, v, lengths, through=through, **options).view(2, 512, -1)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "cudnn": (functools.partial(dense, False), SDPBackend.CUDNN_ATTENTION, {}),
    "flash": (functools.partial(dense, False), SDPBackend.FLASH_ATTENTION, {}),
    "efficient": (functools.partial(dense, False), SDPBackend.EFFICIENT_ATTENTION, {}),
    "by torch's choice": (functools.partial(dense, True), None, {}),
    "documents": (functools.partial(by_documents, [400, 24, 0, 600]), None, {}),
    "documents, a window": (functools.partial(by_documents, [400, 24, 600]), None, {"window": 50}),
    "documents of one length": (functools.partial(by_documents, [256] * 4), None, {}),
    "capped": (functools.partial(by_documents, [400, 24, 600]), None, {"softcap": 5.0}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_tensors_for_backward(case, dtype):
    """Those of a recomputation that hands out what was kept are those of one that runs attention again."""
    attend, backend, options = CASES[case]
    generator = torch.Generator("cuda").manual_seed(0)
    draw = functools.partial(torch.randn, device="cuda", generator=generator)
    heads = HEADS + 2 * GROUPS
    weight = (0.05 * draw(256, heads * WIDTH)).to(dtype).requires_grad_()
    back = (0.05 * draw(HEADS * WIDTH, 256)).to(dtype).requires_grad_()
    x = draw(2, 512, 256).to(dtype).requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (x @ weight).unflatten(-1, (heads, WIDTH)).transpose(1, 2).split((HEADS, GROUPS, GROUPS), 1)
        return (attend(kept_attention.current(), q, k, v, **options) @ back).tanh()

    found: list[list[torch.Tensor]] = []
    for keeps in (None, False, True):
        calls = None if keeps is None else kept_attention.Calls(keeps)
        with sdpa_kernel(backend) if backend else torch.enable_grad():
            y = recomputation.recompute_in_backward(
                SimpleNamespace(keywords={}), run, (x,), x.device, watch=found.append, calls=calls
            )
            if keeps:
                count = sum(call is not None for call in calls._calls)
                assert count == 1, f"{calls._calls} of {y.grad_fn}"
                size = x.shape[:2].numel() * HEADS * WIDTH * 2
                assert size <= calls.bytes <= 1.1 * size
            y.sum().backward()
            assert not keeps or calls._calls == [None]
    stock, measured, ours = found
    assert len(stock) == len(measured) == len(ours) >= 6
    for one, *others in zip(stock, measured, ours, strict=True):
        for other in others:
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            # Bits, and so NaN too; what was never written (the state of no random numbers) may be anything.
            assert one.numel() <= 2 or torch.equal(one, other)


def llama(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    with torch.device("cuda"):
        return switch_on(tiny_model("llama", dtype, **{**sizes, **heads, **changes}))


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each.cuda() for name, each in inputs.items()}


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The loss, and the bytes that wait for backward: those asked for, since blocks may be up to a MiB larger."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    loss = model(**inputs).loss
    return loss, torch.cuda.memory_stats()["requested_bytes.all.current"] - before


@pytest.mark.parametrize("lengths", [(2048,), (2048, 2048), (2000, 1500, 300)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_whole_models(plan, family, lengths):
    """As much more waits for backward as was said; losses agree in all bits, gradients as far as stock's own do."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    with torch.device("cuda"):
        model = switch_on(tiny_model(family, torch.bfloat16, **sizes, **heads))
    inputs = on_gpu(padded(lengths))
    hf_turbo.patch_model(model, **{**switched_off("checkpointing", "memory"), "padding": True})
    losses, sizes_, gradients = [], [], []
    for plan.kept in (Kept(), Kept(), Kept(), Kept(0, ALL)):
        loss, size = forward(model, inputs)
        loss.backward()
        losses.append(loss.detach())
        sizes_.append(size)
        gradients.append([p.grad.float() for p in model.parameters()])
    assert all(cost.attention for cost in plan.costs)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    stack = kept_layers.stack_of(model.model)
    assert stack is not None
    assert sizes_[3] - sizes_[2] == pytest.approx(stack.kept_bytes, rel=0.02)

    def apart(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(some, others, strict=True))

    noise = max(apart(gradients[0], gradients[2]), apart(gradients[1], gradients[2]))
    print(f"{family} {lengths}: stock's own noise {noise:.1e}, ours {apart(gradients[3], gradients[2]):.1e}")
    assert apart(gradients[3], gradients[2]) <= 2 * noise


def test_attention_takes_its_time_once(plan):
    """At 16,384 tokens; printed for the record."""
    model = llama(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768)
    inputs = on_gpu(padded((16384,)))
    hf_turbo.patch_model(model, **switched_off("checkpointing", "memory"))
    times = []
    for plan.kept in (Kept(), Kept(), Kept(0, ALL), Kept(LAYERS)):
        for _ in range(4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            forward(model, inputs)[0].backward()
            end.record()
            torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    print(f"ms: recomputed {times[1]:.1f}, without attention {times[2]:.1f}, kept whole {times[3]:.1f}")
    assert times[3] < times[2] < times[1]


def test_memory_returns_to_its_level(plan):
    """200 steps of random lengths, with this and that kept."""
    model, chance, levels = llama(hidden_size=256, intermediate_size=256), random.Random(0), []
    hf_turbo.patch_model(model, **{**switched_off("checkpointing", "memory"), "padding": True})
    for step in range(200):
        whole = chance.randrange(LAYERS + 1)
        plan.kept = Kept(whole, tuple(index for index in range(LAYERS - whole) if chance.random() < 0.7))
        forward(model, on_gpu(padded(tuple(chance.randrange(30, 900) for _ in range(3)))))[0].backward()
        if step % 20 == 19:
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            levels.append(torch.cuda.memory_allocated())
    assert max(levels[1:]) <= levels[0]


def test_recordings(plan):
    """A CUDA graph of layers that keep attention's outputs computes what one of recomputed layers does."""
    found = []
    for kept in (Kept(), Kept(0, (0, 1))):
        plan.kept = kept
        model = adapted("llama", torch.bfloat16, True)
        hf_turbo.patch_model(model, padding=True, report=False)
        state_of(model).graphs = graphs.Graphs(model.get_base_model().model)
        for _ in range(4):  # nothing of a step is held in the next: it would hold the nodes that gradients end in
            result = trained_step(model, rows(0), True)
        state = state_of(model)
        assert (state.graphs.reason, state.graphs.replays >= 2) == ("", True)
        found.append(list(result.values()))
        hf_turbo.disable()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(one.abs().max()))
