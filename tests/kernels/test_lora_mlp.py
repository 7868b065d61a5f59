from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_turbo.kernels import lora
from hf_turbo.kernels.glu import ACTIVATIONS
from hf_turbo.kernels.lora import Projection
from hf_turbo.kernels.lora_mlp import lora_gated_mlp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.helpers import (
    Inputs,
    Tensors,
    assert_same_bits,
    check_against_stock,
    outputs_and_gradients,
    randn,
    relative_error,
)
from tests.kernels.test_glu import STOCK_ACTIVATIONS
from tests.kernels.test_lora import (
    FakePacked,
    Layer,
    assert_close,
    assert_right,
    packed_inputs_of,
    parts_of,
    projections_of,
    saved_by,
    stock_projection,
    storages,
    tensors_of,
    under_autocast,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Odd sizes, more than a tile of the kernels in each direction.
INPUTS, INNER, OUTPUTS = 75, 69, 40
SHAPE = (2, 35, INPUTS)
SEPARATE = (Layer(INNER, 16), Layer(INNER, 4, 0.5), Layer(OUTPUTS, 17, -1.25))
PACKED = (Layer(2 * INNER, 16), Layer(OUTPUTS, 17, -1.25))
BOTH = pytest.mark.parametrize("layers", [SEPARATE, PACKED], ids=["separate", "packed"])


def with_biases(layers, bias="trained"):
    return tuple(layer._replace(bias=bias) for layer in layers)


# ------------------------------------------------------------------------------------------- stock, turbo, and inputs


def stock_of(layers, activation="silu", out=None):
    """LlamaMLP, or Phi3MLP with packed projections, of PEFT's layers; `out` is the dtype of the last."""

    def stock(x, **tensors):
        *hidden, down = [(*parts_of(tensors, i), layer.scaling) for i, layer in enumerate(layers)]
        outputs = [stock_projection(x, *each) for each in hidden]
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return stock_projection(STOCK_ACTIVATIONS[activation](gate) * up, *down, out)

    return stock


def turbo_of(layers, activation="silu", low=None, out=None, expand=None):
    return lambda x, **tensors: lora_gated_mlp(x, projections_of(layers, tensors, expand), activation, low, out)


def inputs_of(layers, device, dtype=BF16, low=None, shape=SHAPE, weight=None) -> Inputs:
    """`low`: dtype of the adapters; `weight`: that of weights and biases."""
    tensors: dict[str, Any] = {"x": randn(*shape, device=device, dtype=dtype, scale=2.0).requires_grad_()}
    inner = layers[0].outputs if len(layers) == 3 else layers[0].outputs // 2
    for i, layer in enumerate(layers):
        width = inner if layer is layers[-1] else shape[-1]
        tensors |= tensors_of(layer, i, width, device, weight or dtype, low or dtype)
    return tensors


def check(layers, inputs, activation="silu", low=None, out=None) -> Tensors:
    turbo, stock = turbo_of(layers, activation, low, out), stock_of(layers, activation, out)
    return check_against_stock(turbo, stock, stock_of(layers, activation), inputs)


def layers_for(device, layers):
    """At sizes for the device."""
    if device.type != "cuda":
        return layers
    *hidden, down = layers
    inner = 2816 if len(layers) == 3 else 2 * 2816
    return (*[layer._replace(outputs=inner) for layer in hidden], down._replace(outputs=1000))


def shape_for(device):
    return (2, 700, 1000) if device.type == "cuda" else SHAPE


# -------------------------------------------------------------------------------------------- activations and dtypes


@BOTH
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation, dtype, layers):
    layers = layers_for(device, layers)
    check(layers, inputs_of(layers, device, dtype, shape=shape_for(device)), activation)


@BOTH
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64(device, activation, layers):
    layers = with_biases(layers)
    inputs = inputs_of(layers, device, FP64)
    assert_close(turbo_of(layers, activation), stock_of(layers, activation), inputs, 2e-15)


