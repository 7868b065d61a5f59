"""CUDA graphs of whole passes: the host launches one graph where it would launch thousands of kernels.

A pass of few tokens takes the host several times as long as the GPU. Passes are therefore filled up to one of a few
sizes, and what the backbone does for a size is recorded the second time it comes: forward, and backward down to the
gradients of the trained weights. From then on both are one launch each.

A recording holds addresses and decisions, so it serves only as long as all that it rests on is the same. Checked at
every replay are the parameters and their addresses, the classes of all modules, what the LoRA layers were found to be
(lora_watch.py), and autocast; padding.py watches the hooks. Activations live in memory that all recordings share, which
is why a pass whose backward has not come yet keeps others from replaying: they are computed as ever.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from hf_turbo.kernels._launch import once_differentiable
from torch import nn

from . import attention_seams, device_memory, kept_layers, lora, recomputation, varlen
from .engine import is_plain
from .micro_batches import GRAIN, Pass
from .padding_conflicts import dropouts

# Gradients of a pass are copied out of the recording: no matter for adapters, but not for a whole model.
MOST_TRAINED_BYTES = 2**30
# Sizes per power of two; a pass is filled up by a tenth on average.
SIZES_PER_OCTAVE = 4
SMALLEST = 256
DOCUMENTS = 16  # their number is rounded up to a multiple
MOST_RECORDINGS = 32
# What a recording needs beside what forward keeps: gradients, a layer's intermediate results, and room to spare.
MEMORY_OVER_KEPT = 3.0
# Where the layers' inputs go to host memory, recording keeps them on the device. That is no matter for few tokens, nor
# for those of a pass that is far smaller than stock's would be.
FEW_TOKENS = 2048
SHARE_OF_STOCK = 2 / 3
_MOST_CHANGES = 8

Record = Callable[[Callable[[], None]], Callable[[], None]]
_RECORDERS: dict[str, Callable[[torch.device], Record]] = {}


class Size(NamedTuple):
    """The sizes a recording is made for.

    Attributes:
        tokens: all of them, filling included.
        documents: at most, filling included; 0 where all have one length.
        longest: document, at most; where all have one length, that length.
    """

    tokens: int
    documents: int
    longest: int

    def holds(self, lengths: list[int]) -> bool:
        """Whether a recording of this size serves documents of these lengths, without computing much for nothing."""
        other = size_of(lengths)
        if not (self.documents and other.documents):
            return self == other
        # The filling is a document, and longer here than in `other`. Attention does not come to what exceeds `longest`.
        return (
            other.tokens <= self.tokens <= 1.3 * other.tokens
            and other.documents <= self.documents <= 2 * other.documents
            and max(other.longest, self.tokens - sum(lengths)) <= self.longest
        )


def size_of(lengths: list[int]) -> Size:
    """The smallest size that holds documents of these lengths, and one of filling."""
    tokens, longest = sum(lengths), max(lengths)
    if len(set(lengths)) == 1 and tokens % GRAIN["cuda"] == 0:
        return Size(tokens, 0, longest)
    step = max(SMALLEST, 1 << (tokens - 1).bit_length()) // (2 * SIZES_PER_OCTAVE)
    filled = max(-(-tokens // step) * step, SMALLEST)
    longest = max(longest, filled - tokens)
    bound = next(share for share in (filled // 4, filled // 2, filled) if longest <= share)
    return Size(filled, -(-(len(lengths) + 1) // DOCUMENTS) * DOCUMENTS, bound)


def _record_cuda(device: torch.device) -> Record:
    """Records on this device, all recordings in one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], None]) -> Callable[[], None]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            # Not "global": a thread that pins memory for a data loader must not end the recording.
            with (
                torch.cuda.device(device),
                recomputation.without_random_numbers(),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                work()
        finally:
            torch.cuda.set_stream(stream)  # which torch does not put back where recording fails
        return graph.replay

    return record


_RECORDERS["cuda"] = _record_cuda


class _Token:
    """Lives as long as a pass may still go backward."""

    def __init__(self) -> None:
        self.done = False


class _Buffers:
    """What recordings are handed and what they hand out, in memory that all of them share: one is at work at a time.

    Attributes:
        parameters: the trained ones.
        template: what the backbone returns, of no particular size.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], template: Any):
        self.parameters, self.template = parameters, template
        self._hidden = self._gradient = template.last_hidden_state[0, :0]
        self._slices: list[tuple[torch.dtype, int, nn.Parameter]] = []
        ends: Counter[torch.dtype] = Counter()
        for parameter in parameters:
            self._slices.append((parameter.dtype, ends[parameter.dtype], parameter))
            ends[parameter.dtype] += -(-parameter.numel() // 64) * 64  # aligned, for kernels that read 16 bytes
        self._flat = {dtype: torch.zeros(end, dtype=dtype, device=self._hidden.device) for dtype, end in ends.items()}

    def hidden_and_gradient(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, tokens, H] each. Larger ones than before are new; recordings keep those that they were made with."""
        if len(self._hidden) < tokens:
            self._hidden = self._hidden.new_zeros(tokens, self._hidden.shape[-1])
            self._gradient = torch.zeros_like(self._hidden)
        return self._hidden[None, :tokens], self._gradient[None, :tokens]

    def views(self, copied: bool = False) -> list[torch.Tensor]:
        """Where the gradients of the parameters go, or a copy of what is there."""
        flat = {dtype: each.clone() for dtype, each in self._flat.items()} if copied else self._flat
        return [
            flat[dtype][start : start + parameter.numel()].view(parameter.shape)
            for dtype, start, parameter in self._slices
        ]


class _Recording:
    """Forward and backward for one size.

    Attributes:
        hidden, gradient: [1, tokens, H], written and read by `forward` and `backward`.
    """

    def __init__(
        self, run: Callable[..., Any], arguments: dict[str, Any], size: Size, buffers: _Buffers, record: Record
    ):
        self._run, self._buffers = run, buffers
        self._ids = torch.zeros_like(arguments["input_ids"])
        self._positions = torch.zeros_like(arguments["position_ids"])
        lengths = None if size.documents else [size.longest] * (size.tokens // size.longest)
        count = len(lengths) if lengths else size.documents
        self._starts = torch.zeros(count + 1, dtype=torch.int32, device=self._ids.device)
        documents = varlen.Documents(lengths, self._starts, size.longest)
        self._arguments = {
            **arguments,
            "input_ids": self._ids,
            "position_ids": self._positions,
            "documents": documents,
        }
        self.hidden, self.gradient = buffers.hidden_and_gradient(size.tokens)
        self._graph_of: torch.Tensor | None = None
        self._is_used = [True] * len(buffers.parameters)
        self.forward = record(self._forward)
        self.backward = record(self._backward)
        self._graph_of = None

    def _forward(self) -> None:
        with torch.enable_grad():
            hidden = self._run(**self._arguments).last_hidden_state
        self.hidden.copy_(hidden.detach())
        self._graph_of = hidden

    def _backward(self) -> None:
        assert self._graph_of is not None
        gradients = torch.autograd.grad(self._graph_of, self._buffers.parameters, self.gradient, allow_unused=True)
        self._is_used = [gradient is not None for gradient in gradients]
        views = [view for view, used in zip(self._buffers.views(), self._is_used, strict=True) if used]
        torch._foreach_copy_(views, [each for each in gradients if each is not None])

    def set_inputs(self, arguments: dict[str, Any], lengths: list[int]) -> None:
        """For the next `forward`: input ids and positions, and the lengths of the documents."""
        self._ids.copy_(arguments["input_ids"])
        self._positions.copy_(arguments["position_ids"])
        starts = torch.full(self._starts.shape, self._ids.shape[1], dtype=torch.int32)
        starts[0] = 0
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=starts[1 : len(lengths) + 1])
        self._starts.copy_(starts, non_blocking=True)

    def output(self, token: _Token) -> Any:
        """As the backbone returns it."""
        output = copy.copy(self._buffers.template)
        output.last_hidden_state = _Replay.apply(self, token, *self._buffers.parameters)
        return output

    def gradients(self) -> list[torch.Tensor | None]:
        """Of the parameters, in memory of their own."""
        views = self._buffers.views(copied=True)
        return [view if used else None for view, used in zip(views, self._is_used, strict=True)]


class _Replay(torch.autograd.Function):
    """A recorded pass: parameters in, hidden states out."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, token: _Token, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.recording, ctx.token = recording, token
        recording.forward()
        return recording.hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.token.done:
            raise RuntimeError(
                "hf_turbo: a recorded pass goes backward once; use graphs=False for a script that calls backward again"
            )
        ctx.recording.gradient.copy_(dy)
        ctx.recording.backward()
        ctx.token.done = True
        return None, None, *ctx.recording.gradients()


class Graphs:
    """The recordings of one backbone.

    Args:
        is_offloaded: whether the inputs of its layers go to host memory.

    Attributes:
        reason: why nothing is recorded any more, if so.
        replays: passes that were one launch.
    """

    def __init__(self, backbone: Any, is_offloaded: bool = False):
        self._backbone, self._is_offloaded = weakref.ref(backbone), is_offloaded
        self.reason, self.replays, self._changes = "", 0, 0
        self._record: Record | None = None
        self._template: Any = None
        self._is_rehearsed = False
        self._race = Race()
        self.forget()

    def forget(self) -> None:
        """Drops all recordings and frees their memory."""
        self._recordings: dict[tuple[Size, Any], _Recording] = {}
        self._computed: set[tuple[Size, Any]] = set()
        self._rests_on: _RestsOn | None = None
        self._buffers: _Buffers | None = None
        self._token: weakref.ref[_Token] | None = None
        self._held: device_memory.Held | None = None

    @property
    def held_bytes(self) -> int:
        """Of device memory, for all recordings."""
        return 0 if self._held is None else self._held.bytes

    def __len__(self) -> int:
        return len(self._recordings)

    def output(
        self,
        run: Callable[..., Any],
        of: Pass,
        kwargs: dict[str, Any],
        rest: dict[str, Any],
        worst: int,
        kept: float | None,
    ) -> Any:
        """What the backbone returns for a pass, by a recording; None where it is to be computed.

        Args:
            run: the backbone's stock forward.
            kwargs: of the call for one micro-batch. rest: those that neither the tokens nor the loss concern.
            worst: tokens of the largest micro-batch so far, padding included.
            kept: bytes per token that forward keeps for backward, as far as known.
        """
        backbone = self._backbone()
        if (
            self.reason
            or backbone is None
            or self._template is None
            or kwargs.get("inputs_embeds") is not None
            or (self._offloads() and of.tokens > max(FEW_TOKENS, SHARE_OF_STOCK * worst))
            or not _is_recordable(rest)
        ):
            return None
        lengths = [length for each in of.micro_batches for length in each.lengths]
        key = size_of(lengths), (_state_of(of.device), tuple(sorted(rest.items())))
        if key[0].documents and self._race.is_won_by_host(of.tokens):
            return None
        serving = [each for each in self._recordings if each[1] == key[1] and each[0].holds(lengths)]
        found = min(serving, key=lambda each: each[0].tokens, default=key)
        of.fill_to(found[0].tokens)
        if found not in self._recordings and (key not in self._computed or len(self) == MOST_RECORDINGS):
            self._computed.add(key)  # at the size to be recorded: kernels are loaded and memory is known
            return None
        if self._is_busy():
            return None
        if self._rests_on is None:
            self._rests_on = _RestsOn(backbone)
        elif not self._rests_on.is_in_place() or (found not in self._recordings and not self._rests_on.is_same()):
            return self._changed()
        arguments = {
            **rest,
            **of.arguments(kwargs),
            "attention_mask": varlen.no_mask(found[0].tokens, of.device),
            "use_cache": False,
        }
        if found not in self._recordings:
            recording = self._made(run, arguments, found[0], kept or 0.0)
            if recording is None:
                return None
            self._recordings[found] = recording
        recording = self._recordings[found]
        recording.set_inputs(arguments, of.lengths())
        token = _Token()
        output = recording.output(token)
        # While the GPU works: a forward for nothing does no harm, as long as the weights are where they were.
        if not self._rests_on.is_same():
            return self._changed()
        self._token = weakref.ref(token)
        self.replays += 1
        return output

    def _offloads(self) -> bool:
        """Whether inputs of layers wait in host memory: of those that are recomputed."""
        stack = kept_layers.stack_of(self._backbone())  # type: ignore[arg-type]
        return self._is_offloaded and (stack is None or not stack.keeps_all)

    def _changed(self) -> None:
        """There are no recordings any more."""
        self.forget()
        self._changes += 1
        if self._changes == _MOST_CHANGES:
            self.reason = "the model changes again and again"

    def _is_busy(self) -> bool:
        token = None if self._token is None else self._token()
        return token is not None and not token.done

    def _made(self, run: Callable[..., Any], arguments: dict[str, Any], size: Size, kept: float) -> _Recording | None:
        """A recording, if there is memory for it."""
        device = arguments["input_ids"].device
        stack = kept_layers.stack_of(self._backbone())  # type: ignore[arg-type]
        if stack is not None:
            stack.begin(size.tokens, size.tokens, device, size.longest)
        free, more = device_memory.free(device), 0.0 if stack is None else stack.kept_bytes
        if free is not None and free < MEMORY_OVER_KEPT * kept * size.tokens + more + 2**30:
            return None
        if self._record is None:
            self._record = _RECORDERS[device.type](device)
        backbone = self._backbone()
        if self._buffers is None:
            trained = [each for each in backbone.parameters() if each.requires_grad]  # type: ignore[union-attr]
            self._buffers = _Buffers(trained, self._template)
        if self._held is None:
            self._held = device_memory.Held(device)
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        torch.cuda.empty_cache()  # as recording does, too: what is gone afterwards is the recording's
        before = device_memory.reserved(device)
        try:
            recording = _Recording(
                lambda **each: run(self._backbone(), **each), arguments, size, self._buffers, self._record
            )
            torch.cuda.empty_cache()
            self._held.bytes += max((device_memory.reserved(device) or 0) - (before or 0), 0)
            return recording
        except Exception as error:  # whatever cannot be recorded is computed, and the report says why
            self.forget()
            lines = str(error).splitlines()
            self.reason = f"recording failed: {type(error).__name__}: {lines[0] if lines else ''}"
            return None
        finally:
            torch.set_autocast_cache_enabled(cached)

    @contextmanager
    def observed(self, tokens: int, device: torch.device) -> Iterator[None]:
        """Around a computed forward: what it tells of those to be recorded."""
        with self._rehearsed(device), self._race.observed(tokens, device):
            yield

    @contextmanager
    def _rehearsed(self, device: torch.device) -> Iterator[None]:
        """Whether a forward waits for the device. Torch does not get over a recording that fails.

        The first forward of all may wait, where things are looked at once; so it is the second that is watched.
        """
        if self.reason or self._template is None or self._is_rehearsed or device.type != "cuda":
            yield
            return
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        self._is_rehearsed = True
        for each in caught:
            if "synchronizing CUDA operation" in str(each.message):
                self.reason = "it waits for the device"
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)

    def computed(self, output: Any, against: str) -> None:
        """Takes what the backbone returned for a pass that was computed, to return the like; and what it showed."""
        if against:
            self.forget()
            self.reason = against
        if self._template is None:
            self._template = copy.copy(output)
            self._template.last_hidden_state = output.last_hidden_state.detach()[:, :1].clone()


class Race:
    """Between the host that launches a forward and the GPU that computes it: where the GPU is last, launching does not
    matter, and a recording would only add its filling and hold memory.

    A GPU that waits for the host takes as long as the host: what it takes by itself shows only where it is still at
    work when the host is done, and so nothing is concluded for fewer tokens than in such a forward.
    """

    def __init__(self) -> None:
        self._forwards: deque[_Forward] = deque(maxlen=32)
        self._running: deque[tuple[int, float, bool, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=8)

    def note(self, tokens: int, host: float, device: float, is_behind: bool) -> None:
        """What a forward took, in seconds, and whether the GPU had not begun with it when the host was done."""
        self._forwards.append(_Forward(tokens, host, device, is_behind or device > 1.1 * host))

    def is_won_by_host(self, tokens: int) -> bool:
        """Whether the GPU would be last with a forward of so many tokens, without waiting for it to be asked."""
        while self._running and self._running[0][-1].query():
            count, host_seconds, is_behind, start, end = self._running.popleft()
            self.note(count, host_seconds, start.elapsed_time(end) / 1e3, is_behind)
        host = min((each.host for each in self._forwards), default=math.inf)
        return any(
            # A host that takes much longer than it needs compiles.
            each.is_device_last and each.tokens <= tokens and each.device > host and each.host < 3 * host
            for each in self._forwards
        )

    @contextmanager
    def observed(self, tokens: int, device: torch.device) -> Iterator[None]:
        """Around a forward of so many tokens."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        began = time.perf_counter()
        yield
        host, is_behind = time.perf_counter() - began, not start.query()
        end.record(stream)
        self._running.append((tokens, host, is_behind, start, end))


class _Forward(NamedTuple):
    tokens: int
    host: float
    device: float
    is_device_last: bool


class _RestsOn:
    """All that a recording takes for granted."""

    def __init__(self, backbone: Any):
        self._modules = list(backbone.modules())[1:]  # not the backbone itself: it must not be kept alive
        self._types = [type(each) for each in self._modules]
        self._entries = [len(each.__dict__) for each in self._modules]
        self._parameters = [
            (each._parameters, name, parameter, parameter.data_ptr(), parameter.requires_grad)
            for each in self._modules
            for name, parameter in each._parameters.items()
            if parameter is not None
        ]
        self._watches = lora.watches_of(self._modules)

    def is_in_place(self) -> bool:
        """Whether the weights are at the addresses that were recorded, and the same ones are trained."""
        with torch._C.DisableTorchFunctionSubclass():
            return all(
                parameters.get(name) is parameter
                and parameter.data_ptr() == address
                and parameter.requires_grad == trained
                and not (trained and parameter._backward_hooks)
                for parameters, name, parameter, address, trained in self._parameters
            )

    def is_same(self) -> bool:
        """Whether the rest is the same, too."""
        with torch._C.DisableTorchFunctionSubclass():
            return (
                [type(each) for each in self._modules] == self._types
                and [len(each.__dict__) for each in self._modules] == self._entries
                and all(each.is_same() for each in self._watches)
            )


def _is_recordable(rest: dict[str, Any]) -> bool:
    """Whether nobody watches the operators, and no other argument may differ from call to call."""
    return (
        all(value is None or isinstance(value, (bool, int, float, str)) for value in rest.values())
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and not torch.is_anomaly_enabled()
    )


def _state_of(device: torch.device) -> tuple[Any, ...]:
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_enabled("cpu")


def conflict(backbone: Any, device_type: str) -> str | None:
    """Why a backbone's passes are not recorded, or None."""
    if device_type not in _RECORDERS:
        return f"no CUDA graphs on {device_type}"
    parameters = list(backbone.parameters())
    trained = [each for each in parameters if each.requires_grad]
    if not trained:
        return "nothing is trained"
    if not all(is_plain(each) for each in trained):
        return "its weights are sharded"
    if sum(each.numel() * each.element_size() for each in trained) > MOST_TRAINED_BYTES:
        return "gradients of so many trained weights would be copied"
    if any(each._backward_hooks for each in trained):
        return "hooks on the gradients of its parameters"
    kinds = {type(module).__name__ for module in backbone.modules()}
    if any("Expert" in kind or "MoE" in kind or "Moe" in kind for kind in kinds):
        return "experts: sizes depend on the data"
    if "Linear8bitLt" in kinds:
        return "8-bit weights: bitsandbytes waits for the device"
    if any(p > 0 for p in dropouts(backbone)):
        return "dropout draws random numbers"
    if not attention_seams.is_computed_here(getattr(backbone.config, "_attn_implementation", None)):
        return "it has an attention of its own"
    return None
