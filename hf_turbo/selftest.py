"""Checks the numbers of every kernel on the present device: Triton on a GPU, the torch path on a CPU.

The rule, for every output and every gradient, in each dtype:

    rms(fused - exact) <= 1.1 * rms(eager - exact) + 1 ulp

where eager is what transformers computes in the same dtype, and exact is eager in fp64 on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

_EPS = 1e-5
_SEEDS = 4  # the loss is one number, so its error in one trial is luck

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        shapes: of the arguments that get a gradient; drawn from a normal distribution.
        fused: the kernel; takes all arguments by keyword.
        eager: the same in plain torch.
        constants: makes the further arguments with a seeded generator.
    """

    name: str
    shapes: Shapes
    fused: Callable[..., Any]
    eager: Callable[..., Any]
    constants: Callable[[torch.Generator], dict[str, torch.Tensor]] | None = None


@dataclass(frozen=True)
class Result:
    """The outcome of one op: `detail` says where the error comes nearest to what is allowed, or why the op failed."""

    op: str
    passed: bool
    detail: str


def run() -> Iterator[Result]:
    """Yields one result per op. A kernel that cannot be imported or raises is a failed result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device.type == "cuda" else [])
    for op, cases in _CASES.items():
        try:
            share, where = max(worst for case in cases() for dtype in dtypes for worst in _check(case, dtype, device))
        except Exception as error:  # whatever is wrong with a kernel is this report's subject
            reason = str(error).strip().split("\n")[0]
            yield Result(op, False, f"{type(error).__name__}: {reason}")
        else:
            yield Result(op, share <= 1, f"worst error {share:.2f} of the allowed ({where})")


def _check(case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[float, str]]:
    """Yields, for every output and gradient, its error as a share of what the rule allows, and its name."""
    trials: list[dict[str, torch.Tensor]] = []
    for seed in range(_SEEDS):
        arguments = _draw(case, seed, dtype)
        exact = _evaluate(case, case.eager, arguments, torch.float64, device)
        eager = _evaluate(case, case.eager, arguments, dtype, device)
        fused = _evaluate(case, case.fused, arguments, dtype, device)
        trials.append({name: _mean_squares(fused[name], eager[name], exact[name]) for name in exact})
    for name in trials[0]:
        fused_rms, eager_rms, ulp = torch.stack([trial[name] for trial in trials]).mean(0).sqrt().tolist()
        allowed = 1.1 * eager_rms + ulp
        share = fused_rms / allowed if fused_rms < float("inf") else float("inf")  # nan compares false
        yield share, f"{name} of {case.name} in {str(dtype).removeprefix('torch.')}"


def _mean_squares(fused: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    ulp = torch.finfo(fused.dtype).eps * exact
    return torch.stack([term.square().mean() for term in (fused - exact, eager - exact, ulp)])


def _draw(case: Case, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The arguments of one trial, rounded to `dtype`, so that all evaluations see the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {name: torch.randn(shape, generator=generator) for name, shape in case.shapes.items()}
    if case.constants is not None:
        arguments |= case.constants(generator)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in arguments.items()}


def _evaluate(
    case: Case,
    function: Callable[..., Any],
    arguments: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of `function` by name, computed in `dtype`."""
    given = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in arguments.items()}
    leaves = [given[name].detach().requires_grad_() for name in case.shapes]
    outputs = function(**given | dict(zip(case.shapes, leaves, strict=True)))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rounding = next(iter(arguments.values())).dtype
    generator = torch.Generator().manual_seed(_SEEDS)
    upstream = [torch.randn(out.shape, generator=generator).to(rounding).to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"d_{name}": gradient for name, gradient in zip(case.shapes, gradients, strict=True)}


def _kernel(name: str, function: str | None = None) -> Callable[..., Any]:
    return getattr(import_module(f"hf_turbo.kernels.{name}"), function or name)


# ------------------------------------------------------------------------------------------------ what eager computes


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, offset: float = 0.0, round_before_weight: bool = False
) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(compute) * torch.rsqrt(x.to(compute).square().mean(-1, keepdim=True) + _EPS)
    if round_before_weight:
        return weight * normed.to(x.dtype)
    return ((weight.to(compute) + offset) * normed).to(x.dtype)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, _EPS)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = cos.shape[-1]
    if interleaved:
        cos, sin = (table[..., : width // 2].repeat_interleave(2, -1) for table in (cos, sin))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., :width], x[..., width:]
        if interleaved:
            half = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
        else:
            half = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), -1)
        return torch.cat((turned * cos + half * sin, rest), -1)

    return rotate(q), rotate(k)


def _cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


# ------------------------------------------------------------------------------------------------ the cases of each op


