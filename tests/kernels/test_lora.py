from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import _launch
from hf_turbo.kernels import lora as module
from hf_turbo.kernels.lora import Projection, lora_add, lora_linears
from torch.utils.checkpoint import checkpoint

from tests.kernels.helpers import (
    Tensors,
    assert_same_bits,
    check_against_stock,
    outputs_and_gradients,
    randn,
    relative_error,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Layer(NamedTuple):
    """What of a projection is no tensor. Rank 0: no adapter."""

    outputs: int
    rank: int
    scaling: float = 2.0
    bias: str = ""  # "", "frozen" or "trained"
    dropout: float = 0.0


# Odd sizes, more than a tile of the kernel in each direction.
INPUTS = 75
ONE = (Layer(133, 16),)
QKV = (Layer(133, 16, 2.0, "trained"), Layer(40, 4, 0.5, "frozen"), Layer(40, 17, -1.25))
SHAPE = (2, 35, INPUTS)


# ------------------------------------------------------------------------------------------- stock, turbo, and inputs


def stock_projection(x, weight, bias, a, b, scaling, out=None, dropped=None):
    """`lora.Linear.forward` of PEFT on F.linear, whose result is in `out` for 4-bit layers.

    dropped: the input of the adapter after its dropout, from that before it.
    """
    result = F.linear(x, weight, bias)
    result = result.to(out or result.dtype)
    dtype = result.dtype
    if a is not None:
        x = x.to(a.dtype)
        result = result + F.linear(F.linear(x if dropped is None else dropped(x), a), b) * scaling
    return result.to(dtype)


def parts_of(tensors, i) -> list[torch.Tensor | None]:
    return [tensors.get(f"{name}{i}") for name in ("weight", "bias", "a", "b")]


def stock_of(layers, out=None, masks=None):
    """`masks`: for each layer the kept elements of its adapter's input."""

    def dropped_of(i):
        if masks is None or not layers[i].dropout:
            return None
        return lambda x: x * masks[i].view(x.shape) / (1 - layers[i].dropout)

    def stock(x, **tensors):
        return tuple(
            stock_projection(x, *parts_of(tensors, i), layer.scaling, out, dropped_of(i))
            for i, layer in enumerate(layers)
        )

    return stock


def projections_of(layers, tensors, expand=None) -> tuple[Projection, ...]:
    return tuple(
        Projection(*parts_of(tensors, i), layer.scaling, layer.dropout, expand) for i, layer in enumerate(layers)
    )


def turbo_of(layers, low=None, out=None, expand=None):
    return lambda x, **tensors: lora_linears(x, projections_of(layers, tensors, expand), low, out)


def under_autocast(function, dtype=BF16):
    """As Accelerate runs a model in mixed precision."""

    def wrapped(x, **tensors):
        with torch.autocast(x.device.type, dtype):
            return function(x, **tensors)

    return wrapped


def tensors_of(layer: Layer, i: int, inputs: int, device, dtype, low) -> dict[str, Any]:
    """Weight, bias and adapter of one projection, such that all parts of its output are of one size."""
    outputs, rank = layer.outputs, layer.rank
    tensors: dict[str, Any] = {
        f"weight{i}": randn(outputs, inputs, device=device, dtype=dtype, seed=10 * i + 1, scale=inputs**-0.5)
    }
    if layer.bias:
        bias = randn(outputs, device=device, dtype=dtype, seed=10 * i + 2)
        tensors[f"bias{i}"] = bias.requires_grad_(layer.bias == "trained")
    if rank:
        a = randn(rank, inputs, device=device, dtype=low, seed=10 * i + 3, scale=inputs**-0.5)
        b = randn(outputs, rank, device=device, dtype=low, seed=10 * i + 4, scale=rank**-0.5)
        tensors |= {f"a{i}": a.requires_grad_(), f"b{i}": b.requires_grad_()}
    return tensors


def inputs_of(layers: Sequence[Layer], device, dtype=BF16, low=None, shape=SHAPE, weight=None) -> dict[str, Any]:
    """`low`: dtype of the adapters; `weight`: that of weights and biases."""
    tensors = {"x": randn(*shape, device=device, dtype=dtype).requires_grad_()}
    for i, layer in enumerate(layers):
        tensors |= tensors_of(layer, i, shape[-1], device, weight or dtype, low or dtype)
    return tensors


def check(layers, inputs, low=None, out=None) -> Tensors:
    return check_against_stock(turbo_of(layers, low, out), stock_of(layers, out), stock_of(layers), inputs)


def assert_close(actual, expected, inputs, bound, output_gradients=None) -> None:
    """Outputs and gradients of two functions differ by no more than `bound`, relatively."""
    runs = [outputs_and_gradients(function, inputs, output_gradients) for function in (actual, expected)]
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        assert relative_error(value, runs[1][name].double()) < bound, name


def assert_right(turbo, exact, inputs) -> None:
    """Near float64, for float32 inputs of so few elements that the rule, which is about averages, is left to luck."""
    wide = {n: v if v is None else v.detach().double().requires_grad_(v.requires_grad) for n, v in inputs.items()}
    actual, expected = outputs_and_gradients(turbo, inputs), outputs_and_gradients(exact, wide)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert relative_error(value, expected[name]) < 100 * torch.finfo(FP32).eps, name


def shape_for(device):
    return (2, 700, 1000) if device.type == "cuda" else SHAPE


# ------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_one_dtype(device, dtype, layers):
    check(layers, inputs_of(layers, device, dtype, shape=shape_for(device)))


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
def test_float64(device, layers):
    """Stock is the reference here, so that its own rounding is not known: a few ulp."""
    inputs = inputs_of(layers, device, FP64)
    assert_close(turbo_of(layers), stock_of(layers), inputs, 1e-15)


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_adapters_in_float32(device, dtype, layers):
    """PEFT without autocast: it keeps adapters in float32 and casts their input."""
    run = check(layers, inputs_of(layers, device, dtype, FP32, shape_for(device)), FP32)
    assert run["y0"].dtype == run["dx"].dtype == dtype
    assert run["da0"].dtype == run["db0"].dtype == FP32


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
@pytest.mark.parametrize(("x", "weight", "adapter"), [(BF16, BF16, FP32), (FP32, FP32, FP32), (FP32, BF16, BF16)])
@pytest.mark.parametrize("compute", [BF16, FP16])
def test_autocast(device, compute, x, weight, adapter, layers):
    """Everything in the dtype of autocast; gradients as their owners. The caller casts x."""
    inputs = inputs_of(layers, device, x, adapter, shape_for(device), weight)
    turbo = turbo_of(layers, compute)
    run = check_against_stock(
        lambda x, **tensors: turbo(x.to(compute), **tensors),
        under_autocast(stock_of(layers), compute),
        stock_of(layers),
        inputs,
    )
    assert run["y0"].dtype == compute
    assert (run["dx"].dtype, run["da0"].dtype, run["db0"].dtype) == (x, adapter, adapter)


@pytest.mark.parametrize("frozen", [(), ("a1",)], ids=["stacked", "one by one"])
def test_gradients_of_adapters_are_not_rounded(device, frozen):
    """Stock rounds them to the dtype of the product before it gives them in that of the adapter."""
    inputs = inputs_of(QKV, device, BF16, FP32)
    for name in frozen:
        inputs[name].requires_grad_(False)
    run = outputs_and_gradients(turbo_of(QKV, BF16), inputs)
    for name in {"da0", "da1", "da2", "db0", "db1", "db2"} & run.keys():
        assert relative_error(run[name].to(BF16), run[name].double()) > 1e-3, name


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
@pytest.mark.parametrize(("dtype", "out"), [(BF16, FP32), (FP16, FP32), (FP32, BF16), (BF16, FP16), (FP32, FP64)])
def test_other_output_dtype(device, dtype, out, layers):
    """4-bit layers give what they compute in the dtype of their input."""
    run = check(layers, inputs_of(layers, device, dtype, shape=shape_for(device)), out=out)
    assert run["y0"].dtype == out


def test_adapters_of_several_dtypes(device):
    inputs = inputs_of(QKV, device)
    for name in ("a1", "b1", "b2"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    run = check_against_stock(turbo_of(QKV), under_autocast(stock_of(QKV)), stock_of(QKV), inputs)
    dtypes = {name: run[name].dtype for name in ("da0", "db0", "da1", "db1", "da2", "db2")}
    assert dtypes == {"da0": BF16, "db0": BF16, "da1": FP32, "db1": FP32, "da2": BF16, "db2": FP32}


@pytest.mark.filterwarnings("ignore:.*out_dtype.*")
def test_float16_range(device):
    """The largest numbers of float16 pass through, as in stock."""
    inputs = inputs_of(ONE, device, FP16)
    inputs["x"] = (inputs["x"].detach() * 2000).requires_grad_()
    run = check(ONE, inputs)
    assert run["y0"].isfinite().all()
    assert run["y0"].abs().max() > 10000


# -------------------------------------------------------------------------------------------------- ranks and adapters


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("rank", [1, 4, 16, 17, 64, 100, 512])
def test_ranks(device, rank, dtype):
    layers = (Layer(133, rank),)
    check(layers, inputs_of(layers, device, dtype, shape=shape_for(device)))


@pytest.mark.parametrize("ranks", [(100, 1), (16, 16, 16), (512, 8, 64), (64, 0, 0), (0, 33), (0, 0, 0), (0,)])
def test_ranks_of_several(device, ranks):
    """Also where all have one scaling, and one product makes all S."""
    layers = tuple(Layer(outputs, rank) for outputs, rank in zip((130, 40, 24), ranks, strict=False))
    check(layers, inputs_of(layers, device))


@pytest.mark.parametrize("scaling", [0.0, 1.0, -3.0, 1e-3])
def test_scalings(device, scaling):
    layers = (Layer(133, 16, scaling), Layer(40, 16, 1.0))
    check(layers, inputs_of(layers, device, FP32))


def test_rank_zero(device):
    """An adapter of no rows, as pruning may leave one."""
    inputs = inputs_of(QKV, device)
    inputs["a1"] = inputs["a1"].detach()[:0].requires_grad_()
    inputs["b1"] = inputs["b1"].detach()[:, :0].requires_grad_()
    run = check(QKV, inputs)
    assert (run["da1"].shape, run["db1"].shape) == ((0, INPUTS), (40, 0))


def test_fresh_adapter(device):
    """B starts as zeros: the output is that of the frozen layer, bit for bit, and A has no gradient yet."""
    inputs = inputs_of(ONE, device)
    inputs["b0"] = torch.zeros_like(inputs["b0"]).requires_grad_()
    run = check(ONE, inputs)
    assert torch.equal(run["y0"], F.linear(inputs["x"], inputs["weight0"]).detach())
    assert not run["da0"].any()
    assert run["db0"].any()


@pytest.mark.parametrize(
    "trained",
    [("x",), ("a0",), ("b0",), ("bias0",), ("a0", "b0"), ("a0", "b2"), ("b0", "a1", "b1"), ("x", "bias0", "a2")],
    ids="+".join,
)
@pytest.mark.parametrize("low", [BF16, FP32])
def test_partly_trained(device, low, trained):
    inputs = inputs_of(QKV, device, BF16, low)
    for name, value in inputs.items():
        value.requires_grad_(name in trained)
    run = check(QKV, inputs, low)
    assert run.keys() == {"y0", "y1", "y2"} | {"d" + name for name in trained}


def test_nothing_trained(device):
    inputs = {name: value.detach() for name, value in inputs_of(QKV, device).items()}
    assert not any(y.requires_grad for y in turbo_of(QKV)(**inputs))
    check(QKV, inputs)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_unused_outputs(device, used):
    """What stock leaves without a gradient has none: an optimizer passes over it, and does not decay it."""
    inputs = inputs_of(QKV, device, FP32)
    differentiated = {name: value for name, value in inputs.items() if value.requires_grad}

    def gradients(function, **tensors):
        outputs = [function(**tensors)[i] for i in used]
        leaves = [tensors[name] for name in differentiated]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)

    turbo, stock = gradients(turbo_of(QKV), **inputs), gradients(stock_of(QKV), **inputs)
    for name, actual, expected in zip(differentiated, turbo, stock, strict=True):
        assert (actual is None) == (expected is None), name
        if expected is not None:
            assert relative_error(actual, expected.double()) < 1e-5, name


# ------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("shape", [(1, 1), (9,), (1, 64), (3, 7), (2, 1, 5, 33), (64, 128), (65, 129), (130, 16)])
def test_shapes(device, shape):
    layers = (Layer(1, 3), Layer(128, 16, bias="trained"), Layer(129, 1))
    assert_right(turbo_of(layers), stock_of(layers), inputs_of(layers, device, FP32, shape=shape))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize(("dtype", "low"), [(BF16, BF16), (BF16, FP32), (FP32, FP32), (FP16, FP16)])
@pytest.mark.parametrize("shape", [(4096, 4096), (3, 1001, 2048)])
def test_real_shapes(cuda, shape, dtype, low, rank):
    layers = (Layer(4096, rank), Layer(1024, rank, bias="trained"), Layer(1024, rank))
    check(layers, inputs_of(layers, cuda, dtype, low, shape), low)


@pytest.mark.parametrize("low", [BF16, FP32])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, INPUTS)])
def test_no_rows(device, shape, dropout, low):
    layers = tuple(layer._replace(dropout=dropout) for layer in QKV)
    inputs = inputs_of(layers, device, low=low, shape=shape)
    run = outputs_and_gradients(turbo_of(layers, low), inputs)
    assert run["dx"].shape == shape
    for i, layer in enumerate(layers):
        assert run[f"y{i}"].shape == (*shape[:-1], layer.outputs)
        assert not run[f"da{i}"].any()
        assert not run[f"db{i}"].any()
    assert not run["dbias0"].any()