@BOTH
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_adapters_in_float32(device, dtype, layers):
    """PEFT without autocast: it keeps adapters in float32 and casts their input."""
    layers = layers_for(device, layers)
    run = check(layers, inputs_of(layers, device, dtype, FP32, shape_for(device)), low=FP32)
    assert run["y"].dtype == run["dx"].dtype == dtype
    assert run["da0"].dtype == run["db0"].dtype == FP32


@BOTH
@pytest.mark.parametrize(("x", "weight", "adapter"), [(BF16, BF16, FP32), (FP32, FP32, FP32), (FP32, BF16, BF16)])
@pytest.mark.parametrize("compute", [BF16, FP16])
def test_autocast(device, compute, x, weight, adapter, layers):
    """Everything in the dtype of autocast; gradients as their owners. The caller casts x."""
    layers = with_biases(layers_for(device, layers))
    inputs = inputs_of(layers, device, x, adapter, shape_for(device), weight)
    turbo = turbo_of(layers, low=compute)
    run = check_against_stock(
        lambda x, **tensors: turbo(x.to(compute), **tensors),
        under_autocast(stock_of(layers), compute),
        stock_of(layers),
        inputs,
    )
    assert run["y"].dtype == compute
    assert (run["dx"].dtype, run["dbias0"].dtype, run["da0"].dtype, run["db0"].dtype) == (x, weight, adapter, adapter)


@BOTH
def test_gradients_of_adapters_are_not_rounded(device, layers):
    """Stock rounds them to the dtype of the product before it gives them in that of the adapter."""
    inputs = inputs_of(layers, device, BF16, FP32)
    run = outputs_and_gradients(turbo_of(layers, low=BF16), inputs)
    for name in inputs:
        if name[0] == "a" or (name[0] == "b" and "bias" not in name):
            assert relative_error(run["d" + name].to(BF16), run["d" + name].double()) > 1e-3, name


@BOTH
@pytest.mark.parametrize(("dtype", "out"), [(BF16, FP32), (FP16, FP32), (FP32, BF16), (FP32, FP64)])
def test_other_output_dtype(device, dtype, out, layers):
    """4-bit layers give what they compute in the dtype of their input."""
    layers = layers_for(device, layers)
    run = check(layers, inputs_of(layers, device, dtype, shape=shape_for(device)), out=out)
    assert run["y"].dtype == out


# ------------------------------------------------------------------------------------------------- ranks and adapters


@pytest.mark.parametrize("rank", [1, 4, 16, 17, 64, 100, 512])
@BOTH
def test_ranks(device, layers, rank):
    layers = tuple(layer._replace(rank=rank) for layer in layers_for(device, layers))
    check(layers, inputs_of(layers, device, shape=shape_for(device)))


@pytest.mark.parametrize(
    "ranks",
    [(16, 16, 16), (100, 3, 8), (1, 64, 130), (0, 16, 4), (16, 0, 4), (16, 4, 0), (0, 0, 16), (16, 0, 0), (0, 0, 0)],
)
@pytest.mark.parametrize("low", [BF16, FP32])
def test_ranks_of_several(device, low, ranks):
    """Adapters on any of the projections, of any ranks."""
    layers = tuple(layer._replace(rank=rank) for layer, rank in zip(SEPARATE, ranks, strict=True))
    check(layers, inputs_of(layers, device, low=low), low=low)


@pytest.mark.parametrize("ranks", [(0, 16), (16, 0), (0, 0), (4, 100)])
def test_ranks_of_packed(device, ranks):
    layers = tuple(layer._replace(rank=rank) for layer, rank in zip(PACKED, ranks, strict=True))
    check(layers, inputs_of(layers, device))


@BOTH
def test_one_scaling(device, layers):
    layers = tuple(layer._replace(scaling=0.5) for layer in layers)
    check(layers, inputs_of(layers, device))


@BOTH
@pytest.mark.parametrize("scaling", [0.0, -3.0])
def test_scalings(device, scaling, layers):
    """One projection after the other with another scaling than the rest."""
    for i in range(len(layers)):
        changed = tuple(layer._replace(scaling=scaling if i == j else 1.5) for j, layer in enumerate(layers))
        check(changed, inputs_of(changed, device, shape=(5, INPUTS)))


