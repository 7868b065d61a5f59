from __future__ import annotations

import importlib.util
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hf_turbo.kernels.dequantize import Nested, dequantize_4bit, dequantize_int8

from tests.kernels.helpers import randn

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")

# The tables of the QLoRA paper and of bitsandbytes, in float32.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_POSITIVE = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODES = {"nf4": NF4, "fp4": _FP4_POSITIVE + tuple(-value for value in _FP4_POSITIVE)}  # the latter with -0.0


def random_4bit(shape, device, blocksize=64, quant_type="nf4", nested_blocksize=None) -> dict[str, Any]:
    """Any codes and scales: the tensors of a quantized weight, those of `nested` under names that start with it."""
    generator = torch.Generator(device).manual_seed(0)
    n = math.prod(shape)
    blocks = -(-n // blocksize)
    packed = torch.randint(256, ((n + 1) // 2, 1), generator=generator, device=device, dtype=torch.uint8)
    code = torch.tensor(CODES[quant_type], device=device)
    if nested_blocksize is None:
        return {"packed": packed, "absmax": randn(blocks, device=device, dtype=FP32).abs(), "code": code}
    return {
        "packed": packed,
        "absmax": torch.randint(256, (blocks,), generator=generator, device=device, dtype=torch.uint8),
        "code": code,
        "nested_code": randn(256, device=device, dtype=FP32, seed=1).sort().values,
        "nested_absmax": randn(-(-blocks // nested_blocksize), device=device, dtype=FP32, seed=2, scale=0.02).abs(),
        "nested_offset": torch.tensor(0.0312, device=device),
    }


def nested_of(tensors, blocksize) -> Nested | None:
    if "nested_code" not in tensors:
        return None
    return Nested(tensors["nested_code"], tensors["nested_absmax"], tensors["nested_offset"], blocksize)


def turbo_of(shape, dtype=BF16, blocksize=64, nested_blocksize=256, out=None):
    """dequantize_4bit of the tensors of `random_4bit`; `out` makes the tensor to fill."""

    def turbo(packed, absmax, code, **nested):
        levels = nested_of(nested, nested_blocksize)
        target = None if out is None else out(packed.device)
        return dequantize_4bit(packed, absmax, code, blocksize, shape, dtype, nested=levels, out=target)

    return turbo


def exact_of(shape, blocksize=64, nested_blocksize=256, dtype=None):
    """The formula in the dtype of the code table, rounded to `dtype`, if given, at the end."""

    def exact(packed, absmax, code, **nested):
        n = math.prod(shape)
        packed = packed.flatten().long()
        element = torch.arange(n, device=packed.device)
        byte = packed[element // 2]
        nibble = torch.where(element % 2 == 0, byte // 16, byte % 16)
        if nested:
            block = torch.arange(len(absmax), device=packed.device)
            scaled = nested["nested_code"][absmax.long()] * nested["nested_absmax"][block // nested_blocksize]
            absmax = scaled + nested["nested_offset"]
        y = (code[nibble] * absmax[element // blocksize]).reshape(shape)
        return y if dtype is None else y.to(dtype)

    return exact


def bitsandbytes_of(shape, dtype=BF16, blocksize=64, quant_type="nf4", nested_blocksize=256):
    """Its dequantize_4bit of the same tensors."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    def stock(packed, absmax, code, **nested):
        state2 = offset = None
        if nested:
            offset, table = nested["nested_offset"], nested["nested_code"]
            state2 = QuantState(nested["nested_absmax"], code=table, blocksize=nested_blocksize, dtype=FP32)
        state = QuantState(absmax, shape, code, blocksize, quant_type, dtype, offset, state2)
        # AVX-512 machines compile their fallback for large blocks.
        compiling = nullcontext() if packed.is_cuda else torch.compiler.set_stance("force_eager")
        with compiling:
            return dequantize_4bit(packed, state)

    return stock


def int8_inputs_of(shape, device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randint(-127, 128, shape, generator=generator, device=device, dtype=torch.int8)
    return {"weight": weight, "scale": randn(shape[0], device=device, dtype=FP32, seed=1).abs() + 0.01}


def stock_int8_of(dtype):
    """The weight as the backward of Linear8bitLt makes it (MatMul8bitLt in bitsandbytes/autograd/_functions.py)."""
    return lambda weight, scale: weight.to(dtype, copy=True).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))


def exact_int8(weight, scale):
    return weight * scale.unsqueeze(1) / 127


def assert_equal_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """With the signs of zeros."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integers = torch.int32 if actual.itemsize == 4 else torch.int16
    assert torch.equal(actual.contiguous().view(integers), expected.contiguous().view(integers))


def check_4bit(shape, device, dtype=BF16, blocksize=64, quant_type="nf4", nested_blocksize=None) -> None:
    """The bits of the formula."""
    tensors = random_4bit(shape, device, blocksize, quant_type, nested_blocksize)
    actual = turbo_of(shape, dtype, blocksize, nested_blocksize)(**tensors)
    expected = exact_of(shape, blocksize, nested_blocksize, dtype)(**tensors)
    assert actual.is_contiguous()
    assert_equal_bits(actual, expected)


@pytest.mark.parametrize("nested_blocksize", [None, 256])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_4bit(device, dtype, quant_type, nested_blocksize):
    check_4bit((67, 200), device, dtype, quant_type=quant_type, nested_blocksize=nested_blocksize)


@pytest.mark.parametrize("nested_blocksize", [None, 16, 256])
@pytest.mark.parametrize("blocksize", [8, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_4bit_blocksizes(device, blocksize, nested_blocksize):
    """Several programs, each in several blocks or in part of one, and rows that end inside blocks."""
    check_4bit((47, 200), device, blocksize=blocksize, nested_blocksize=nested_blocksize)


@pytest.mark.parametrize("nested_blocksize", [None, 3])
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (3, 37), (5, 3, 7), (2, 33, 66), (71, 71)])
def test_4bit_shapes(device, shape, nested_blocksize):
    """Odd counts too: the last nibble has no element."""
    check_4bit(shape, device, nested_blocksize=nested_blocksize)


@needs_bitsandbytes
@pytest.mark.parametrize("nested_blocksize", [None, 256])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 1024, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_4bit_as_bitsandbytes(device, dtype, quant_type, blocksize, nested_blocksize):
    shape = (1000, 4104) if device.type == "cuda" else (2, 4096)
    tensors = random_4bit(shape, device, blocksize, quant_type, nested_blocksize)
    expected = bitsandbytes_of(shape, dtype, blocksize, quant_type)(**tensors)
    actual = turbo_of(shape, dtype, blocksize)(**tensors)
    if quant_type == "fp4" and device.type == "cpu":
        # FP4 has two zeros, and the sign of the second is another by bitsandbytes' code for another processor.
        actual, expected = actual + 0.0, expected + 0.0
    assert_equal_bits(actual, expected)


@needs_bitsandbytes
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("quant_storage", [torch.uint8, BF16, FP32])
def test_4bit_of_a_quantized_weight(device, quant_storage, quant_type, nested):
    """What quantize_4bit makes, as Linear4bit holds it; only the sign of FP4's zero may differ on CUDA."""
    import bitsandbytes.functional as bnb

    weight = randn(24, 256, device=device, dtype=BF16, scale=0.02)
    packed, state = bnb.quantize_4bit(
        weight, compress_statistics=nested, quant_type=quant_type, quant_storage=quant_storage
    )
    assert packed.dtype == quant_storage
    levels = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize) if nested else None
    actual = dequantize_4bit(packed, state.absmax, state.code, state.blocksize, state.shape, BF16, nested=levels)
    assert torch.equal(actual, bnb.dequantize_4bit(packed, state))
    transposed = dequantize_4bit(
        packed.t(), state.absmax, state.code, state.blocksize, state.shape, BF16, nested=levels
    )
    assert torch.equal(actual, transposed)


@pytest.mark.gpu
@needs_bitsandbytes
@pytest.mark.parametrize("nested_blocksize", [None, 256])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (1023, 4095), (1001,)])
def test_4bit_real_shapes(cuda, shape, quant_type, nested_blocksize):
    tensors = random_4bit(shape, cuda, 64, quant_type, nested_blocksize)
    assert_equal_bits(turbo_of(shape)(**tensors), bitsandbytes_of(shape, quant_type=quant_type)(**tensors))


@pytest.mark.gpu
@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_4bit_flushes_subnormals_as_bitsandbytes(cuda, dtype):
    shape = (64, 64)
    tensors = random_4bit(shape, cuda)
    tensors["absmax"] = torch.logspace(-44, -36, 64, device=cuda)
    expected = bitsandbytes_of(shape, dtype)(**tensors)
    assert not expected.any(-1).all()
    assert_equal_bits(turbo_of(shape, dtype)(**tensors), expected)


@pytest.mark.parametrize("blocksize", [64, 256])
def test_nested_absmax_rounds_twice(device, blocksize):
    """A product and a sum, never an fma: numbers that tell the two apart."""
    shape, blocks = (256, blocksize), 256
    tensors = {
        "packed": torch.full((blocks * blocksize // 2,), 0xFF, dtype=torch.uint8, device=device),
        "absmax": torch.arange(256, device=device).to(torch.uint8),
        "code": torch.tensor(NF4, device=device),
        "nested_code": 1 + torch.arange(256, device=device) * 2.0**-23,
        "nested_absmax": torch.tensor([1 + 2.0**-12], device=device),
        "nested_offset": torch.tensor(-1.0, device=device),
    }
    actual = turbo_of(shape, FP32, blocksize)(**tensors)
    product = (tensors["nested_code"].double() * (1 + 2.0**-12)).float()
    assert_equal_bits(actual, (product - 1)[:, None].expand(shape))
    assert not torch.equal(product.double() - 1, tensors["nested_code"].double() * (1 + 2.0**-12) - 1)


OUTS = {
    "contiguous": lambda y: y,
    "pitched by 8": lambda y: torch.full((y.shape[0], y.shape[1] + 8), 7, dtype=y.dtype)[:, : y.shape[1]],
    "pitched by 16": lambda y: torch.full((y.shape[0], y.shape[1] + 16), 7, dtype=y.dtype)[:, : y.shape[1]],
    "pitched by 3": lambda y: torch.full((y.shape[0], y.shape[1] + 3), 7, dtype=y.dtype)[:, : y.shape[1]],
    "not at the start": lambda y: torch.full((y.shape[0], y.shape[1] + 13), 7, dtype=y.dtype)[:, 5 : 5 + y.shape[1]],
    "every second row": lambda y: torch.full((2 * y.shape[0], y.shape[1]), 7, dtype=y.dtype)[::2],
    "transposed": lambda y: torch.full((y.shape[1], y.shape[0]), 7, dtype=y.dtype).t(),
    "every second column": lambda y: torch.full((y.shape[0], 2 * y.shape[1]), 7, dtype=y.dtype)[:, ::2],
}


def check_out(expected: torch.Tensor, name: str, fill: Any) -> None:
    """`fill(out)` returns out, with the bits of `expected`, and leaves the rest of its storage alone."""
    out = OUTS[name](torch.full_like(expected, 7, device="cpu"))
    # The same view on the device, of a storage with room behind it.
    whole = torch.full(
        (out.untyped_storage().nbytes() // out.itemsize + 64,), 7, dtype=out.dtype, device=expected.device
    )
    out = whole.as_strided(out.shape, out.stride(), out.storage_offset())
    assert fill(out) is out
    assert_equal_bits(out, expected)
    out.fill_(7)
    assert (whole == 7).all()


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize(("shape", "dtype"), [((33, 192), BF16), ((30, 136), FP32), ((21, 37), FP16)])
def test_4bit_out(device, shape, dtype, name):
    tensors = random_4bit(shape, device, nested_blocksize=256)
    expected = turbo_of(shape, dtype)(**tensors)
    check_out(expected, name, lambda out: turbo_of(shape, dtype, out=lambda device: out)(**tensors))


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize(("shape", "dtype"), [((9, 192), BF16), ((9, 37), FP32)])
def test_int8_out(device, shape, dtype, name):
    inputs = int8_inputs_of(shape, device)
    expected = dequantize_int8(**inputs, dtype=dtype)
    check_out(expected, name, lambda out: dequantize_int8(**inputs, dtype=dtype, out=out))


def test_4bit_out_of_three_dimensions(device):
    shape = (2, 5, 24)
    tensors = random_4bit(shape, device)
    out = torch.empty(2, 5, 32, device=device, dtype=BF16)[..., :24]
    assert turbo_of(shape, out=lambda device: out)(**tensors) is out
    assert_equal_bits(out, turbo_of(shape)(**tensors))


def test_4bit_unaligned_and_strided_inputs(device):
    shape = (40, 200)
    tensors = random_4bit(shape, device, nested_blocksize=256)
    expected = turbo_of(shape)(**tensors)
    for offset in (1, 2, 4):
        packed = torch.cat([tensors["packed"].new_zeros(offset, 1), tensors["packed"]])[offset:]
        assert_equal_bits(turbo_of(shape)(**tensors | {"packed": packed}), expected)
    strided = {name: torch.stack([value, value], -1)[..., 0] for name, value in tensors.items()}
    assert_equal_bits(turbo_of(shape)(**strided), expected)
    longer = tensors | {"packed": torch.cat([tensors["packed"], tensors["packed"]])}
    assert_equal_bits(turbo_of(shape)(**longer), expected)


def test_4bit_absmax_zero_and_special(device):
    """Blocks of zeros stay zero, and infinite or NaN scales stay in their blocks."""
    shape = (4, 64)
    tensors = random_4bit(shape, device)
    tensors["packed"].fill_(0xF0)
    tensors["absmax"] = torch.tensor([0.0, math.inf, math.nan, 1.0], device=device)
    y = turbo_of(shape)(**tensors)
    assert not y[0].any()
    assert torch.equal(y[1], torch.tensor([math.inf, -math.inf], device=device).repeat(32).to(BF16))
    assert y[2].isnan().all()
    assert torch.equal(y[3], torch.tensor([1.0, -1.0], device=device).repeat(32).to(BF16))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", [(5, 64), (3, 37), (2, 4100), (1, 1)])
def test_int8(device, shape, dtype):
    """The bits of both places where bitsandbytes does it."""
    inputs = int8_inputs_of(shape, device)
    actual = dequantize_int8(**inputs, dtype=dtype)
    assert_equal_bits(actual, stock_int8_of(dtype)(**inputs))
    actual = dequantize_int8(**inputs, dtype=dtype, scale_first=False)
    weight, scale = inputs.values()
    assert_equal_bits(actual, (weight * scale.view(-1, 1) * 7.874015718698502e-3).to(dtype))


@needs_bitsandbytes
def test_int8_as_bitsandbytes(device):
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    weight, scale, _ = int8_vectorwise_quant(randn(33, 136, device=device, dtype=FP16))
    actual = dequantize_int8(weight, scale, FP32, scale_first=False)
    assert_equal_bits(actual, int8_vectorwise_dequant(weight, scale))


def test_int8_strided_weight(device):
    weight, scale = int8_inputs_of((6, 80), device).values()
    for view in (weight[:, 3:67], weight[::2], weight.t()[:6], weight[:, ::2]):
        expected = dequantize_int8(view.contiguous(), scale[: len(view)], BF16)
        assert_equal_bits(dequantize_int8(view, scale[: len(view)], BF16), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 11008)])
def test_int8_real_shapes(cuda, shape):
    inputs = int8_inputs_of(shape, cuda)
    assert_equal_bits(dequantize_int8(**inputs, dtype=BF16), stock_int8_of(BF16)(**inputs))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (2, 0)])
def test_empty(device, shape):
    tensors = random_4bit(shape, device)
    out = torch.empty(shape, device=device, dtype=BF16)
    assert turbo_of(shape)(**tensors).shape == shape
    assert turbo_of(shape, out=lambda device: out)(**tensors) is out
    if len(shape) == 2:
        inputs = int8_inputs_of(shape, device)
        assert dequantize_int8(**inputs, dtype=BF16).shape == shape
        assert dequantize_int8(**inputs, dtype=BF16, out=out) is out


@pytest.mark.parametrize("nested_blocksize", [None, 256])
def test_opcheck(device, nested_blocksize):
    shape = (6, 64)
    tensors = random_4bit(shape, device, nested_blocksize=nested_blocksize)
    packed, absmax, code, *nested = tensors.values()
    quantized = (packed.flatten(), absmax, code, 64, *(nested or [None] * 3), nested_blocksize or 1)
    out = torch.empty(6, 80, device=device, dtype=BF16)[:, :64]
    torch.library.opcheck(torch.ops.hf_turbo.dequantize_4bit.default, (*quantized, list(shape), BF16))
    torch.library.opcheck(torch.ops.hf_turbo.dequantize_4bit_out.default, (*quantized, out))
    inputs = tuple(int8_inputs_of(shape, device).values())
    torch.library.opcheck(torch.ops.hf_turbo.dequantize_int8.default, (*inputs, True, BF16))
    torch.library.opcheck(torch.ops.hf_turbo.dequantize_int8_out.default, (*inputs, True, out))


def test_compile(device):
    """One graph, and the same bits, also into a buffer."""
    shape = (6, 64)
    tensors, inputs = random_4bit(shape, device, nested_blocksize=256), int8_inputs_of(shape, device)

    def function(out, int8_out):
        y = turbo_of(shape)(**tensors)
        turbo_of(shape, out=lambda device: out)(**tensors)
        dequantize_int8(**inputs, dtype=BF16, out=int8_out)
        return y, out * 2, int8_out * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for run in (compiled, function):
        outs = [torch.zeros(6, 80, device=device, dtype=BF16)[:, :64] for _ in range(2)]
        results.append((*run(*outs), *outs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_refusals(device):
    shape = (6, 64)
    tensors = random_4bit(shape, device)
    nested = random_4bit(shape, device, nested_blocksize=256)

    def refuse(error, match, replaced=None, *, base=tensors, **options):
        with pytest.raises(error, match=match):
            turbo_of(**{"shape": shape} | options)(**base | (replaced or {}))

    refuse(TypeError, "dtype must be float16", dtype=torch.float64)
    refuse(ValueError, "multiple of 8", blocksize=60)
    refuse(ValueError, "multiple of 8", blocksize=0)
    refuse(ValueError, "packed holds 384 codes", shape=(7, 64))
    refuse(ValueError, "absmax must have at least 6 elements, got 5", {"absmax": tensors["absmax"][:5]})
    refuse(TypeError, "absmax must be torch.float32, got torch.uint8", {"absmax": nested["absmax"]})
    refuse(TypeError, "absmax must be torch.uint8", {"absmax": tensors["absmax"]}, base=nested)
    refuse(ValueError, "code must have 16 elements, got 8", {"code": tensors["code"][:8]})
    refuse(TypeError, "code must be torch.float32", {"code": tensors["code"].to(BF16)})
    refuse(ValueError, "nested.code must have 256 elements", {"nested_code": nested["code"]}, base=nested)
    refuse(ValueError, "nested.absmax must have at least 1", {"nested_absmax": nested["code"][:0]}, base=nested)
    refuse(ValueError, "nested.offset must have 1 elements", {"nested_offset": nested["code"]}, base=nested)
    refuse(ValueError, "nested.blocksize must be positive", base=nested, nested_blocksize=0)
    refuse(ValueError, "absmax on meta", {"absmax": tensors["absmax"].to("meta")})
    refuse(TypeError, "out must be torch.bfloat16", out=lambda device: torch.empty(shape, device=device))
    refuse(ValueError, "out must be", out=lambda device: torch.empty(6, 63, device=device, dtype=BF16))
    refuse(
        ValueError,
        "requires a gradient",
        out=lambda device: torch.empty(shape, device=device, dtype=BF16, requires_grad=True),
    )
    inputs = int8_inputs_of(shape, device)
    weight, scale = inputs.values()
    with pytest.raises(TypeError, match="weight must be int8"):
        dequantize_int8(weight.float(), scale, BF16)
    with pytest.raises(ValueError, match="weight must be"):
        dequantize_int8(weight[0], scale, BF16)
    with pytest.raises(ValueError, match="scale must have 6 elements"):
        dequantize_int8(weight, scale[:5], BF16)
    with pytest.raises(TypeError, match="scale must be"):
        dequantize_int8(weight, scale.to(BF16), BF16)
    with pytest.raises(TypeError, match="out must be"):
        dequantize_int8(weight, scale, BF16, out=torch.empty(shape, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("pitched", [False, True])
def test_more_than_2_31_elements(cuda, pitched):
    rows, width = 2**31 // 8192 + 16, 8192
    tail, n = 16, rows * width
    small = random_4bit((tail, width), cuda)
    packed = torch.zeros(n // 2, dtype=torch.uint8, device=cuda)
    packed[-tail * width // 2 :] = small["packed"].flatten()
    absmax = torch.ones(n // 64, device=cuda)
    absmax[-tail * width // 64 :] = small["absmax"]
    out = torch.empty(rows, width + 64 * pitched, device=cuda, dtype=BF16)[:, :width]
    dequantize_4bit(packed, absmax, small["code"], 64, (rows, width), BF16, out=out)
    assert_equal_bits(out[-tail:], turbo_of((tail, width))(**small))
    assert (out[0] == -1).all()
    weight = torch.zeros(rows, width, dtype=torch.int8, device=cuda)
    weight[-tail:] = int8_inputs_of((tail, width), cuda)["weight"]
    scale = torch.linspace(0.5, 1.5, rows, device=cuda)
    dequantize_int8(weight, scale, BF16, out=out)
    assert_equal_bits(out[-tail:], dequantize_int8(weight[-tail:], scale[-tail:], BF16))
