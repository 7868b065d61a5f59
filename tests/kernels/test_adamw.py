"""AdamW over many tensors, against torch's own and bitsandbytes', and both against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hf_turbo.kernels import adamw
from hf_turbo.kernels._launch import launch
from hf_turbo.kernels.adamw import BlockStates, MultiTensorAdamW, Rates
from hf_turbo.kernels.clip_grad_norm import Gradients

from tests.kernels.helpers import assert_as_exact_as_stock, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Large enough that rounding averages out: of 5 elements after 5 steps, either of two right answers is nearer.
SHAPES = [(16, 130), (333,), (2048,), (3, 7, 11), (2500,)]
LORA_SHAPES = [(16, 4096), (1024, 16), (14336, 16), (16, 14336), (7,)]


class Case(NamedTuple):
    params: list[torch.Tensor]
    grads: list[list[torch.Tensor]]  # by step


def make_case(device, dtype, shapes=SHAPES, steps=5, seed=0) -> Case:
    params = [randn(*shape, device=device, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)]
    grads = [
        [randn(*shape, device=device, dtype=dtype, seed=100 * step + i, scale=0.1) for i, shape in enumerate(shapes)]
        for step in range(1, steps + 1)
    ]
    return Case(params, grads)


def run_stock(case: Case, dtype=None, **options) -> dict[str, list[torch.Tensor]]:
    params = [torch.nn.Parameter(param.to(dtype or param.dtype, copy=True)) for param in case.params]
    optimizer = torch.optim.AdamW(params, **options)
    for grads in case.grads:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()
    names = ("exp_avg", "exp_avg_sq")
    return {"p": [p.detach() for p in params]} | {n: [optimizer.state[p][n] for p in params] for n in names}


def run_turbo(case: Case, rates: Rates, device_steps: bool) -> dict[str, list[torch.Tensor]]:
    params = [param.clone() for param in case.params]
    m, v = ([torch.zeros_like(param) for param in params] for _ in range(2))
    counters = [param.new_zeros((), dtype=torch.float32) for param in params] if device_steps else None
    tables = MultiTensorAdamW(params, m, v, [0] * len(params), steps=counters)
    for step, grads in enumerate(case.grads, 1):
        tables.update(grads, [rates], None if device_steps else [float(step)] * len(params))
    if counters is not None:
        assert [counter.item() for counter in counters] == [len(case.grads)] * len(params)
    return {"p": params, "exp_avg": m, "exp_avg_sq": v}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.2)])
def test_as_exact_as_torch(device, dtype, fused, betas):
    eps = 1e-8 if dtype != torch.float16 else 1e-4  # 1e-8 is 0 in float16, and stock divides by it
    options = {"lr": 1e-2, "betas": betas, "eps": eps, "weight_decay": 0.1}
    case = make_case(device, dtype)
    turbo = run_turbo(case, Rates(1e-2, *betas, eps, 0.1), device_steps=fused)
    stock = run_stock(case, fused=fused, **options)
    exact = run_stock(case, torch.float64, fused=fused, **options)
    for name, tensors in turbo.items():
        for i, tensor in enumerate(tensors):
            assert_as_exact_as_stock(f"{name} {SHAPES[i]}", tensor, stock[name][i], exact[name][i])


@pytest.mark.parametrize(
    ("dtype", "bits", "factor"),
    [
        (torch.float32, 32, 0.37),
        (torch.bfloat16, 32, 0.37),
        (torch.bfloat16, 32, float("nan")),
        (torch.bfloat16, 8, 0.37),
        (torch.float16, 8, 0.0),
    ],
)
def test_scaled_by_the_step_as_by_clipping(device, dtype, bits, factor):
    """The same bits, and gradients that stay what they are."""
    case, rates = make_case(device, dtype, steps=2), [Rates(1e-2, 0.9, 0.999, 1e-8, 0.1)]
    scale, results = torch.full((), factor, device=device), []
    for by_step in (False, True):
        params = [param.clone() for param in case.params]
        blocks = None
        states = [[torch.zeros_like(param) for param in params] for _ in range(2)]
        if bits == 8:
            *states, blocks = make_8bit(case, bitsandbytes_maps(device))
        tables = MultiTensorAdamW(params, *states, [0] * len(params), blocks=blocks)
        for step, grads in enumerate(case.grads, 1):
            given = [grad.clone() for grad in grads]
            if not by_step:
                Gradients(given).multiply(scale)
            tables.update(given, rates, [float(step)] * len(params), scale=scale if by_step else None)
            assert not by_step or all(map(torch.equal, given, grads))
        results.append([*params, *states[0], *states[1]])
    assert factor != 0.37 or not torch.equal(results[0][0], case.params[0])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        assert torch.equal(one.isnan(), other.isnan())


def test_averages_do_not_drift(device):
    """0.999 in float32 is off by 1e-8, and 1 minus that by 1e-5 of itself: so is an average that multiplies by it."""
    case = make_case(device, torch.float32, shapes=[(64,)], steps=60)
    rates = Rates(1e-3, 0.9, 0.999, 1e-8, 0.0)
    turbo = run_turbo(case, rates, device_steps=False)
    exact = run_stock(case, torch.float64, betas=(0.9, 0.999), weight_decay=0.0)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(turbo[name][0].double(), exact[name][0], rtol=2e-6, atol=1e-9)


def test_groups_missing_gradients_and_counted_steps(device):
    case = make_case(device, torch.float32, steps=1)
    rates = [Rates(1e-2, 0.9, 0.999, 1e-8, 0.1), Rates(1e-3, 0.8, 0.99, 1e-6, 0.0)]
    params = [param.clone() for param in case.params]
    m, v = ([torch.full_like(param, 0.01) for param in params] for _ in range(2))
    counters = [torch.full((), float(i), device=device) for i in range(len(params))]
    tables = MultiTensorAdamW(params, m, v, [0, 1, 0, 1, 1], steps=counters)
    grads = [*case.grads[0][:2], None, *case.grads[0][3:]]
    tables.update(grads, rates)
    assert [counter.item() for counter in counters] == [1, 2, 2, 4, 5]
    assert torch.equal(params[2], case.params[2])
    assert torch.equal(m[2], torch.full_like(m[2], 0.01))
    for i in (0, 1, 3, 4):
        p, g, one_m, one_v = case.params[i].double(), case.grads[0][i].double(), 0.01, 0.01
        lr, beta1, beta2, eps, weight_decay = rates[tables.groups[i]]
        one_m, one_v = beta1 * one_m + (1 - beta1) * g, beta2 * one_v + (1 - beta2) * g * g
        denominator = (one_v / (1 - beta2 ** (i + 1))).sqrt() + eps
        expected = p * (1 - lr * weight_decay) - lr * one_m / (1 - beta1 ** (i + 1)) / denominator
        torch.testing.assert_close(params[i].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("given", [[1], [2], [0, 1], [3, 4], [1, 3], [4]])
def test_some_gradients_are_stepped_as_with_all(device, given):
    """In several calls, as when they come one after the other: the same bits, and no program for the rest."""
    case, rates = make_case(device, torch.float32, steps=1), [Rates(1e-2, 0.9, 0.999, 1e-8, 0.1)]
    whole = run_turbo(case, rates[0], device_steps=False)
    params = [param.clone() for param in case.params]
    m, v = ([torch.zeros_like(param) for param in params] for _ in range(2))
    tables = MultiTensorAdamW(params, m, v, [0] * 5)
    tables.update([grad if i in given else None for i, grad in enumerate(case.grads[0])], rates, [1.0] * 5)
    assert all(torch.equal(params[i], (whole["p"] if i in given else case.params)[i]) for i in range(5))
    tables.update([None if i in given else grad for i, grad in enumerate(case.grads[0])], rates, [1.0] * 5)
    for name, tensors in (("p", params), ("exp_avg", m), ("exp_avg_sq", v)):
        assert all(map(torch.equal, tensors, whole[name])), name
    if tables._on_triton:
        chunks = tables._chunks_of([int(i in given) for i in range(5)])[:, 0].tolist()
        assert given[0] - 1 <= chunks[0] <= given[0]
        assert chunks[-1] == given[-1]


def test_no_gradient_at_all(device):
    case = make_case(device, torch.float32, steps=1)
    params = [param.clone() for param in case.params]
    states = [torch.zeros_like(param) for param in params]
    tables = MultiTensorAdamW(params, states, [s.clone() for s in states], [0] * 5)
    tables.update([None] * 5, [Rates(1e-2, 0.9, 0.999, 1e-8, 0.1)], [1.0] * 5)
    assert all(torch.equal(new, old) for new, old in zip(params, case.params, strict=True))


def test_unaligned_tensors(device):
    """Views into a flat buffer at odd offsets, as gradients in the buckets of DistributedDataParallel."""
    flat = randn(4, 1000, device=device, dtype=torch.bfloat16)

    def views(row: int) -> list[torch.Tensor]:
        return [flat[row, 1:641].clone(), flat[row, 3:17], flat[row, 21:600]]

    case = Case(views(0), [views(1), views(2)])
    rates = Rates(1e-2, 0.9, 0.999, 1e-8, 0.1)
    packed = Case([p.clone() for p in case.params], [[g.clone() for g in grads] for grads in case.grads])
    expected, actual = run_turbo(packed, rates, False), run_turbo(case, rates, False)
    for name, tensors in actual.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected[name], strict=True)), name


def test_same_bits_every_time(device):
    case = make_case(device, torch.bfloat16, steps=2)
    rates = Rates(1e-2, 0.9, 0.999, 1e-8, 0.1)
    first, second = run_turbo(case, rates, True), run_turbo(case, rates, True)
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))


def test_nan_and_infinity_stay_where_they_are(device):
    case = make_case(device, torch.float32, shapes=[(300,)], steps=2)
    case.grads[0][0][3], case.grads[0][0][4] = float("nan"), float("inf")
    turbo = run_turbo(case, Rates(1e-2, 0.9, 0.999, 1e-8, 0.1), False)
    stock = run_stock(case, lr=1e-2, weight_decay=0.1)
    for name, tensors in turbo.items():
        assert torch.equal(tensors[0].isfinite(), stock[name][0].isfinite()), name


# --------------------------------------------------------------------------------------------------------------- 8 bits


def bitsandbytes_maps(device) -> tuple[torch.Tensor, torch.Tensor]:
    functional = pytest.importorskip("bitsandbytes.functional")
    return tuple(functional.create_dynamic_map(signed).to(device) for signed in (True, False))


@triton.jit
def _code_kernel(x_ptr, code_ptr, ends_ptr, count, SIGNED: tl.constexpr, SIZE: tl.constexpr):
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + element, mask=element < count, other=0.0)
    code = adamw._nearest_code(x * adamw._SEARCH_SCALE, tl.load(ends_ptr + tl.arange(0, 256)), SIGNED)
    tl.store(code_ptr + element, code, mask=element < count)


@pytest.mark.parametrize("signed", [True, False])
def test_search_finds_the_nearest_code(device, signed):
    values = bitsandbytes_maps(device)[0 if signed else 1]
    exact = values.double()
    middle = ((exact[1:] + exact[:-1]) / 2).float()
    near = [middle, values]
    for end in (2.0, -2.0):
        x = middle
        for _ in range(2):
            x = torch.nextafter(x, torch.full_like(x, end))
            near.append(x)
    spread = randn(4000, device=device, dtype=torch.float32) * 10 ** -(8 * torch.rand(4000, device=device))
    x = torch.cat([*near, spread, spread.new_tensor([0.0, 1.0, 1e-12, 1e-38])]).clamp(-1 if signed else 0, 1)
    if signed:
        x = torch.cat([x, x.new_tensor([-1.0, -1e-12, -1e-37])])
    ends = adamw._search_table(values, signed)
    code = torch.bucketize(x, adamw._thresholds(values)).int()
    if x.is_cuda or adamw.use_triton(x):
        found = torch.empty_like(code)
        size = {"SIGNED": signed, "SIZE": 256}
        launch(_code_kernel, (-(-len(x) // 256),), x.device, x, found, ends, len(x), **size)
        assert torch.equal(found, code)
    distance = (x.double()[:, None] - exact).abs()
    taken = distance.gather(1, code.long()[:, None])[:, 0]
    # Midpoints are rounded to float32: at a tie within that rounding either neighbour will do.
    smallest = values[values > 0].min()
    slack = torch.where((x < 0) & (x > -0.51 * smallest), smallest, 1.2e-7 * x.abs())
    assert bool((taken <= distance.min(1).values + slack).all())
    if signed:
        assert bool((exact[code.long()][x < 0] < 0).all()), "negative x keep their sign"


def make_8bit(case: Case, maps) -> tuple[list[torch.Tensor], list[torch.Tensor], BlockStates]:
    """Random states."""
    device = case.params[0].device
    generator = torch.Generator(device).manual_seed(0)
    code1, code2 = (
        [torch.randint(0, 256, p.shape, dtype=torch.uint8, device=device, generator=generator) for p in case.params]
        for _ in range(2)
    )
    absmax1, absmax2 = (
        [torch.rand(-(-p.numel() // 256), device=device, generator=generator) * scale for p in case.params]
        for scale in (0.1, 0.01)
    )
    return code1, code2, BlockStates(absmax1, absmax2, *maps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay_last", [False, True])
def test_8bit_follows_the_formula(device, dtype, decay_last):
    """Parameters as exactly as in bitsandbytes' order, states to half a step of their map, from random states."""
    case = make_case(device, dtype, steps=1)
    case.grads[0][0][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    maps = bitsandbytes_maps(device)
    code1, code2, blocks = make_8bit(case, maps)
    decoded = []
    for codes, absmax, values in zip((code1, code2), blocks[:2], maps, strict=True):
        decoded.append(
            [
                values.double()[c.flatten().int()] * a.double().repeat_interleave(256)[: c.numel()]
                for c, a in zip(codes, absmax, strict=True)
            ]
        )
    rates = Rates(1e-2, 0.9, 0.999, 1e-8, 0.1)
    params = [param.clone() for param in case.params]
    tables = MultiTensorAdamW(params, code1, code2, [0] * 5, blocks=blocks, decay_last=decay_last)
    tables.update(case.grads[0], [rates], [7.0] * 5)
    for i, param in enumerate(params):
        new = {}
        for wide in (torch.float32, torch.float64):
            grad, p = case.grads[0][i].to(wide).flatten(), case.params[i].to(wide).flatten()
            finite = grad.isfinite()
            m = torch.where(finite, 0.9 * decoded[0][i].to(wide) + 0.1 * grad, 0.0)
            v = torch.where(finite, 0.999 * decoded[1][i].to(wide) + 0.001 * grad**2, 0.0)
            correction = (1 - 0.999**7) ** 0.5
            update = 1e-2 * correction / (1 - 0.9**7) * (m / (v.sqrt() + 1e-8 * correction))
            after = (p - update) * (1 - 1e-3) if decay_last else p * (1 - 1e-3) - update
            new[wide] = torch.where(finite, after, p).view(param.shape)
        assert_as_exact_as_stock(f"parameter {i}", param, new[torch.float32].to(dtype), new[torch.float64])
        for state, codes, absmax, values in ((m, code1, blocks.absmax1, maps[0]), (v, code2, blocks.absmax2, maps[1])):
            padded = torch.nn.functional.pad(state, (0, -len(state) % 256)).view(-1, 256)
            torch.testing.assert_close(absmax[i].double(), padded.abs().amax(1), rtol=1e-6, atol=1e-12)
            x = (padded / padded.abs().amax(1, keepdim=True)).flatten()[: len(state)]
            best = (x[:, None] - values.double()).abs().min(1).values
            taken = (x - values.double()[codes[i].flatten().int()]).abs()
            assert bool((taken <= best + 1e-6 * x.abs() + 3e-7).all())


def test_8bit_blocks_end_with_their_tensor(device):
    """What lies behind the end of a tensor has no part in the absmax of its last block."""
    maps = bitsandbytes_maps(device)
    zero, size = int((maps[0] == 0).nonzero()), 300
    param, grad = torch.ones(size, device=device), torch.full((size,), 1e-3, device=device)
    codes = [torch.full((size,), code, dtype=torch.uint8, device=device) for code in (zero, 0)]
    blocks = BlockStates(*[[torch.ones(2, device=device)] for _ in range(2)], *maps)
    tables = MultiTensorAdamW([param], [codes[0]], [codes[1]], [0], blocks=blocks)
    tables.update([grad], [Rates(1e-3, 0.9, 0.999, 1e-8, 0.0)], [1.0])
    torch.testing.assert_close(blocks.absmax1[0], torch.full((2,), 1e-4, device=device))
    torch.testing.assert_close(blocks.absmax2[0], torch.full((2,), 1e-9, device=device), rtol=1e-5, atol=0.0)


def test_8bit_blocks_of_zeros(device):
    """LoRA's A has zero gradients until B has moved: absmax 0."""
    case = make_case(device, torch.float32, shapes=[(16, 64)], steps=1)
    maps = bitsandbytes_maps(device)
    codes = [torch.zeros(16, 64, dtype=torch.uint8, device=device) for _ in range(2)]
    blocks = BlockStates(*[[torch.zeros(4, device=device)] for _ in range(2)], *maps)
    params = [case.params[0].clone()]
    tables = MultiTensorAdamW(params, [codes[0]], [codes[1]], [0], blocks=blocks)
    for step in (1.0, 2.0):
        tables.update([torch.zeros_like(params[0])], [Rates(1e-2, 0.9, 0.999, 1e-8, 0.0)], [step])
    assert torch.equal(params[0], case.params[0])
    assert bool((blocks.absmax1[0] == 0).all())
    tables.update(case.grads[0], [Rates(1e-2, 0.9, 0.999, 1e-8, 0.0)], [3.0])
    assert bool(params[0].isfinite().all())
    assert not torch.equal(params[0], case.params[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_against_bitsandbytes(device, dtype):
    """Step by step from bitsandbytes' own states: on a GPU the same codes, but where x lies between two."""
    optim = pytest.importorskip("bitsandbytes.optim")
    if dtype == torch.float16 and device.type == "cpu":
        pytest.skip("one 16-bit dtype will do on the CPU")
    optim.GlobalOptimManager.get_instance().initialize()  # it knows settings by ids of parameters that are gone
    maps = bitsandbytes_maps(device)
    shapes = [(16, 1024), (4096,), (40, 130)]
    case = make_case(device, dtype, shapes=shapes, steps=4)
    params = [torch.nn.Parameter(param.clone()) for param in case.params]
    optimizer = optim.AdamW8bit(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    on_gpu = device.type == "cuda"
    betas = torch.tensor([0.9, 0.999]).tolist() if on_gpu else (0.9, 0.999)
    differing = total = 0
    for step, grads in enumerate(case.grads, 1):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if step == 1:
            for i, param in enumerate(params):
                optimizer.init_state(optimizer.param_groups[0], param, 0, i)
        ours = [param.detach().clone() for param in params]
        names = ("state1", "state2", "absmax1", "absmax2")
        states = {name: [optimizer.state[param][name].clone() for param in params] for name in names}
        blocks = BlockStates(states["absmax1"], states["absmax2"], *maps)
        tables = MultiTensorAdamW(ours, states["state1"], states["state2"], [0] * 3, blocks=blocks, decay_last=on_gpu)
        tables.update(grads, [Rates(1e-3, *betas, 1e-8, 0.1)], [float(step)] * 3)
        optimizer.step()
        for i, param in enumerate(params):
            # bitsandbytes rounds a second time, after the decay, on a GPU.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(ours[i], param.detach(), rtol=2 * eps, atol=1e-6 * (1 + on_gpu))
            state = optimizer.state[param]
            for absmax in names[2:]:
                torch.testing.assert_close(states[absmax][i], state[absmax], rtol=1e-6, atol=0)
            for codes, values in zip(names[:2], maps, strict=True):
                found, expected = states[codes][i].int(), state[codes].int()
                apart = found != expected
                if not on_gpu:  # there bitsandbytes takes a code that is near, not always the nearest
                    apart &= (values[found] - values[expected]).abs() > 2e-4
                assert int((found - expected)[apart].abs().sum()) == int(apart.sum()), "more than one code apart"
                differing, total = differing + int(apart.sum()), total + found.numel()
    assert differing <= (1e-4 if on_gpu else 5e-3) * total, f"{differing} of {total} codes differ"


def test_tables_refuse_what_does_not_fit(device):
    param = torch.zeros(8, device=device)
    with pytest.raises(ValueError, match="as many"):
        MultiTensorAdamW([param], [param], [], [0])
    with pytest.raises(ValueError, match="contiguous"):
        MultiTensorAdamW([torch.zeros(4, 4, device=device).t()], [torch.zeros(4, 4)], [torch.zeros(4, 4)], [0])
    with pytest.raises(ValueError, match="states"):
        MultiTensorAdamW([param], [param[:4]], [param], [0])
    with pytest.raises(ValueError, match="one dtype"):
        MultiTensorAdamW([param, param.double()], [param, param], [param, param], [0, 0])
    with pytest.raises(ValueError, match="one for all states"):
        MultiTensorAdamW([param], [param.bfloat16()], [param], [0])
    codes = torch.zeros(8, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="blocks"):
        MultiTensorAdamW([param], [codes], [codes], [0])
    tables = MultiTensorAdamW([param], [param.clone()], [param.clone()], [0])
    with pytest.raises(ValueError, match="counted"):
        tables.update([param], [Rates(1e-3, 0.9, 0.999, 1e-8, 0.0)])
    with pytest.raises(ValueError, match="ascending"):
        adamw._thresholds(torch.zeros(256))
    signed, unsigned = bitsandbytes_maps("cpu")
    for values, is_signed in ((torch.linspace(0.5, 0.501, 256), False), (signed, False), (unsigned, True)):
        with pytest.raises(ValueError, match="dynamic maps"):
            adamw._search_table(values, is_signed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lora_tensors_at_full_size(cuda, dtype):
    case = make_case(cuda, dtype, shapes=LORA_SHAPES, steps=3)
    rates = Rates(1e-3, 0.9, 0.999, 1e-8, 0.1)
    options = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}
    turbo = run_turbo(case, rates, True)
    stock, exact = run_stock(case, **options), run_stock(case, torch.float64, **options)
    for name, tensors in turbo.items():
        for i, tensor in enumerate(tensors):
            assert_as_exact_as_stock(f"{name} {LORA_SHAPES[i]}", tensor, stock[name][i], exact[name][i])