@BOTH
@pytest.mark.parametrize("bias", ["frozen", "trained"])
@pytest.mark.parametrize("low", [BF16, FP32])
def test_biases(device, low, bias, layers):
    layers = with_biases(layers, bias)
    run = check(layers, inputs_of(layers, device, low=low), low=low)
    assert ("dbias0" in run) == (bias == "trained")


@pytest.mark.parametrize(
    "trained",
    [("x",), ("a0",), ("b0",), ("a1", "b1"), ("a2",), ("b2",), ("bias0",), ("bias2",), ("x", "a2"), ("b0", "a1", "b2")],
    ids="+".join,
)
@pytest.mark.parametrize("low", [BF16, FP32])
def test_partly_trained(device, low, trained):
    layers = with_biases(SEPARATE)
    inputs = inputs_of(layers, device, low=low)
    for name, value in inputs.items():
        value.requires_grad_(name in trained)
    run = check(layers, inputs, low=low)
    assert run.keys() == {"y"} | {"d" + name for name in trained}


@pytest.mark.parametrize("trained", [("x",), ("a0",), ("b0", "a1"), ("bias1",), ("bias0", "b1")], ids="+".join)
def test_packed_partly_trained(device, trained):
    layers = with_biases(PACKED)
    inputs = inputs_of(layers, device)
    for name, value in inputs.items():
        value.requires_grad_(name in trained)
    assert check(layers, inputs).keys() == {"y"} | {"d" + name for name in trained}


def test_nothing_trained(device):
    inputs = {name: value.detach() for name, value in inputs_of(SEPARATE, device).items()}
    assert not turbo_of(SEPARATE)(**inputs).requires_grad
    check(SEPARATE, inputs)


# ------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("shape", "inner", "outputs"),
    [
        ((1, 1), 1, 1),
        ((9,), 7, 3),
        ((2, 1, 5, 33), 65, 129),
        ((64, 16), 128, 64),
        ((130, 16), 16, 16),
        ((1, 64), 31, 2),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_shapes(device, packed, shape, inner, outputs):
    hidden = (Layer(2 * inner, 3),) if packed else (Layer(inner, 3), Layer(inner, 1))
    layers = with_biases((*hidden, Layer(outputs, 5)))
    assert_right(turbo_of(layers), stock_of(layers), inputs_of(layers, device, FP32, shape=shape))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize(("dtype", "low"), [(BF16, BF16), (BF16, FP32), (FP32, FP32), (FP16, FP16)])
@pytest.mark.parametrize(("shape", "inner"), [((4096, 4096), 14336), ((3, 1001, 2048), 5461)])
def test_real_shapes(cuda, shape, inner, dtype, low, rank):
    layers = (Layer(inner, rank), Layer(inner, rank), Layer(shape[-1], rank))
    check(layers, inputs_of(layers, cuda, dtype, low, shape), low=low)


@BOTH
@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, INPUTS)])
def test_no_rows(device, shape, layers):
    layers = with_biases(layers)
    inputs = inputs_of(layers, device, shape=shape)
    run = outputs_and_gradients(turbo_of(layers, low=FP32), inputs)
    assert (run["y"].shape, run["dx"].shape) == ((*shape[:-1], OUTPUTS), shape)
    for name, value in inputs.items():
        if value.requires_grad:
            assert run["d" + name].shape == value.shape
            assert not run["d" + name].any()


