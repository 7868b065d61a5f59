"""Layer inputs in pinned host memory on a GPU: the bits of stock, less memory, copies beside the computation."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_turbo.patches import checkpointing, host_memory, mlp
from hf_turbo.patches.host_memory import STAYING, CudaCopies, HostStore
from torch.autograd import DeviceType

import hf_turbo
from tests.models import VOCABULARY, switch_on, switched_off, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OTHERS = switched_off("offload")
MIB = 2**20


def patch(model: Any, **options: Any) -> Any:
    report = hf_turbo.patch_model(model, **{**OTHERS, "offload": True, **options})
    return next(row for row in report.rows if row.role == "offload")


def llama(hidden_size: int, layers: int, reentrant: bool = False, **changes: Any) -> Any:
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden_size // 64, "num_key_value_heads": hidden_size // 256, "head_dim": 64}
    with torch.device("cuda"):
        model = tiny_model("llama", torch.bfloat16, **{**sizes, **heads, "max_position_embeddings": 8192, **changes})
    return switch_on(model, reentrant)


def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator).cuda()
    return {"input_ids": ids, "labels": ids}


def step(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)  # dropout
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def freeze_all_but_norms(model: Any) -> None:
    """As adapters do: gradients take no memory to speak of."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    model.enable_input_require_grads()


@pytest.fixture(params=[False, "auto"], ids=["by torch", "by hf_turbo"], autouse=True)
def recomputed(monkeypatch, request) -> None:
    monkeypatch.setitem(OTHERS, "checkpointing", request.param)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_bits_are_those_of_stock(deterministic, reentrant):
    model = llama(1024, 8, reentrant, attn_implementation="eager", attention_dropout=0.1)
    inputs = tokens(16, 512)  # 16 MiB per layer
    stock = step(model, inputs)
    again = step(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(stock, again, strict=True)), "stock itself draws other bits here"
    assert patch(model).patched == 8
    for _ in range(4):
        ours = step(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))
    assert checkpointing._STORES[model.model.layers[0]].bytes == 8 * 16 * MIB


def test_two_graphs_alive(deterministic):
    model = llama(1024, 6, attn_implementation="eager")
    first, second = tokens(16, 512), tokens(8, 1024)

    def both() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(**first).loss - model(**second).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    stock = both()
    patch(model)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(stock, both(), strict=True))


class SlowCopies(CudaCopies):
    """Each copy begins some milliseconds late: whoever does not wait for it reads, or has overwritten, wrong bits."""

    def _copy(self, side: torch.cuda.Stream, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        with torch.cuda.stream(side):
            torch.cuda._sleep(4_000_000)
        return super()._copy(side, destination, source, after)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_memory_is_never_touched_too_early(seed, devices):
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} CUDA devices")
    store, chance = HostStore(SlowCopies, 2**34), random.Random(seed)
    alive: dict[int, Any] = {}
    expected: dict[int, torch.Tensor] = {}
    for number in range(150):
        device = torch.device("cuda", chance.randrange(devices))
        action = chance.random()
        if action < 0.45 or not alive:
            size = chance.choice([1, 1, 2]) * MIB
            expected[number] = torch.randn(size).bfloat16()
            expected[number][:3] = number
            alive[number] = store.put(expected[number].to(device))
        elif action < 0.85:
            key = chance.choice(list(alive))
            result = store.get(alive[key])
            assert torch.equal(result.cpu().view(torch.int16), expected[key].view(torch.int16))
        else:
            del alive[chance.choice(list(alive))]
        # Takes memory that was freed just now and overwrites it.
        for size in (MIB, 2 * MIB):
            torch.full((size,), float("nan"), dtype=torch.bfloat16, device=device)
    alive.clear()
    store.trim()
    assert store.bytes == 0


