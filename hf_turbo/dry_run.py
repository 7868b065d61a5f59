"""One training step on tensors without data, to see what memory it takes: every shape is real, nothing is computed.

The model is that of the run, adapters and packed 4-bit weights included, patched as in training, on torch's "meta"
device. Forward, loss and backward go through the code that runs on a GPU; a dispatch mode adds up the storages that
live at a time. So nothing is known of single models here. What the kernels take inside one launch is not seen, save
attention's fp32 sum of the gradient of the queries, which is as large as a layer's other tensors.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_turbo.kernels.linear_cross_entropy import linear_log_prob
from hf_turbo.patches import checkpointing, host_memory, kept_attention, recomputation, tiling

from .policies.footprint import Trained

# torch's allocator hands out multiples of this.
ALLOCATION = 512
_ATTENTION = "hf_turbo_dry_run"
# What changes no memory, or is done here.
_OFF = ("padding", "merging", "graphs", "checkpointing", "offload", "optimizer", "host", "loss", "metrics", "report")
# bitsandbytes' defaults, which transformers does not change: elements that share a scale, and scales that do.
_BLOCK, _BLOCK_OF_SCALES = 64, 256


class Unsupported(ValueError):
    """What cannot be planned; the message says why, and what to do."""


class Sizes(NamedTuple):
    """What a model takes before the first step.

    Attributes:
        weights, adapters: bytes, buffers and scales of packed weights included.
        trained: each tensor that is.
    """

    weights: int
    adapters: int
    trained: list[Trained]


@dataclass
class Step:
    """What one forward and backward pass takes beyond weights and optimizer states, in bytes.

    Attributes:
        peak: the most at one time.
        parts: of what is live then, by where it was made: "forward", "loss", "backward", and there "gradients".
        kept: of each layer that is not recomputed, in the order of forward: what it keeps for backward, its input
            included, as kept_layers.py measures it; 0 of others.
        attention: of these layers what attention's outputs are of it, and the FLOP of attention's forward.
        timeline: `parts` after every change, in order.
    """

    peak: int
    parts: dict[str, int]
    kept: list[int]
    attention: list[tuple[int, float]]
    timeline: list[dict[str, int]]


# ------------------------------------------------------------------------------------------------------------ the model


def build(config: Any, method: str, rank: int, dtype: torch.dtype) -> Any:
    """The model of a run on the meta device, in training mode, with everything frozen that is not trained.

    Args:
        config: of transformers.
        method: "full", "lora" or "qlora"; adapters on all linear layers, as `target_modules="all-linear"`.
        rank: of the adapters.
        dtype: of the weights. Adapters are float32 beside 16-bit weights and bfloat16 beside 4-bit ones, as TRL and
            PEFT make them.

    Raises:
        Unsupported: no causal language model; a package is missing.
    """
    from transformers import AutoModelForCausalLM

    config.use_cache = False
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise Unsupported(
            f"no causal language model of transformers belongs to model_type {config.model_type!r}: give the config of "
            "the text model"
        ) from error
    if method == "full":
        return model.train()
    if any(parameter.ndim == 3 for parameter in model.parameters()):
        raise Unsupported("a mixture of experts can be planned with --method full only")
    if method == "qlora":
        _pack(model, dtype)
    try:
        import peft
    except ImportError as error:
        raise Unsupported(f"--method {method} needs peft: pip install peft") from error
    adapters = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = peft.get_peft_model(model, adapters)
    if method == "qlora":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model.train()


def _pack(model: Any, dtype: torch.dtype) -> None:
    """Puts 4-bit layers of bitsandbytes, NF4 with nested scales, in place of all linear ones but the head."""
    try:
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise Unsupported("--method qlora needs bitsandbytes: pip install bitsandbytes") from error

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        with torch.device("meta"):
            packed = Linear4bit(module.in_features, module.out_features, module.bias is not None, compute_dtype=dtype)
            weights = math.prod(module.weight.shape)
            scales = -(-weights // _BLOCK)
            state = QuantState(
                torch.empty(scales, dtype=torch.uint8),
                module.weight.shape,
                torch.empty(16),
                _BLOCK,
                "nf4",
                dtype,
                torch.empty(()),
                QuantState(torch.empty(-(-scales // _BLOCK_OF_SCALES)), code=torch.empty(256), blocksize=256),
            )
            data = torch.empty(-(-weights // 2), 1, dtype=torch.uint8)
        packed.weight = Params4bit(
            data, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=packed
        )
        packed.bias, packed.compute_type_is_set = module.bias, True
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # what PEFT looks at
    model.requires_grad_(False)


def sizes_of(model: nn.Module) -> Sizes:
    """What the model takes."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    frozen = trained = 0
    each_trained = []
    full = not hasattr(model, "peft_config")
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameters
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.requires_grad:
                trained += _allocated(tensor)
                each_trained.append(Trained(tensor.numel(), tensor.element_size(), id(tensor) in embeddings))
            else:
                frozen += _allocated(tensor) + sum(map(_allocated, _scales(tensor)))
    return Sizes(frozen + trained, 0, each_trained) if full else Sizes(frozen, trained, each_trained)