def _rms_norm_cases() -> Iterator[Case]:
    kernel = partial(_kernel("rms_norm"), eps=_EPS)
    shapes = {"x": (48, 480), "weight": (480,)}
    yield Case("Llama", shapes, partial(kernel, round_before_weight=True), partial(_rms_norm, round_before_weight=True))
    yield Case("OLMo2", shapes, kernel, _rms_norm)
    yield Case("Gemma", shapes, partial(kernel, weight_offset=1.0), partial(_rms_norm, offset=1.0))


def _add_rms_norm_cases() -> Iterator[Case]:
    kernel, norm = _kernel("add_rms_norm"), _kernel("add_rms_norm", "Norm")
    shapes = {"residual": (48, 480), "branch": (48, 480), "weight": (480,)}

    def eager(residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = residual + branch
        return h, _rms_norm(h, weight, round_before_weight=True)

    yield Case("Llama", shapes, partial(kernel, norm=norm(_EPS, round_before_weight=True)), eager)


def _layer_norm_cases() -> Iterator[Case]:
    shapes = {"x": (48, 480), "weight": (480,), "bias": (480,)}
    yield Case("affine", shapes, partial(_kernel("layer_norm"), eps=_EPS), _layer_norm)


def _glu_cases() -> Iterator[Case]:
    glu, glu_packed = _kernel("glu"), _kernel("glu", "glu_packed")
    for name, act in _ACTIVATIONS.items():

        def split(gate: torch.Tensor, up: torch.Tensor, act: Callable[..., torch.Tensor] = act) -> torch.Tensor:
            return act(gate) * up

        def packed(gate_up: torch.Tensor, act: Callable[..., torch.Tensor] = act) -> torch.Tensor:
            gate, up = gate_up.chunk(2, -1)
            return up * act(gate)

        yield Case(name, {"gate": (48, 480), "up": (48, 480)}, partial(glu, activation=name), split)
        yield Case(f"packed {name}", {"gate_up": (32, 960)}, partial(glu_packed, activation=name), packed)


def _rope_cases() -> Iterator[Case]:
    kernel = _kernel("rope")
    shapes = {"q": (2, 4, 48, 64), "k": (2, 2, 48, 64)}

    def tables(generator: torch.Generator, width: int) -> dict[str, torch.Tensor]:
        angles = (torch.rand(2, 48, width // 2, generator=generator) * 6.28).repeat(1, 1, 2)
        return {"cos": angles.cos(), "sin": angles.sin()}

    yield Case("halves", shapes, kernel, _rope, partial(tables, width=64))
    yield Case("partial", shapes, kernel, _rope, partial(tables, width=32))
    yield Case(
        "pairs", shapes, partial(kernel, interleaved=True), partial(_rope, interleaved=True), partial(tables, width=32)
    )


def _qk_norm_rope_cases() -> Iterator[Case]:
    kernel, norm = _kernel("qk_norm_rope"), _kernel("add_rms_norm", "Norm")
    shapes = {"q": (2, 4, 48, 64), "k": (2, 2, 48, 64), "q_weight": (64,), "k_weight": (64,)}

    def tables(generator: torch.Generator) -> dict[str, torch.Tensor]:
        angles = (torch.rand(2, 48, 32, generator=generator) * 6.28).repeat(1, 1, 2)
        return {"cos": angles.cos(), "sin": angles.sin()}

    def eager(
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = (_rms_norm(x, w, round_before_weight=True) for x, w in ((q, q_weight), (k, k_weight)))
        return _rope(q, k, cos, sin)

    yield Case("Qwen3", shapes, partial(kernel, norm=norm(_EPS, round_before_weight=True)), eager, tables)


def _linear_cross_entropy_cases() -> Iterator[Case]:
    kernel = _kernel("linear_cross_entropy")
    hidden, head = {"hidden": (64, 64)}, {"weight": (500, 64)}

    def labels(generator: torch.Generator) -> dict[str, torch.Tensor]:
        drawn = torch.randint(0, 500, (64,), generator=generator)
        return {"labels": drawn.where(torch.rand(64, generator=generator) > 0.3, -100)}

    def frozen(generator: torch.Generator) -> dict[str, torch.Tensor]:
        return labels(generator) | {"weight": torch.randn(500, 64, generator=generator)}

    yield Case("trained head", hidden | head, kernel, _cross_entropy, labels)
    yield Case("frozen head", hidden, kernel, _cross_entropy, frozen)
    yield Case(
        "bias, scale and softcap",
        hidden | head | {"bias": (500,)},
        partial(kernel, logit_scale=0.25, softcap=5.0),
        partial(_cross_entropy, logit_scale=0.25, softcap=5.0),
        labels,
    )


_CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "rms_norm": _rms_norm_cases,
    "add_rms_norm": _add_rms_norm_cases,
    "layer_norm": _layer_norm_cases,
    "glu": _glu_cases,
    "rope": _rope_cases,
    "qk_norm_rope": _qk_norm_rope_cases,
    "linear_cross_entropy": _linear_cross_entropy_cases,
}