VIEWS = {
    "columns": lambda x: x[..., 8:40],
    "transposed": lambda x: x.transpose(0, 1),
    "every second element": lambda x: x[..., ::2],
    "last dimension is not innermost": lambda x: x.transpose(1, 2),
    "two dimensions, transposed": lambda x: x[0].t(),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


@BOTH
@pytest.mark.parametrize("view", VIEWS)
def test_layouts(device, view, layers):
    """Any view gives the numbers of its contiguous copy."""
    view_of = VIEWS[view]
    leaf = randn(3, 20, 64, device=device, dtype=FP32).requires_grad_()
    inputs = inputs_of(layers, device, FP32, shape=tuple(view_of(leaf).shape)) | {"x": leaf}
    turbo = turbo_of(layers)
    # The library's products may add up in another order for other strides.
    assert_close(
        lambda x, **tensors: turbo(view_of(x), **tensors),
        lambda x, **tensors: turbo(view_of(x).contiguous(), **tensors),
        inputs,
        1e-6,
    )


@BOTH
@pytest.mark.parametrize("low", [BF16, FP32])
@pytest.mark.parametrize("start", ["expanded", "one row", "transposed", "strided"])
def test_incoming_gradient_layouts(device, start, low, layers):
    inputs = inputs_of(layers, device, BF16, low, (3, 4, INPUTS))

    def start_of(index, y):
        if start == "expanded":
            return torch.ones((), device=device, dtype=y.dtype).expand(y.shape)
        if start == "one row":
            return randn(y.shape[-1], device=device, dtype=y.dtype).expand(y.shape)
        if start == "transposed":
            return randn(*y.mT.shape, device=device, dtype=y.dtype).mT
        return randn(*y.shape[:-1], 2 * y.shape[-1], device=device, dtype=y.dtype)[..., : y.shape[-1]]

    actual = outputs_and_gradients(turbo_of(layers, low=low), inputs, start_of)
    expected = outputs_and_gradients(turbo_of(layers, low=low), inputs, lambda i, y: start_of(i, y).contiguous())
    for name, value in actual.items():
        # The library's products may add up in another order for other strides, and roundings to bfloat16 follow.
        assert relative_error(value, expected[name].double()) < 2 * torch.finfo(BF16).eps, name


@pytest.mark.parametrize("ranks", [(16, 4, 17), (0, 16, 0), (16, 0, 0), (0, 0, 16)])
@pytest.mark.parametrize("low", [BF16, FP32])
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_layouts_of_adapters_and_weights(device, layout, low, ranks):
    """Transposed, as some initialisations leave adapters, or slices of a flat buffer, as sharding does."""
    separate = tuple(layer._replace(rank=rank) for layer, rank in zip(SEPARATE, ranks, strict=True))
    packed = tuple(layer._replace(rank=rank) for layer, rank in zip(PACKED, ranks[1:], strict=True))

    def change(tensor):
        if tensor.ndim == 1:
            return tensor
        return tensor.t().contiguous().t() if layout == "transposed" else F.pad(tensor, (3, 2))[:, 3:-2]

    for layers in (separate, packed):
        turbo = turbo_of(layers, low=low)
        check_against_stock(
            lambda x, turbo=turbo, **tensors: turbo(x, **{name: change(value) for name, value in tensors.items()}),
            stock_of(layers),
            stock_of(layers),
            inputs_of(layers, device, BF16, low),
        )


# ------------------------------------------------------------------------------------------------------ packed weights


def packed_of(layers, device) -> tuple[Inputs, Any, list[FakePacked]]:
    """Inputs with dense weights, a function that takes them but computes with packed ones, and what expands those."""
    inputs, packed, expands = inputs_of(layers, device), {}, []
    for i, layer in enumerate(layers):
        one = {"weight0": inputs[f"weight{i}"]}
        packed_one, expand = packed_inputs_of((layer,), one)
        inputs[f"weight{i}"], packed[f"weight{i}"] = one["weight0"], packed_one["weight0"]
        expands.append(expand)

    def turbo(x, **tensors):
        projections = zip(projections_of(layers, tensors | packed), layers, expands, strict=True)
        return lora_gated_mlp(
            x, tuple(p._replace(out_features=layer.outputs, expand=expand) for p, layer, expand in projections), "silu"
        )

    return inputs, turbo, expands


@BOTH
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("x_trained", [False, True])
def test_expand(device, x_trained, adapters, layers):
    """The same bits as from the dense weights, each made once for each product."""
    layers = with_biases(layers if adapters else tuple(layer._replace(rank=0) for layer in layers))
    inputs, turbo, expands = packed_of(layers, device)
    inputs["x"].requires_grad_(x_trained)
    assert_same_bits(outputs_and_gradients(turbo, inputs), outputs_and_gradients(turbo_of(layers), inputs))
    *hidden, down = [expand.calls for expand in expands]
    for layer, calls in zip(layers, hidden, strict=False):
        assert calls == [(layer.outputs, BF16, False)] + [(layer.outputs, BF16, True)] * x_trained
    assert down == [(OUTPUTS, BF16, False), (OUTPUTS, BF16, True)]


@BOTH
def test_recompute_leaves_out_the_last_product(device, layers):
    """Non-reentrant checkpointing stops at the last saved tensor; the product with Wd comes after it."""
    inputs, turbo, expands = packed_of(layers, device)

    def recomputed(x, **tensors):
        return checkpoint(turbo, x, **tensors, use_reentrant=False)

    assert_same_bits(outputs_and_gradients(recomputed, inputs), outputs_and_gradients(turbo_of(layers), inputs))
    *hidden, down = [[backward for _, _, backward in expand.calls] for expand in expands]
    assert down == [False, True]
    assert all(calls == [False, False, True] for calls in hidden)


# ------------------------------------------------------------------------------------------- memory, bits and recompute


@BOTH
def test_same_bits_twice_and_backward_twice(device, layers):
    layers = layers_for(device, layers)
    inputs = inputs_of(layers, device, shape=shape_for(device))
    assert_same_bits(*[outputs_and_gradients(turbo_of(layers), inputs) for _ in range(2)])
    y = turbo_of(layers)(**inputs)
    leaves = [value for value in inputs.values() if value.requires_grad]
    grads = [torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


@BOTH
@pytest.mark.parametrize("low", [BF16, FP32])
def test_saved_tensors(device, low, layers):
    """x, gate and up, both S, and adapters: in one tensor where they had to be cast or stacked. Not h."""
    inputs = inputs_of(layers, device, BF16, FP32, (2, 100, INPUTS))
    kept = saved_by(lambda: turbo_of(layers, low=low)(**inputs))
    as_they_are = low == FP32 and len(layers) == 2
    adapters = [inputs[name] for name in inputs if name[0] in "ab"]
    given = storages([inputs["x"], *(adapters if as_they_are else [])])
    assert storages(kept) & storages(inputs.values()) == given
    own = [t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() not in given]
    budget = 200 * 2 * INNER * 2 + 200 * sum(layer.rank for layer in layers) * low.itemsize
    if not as_they_are:
        budget += sum(each.numel() for each in adapters) * low.itemsize
    assert sum(own) == budget
    assert len(own) == len(layers) + (1 if as_they_are else 2)


@BOTH
def test_large_matrices_are_copied_only_if_they_must_be(device, layers, monkeypatch):
    """A of gate and up, which are stacked. The numbers are the same."""
    inputs = inputs_of(layers, device, BF16, BF16)
    expected = outputs_and_gradients(turbo_of(layers), inputs)
    monkeypatch.setattr(lora, "_COPIED_AT_MOST", 0)
    assert_same_bits(outputs_and_gradients(turbo_of(layers), inputs), expected)
    kept = storages(saved_by(lambda: turbo_of(layers)(**inputs)))
    last, stacked = len(layers) - 1, len(layers) == 3
    names = ["x", f"a{last}", *(f"b{i}" for i in range(len(layers))), *([] if stacked else ["a0"])]
    assert kept & storages(inputs.values()) == storages(inputs[name] for name in names)


@BOTH
def test_a_weight_changed_before_backward_is_an_error(device, layers):
    inputs = inputs_of(layers, device)
    y = turbo_of(layers)(**inputs)
    with torch.no_grad():
        inputs["weight1"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class _Zeros(TorchDispatchMode):
    """The shapes of the tensors of zeros that are made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if "zero" in func.__name__:
            self.shapes.append(result.shape)
        return result


@BOTH
def test_backward_makes_no_zeros(layers):
    """Autograd would fill one tensor for each output that has no gradient, as large as h."""
    inputs = inputs_of(layers, torch.device("cpu"))
    y = turbo_of(layers)(**inputs)
    with _Zeros() as zeros:
        y.backward(torch.ones_like(y))
    assert zeros.shapes == []


@BOTH
def test_reads_nothing_before_it_is_written(device, layers):
    """With all fresh memory full of NaN: products into parts of a buffer leave no part out that is read."""
    inputs = inputs_of(layers, device)
    inputs["a0"].requires_grad_(False)
    expected = outputs_and_gradients(turbo_of(layers), inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        actual = outputs_and_gradients(turbo_of(layers), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in actual.values())
    if device.type == "cpu":  # deterministic products of a GPU may be other ones
        assert_same_bits(actual, expected)


@BOTH
def test_nan_stays_in_its_row(device, layers):
    inputs = inputs_of(layers, device, shape=(70, INPUTS))
    with torch.no_grad():
        inputs["x"][69, 3] = float("nan")
    run = outputs_and_gradients(turbo_of(layers), inputs)
    assert run["y"][:69].isfinite().all()
    assert run["y"][69].isnan().all()
    assert run["dx"][:69].isfinite().all()


@BOTH
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(device, use_reentrant, layers):
    inputs = inputs_of(layers, device)

    def recomputed(x, **tensors):
        # A reentrant checkpoint differentiates positional arguments only.
        def positional(x, *values):
            return turbo_of(layers)(x, **dict(zip(tensors, values, strict=True)))

        return checkpoint(positional, x, *tensors.values(), use_reentrant=use_reentrant)

    assert_same_bits(outputs_and_gradients(recomputed, inputs), outputs_and_gradients(turbo_of(layers), inputs))


@BOTH
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, layers):
    sizes = (3, 3, 2) if len(layers) == 3 else (6, 2)
    small = tuple(layer._replace(outputs=n, rank=2, bias="trained") for layer, n in zip(layers, sizes, strict=True))
    inputs = inputs_of(small, torch.device("cpu"), FP64, shape=(2, 2, 5))
    names = [name for name, value in inputs.items() if value.requires_grad]

    def function(*values):
        return turbo_of(small, activation)(**inputs | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names])


def test_no_double_backward(device):
    inputs = inputs_of(SEPARATE, device, shape=(3, 8))
    y = turbo_of(SEPARATE)(**inputs)
    (dx,) = torch.autograd.grad(y, inputs["x"], torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


# ------------------------------------------------------------------------------------------------ operators and errors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("adapters", [True, False])
def test_opcheck(device, packed, adapters):
    """Also: dh becomes the h of the forward pass."""
    gate = randn(5, 80 if packed else 40, device=device, dtype=BF16)
    up = None if packed else randn(5, 40, device=device, dtype=BF16, seed=1)
    s, b = randn(5, 24, device=device, dtype=BF16, seed=2), randn(80, 16, device=device, dtype=BF16, seed=3)
    parts = (s[:, :16], b[:40], s[:, :16] if packed else None, b[40:] if packed else None)
    down = (s[:, 8:16], randn(8, 40, device=device, dtype=BF16, seed=4))
    if not adapters:
        parts, down = (None,) * 4, (None, None)
    ops = torch.ops.hf_turbo
    torch.library.opcheck(ops.lora_glu.default, (gate, up, *parts, "silu"))
    h = ops.lora_glu(gate, up, *parts, "silu")
    for keep_h in (False, True):
        dh = randn(5, 40, device=device, dtype=BF16, seed=5)
        arguments = (gate, up, *parts, *down, keep_h, "silu")
        torch.library.opcheck(ops.lora_glu_backward.default, (dh.clone(), *arguments))
        before = dh.clone()
        ops.lora_glu_backward(dh, *arguments)
        if keep_h:
            # In other tiles the sums may be rounded in another order.
            assert relative_error(dh, h.double()) < torch.finfo(BF16).eps
        else:
            assert torch.equal(dh, before)


def test_compile(device):
    """The same bits. The graph breaks: torch.compile does not take products into part of a buffer."""
    inputs = inputs_of(SEPARATE, device, BF16, FP32, (2, 3, 16))
    function = turbo_of(SEPARATE, low=BF16)
    compiled = torch.compile(function, backend="aot_eager")
    assert_same_bits(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs))


def test_refusals(device):
    inputs = {name: value.detach() for name, value in inputs_of(SEPARATE, device).items()}
    x = inputs.pop("x")
    good = projections_of(SEPARATE, inputs)
    gate, up, down = good
    with pytest.raises(ValueError, match="activation"):
        lora_gated_mlp(x, good, "relu")
    for count in (good[:1], (*good, down)):
        with pytest.raises(ValueError, match="gate_up and down"):
            lora_gated_mlp(x, count, "silu")
    with pytest.raises(ValueError, match="dropout"):
        lora_gated_mlp(x, (gate, up, down._replace(dropout=0.1)), "silu")

    def changed(i: int, **changes: Any) -> tuple[Projection, ...]:
        return tuple(each._replace(**changes) if i == j else each for j, each in enumerate(good))

    for i, projection in enumerate(good):
        weight, _, a, b = projection[:4]
        with pytest.raises(TypeError, match="frozen"):
            lora_gated_mlp(x, changed(i, weight=weight.clone().requires_grad_()), "silu")
        wrong = {
            "weight": {"weight": weight[:, :7]},
            "bias": {"bias": weight[:5, 0]},
            "neither": {"a": None},
            "both": {"b": None},
            "a must": {"a": a[:, :7]},
            "and b": {"b": b[:, :1]},
            "rows": {"b": b[:5]},
            "dropout": {"dropout": 1.0},
        }
        for match, changes in wrong.items():
            with pytest.raises(ValueError, match=match):
                lora_gated_mlp(x, changed(i, **changes), "silu")
    # gate and up of different sizes, and an odd packed one.
    with pytest.raises(ValueError, match="gate and up"):
        lora_gated_mlp(x, (gate, up._replace(weight=up.weight[:7], b=up.b[:7]), down), "silu")
    with pytest.raises(ValueError, match="even"):
        lora_gated_mlp(x, (gate, down), "silu")

    def expand(weight, dtype, backward):
        return weight.to(dtype)

    with pytest.raises(ValueError, match="out_features"):
        lora_gated_mlp(x, changed(2, a=None, b=None, expand=expand), "silu")
    lora_gated_mlp(x, changed(2, a=None, b=None, expand=expand, out_features=OUTPUTS), "silu")
    lora_gated_mlp(x, good, "silu")


# ---------------------------------------------------------------------------------------------------------- GPUs only


@pytest.mark.gpu
def test_more_than_2_31_elements(cuda):
    """The last rows of huge tensors are those of small ones."""
    rows, width = 2**31 // 8192 + 8, 8192
    gate = torch.zeros(rows, width, device=cuda, dtype=BF16)
    gate[-8:] = randn(8, width, device=cuda, dtype=BF16)
    s = torch.ones(rows, 16, device=cuda, dtype=BF16)
    b = randn(width, 16, device=cuda, dtype=BF16, seed=1)
    ops = torch.ops.hf_turbo
    h = ops.lora_glu(gate, gate, s, b, s, b, "silu")
    small, s_small = gate[-8:].clone(), s[-8:]
    expected = ops.lora_glu(small, small, s_small, b, s_small, b, "silu")
    assert torch.equal(h[-8:], expected)
    dh = expected.clone()
    expected_gradients = ops.lora_glu_backward(dh, small, small, s_small, b, s_small, b, None, None, True, "silu")
    gradients = ops.lora_glu_backward(h, gate, gate, s, b, s, b, None, None, True, "silu")
    assert torch.equal(h[-8:], dh)
    assert all(torch.equal(each[-8:], small) for each, small in zip(gradients, expected_gradients, strict=True))


@pytest.mark.gpu
def test_other_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    check(SEPARATE, inputs_of(SEPARATE, torch.device("cuda", 1), BF16, FP32), low=FP32)
