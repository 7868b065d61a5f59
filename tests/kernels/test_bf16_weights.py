"""bfloat16 weights that lose no updates: with the rest of a float32 master, bit for bit, and rounded by chance."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hf_turbo.kernels import _bf16_weights as bf16
from hf_turbo.kernels._launch import launch, use_triton
from hf_turbo.kernels.adamw import BlockStates, MultiTensorAdamW, Random, Rates

from tests.kernels.helpers import assert_as_exact_as_stock, randn
from tests.kernels.test_adamw import bitsandbytes_maps

RATES = Rates(1e-3, 0.9, 0.999, 1e-8, 0.1)
SHAPES = [(16, 130), (333,), (2048,), (2500,), (3, 7)]


def of_bits(bits: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).to(device)


def hard_masters(device: torch.device) -> torch.Tensor:
    """All lower halves under some upper halves: zeros, subnormals, ends of binades, odd and even, the largest; both
    signs. And numbers of any size."""
    uppers = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3C23, 0x7F7E, 0x7F7F]
    halves = range(0, 0x10000, 1 if device.type == "cuda" else 61)
    edges = [0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
    bits = [(sign | upper) << 16 | low for sign in (0, 0x8000) for upper in uppers for low in (*edges, *halves)]
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (50_000,), generator=generator)
    return torch.cat([of_bits([*bits, 0x7F800000, 0xFF800000], device), of_bits(anything.tolist(), device)])


@triton.jit
def _split_join_kernel(x_ptr, high_ptr, low_ptr, again_ptr, count, SIZE: tl.constexpr):
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = element < count
    bits = bf16.bits_of(tl.load(x_ptr + element, mask=mask, other=0.0))
    high, low = bf16.upper_half(bits, 0x8000), bits.to(tl.int16)
    tl.store(high_ptr + element, high, mask=mask)
    tl.store(low_ptr + element, low, mask=mask)
    tl.store(again_ptr + element, bf16.join_bits(high, low), mask=mask)


def split_and_join(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not use_triton(x):
        weight, remainder = bf16.split(x)
        return weight, remainder, bf16.join(weight, remainder)
    weight, remainder = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int16)
    again = torch.empty_like(x)
    grid = (-(-len(x) // 1024),)
    launch(_split_join_kernel, grid, x.device, x, weight.view(torch.int16), remainder, again, len(x), SIZE=1024)
    return weight, remainder, again


def test_weight_and_remainder_are_the_master(device):
    """To the last bit; and the weight is what a cast would give, but for halves, where two are equally near."""
    x = hard_masters(device)
    weight, remainder, again = split_and_join(x)
    nan = x.isnan()
    assert torch.equal(again[~nan].view(torch.int32), x[~nan].view(torch.int32))
    assert bool(again[nan].isnan().all())
    assert bool(weight[nan].isnan().all())
    cast = x.bfloat16()
    half = (x.view(torch.int32) & 0xFFFF) == 0x8000
    same = weight.view(torch.int16) == cast.view(torch.int16)
    assert bool(same[~half & ~nan].all())
    finite = half & ~nan & weight.isfinite() & cast.isfinite()
    assert not bool(same[finite].all()), "no cast differs: then 65,537 masters have found 65,536 remainders"
    assert torch.equal((weight.double() - x.double())[finite].abs(), (cast.double() - x.double())[finite].abs())
    assert torch.equal(bf16.split(x)[0].view(torch.int16)[~nan], weight.view(torch.int16)[~nan])
    assert torch.equal(bf16.split(x)[1][~nan], remainder[~nan])


def test_a_remainder_of_another_weight_does_no_harm():
    weight = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.0, float("nan")], dtype=torch.bfloat16)
    for rest in (-0x8000, -1, 1, 0x7FFF):
        master = bf16.join(weight, torch.full((6,), rest, dtype=torch.int16))
        assert not bool(master[:5].isnan().any())
        assert bool(master[5].isnan())
        assert torch.equal(master[:2].signbit(), weight[:2].signbit())
        assert abs(master[4].item() - 1) <= 2**-8


# ------------------------------------------------------------------------------------------------- against fp32 masters


def states_of(kind: str, params: list[torch.Tensor], maps) -> dict:
    if kind != "8-bit":
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        m, v = ([torch.zeros_like(param, dtype=dtype) for param in params] for _ in range(2))
        return {"exp_avgs": m, "exp_avg_sqs": v}
    codes = [[torch.zeros_like(param, dtype=torch.uint8) for param in params] for _ in range(2)]
    absmax = [[torch.zeros(-(-param.numel() // 256), device=param.device) for param in params] for _ in range(2)]
    return {"exp_avgs": codes[0], "exp_avg_sqs": codes[1], "blocks": BlockStates(*absmax, *maps)}


def gradients(params: list[torch.Tensor], step: int) -> list[torch.Tensor]:
    return [
        randn(*param.shape, device=param.device, dtype=torch.bfloat16, seed=100 * step + i, scale=0.1)
        for i, param in enumerate(params)
    ]


@pytest.mark.parametrize(("kind", "decay_last"), [("float32", False), ("8-bit", True)])
def test_bit_identical_to_fp32_masters(device, kind, decay_last):
    """The gradient depends on the weight, so that a weight that differs makes everything differ."""
    maps = bitsandbytes_maps(device) if kind == "8-bit" else None
    start = [randn(*shape, device=device, dtype=torch.bfloat16, seed=i, scale=0.02) for i, shape in enumerate(SHAPES)]
    params, masters = [param.clone() for param in start], [param.float() for param in start]
    remainders = [torch.zeros_like(param, dtype=torch.int16) for param in start]
    options = {"groups": [0] * len(start), "decay_last": decay_last}
    ours, theirs = states_of(kind, start, maps), states_of(kind, start, maps)
    tables = MultiTensorAdamW(params, remainders=remainders, **ours, **options)
    reference = MultiTensorAdamW(masters, **theirs, **options)
    for step in range(1, 6):
        grads = gradients(start, step)
        reference.update([g + bf16.split(m)[0] for g, m in zip(grads, masters, strict=True)], [RATES], float(step))
        tables.update([g + p for g, p in zip(grads, params, strict=True)], [RATES], float(step))
    for i, (param, master) in enumerate(zip(params, masters, strict=True)):
        assert torch.equal(bf16.join(param, remainders[i]), master), SHAPES[i]
        assert torch.equal(param, bf16.split(master)[0]), SHAPES[i]
        for name in ("exp_avgs", "exp_avg_sqs"):
            assert torch.equal(ours[name][i], theirs[name][i]), name
    assert any(bool((rest != 0).any()) for rest in remainders)


def test_masters_are_as_exact_as_torch_in_fp32(device):
    """After 1 step and after 100, against float64; the weight itself is the master rounded once."""
    start = [randn(600, device=device, dtype=torch.bfloat16, scale=0.02)]
    params, remainders = [start[0].clone()], [torch.zeros_like(start[0], dtype=torch.int16)]
    states = states_of("float32", params, None)
    tables = MultiTensorAdamW(params, groups=[0], remainders=remainders, **states)
    leaves = [torch.nn.Parameter(start[0].to(dtype)) for dtype in (torch.float32, torch.float64)]
    stock = [torch.optim.AdamW([leaf], lr=RATES.lr, weight_decay=RATES.weight_decay) for leaf in leaves]
    for step in range(1, 101):
        grads = gradients(start, step)
        tables.update(grads, [RATES], float(step))
        for leaf, optimizer in zip(leaves, stock, strict=True):
            leaf.grad = grads[0].to(leaf.dtype)
            optimizer.step()
        if step in (1, 100):
            master, fp32, fp64 = bf16.join(params[0], remainders[0]), *(leaf.detach() for leaf in leaves)
            assert_as_exact_as_stock(f"master after {step} steps", master, fp32, fp64)
            for name, key in (("exp_avgs", "exp_avg"), ("exp_avg_sqs", "exp_avg_sq")):
                theirs = [o.state[leaf][key] for o, leaf in zip(stock, leaves, strict=True)]
                assert_as_exact_as_stock(f"{key} after {step} steps", states[name][0], *theirs)
            assert torch.equal((params[0].double() - master).abs(), (master.bfloat16().double() - master).abs())


def test_missing_gradients_and_unaligned_tensors(device):
    flat, rest = randn(3000, device=device, dtype=torch.bfloat16), torch.zeros(3000, device=device, dtype=torch.int16)
    params, remainders = [flat[1:701], flat[703:2000]], [rest[3:703], rest[801:2098]]
    before = [param.clone() for param in params]
    states = states_of("float32", params, None)
    tables = MultiTensorAdamW(params, groups=[0, 0], remainders=remainders, **states)
    tables.update([None, torch.ones_like(params[1])], [RATES._replace(lr=1e-5)], 1.0)
    assert torch.equal(params[0], before[0])
    assert not bool(remainders[0].any())
    expected = before[1].float() * (1 - 1e-6) - 1e-5
    torch.testing.assert_close(bf16.join(params[1], remainders[1]), expected, rtol=2e-7, atol=1e-9)
    assert not bool(rest[:3].any())
    assert not bool(rest[703:801].any())
    assert not bool(rest[2098:].any())


# ----------------------------------------------------------------------------------------------------------- by chance


def run_by_chance(device, kind, seed=3, streams=(7, 1, 2, 0, 4), steps=2, rates=RATES) -> list[torch.Tensor]:
    maps = bitsandbytes_maps(device) if kind == "8-bit" else None
    params = [randn(*shape, device=device, dtype=torch.bfloat16, seed=i, scale=0.02) for i, shape in enumerate(SHAPES)]
    states = states_of(kind, params, maps)
    random = Random(seed, list(streams))
    tables = MultiTensorAdamW(params, groups=[0] * len(params), random=random, **states)
    for step in range(1, steps + 1):
        tables.update(gradients(params, step), [rates], float(step))
    return [*params, *states["exp_avgs"], *states["exp_avg_sqs"]]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "8-bit"])
def test_by_chance_is_reproducible(device, kind):
    first, second, other = (run_by_chance(device, kind, seed) for seed in (3, 3, 4))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    # The numbers of a tensor are its own, whatever place it has.
    streams = run_by_chance(device, kind, streams=(7, 1, 9, 0, 4))
    assert torch.equal(streams[0], first[0])
    assert not torch.equal(streams[2], first[2])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "8-bit"])
def test_triton_draws_what_the_reference_draws(device, kind, monkeypatch):
    """Equal but where float32 itself differs in its last bit."""
    if not use_triton(torch.empty(0, device=device)):
        pytest.skip("the reference itself")
    actual = run_by_chance(device, kind, steps=1)
    monkeypatch.setattr("hf_turbo.kernels.adamw.use_triton", lambda tensor: False)
    expected = run_by_chance(device, kind, steps=1)
    for one, two in zip(actual[:5], expected[:5], strict=True):
        assert float((one != two).float().mean()) < 1e-2
    assert torch.equal(actual[0], expected[0]) or device.type == "cuda"


def test_by_chance_is_unbiased(device):
    """The mean of many roundings is the float32 value to 5 standard errors, also tensor by tensor; and roundings of
    neighbours, of one place in two tensors, and of a place at two steps, know nothing of each other.
    """
    count, repeats, ulp = 4096, 10, 2.0**-7

    def ups(fraction: float, step: float) -> torch.Tensor:
        """Which of many ones went up by a unit in the last place, when `fraction` of one was to be added."""
        params = [torch.ones(count, device=device, dtype=torch.bfloat16) for _ in range(repeats)]
        states = states_of("float32", params, None)
        tables = MultiTensorAdamW(params, groups=[0] * repeats, random=Random(11, list(range(repeats))), **states)
        # With m = g and v = g^2 the update is lr * sign(g).
        rates = Rates(fraction * ulp, 0.0, 0.0, 0.0, 0.0)
        tables.update([-torch.ones_like(param) for param in params], [rates], step)
        up = torch.stack([(param.float() - 1) / ulp for param in params])
        assert set(up.unique().tolist()) == {0.0, 1.0}
        return up

    for fraction in (0.1, 0.77):
        up = ups(fraction, 1.0)
        spread = (fraction * (1 - fraction)) ** 0.5
        assert abs(float(up.mean()) - fraction) < 5 * spread / up.numel() ** 0.5
        assert float((up.mean(1) - fraction).abs().max()) < 5 * spread / count**0.5
        centred = (up - fraction) / spread
        later = (ups(fraction, 2.0) - fraction) / spread
        for one, two in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1]), (centred, later)):
            assert abs(float((one * two).mean())) < 5 / one.numel() ** 0.5


def test_averages_in_bfloat16_do_not_stall(device):
    """beta2 = 0.999 changes the average of squares by less than bfloat16 holds: rounded to nearest it never falls."""
    param = [torch.zeros(4096, device=device, dtype=torch.bfloat16)]
    means = {}
    for name, random in (("nearest", None), ("chance", Random(1, [0]))):
        m, v = torch.zeros_like(param[0]), torch.ones_like(param[0])
        tables = MultiTensorAdamW([param[0].clone()], [m], [v], [0], random=random)
        for step in range(1, 21):
            tables.update([torch.zeros_like(m)], [RATES], float(step))
        means[name] = float(v.double().mean())
    assert means["nearest"] == 1.0
    assert means["chance"] == pytest.approx(0.999**20, abs=2e-3)


def test_not_finite(device):
    for options in ({"random": Random(1, [0])}, {"remainders": [torch.zeros(300, dtype=torch.int16, device=device)]}):
        param = [randn(300, device=device, dtype=torch.bfloat16)]
        grad = torch.ones_like(param[0])
        grad[3], grad[4] = float("nan"), float("inf")
        states = states_of("float32", param, None)
        MultiTensorAdamW(param, groups=[0], **states, **options).update([grad], [RATES], 1.0)
        assert param[0].isnan().nonzero().flatten().tolist() == [3, 4]


def test_refuses_what_does_not_fit(device):
    param, other = torch.zeros(8, device=device, dtype=torch.bfloat16), torch.zeros(8, device=device)
    rest = torch.zeros(8, dtype=torch.int16, device=device)
    states = lambda p: {"exp_avgs": [p.float()], "exp_avg_sqs": [p.float()], "groups": [0]}  # noqa: E731
    with pytest.raises(ValueError, match="bfloat16 parameters"):
        MultiTensorAdamW([other], remainders=[rest], **states(other))
    with pytest.raises(ValueError, match="bfloat16 parameters"):
        MultiTensorAdamW([param], remainders=[rest], random=Random(1, [0]), **states(param))
    with pytest.raises(ValueError, match="remainder"):
        MultiTensorAdamW([param], remainders=[rest[:4]], **states(param))
    with pytest.raises(ValueError, match="stream"):
        MultiTensorAdamW([param], random=Random(1, []), **states(param))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "8-bit"])
def test_full_size(cuda, kind):
    """A large matrix, 20 steps, against fp32 masters: the compiler makes the same arithmetic of both kernels."""
    maps = bitsandbytes_maps(cuda) if kind == "8-bit" else None
    start = [
        randn(8192, 2048, device=cuda, dtype=torch.bfloat16, scale=0.02),
        randn(5, device=cuda, dtype=torch.bfloat16),
    ]
    params, masters = [param.clone() for param in start], [param.float() for param in start]
    remainders = [torch.zeros_like(param, dtype=torch.int16) for param in start]
    tables = MultiTensorAdamW(params, groups=[0, 0], remainders=remainders, **states_of(kind, start, maps))
    reference = MultiTensorAdamW(masters, groups=[0, 0], **states_of(kind, start, maps))
    for step in range(1, 21):
        grads = gradients(start, step)
        for one in (tables, reference):
            one.update(grads, [RATES._replace(lr=2e-5)], float(step))
    for param, rest, master in zip(params, remainders, masters, strict=True):
        assert torch.equal(bf16.join(param, rest), master)
        assert torch.equal((param.double() - master).abs(), (master.bfloat16().double() - master).abs())