def _scales(weight: Any) -> list[torch.Tensor]:
    state = weight.__dict__.get("quant_state")
    return [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def _allocated(tensor: torch.Tensor) -> int:
    return -(-tensor.untyped_storage().nbytes() // ALLOCATION) * ALLOCATION


# ------------------------------------------------------------------------------------------------------------- the step


class Ledger(TorchDispatchMode):
    """Adds up the storages that operators make and that are alive.

    Attributes:
        phase: under which new storages are entered.
        live: bytes by phase. peak, at_peak: the most of their sum, and what it was made of.
        timeline: `live` after every change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.timeline: list[dict[str, int]] = []
        self.phase, self.live, self._total = "forward", Counter[str](), 0
        self.peak, self.at_peak = 0, dict[str, int]()
        self._entries: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.add.Tensor and _adds_gradients(*args):
            function = torch.ops.aten.add_.Tensor
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.enter(each)
        return result

    def enter(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries or tensor.device.type != "meta":
            return
        size = _allocated(tensor)
        self._entries[key] = weakref.ref(storage, lambda _: self._leave(key)), self.phase, size
        self._add(self.phase, size)

    def own(self, tensors: Any) -> None:
        """Leaves these tensors out: they are there before the step."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._entries[storage._cdata] = weakref.ref(storage), "", 0

    def move(self, tensor: torch.Tensor, phase: str) -> None:
        """Enters a tensor anew, under another phase."""
        key = tensor.untyped_storage()._cdata
        reference, old, size = self._entries[key]
        self._entries[key] = reference, phase, size
        self.live[old] -= size
        self.live[phase] += size

    def _leave(self, key: int) -> None:
        _, phase, size = self._entries.pop(key)
        self._add(phase, -size)

    def _add(self, phase: str, size: int) -> None:
        self.live[phase] += size
        self._total += size
        self.timeline.append(dict(self.live))
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, self.timeline[-1]


def _adds_gradients(a: Any, b: Any, *_: Any) -> bool:
    """Whether autograd adds gradients that meet. It does so in place, unless there is a mode like the one above."""
    return (
        torch._C._current_graph_task_id() != -1
        and not torch.is_grad_enabled()
        and isinstance(b, torch.Tensor)
        and (a.shape, a.dtype) == (b.shape, b.dtype)
    )


class _Attention(torch.autograd.Function):
    """Keeps what FlashAttention and cuDNN keep. Shapes: q [B, H, T, D]; k, v [B, G, T, D], G dividing H."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _, sums = ctx.saved_tensors
        # Workspace: the row sums of dO * O, and dQ, which is added up in fp32 by several blocks of keys.
        workspace = torch.empty_like(sums), torch.empty_like(q, dtype=torch.float32)
        results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del workspace
        return results


def _attention(
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
    sliding_window: int | None = None,
    **__: Any,
) -> Any:
    keeper, length = kept_attention.current(), k.shape[2]
    # With a window shorter than a row there is a mask, of which SDPA keeps a copy too large to be kept besides.
    if keeper is None or (sliding_window or length) < length:
        out = _Attention.apply(q, k, v)
    else:
        out = keeper.call(length, _Attention.apply, q, k, v)
    return out.transpose(1, 2).contiguous(), None


class _Input:
    """The input of a checkpointed layer, on the host while `tensor` is None."""

    def __init__(self, tensor: torch.Tensor, previous: _Input | None):
        self.key = tensor.untyped_storage()._cdata
        self.previous = previous
        self.tensor: torch.Tensor | None = tensor.detach()
        self._shape, self._dtype = tensor.shape, tensor.dtype

    def on_device(self) -> torch.Tensor:
        if self.tensor is None:
            self.tensor = torch.empty(self._shape, dtype=self._dtype, device="meta")
        return self.tensor


class _Layers:
    """How the decoder layers of a step are called: in place of transformers' checkpointing.

    Args:
        recomputed: how many of the first are; None without checkpointing.
        attended: the numbers of those that keep attention's outputs. offloaded: whether their inputs wait in host
            memory.
        autocast: the context that a layer runs in.

    Attributes:
        kept: bytes that each layer keeps for backward; 0 where it is recomputed.
        attention: bytes and FLOP of attention in these layers.
    """

    def __init__(
        self,
        layers: list[Any],
        recomputed: int | None,
        attended: Sequence[int],
        offloaded: bool,
        autocast: Callable[[], Any],
    ):
        self._offloaded, self._autocast = offloaded, autocast
        self._tiles = tiling.not_checkpointed if recomputed is None else tiling.keeping
        self._last: _Input | None = None
        self.kept, self.attention = [0] * len(layers), [(0, 0.0)] * len(layers)
        for place, layer in enumerate(layers):
            own = {each.untyped_storage()._cdata for each in (*layer.parameters(), *layer.buffers())}
            call = functools.partial(self._keep, place, own)
            if place < (recomputed or 0):
                call = functools.partial(self._recompute, place in attended)
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, call

    def _keep(self, place: int, own: set[int], function: Callable[..., Any], *args: Any) -> Any:
        """Calls the layer, and notes the storages that it saves, but for its own."""
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor.detach()  # a node that holds its own output would never be freed

        def unpack(tensor: torch.Tensor) -> torch.Tensor:
            return tensor

        calls = kept_attention.Calls(keeps=False)
        with (
            saved_tensors_hooks(pack, unpack),
            kept_attention.recording(calls, pack, unpack, lambda: 0),
            self._tiles(),
        ):
            output = function(*args)
        self.kept[place], self.attention[place] = sum(saved.values()), (calls.bytes, calls.flops)
        return output

    def _recompute(self, attended: bool, function: Callable[..., Any], hidden_states: torch.Tensor, *args: Any) -> Any:
        def run(*args: Any) -> Any:
            with self._autocast():
                return function(*args)

        # Gradient accumulation holds on to leaves: embeddings made to require gradients.
        leaves = self._offloaded and not (hidden_states.is_leaf and hidden_states.requires_grad)
        hooks = self._on_the_way(hidden_states) if leaves else None
        if attended:
            stock, calls = functools.partial(checkpoint, preserve_rng_state=False), kept_attention.Calls(keeps=True)
            call = recomputation.recompute_in_backward
            return call(stock, run, (hidden_states, *args), torch.device("cpu"), hooks, calls=calls)
        with nullcontext() if hooks is None else saved_tensors_hooks(*hooks):
            return checkpoint(run, hidden_states, *args, use_reentrant=False, preserve_rng_state=False)

    def _on_the_way(self, hidden_states: torch.Tensor) -> recomputation.Hooks:
        """What host_memory.py does: the last inputs stay, the others leave and return one layer ahead of backward."""
        entry = self._last = _Input(hidden_states, self._last)
        leaving: _Input | None = entry
        for _ in range(host_memory.STAYING):
            leaving = leaving and leaving.previous
        if leaving is not None:
            leaving.tensor = None

        def unpack(saved: Any) -> torch.Tensor:
            if not isinstance(saved, _Input):
                return saved
            tensor = saved.on_device()
            if saved.previous is not None:
                saved.previous.on_device()
            saved.tensor = None
            return tensor

        return lambda tensor: entry if tensor.untyped_storage()._cdata == entry.key else tensor, unpack


@contextmanager
def patched(model: Any, memory: str = "as_is") -> Iterator[None]:
    """The model under hf_turbo, for the length of a `with` block. What changes no memory, or is done here, is off.

    Args:
        memory: the option of this name, for what it says of the layers' insides.
    """
    from transformers import AttentionInterface

    import hf_turbo

    options: dict[str, Any] = {**dict.fromkeys(_OFF, False), "memory": memory}
    AttentionInterface.register(_ATTENTION, _attention)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal.config._attn_implementation == "sdpa":
        causal.set_attn_implementation(_ATTENTION)
    with hf_turbo.session(**options):
        hf_turbo.patch_model(model, **options)
        yield


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """Mixed precision as patches and kernels see it; `torch.autocast` asks for a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", torch.bfloat16 if dtype == torch.float32 else dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def step(
    model: Any,
    rows: int,
    length: int,
    *,
    recomputed: int | None = None,
    attended: Sequence[int] = (),
    offloaded: bool = False,
    bucket: int | None = None,
) -> Step:
    """Goes through one forward and backward pass of a model that is `patched`.

    Args:
        rows, length: of the batch, in tokens, without padding; every token has a label.
        recomputed: how many of the first layers are recomputed in backward; None without gradient checkpointing.
        attended: the numbers of those whose attention is not.
        offloaded: whether their inputs wait in host memory.
        bucket: gradients of so many bytes are used and let go of within backward; None: all stand until its end.

    Raises:
        Unsupported: layers that transformers does not checkpoint; no head; code that looks into its tensors.
    """
    is_adapted = hasattr(model, "peft_config")
    causal = model.get_base_model() if is_adapted else model
    layers, head = list(checkpointing.layers_of(causal).values()), causal.get_output_embeddings()
    if not layers or head is None:
        raise Unsupported(f"{type(causal).__name__} is no stack of decoder layers with a language-model head")
    dtype = causal.dtype
    ledger = Ledger()
    hooks, waiting = [], list[torch.Tensor]()

    def accumulated(tensor: torch.Tensor) -> None:
        assert tensor.grad is not None
        ledger.move(tensor.grad, "gradients")
        if bucket is None:
            return
        waiting.append(tensor)
        if sum(each.nbytes for each in waiting) >= bucket:
            for each in waiting:
                each.grad = None
            waiting.clear()

    for tensor in (*model.parameters(), *model.buffers()):
        ledger.own([tensor, *_scales(tensor)])
        if tensor.requires_grad:
            hooks.append(tensor.register_post_accumulate_grad_hook(accumulated))
    if is_adapted and recomputed is not None:
        model.enable_input_require_grads()  # as trainers do
    calls = _Layers(layers, recomputed, attended, offloaded, lambda: _autocast(dtype))
    try:
        with ledger:
            with _autocast(dtype):
                input_ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
                # Without it masks are made, where they are, by looking for packed rows.
                mask = torch.ones(rows, length, dtype=torch.int64, device="meta")
                outputs = causal.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
                hidden_states = outputs.last_hidden_state
                del outputs
                ledger.phase = "loss"
                labelled = hidden_states[:, :-1].clone(memory_format=torch.contiguous_format).flatten(0, 1)
                del hidden_states
                targets = torch.empty(len(labelled), dtype=torch.int64, device="meta")
                log_prob: Any = linear_log_prob(labelled, head.weight, targets, head.bias, uniform=True)[0]
                del labelled
            ledger.phase = "backward"
            log_prob.sum().backward()
            del log_prob
            timeline = list(ledger.timeline)
    except (NotImplementedError, RuntimeError) as error:
        raise Unsupported(
            f"{type(causal).__name__} cannot be gone through without data: {str(error).splitlines()[0]}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        waiting.clear()
        if is_adapted and recomputed is not None:
            model.disable_input_require_grads()
        model.zero_grad(set_to_none=True)
    return Step(ledger.peak, ledger.at_peak, calls.kept, calls.attention, timeline)