def test_peak_memory_is_less_by_the_inputs_of_the_layers():
    layers, size = 16, 16 * MIB
    model = llama(1024, layers)
    freeze_all_but_norms(model)
    inputs = tokens(16, 512)

    def peak() -> int:
        step(model, inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    stock = peak()
    patch(model)
    ours = peak()
    # The first layer's input is a leaf, which accumulation keeps; the last stay; one leaves, one returns.
    kept = 1 + STAYING + 2
    print(f"peak {stock / MIB:.0f} MiB stock, {ours / MIB:.0f} MiB offloaded, {layers} inputs of {size / MIB:.0f} MiB")
    assert stock - ours >= (layers - kept) * size


def test_copies_run_beside_the_computation():
    """Of a layer as wide as Llama-8B's. Nearly all copying happens while kernels run, and the step takes as long."""
    model = llama(4096, 6)
    freeze_all_but_norms(model)
    inputs = tokens(2, 4096)

    def milliseconds() -> float:
        step(model, inputs)
        times = []
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step(model, inputs)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    stock = milliseconds()
    row = patch(model)
    assert row.patched == 6
    ours = milliseconds()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(model, inputs)
        torch.cuda.synchronize()
    spans = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    out, back = ([e for e in spans if e.name.startswith(f"Memcpy {way}")] for way in ("DtoH", "HtoD"))
    # Copies of 64 MiB, not of a number that the host reads.
    out, back = ([e for e in copies if "Pinned" in e.name and length(e) > 100] for copies in (out, back))
    kernels = merged([(e.time_range.start, e.time_range.end) for e in spans if not e.name.startswith("Mem")])
    hidden = {way: covered(copies, kernels) for way, copies in (("out", out), ("back", back))}
    speed = host_memory.link_speed(torch.device("cuda", 0)) or 0.0
    print(f"step {stock:.1f} ms stock, {ours:.1f} ms offloaded; link {speed / 1e9:.0f} GB/s; hidden {hidden}")
    assert (len(out), len(back)) == (5, 5 - STAYING)
    assert min(hidden.values()) > 0.9
    assert ours < 1.05 * stock


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_products_of_layers_that_are_not_checkpointed(monkeypatch, attention):
    """The same bits with one of the two in host memory, and less memory by all of them but the last.

    Only eager attention has the same gradients each time, and only the other takes less memory than the products.
    """
    monkeypatch.setattr(checkpointing, "MIN_BYTES", 0)
    layers, inputs = 6, tokens(4, 1024)
    model = llama(1024, layers)
    model.set_attn_implementation(attention)
    model.gradient_checkpointing_disable()
    freeze_all_but_norms(model)
    hf_turbo.patch_model(model, **{**OTHERS, "offload": False, "mlp": True})

    def peak() -> tuple[int, list[torch.Tensor]]:
        step(model, inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = [each.clone() for each in step(model, inputs)]
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, results

    kept, expected = peak()
    waits = mlp.find_offload(model, lambda sizes, _: [True] * len(sizes), 2**30)
    assert (waits.patched, waits.found) == (layers, layers)
    for patch_ in waits.patches:
        patch_.apply()
    try:
        waited, results = peak()
    finally:
        for patch_ in waits.patches:
            patch_.revert()
    if attention == "eager":
        assert all(map(torch.equal, results, expected))
        return
    size = 4 * 1024 * 3 * 1024 * 2
    print(f"peak {kept / MIB:.0f} MiB kept, {waited / MIB:.0f} MiB waiting, {layers} of {size / MIB:.0f} MiB")
    # The last one stays, one leaves, one returns.
    assert kept - waited >= (layers - 3) * size


def length(event: Any) -> float:
    """Microseconds."""
    return event.time_range.end - event.time_range.start


def merged(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    result: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if result and begin <= result[-1][1] + 5:  # gaps between launches
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def covered(copies: list[Any], kernels: list[tuple[float, float]]) -> float:
    """The share of the copies' time during which kernels run."""
    shared = sum(
        max(0.0, min(end, e.time_range.end) - max(begin, e.time_range.start)) for e in copies for begin, end in kernels
    )
    return shared / sum(map(length, copies))


def test_auto_on_a_device_of_known_speed():
    from hf_turbo.metrics import peak_flops

    device = torch.device("cuda", 0)
    speed = host_memory.link_speed(device)
    assert speed is not None
    assert 1e9 < speed < 1e12
    row = patch(llama(1024, 2), offload="auto")
    assert row.found == 2
    if peak_flops(device) is None:
        assert "unknown" in row.reason
    else:
        assert row.patched == 2 or "too short to hide a copy" in row.reason