VIEWS = {
    "columns": lambda x: x[..., 8:40],
    "rows": lambda x: x[:, 1:],
    "transposed": lambda x: x.transpose(0, 1),
    "columns, transposed": lambda x: x[..., 8:40].transpose(0, 1),
    "every second element": lambda x: x[..., ::2],
    "last dimension is not innermost": lambda x: x.transpose(1, 2),
    "two dimensions, columns": lambda x: x[0, :, 8:40],
    "two dimensions, every second element": lambda x: x[0, :, ::2],
    "two dimensions, transposed": lambda x: x[0].t(),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("view", VIEWS)
def test_layouts(device, view, dropout):
    """Any view gives the numbers of its contiguous copy, dropout included."""
    view_of = VIEWS[view]
    leaf = randn(3, 20, 64, device=device, dtype=FP32).requires_grad_()
    layers = (Layer(24, 4, dropout=dropout), Layer(40, 1))
    inputs = inputs_of(layers, device, FP32, shape=tuple(view_of(leaf).shape)) | {"x": leaf}

    def run(prepare):
        torch.manual_seed(3)
        turbo = turbo_of(layers)
        return outputs_and_gradients(lambda x, **tensors: turbo(prepare(view_of(x)), **tensors), inputs)

    actual, expected = run(lambda x: x), run(lambda x: x.contiguous())
    for name, value in actual.items():
        # The library's products may add up in another order for other strides.
        assert relative_error(value, expected[name].double()) < 1e-6, name


@pytest.mark.parametrize("low", [BF16, FP32])
@pytest.mark.parametrize("start", ["expanded", "one row", "transposed", "strided"])
def test_incoming_gradient_layouts(device, start, low):
    """Gradients arrive in any layout: expanded from a sum, transposed from attention, sliced from a concatenation."""
    inputs = inputs_of(QKV, device, BF16, low, (3, 4, INPUTS))

    def start_of(index, y):
        if start == "expanded":
            return torch.ones((), device=device, dtype=y.dtype).expand(y.shape)
        if start == "one row":
            return randn(y.shape[-1], device=device, dtype=y.dtype).expand(y.shape)
        if start == "transposed":
            return randn(*y.mT.shape, device=device, dtype=y.dtype).mT
        return randn(*y.shape[:-1], 2 * y.shape[-1], device=device, dtype=y.dtype)[..., : y.shape[-1]]

    actual = outputs_and_gradients(turbo_of(QKV, low), inputs, start_of)
    expected = outputs_and_gradients(turbo_of(QKV, low), inputs, lambda i, y: start_of(i, y).contiguous())
    for name, value in actual.items():
        # The library's products may add up in another order for other strides.
        assert relative_error(value, expected[name].double()) < max(1e-6, torch.finfo(value.dtype).eps), name


@pytest.mark.parametrize("low", [BF16, FP32])
@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
def test_layouts_of_adapters_and_weights(device, layers, low):
    """Transposed, as some initialisations leave adapters, or slices of a flat buffer, as sharding does."""
    inputs = inputs_of(layers, device, BF16, low)

    def transposed(x, **tensors):
        tensors = {n: t if t.ndim == 1 else t.t().contiguous().t() for n, t in tensors.items()}
        return turbo_of(layers, low)(x, **tensors)

    def sliced(x, **tensors):
        tensors = {n: t if t.ndim == 1 else F.pad(t, (3, 2))[:, 3:-2] for n, t in tensors.items()}
        return turbo_of(layers, low)(x, **tensors)

    for function in (transposed, sliced):
        check_against_stock(function, stock_of(layers), stock_of(layers), inputs)


# ------------------------------------------------------------------------------------------------------ packed weights


class FakePacked:
    """int8 weights with one scale per row; remembers what it was asked to expand."""

    def __init__(self, scales: dict[int, torch.Tensor]):
        self._scales = scales  # by the outputs of the layer
        self.calls: list[tuple[int, torch.dtype, bool]] = []

    def __call__(self, weight, dtype, backward):
        assert weight.dtype == torch.int8
        self.calls.append((weight.shape[0], dtype, backward))
        return (weight.float() * self._scales[weight.shape[0]]).to(dtype)


def packed_inputs_of(layers, inputs) -> tuple[dict[str, Any], FakePacked]:
    """Replaces dense weights in `inputs` by those that the packed ones stand for, and gives the packed ones."""
    packed, scales = {}, {}
    for i, layer in enumerate(layers):
        weight = inputs[f"weight{i}"]
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        packed[f"weight{i}"] = (weight.float() / scale).round().to(torch.int8)
        scales[layer.outputs] = scale
        inputs[f"weight{i}"] = (packed[f"weight{i}"].float() * scale).to(weight.dtype)
    return packed, FakePacked(scales)


@pytest.mark.parametrize("x_trained", [False, True])
def test_expand(device, x_trained):
    """The same bits as from the dense weight, which is made once for each product."""
    layers = (Layer(133, 16, bias="trained"), Layer(40, 4), Layer(24, 0))
    inputs = inputs_of(layers, device)
    inputs["x"].requires_grad_(x_trained)
    packed, expand = packed_inputs_of(layers, inputs)
    dense_run = outputs_and_gradients(turbo_of(layers), inputs)
    packed_run = outputs_and_gradients(turbo_of(layers, expand=expand), inputs | packed)
    assert_same_bits(packed_run, dense_run)
    widths = [layer.outputs for layer in layers]
    expected = [(width, BF16, False) for width in widths] + [(width, BF16, True) for width in widths] * x_trained
    assert expand.calls == expected


def test_expand_of_some(device):
    """Packed and dense ones in one group, and `expand` of several shapes of packed weights."""
    layers = (Layer(133, 16), Layer(40, 4))
    inputs = inputs_of(layers, device)
    packed, expand = packed_inputs_of(layers, inputs)

    def mixed(x, **tensors):
        first, second = projections_of(layers, tensors)
        flat = packed["weight0"].view(-1, 1)
        shaped = first._replace(weight=flat, expand=lambda w, *rest: expand(w.view(133, INPUTS), *rest))
        return lora_linears(x, (shaped, second))

    assert_same_bits(outputs_and_gradients(mixed, inputs), outputs_and_gradients(turbo_of(layers), inputs))
    assert len(expand.calls) == 2


# ------------------------------------------------------------------------------------------- memory, bits and recompute


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_same_bits_twice_and_backward_twice(device, dropout, layers):
    layers = tuple(layer._replace(dropout=dropout) for layer in layers)
    inputs = inputs_of(layers, device, shape=shape_for(device))
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(outputs_and_gradients(turbo_of(layers), inputs))
    assert_same_bits(*runs)
    outputs = turbo_of(layers)(**inputs)
    leaves = [value for value in inputs.values() if value.requires_grad]
    starts = [torch.ones_like(y) for y in outputs]
    grads = [torch.autograd.grad(outputs, leaves, starts, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


def saved_by(function: Callable[[], Any]) -> list[torch.Tensor]:
    """The tensors that autograd keeps after `function`, each storage once."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = function()
    del result
    return list({t.untyped_storage().data_ptr(): t for t in kept}.values())


def storages(tensors) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("low", [BF16, FP32])
@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
def test_saved_tensors(device, layers, low, dropout):
    """x, S, and adapters: in one tensor where they had to be cast or stacked. Frozen weights are there anyway.

    Nothing is kept for the masks of dropout.
    """
    layers = tuple(layer._replace(dropout=dropout) for layer in layers)
    inputs = inputs_of(layers, device, BF16, FP32, (2, 100, INPUTS))
    kept = saved_by(lambda: turbo_of(layers, low)(**inputs))
    as_they_are = low == FP32 and len(layers) == 1
    given = [inputs["x"], inputs["a0"], inputs["b0"]] if as_they_are else [inputs["x"]]
    assert storages(given) == storages(kept) & storages(inputs.values())
    own = [t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() not in storages(given)]
    rank = sum(layer.rank for layer in layers)
    budget = [200 * rank * low.itemsize]
    if not as_they_are:
        budget.append((rank * INPUTS + sum(layer.rank * layer.outputs for layer in layers)) * low.itemsize)
    assert sorted(own) == sorted(budget)


@pytest.mark.parametrize("layers", [ONE, QKV, (QKV[0], Layer(24, 0), QKV[1])], ids=["one", "three", "two of three"])
def test_large_matrices_are_copied_only_if_they_must_be(device, layers, monkeypatch):
    """A_i that are stacked; B_i stay where they are. The numbers are the same."""
    inputs = inputs_of(layers, device, BF16, BF16)
    expected = outputs_and_gradients(turbo_of(layers), inputs)
    monkeypatch.setattr(module, "_COPIED_AT_MOST", 0)
    assert_same_bits(outputs_and_gradients(turbo_of(layers), inputs), expected)
    kept = saved_by(lambda: turbo_of(layers)(**inputs))
    adapted = [i for i, layer in enumerate(layers) if layer.rank]
    given = [inputs["x"], *(inputs[f"b{i}"] for i in adapted), *([inputs["a0"]] if len(adapted) == 1 else [])]
    assert storages(given) == storages(kept) & storages(inputs.values())
    own = [t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() not in storages(given)]
    rank, rows = sum(layer.rank for layer in layers), inputs["x"].numel() // INPUTS
    assert sum(own) == 2 * rank * (rows + (INPUTS if len(adapted) > 1 else 0))


def test_a_weight_changed_before_backward_is_an_error(device):
    """Dense ones, as in autograd; a packed weight that was expanded is nobody's input."""
    inputs = inputs_of(QKV, device)
    outputs = turbo_of(QKV)(**inputs)
    with torch.no_grad():
        inputs["weight1"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(output.sum() for output in outputs).backward()


def test_nothing_saved_without_gradients(device):
    with torch.no_grad():
        assert not saved_by(lambda: turbo_of(QKV)(**inputs_of(QKV, device)))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_reads_nothing_before_it_is_written(device, dropout):
    """With all fresh memory full of NaN: products into parts of a buffer leave no part out that is read."""
    layers = tuple(layer._replace(dropout=dropout) for layer in (*QKV[:2], Layer(24, 0)))
    inputs = inputs_of(layers, device)
    inputs["a1"].requires_grad_(False)
    torch.manual_seed(0)
    expected = outputs_and_gradients(turbo_of(layers), inputs)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        actual = outputs_and_gradients(turbo_of(layers), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in actual.values())
    if device.type == "cpu":  # deterministic products of a GPU may be other ones
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nan_stays_in_its_row(device, dropout):
    layers = tuple(layer._replace(dropout=dropout) for layer in QKV)
    inputs = inputs_of(layers, device, shape=(70, INPUTS))
    with torch.no_grad():
        inputs["x"][69, 3] = float("nan")
    run = outputs_and_gradients(turbo_of(layers), inputs)
    for i in range(3):
        assert run[f"y{i}"][:69].isfinite().all()
        assert run[f"y{i}"][69].isnan().all()
    assert run["dx"].isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpoint(device, dropout, use_reentrant):
    """Recomputation gives the same bits: the masks are those of the forward pass."""
    layers = tuple(layer._replace(dropout=dropout) for layer in QKV)
    inputs = inputs_of(layers, device)

    def recomputed(x, **tensors):
        # A reentrant checkpoint differentiates positional arguments only.
        def positional(x, *values):
            return turbo_of(layers)(x, **dict(zip(tensors, values, strict=True)))

        return checkpoint(positional, x, *tensors.values(), use_reentrant=use_reentrant)

    runs = []
    for function in (turbo_of(layers), recomputed):
        torch.manual_seed(5)
        runs.append(outputs_and_gradients(function, inputs))
    assert_same_bits(*runs)


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
def test_gradcheck(layers):
    small = tuple(layer._replace(outputs=3 + i, rank=1 + i) for i, layer in enumerate(layers))
    inputs = inputs_of(small, torch.device("cpu"), FP64, shape=(2, 2, 5))
    names = [name for name, value in inputs.items() if value.requires_grad]

    def function(*values):
        return turbo_of(small)(**inputs | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names])
    x, a, b = (inputs[name] for name in ("x", "a0", "b0"))
    y = torch.randn(2, 2, 3, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *tensors: lora_add(*tensors, scaling=0.7), (y, x, a, b))


def test_no_double_backward(device):
    inputs = inputs_of(ONE, device, shape=(3, 8))
    (y,) = turbo_of(ONE)(**inputs)
    added = lora_add(y.detach().requires_grad_(), inputs["x"], inputs["a0"], inputs["b0"])
    for output in (y, added):
        start = torch.ones_like(output).requires_grad_()
        (dx,) = torch.autograd.grad(output, inputs["x"], start, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            dx.sum().backward()


# ------------------------------------------------------------------------------------------------------------- dropout


def mask_of(rows: int, width: int, dropout: float, seed: int, device) -> torch.Tensor:
    """The elements that dropout keeps for a seed, as float32."""
    ones = torch.ones(rows, width, device=device)
    return (torch.ops.hf_turbo.lora_dropout(ones, dropout, seed) != 0).float()


def philox(counter: torch.Tensor, seed: int, rounds: int = 7) -> torch.Tensor:
    """Philox-4x32 of `counter` (int64 below 2^32; the upper words are 0): [..., 4] as int64 below 2^32."""
    word = 2**32 - 1
    c = [counter, *[torch.zeros_like(counter)] * 3]
    key = [seed & word, seed >> 32]

    def multiply(factor: int, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The upper and the lower word of a product, by halves: it does not fit int64."""
        low, high = (number & 0xFFFF) * factor, (number >> 16) * factor
        total = (low >> 16) + high
        return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(rounds):
        high_0, low_0 = multiply(0xD2511F53, c[0])
        high_2, low_2 = multiply(0xCD9E8D57, c[2])
        c = [high_2 ^ c[1] ^ key[0], low_2, high_0 ^ c[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return torch.stack(c, -1)


def test_philox_itself():
    """The known answer of the authors' library (Random123) for ten rounds of zeros."""
    words = philox(torch.zeros((), dtype=torch.int64), 0, rounds=10)
    assert [f"{word:08x}" for word in words.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 2])
@pytest.mark.parametrize(("rows", "width"), [(70, 260), (3, 1), (5, 7), (64, 128)])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_masks_are_philox(device, dropout, rows, width, seed):
    """Kernels draw the documented numbers, whatever their tiles: the interpreter and every GPU the same masks."""
    if not module.use_triton(torch.ones(1, device=device)):
        pytest.skip("the torch reference draws from torch's generator")
    quads = -(-width // 4)
    counter = torch.arange(rows * quads, device=device).view(rows, quads)
    numbers = philox(counter, seed).view(rows, 4 * quads)[:, :width]
    assert torch.equal(mask_of(rows, width, dropout, seed, device), (numbers >= round(dropout * 2**32)).float())


def draw(dropout: float, seed: int, device, rows=0, width=0) -> torch.Tensor:
    """A large mask. The interpreter would take minutes: the twin that the test above compares it to draws for it."""
    large = 4096 if device.type == "cuda" else 600
    rows, width = rows or large, width or large
    if device.type == "cuda" or not _launch.INTERPRET:
        return mask_of(rows, width, dropout, seed, device)
    quads = -(-width // 4)
    numbers = philox(torch.arange(rows * quads).view(rows, quads), seed).view(rows, 4 * quads)[:, :width]
    return (numbers >= round(dropout * 2**32)).float()


# All draws below have fixed seeds: a bound of five standard deviations either holds or it does not.


@pytest.mark.parametrize("dropout", [0.001, 0.05, 0.1, 0.5, 0.9, 0.99])
def test_fraction_kept(device, dropout):
    """In the whole, and with the variance of independent draws in rows, in columns and in each word of a counter."""
    mask = draw(dropout, 1234, device).double()
    rows, width = mask.shape
    variance = dropout * (1 - dropout)
    assert abs(mask.mean() - (1 - dropout)) < 5 * (variance / mask.numel()) ** 0.5
    for word in range(4):
        assert abs(mask[:, word::4].mean() - (1 - dropout)) < 5 * (variance / (mask.numel() // 4)) ** 0.5
    for sums, count in ((mask.sum(0), rows), (mask.sum(1), width)):
        squares = (sums - count * (1 - dropout)).square() / (count * variance)
        # The fourth moment of a sum of such draws gives the variance of the square.
        spread = (2 + (1 - 6 * variance) / (count * variance)) ** 0.5
        assert abs(squares.mean() - 1) < 5 * spread / len(sums) ** 0.5


def correlation(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Of two masks, and five standard deviations of it for independent ones."""
    first, second = first.double().flatten(), second.double().flatten()
    first, second = first - first.mean(), second - second.mean()
    return ((first @ second) / (first.norm() * second.norm())).item(), 5 * len(first) ** -0.5


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_elements_are_independent(device, dropout):
    """Of neighbours in rows and columns, one counter's words, tiles, the same place of other seeds and layers."""
    mask = draw(dropout, 99, device)
    rows, width = mask.shape
    pairs = {f"columns, {lag} apart": (mask[:, lag:], mask[:, :-lag]) for lag in (1, 2, 3, 4, 8, 64, 128)}
    pairs |= {f"rows, {lag} apart": (mask[lag:], mask[:-lag]) for lag in (1, 2, 32, 64, 128)}
    pairs |= {"diagonal": (mask[1:, 1:], mask[:-1, :-1])}
    for seed in (98, 100, 99 + 4, 99 ^ 2**30):
        pairs[f"seed {seed}"] = (mask, draw(dropout, seed, device))
    narrower = draw(dropout, 100, device, rows, width - 4)
    pairs["another width and seed"] = (mask.flatten()[: narrower.numel()], narrower)
    for name, (first, second) in pairs.items():
        found, bound = correlation(first, second)
        assert abs(found) < bound, f"{name}: {found:.5f}, bound {bound:.5f}"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_kept_elements_are_scaled(device, dropout, dtype):
    x = randn(70, 260, device=device, dtype=dtype) + 8
    y = torch.ops.hf_turbo.lora_dropout(x, dropout, 7)
    kept = y != 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(kept.float(), mask_of(70, 260, dropout, 7, device))
    expected = x.double()[kept] / (1 - dropout)
    # Rounded once, after a factor that is rounded in float32.
    ulp = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(FP32).eps
    assert ((y.double()[kept] - expected).abs() <= ulp * expected.abs()).all()


def identity_inputs(device, count=3, width=96, rows=80):
    """Projections that let their masks be seen: y_i is dropout_i(x), since W is 0 and A and B are 1."""
    layers = (Layer(width, width, 1.0, dropout=0.4),) * count
    eye = torch.eye(width, device=device)
    inputs: dict[str, Any] = {"x": torch.ones(rows, width, device=device).requires_grad_()}
    for i in range(count):
        inputs[f"weight{i}"] = torch.zeros_like(eye)
        inputs |= {f"a{i}": eye.clone().requires_grad_(), f"b{i}": eye.clone().requires_grad_()}
    return layers, inputs


def test_one_mask_in_outputs_and_gradients(device):
    """The mask that the output shows is that of dx and dA; each projection has its own."""
    layers, inputs = identity_inputs(device)
    starts = [randn(80, 96, device=device, dtype=FP32, seed=i) for i in range(3)]
    run = outputs_and_gradients(turbo_of(layers), inputs, lambda i, y: starts[i])
    dx = sum(starts[i].double() * run[f"y{i}"].double() for i in range(3))
    assert relative_error(run["dx"], dx) < 1e-6
    for i in range(3):
        y = run[f"y{i}"].double()
        assert relative_error(run[f"da{i}"], starts[i].double().t() @ y) < 1e-6
        assert relative_error(run[f"db{i}"], starts[i].double().t() @ y) < 1e-6
        found, bound = correlation(run[f"y{i}"] != 0, run[f"y{(i + 1) % 3}"] != 0)
        assert abs(found) < bound


def test_draws_follow_the_seed(device):
    """The same after the same manual_seed, others after another one, others in each call and projection."""
    layers, inputs = identity_inputs(device, count=2)

    def call(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return [y.detach() != 0 for y in turbo_of(layers)(**inputs)]

    first, next_call, again, other = call(0), call(), call(0), call(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    masks = [*first, *next_call, *other]
    for i, mask in enumerate(masks):
        assert abs(mask.double().mean() - 0.6) < 5 * (0.24 / mask.numel()) ** 0.5
        for another in masks[:i]:
            found, bound = correlation(mask, another)
            assert abs(found) < bound


def test_draws_of_many_calls(device):
    """Seeds of successive calls repeat no more often than chance has it."""
    torch.manual_seed(0)
    seeds = [module.draw_seed(device) for _ in range(3000)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) >= 2995


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_generator_moves_only_for_dropout(device, dropout):
    """Without dropout the random numbers of the rest of the model are those of stock."""
    layers = (QKV[0]._replace(dropout=dropout),)
    inputs = inputs_of(layers, device)

    def state():
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    before = state()
    (y,) = turbo_of(layers)(**inputs)
    assert torch.equal(before, state()) == (dropout == 0)
    before = state()
    y.sum().backward()
    assert torch.equal(before, state())


@pytest.mark.parametrize("layers", [ONE, QKV], ids=["one", "three"])
@pytest.mark.parametrize(
    ("dtype", "low"), [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32), (FP64, FP64), (FP64, FP32), (FP32, FP64)]
)
def test_dropout_is_as_exact_as_stock(device, dtype, low, layers, monkeypatch):
    """Given the same masks. One projection of several may be without dropout."""
    dropouts = (0.1, 0.0, 0.6) if len(layers) > 1 else (0.3,)
    layers = tuple(layer._replace(dropout=p) for layer, p in zip(layers, dropouts, strict=True))
    seeds = [11 + i for i, p in enumerate(dropouts) if p]
    left = iter(seeds)
    monkeypatch.setattr(module, "draw_seed", lambda device: next(left))
    inputs = inputs_of(layers, device, dtype, low)
    rows, width = inputs["x"].shape[:-1].numel(), inputs["x"].shape[-1]
    given = iter(seeds)
    ones = torch.ones(rows, width, device=device, dtype=low)
    masks = [torch.ops.hf_turbo.lora_dropout(ones, p, next(given)) != 0 if p else None for p in dropouts]
    stock = stock_of(layers, masks=masks)
    if FP64 in (dtype, low):
        assert_close(turbo_of(layers, low), stock, inputs, 1e-15 if dtype == low else 1e-6)
    else:
        check_against_stock(turbo_of(layers, low), stock, stock, inputs)
    assert next(left, None) is None


def test_mean_over_draws(device):
    """The mean over many draws, which are rows of one call here, tends to the output without dropout."""
    layers = (Layer(40, 8, dropout=0.3),)
    inputs = {name: value.detach() for name, value in inputs_of(layers, device, FP32, shape=(1, 32)).items()}
    expected = stock_of(layers)(**inputs)[0].double()
    torch.manual_seed(0)
    count = 2000
    draws = turbo_of(layers)(**inputs | {"x": inputs["x"].repeat(count, 1)})[0].double()
    assert draws.std(0).min() > 0
    deviations = (draws.mean(0) - expected[0]) / (draws.std(0) / count**0.5)
    assert deviations.abs().max() < 5


# ------------------------------------------------------------------------------------------------ beside another layer


def stock_add(scaling, mask=None, dropout=0.0):
    def stock(y, x, a, b):
        x = x.to(a.dtype)
        if mask is not None:
            x = x * mask.view(x.shape) / (1 - dropout)
        return (y + F.linear(F.linear(x, a), b) * scaling).to(y.dtype)

    return stock


def add_inputs_of(device, dtype=BF16, low=None, rank=16, shape=SHAPE, y=None) -> dict[str, Any]:
    tensors = inputs_of((Layer(133, rank),), device, dtype, low, shape)
    start = randn(*shape[:-1], 133, device=device, dtype=y or dtype, seed=5)
    return {"y": start.requires_grad_(), "x": tensors["x"], "a": tensors["a0"], "b": tensors["b0"]}


@pytest.mark.parametrize("rank", [1, 16, 100])
@pytest.mark.parametrize(
    ("y", "x", "low"), [(BF16, BF16, BF16), (BF16, BF16, FP32), (FP16, FP16, FP16), (FP32, FP32, FP32)]
)
def test_add(device, y, x, low, rank):
    def turbo(y, x, a, b):
        return lora_add(y, x, a, b, 1.5, low=low)

    inputs = add_inputs_of(device, x, low, rank, shape_for(device), y)
    check_against_stock(turbo, stock_add(1.5), stock_add(1.5), inputs)


@pytest.mark.parametrize(("y", "x", "adapter"), [(FP32, BF16, FP32), (BF16, FP32, FP32), (FP32, FP32, BF16)])
def test_add_under_autocast(device, y, x, adapter):
    def turbo(y, x, a, b):
        return lora_add(y, x.to(BF16), a, b, 1.5, low=BF16)

    def stock(y, x, a, b):
        with torch.autocast(device.type, BF16):
            return stock_add(1.5)(y, x, a, b)

    check_against_stock(turbo, stock, stock_add(1.5), add_inputs_of(device, x, adapter, y=y))


@pytest.mark.parametrize("trained", [("y",), ("x",), ("a",), ("b",), ("x", "b"), ("a", "b")], ids="+".join)
def test_add_partly_trained(device, trained):
    inputs = add_inputs_of(device)
    for name, value in inputs.items():
        value.requires_grad_(name in trained)
    run = check_against_stock(lora_add, stock_add(1.0), stock_add(1.0), inputs)
    assert run.keys() == {"y"} | {"d" + name for name in trained}


@pytest.mark.parametrize(("dtype", "low"), [(BF16, BF16), (BF16, FP32), (FP32, FP32), (FP64, FP32)])
def test_add_with_dropout(device, dtype, low, monkeypatch):
    monkeypatch.setattr(module, "draw_seed", lambda device: 21)
    inputs = add_inputs_of(device, dtype, low)
    ones = torch.ones(70, INPUTS, device=device, dtype=low)
    mask = torch.ops.hf_turbo.lora_dropout(ones, 0.3, 21) != 0

    def turbo(y, x, a, b):
        return lora_add(y, x, a, b, 1.5, 0.3, low)

    stock = stock_add(1.5, mask, 0.3)
    if dtype == FP64:
        assert_close(turbo, stock, inputs, 1e-6)
    else:
        check_against_stock(turbo, stock, stock, inputs)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "columns"])
def test_add_layouts(device, layout):
    """y and the incoming gradient in any layout; y is left as it was."""
    view = {
        "expanded": lambda t: t[:1].expand(3, -1, -1),
        "transposed": lambda t: t.transpose(0, 1),
        "columns": lambda t: t[..., 3:],
    }[layout]
    leaf = randn(3, 20, 64, device=device, dtype=BF16).requires_grad_()
    shape = view(leaf).shape
    inputs = {
        "y": leaf,
        "x": randn(*shape[:-1], 24, device=device, dtype=BF16, seed=1).requires_grad_(),
        "a": randn(4, 24, device=device, dtype=BF16, seed=2).requires_grad_(),
        "b": randn(shape[-1], 4, device=device, dtype=BF16, seed=3).requires_grad_(),
    }

    def start_of(index, y):
        return view(randn(3, 20, 64, device=device, dtype=BF16, seed=4))

    actual = outputs_and_gradients(lambda y, **rest: lora_add(view(y), **rest), inputs, start_of)
    expected = outputs_and_gradients(
        lambda y, **rest: lora_add(view(y).contiguous(), **rest), inputs, lambda i, y: start_of(i, y).contiguous()
    )
    for name, value in actual.items():
        assert relative_error(value, expected[name].double()) < 1e-3, name


def test_add_saves_little(device):
    inputs = add_inputs_of(device)
    for dropout in (0.0, 0.5):
        kept = saved_by(lambda dropout=dropout: lora_add(**inputs, dropout=dropout))
        assert storages([inputs["x"], inputs["a"], inputs["b"]]) <= storages(kept)
        assert inputs["y"].untyped_storage().data_ptr() not in storages(kept)
        assert [t.shape for t in kept if t.data_ptr() not in storages(inputs.values())] == [(70, 16)]


@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, INPUTS)])
def test_add_no_rows(device, shape):
    run = outputs_and_gradients(lora_add, add_inputs_of(device, shape=shape))
    assert (run["y"].shape, run["dx"].shape) == ((*shape[:-1], 133), shape)
    assert not run["da"].any()


# ------------------------------------------------------------------------------------------------ operators and errors


def test_opcheck(device):
    check_op = torch.library.opcheck
    y, s = randn(5, 40, device=device, dtype=BF16), randn(5, 24, device=device, dtype=BF16, seed=1)
    b = randn(40, 8, device=device, dtype=BF16, seed=2)
    ops = torch.ops.hf_turbo
    for columns in (s[:, 8:16], s[:, :8].contiguous()):
        check_op(ops.low_rank_add_.default, (y.clone(), columns, b, 0.0, 0))
        check_op(ops.low_rank_add_.default, (y.clone(), columns, b, 0.5, 3))
    check_op(ops.low_rank_add_.default, (y.clone(), s[:, :8], b.t().contiguous().t(), 0.0, 0))
    check_op(ops.lora_dropout.default, (y, 0.5, 3))
    check_op(ops.lora_pack.default, ([y, s.float(), b[:, :3]], BF16))


@pytest.mark.parametrize("count", range(1, 7))
def test_pack(device, count):
    """Up to six tensors of any size, dtype and layout, one of them empty."""
    dtypes = (BF16, FP32, FP16, FP32, BF16, FP32)
    sizes = ((3, 5), (70, 40), (0, 7), (1, 1), (33, 2), (5000,))
    tensors = [randn(*s, device=device, dtype=d, seed=i) for i, (s, d) in enumerate(zip(sizes, dtypes, strict=True))]
    tensors[1] = tensors[1].t()
    tensors = tensors[:count]
    for dtype in (BF16, FP32):
        expected = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
        assert torch.equal(torch.ops.hf_turbo.lora_pack(tensors, dtype), expected)
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    assert len(expected) == ends[-1]


def test_pack_keeps_specials(device):
    """NaN and infinities stay where they are."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0], device=device)
    packed = torch.ops.hf_turbo.lora_pack([torch.ones(3, device=device), special, torch.ones(2, device=device)], FP16)
    expected = torch.cat([torch.ones(3, device=device), special, torch.ones(2, device=device)]).half()
    assert torch.equal(packed.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


def test_compile(device):
    """The same bits. The graph breaks: torch.compile does not take products into part of a buffer."""
    inputs = inputs_of(QKV, device, BF16, FP32, (2, 3, 16))
    function = turbo_of(QKV, BF16)
    compiled = torch.compile(function, backend="aot_eager")
    assert_same_bits(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs))


def test_refusals(device):
    x = randn(3, 8, device=device, dtype=BF16)
    weight, a, b = (randn(*s, device=device, dtype=BF16) for s in ((6, 8), (2, 8), (6, 2)))
    bias = weight[:, 0].clone()
    good = Projection(weight, bias, a, b)
    bad = {
        "at most|three": [good] * 4,
        "one": [],
        "frozen": [good._replace(weight=weight.clone().requires_grad_())],
        "weight must": [good._replace(weight=weight[:, :7])],
        "bias must": [good._replace(bias=bias[:5])],
        "neither": [good._replace(a=None)],
        "both": [good._replace(b=None)],
        "a must be": [good._replace(a=a[:, :7])],
        "and b": [good._replace(b=b[:, :1])],
        "rows": [good._replace(b=b[:5])],
        "dropout": [good, good._replace(dropout=1.0)],
        "in \\[0, 1\\)": [good._replace(dropout=-0.1)],
    }
    for match, projections in bad.items():
        with pytest.raises(TypeError if match == "frozen" else ValueError, match=match):
            lora_linears(x, projections)
    with pytest.raises(ValueError, match="weight must"):
        lora_linears(x, [good._replace(weight=weight.flatten())])
    lora_linears(x, [good])


def test_add_refusals(device):
    x, y = randn(3, 8, device=device, dtype=BF16), randn(3, 6, device=device, dtype=BF16)
    a, b = randn(2, 8, device=device, dtype=BF16), randn(6, 2, device=device, dtype=BF16)
    with pytest.raises(ValueError, match="y must"):
        lora_add(y[:, :5], x, a, b)
    with pytest.raises(ValueError, match="y must"):
        lora_add(y[:2], x, a, b)
    with pytest.raises(ValueError, match="a must"):
        lora_add(y, x, a[:, :7], b)
    with pytest.raises(ValueError, match="a must"):
        lora_add(y, x, a, b[:, :1])
    with pytest.raises(ValueError, match="dropout"):
        lora_add(y, x, a, b, dropout=1.0)


# --------------------------------------------------------------------------------------------------------- GPUs only


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_more_than_2_31_elements(cuda, dropout):
    """The last rows of a huge tensor are those of a small one, but for dropout, which is as dense there."""
    rows, width = 2**31 // 8192 + 8, 8192
    y = torch.zeros(rows, width, device=cuda, dtype=BF16)
    s = torch.ones(rows, 16, device=cuda, dtype=BF16)
    b = randn(width, 16, device=cuda, dtype=BF16)
    y[-8:] = randn(8, width, device=cuda, dtype=BF16, seed=1)
    expected = y[-8:].clone()
    torch.ops.hf_turbo.low_rank_add_(y, s, b, dropout, 3)
    if not dropout:
        torch.ops.hf_turbo.low_rank_add_(expected, s[-8:], b, 0.0, 0)
        assert torch.equal(y[-8:], expected)
        return
    # The first change of the last rows: kept elements are those of the same mask of a tensor of ones.
    kept = y[-8:] != expected
    del y
    ones = torch.ones(rows, width, device=cuda, dtype=BF16)
    mask = torch.ops.hf_turbo.lora_dropout(ones, dropout, 3)[-8:] != 0
    assert (kept & ~mask).sum() == 0
    assert (mask & ~kept).sum() < 0.02 * mask.numel()  # additions too small to be seen
    assert abs(mask.double().mean() - 0.5) < 5 * 0.5 * mask.numel() ** -0.5


@pytest.mark.gpu
def test_other_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1)
    check(QKV, inputs_of(QKV, other, BF16, FP32), FP32)
    layers = tuple(layer._replace(dropout=0.5) for layer in QKV)
    assert all(y.device == other for y in turbo_of(layers)(**inputs_of(layers, other)))
