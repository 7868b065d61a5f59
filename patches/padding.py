"""Padding-free passes: the text backbone computes the tokens of its batches, and not their padding.

In front of the backbone `[B, S]` with a mask becomes `[1, tokens]`, each token at the position it had; behind it the
hidden states return to their places, with zeros where padding was. In between, attention runs document by document
(varlen.py); everything else in a decoder layer is done token by token. The micro-batches of an optimizer step may share
a pass (micro_batches.py).

A row that the script has packed itself, positions starting anew at each document, goes the same way, and needs no mask
of all tokens by all tokens.

What could go wrong is ruled out in this order:

* The backbone's `forward` may use the mask for nothing but to make causal masks (read off its source), full or with a
  window that the attention layers pass on (padding_conflicts.py).
* In the first pass every layer has to call the seam, as many times as there are layers: a layer with another kind of
  memory (convolution, recurrence, attention of its own) does not, and the pass is done again by stock.
* Where padding bears labels, its hidden states count: such batches stay stock (`labels_on_padding`), and a gradient
  that arrives at padding switches the feature off, loudly.
"""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from . import (
    attention_seams,
    checkpointing,
    dense_masks,
    device_memory,
    graphs,
    kept_layers,
    padding_conflicts,
    sharded,
    varlen,
)
from .deepspeed import is_of_zero
from .engine import (
    ClassSwap,
    Exactness,
    Finding,
    Patch,
    forward_of,
    is_live,
    is_swapped,
    same_name_subclass,
    stock_class,
)
from .micro_batches import MicroBatch, Pass, Step, foresee, labels_on_padding
from .recomputation import random_states, set_random_states

# Given the tokens of each micro-batch, those of the largest with padding, the bytes that forward keeps per token (None
# where unknown), and whether these micro-batches may share passes: the number of them in each pass.
Plan = Callable[[list[int], int, float | None, bool], list[int]]

# Arguments of a backbone's forward: to be flattened, for the loss alone, and those that must be off.
_FLATTENED = {"input_ids", "attention_mask", "position_ids", "inputs_embeds"}
_OF_LOSS = {"labels", "shift_labels", "num_items_in_batch"}
_OF_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_OFF = ("output_attentions", "output_hidden_states", "output_router_logits")
_MEASURED_PASSES = 4


class _State:
    """What is known of one backbone.

    Attributes:
        attention: that its config named when it was patched.
        takes_packed_rows: whether stock keeps the documents of a packed row apart by the masks that it makes.
            FlashAttention keeps them apart itself, as it finds them: nothing is gained there, and little known.
        reason: why it stays stock after all; found in its first pass, or by a gradient at padding.
        tried: whether a flattened pass went through.
        skip: whether the batches of the present step bear labels on padding.
        step: the micro-batches of the present step, where a trainer fetched them.
        foreseen: the same, for calls that ask for no gradients.
        acts_everywhere: whether padding is left out wherever the backbone is called, and not in `in_step` alone.
        in_step: whether the trainer whose loss leaves padding out is in its training step, and not in evaluation, in a
            callback or behind `train()`, where another trainer or a loop of the script's may call the model.
        masks_reference: whether in that step calls that ask for no gradients leave padding out, too.
        stock_tokens, tokens, micro_batches, passes: that stock would have computed, and that were computed.
        worst: tokens of the largest micro-batch so far, padding included.
        kept_per_token: bytes that forward keeps for backward, the most of the passes measured.
        measured: number of these.
        graphs: recordings of its passes, where they may be recorded.
    """

    def __init__(self, backbone: Any) -> None:
        self.attention = backbone.config._attn_implementation
        positions = padding_conflicts.masks_know_positions(forward_of(type(backbone)))
        self.takes_packed_rows = positions and attention_seams.is_computed_here(self.attention)
        self._hooks, self._parameters = padding_conflicts.HookWatch(backbone), list(backbone.parameters())
        self.reason = ""
        self.tried = self.skip = self.in_step = self.masks_reference = False
        self.acts_everywhere = True
        self.step: Step | None = None
        self.foreseen: list[MicroBatch] = []
        self._at_padding: torch.Tensor | None = None
        self.kept_per_token: float | None = None
        self.worst = self.measured = 0
        self.graphs: graphs.Graphs | None = None
        self.end_training()

    def end_training(self) -> None:
        """Counts anew, from the next training on."""
        self.skip, self.step, self.foreseen = False, None, []
        self.stock_tokens = self.tokens = self.micro_batches = self.passes = 0
        if self.graphs is not None:
            self.graphs.forget()
            self.graphs.replays = 0

    def is_hooked(self) -> bool:
        """Whether hooks inside the backbone, maybe registered since, would see other shapes."""
        return self._hooks.conflict() is not None

    def has_gradient_hooks(self) -> bool:
        """Whether something watches the gradients of parameters, maybe registered since; ZeRO only sums them up."""
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameters
            found = [hooks for p in self._parameters for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
        return not all(is_of_zero(hook) for hooks in found if hooks for hook in hooks.values())

    def smallest_trained(self) -> nn.Parameter | None:
        """The parameter that takes least to reduce a gradient of."""
        trained = (parameter for parameter in self._parameters if parameter.requires_grad)
        return min(trained, key=torch.Tensor.numel, default=None)

    def gradient_at_padding(self, gradient: torch.Tensor) -> None:
        """Notes whether there is one. On a GPU without waiting for it: `look` says so in the next step."""
        found = gradient.any()
        self._at_padding = found if self._at_padding is None else self._at_padding | found
        if gradient.device.type == "cpu":
            self.look()

    def look(self) -> None:
        """Switches off, with a warning, if a gradient arrived at padding."""
        found, self._at_padding = self._at_padding, None
        if found is not None and bool(found) and not self.reason:
            self.reason = "the loss depends on padding"
            warnings.warn(
                "hf_turbo: this loss depends on the hidden states of padding, which hf_turbo had left out; from here "
                "on they are computed. Use padding=False for a run that agrees with stock from its first step",
                RuntimeWarning,
                stacklevel=2,
            )

    def count(self, computed: Pass) -> None:
        self.passes += 1
        self.micro_batches += len(computed.micro_batches)
        for each in computed.micro_batches:
            self.tokens += each.tokens
            self.stock_tokens += each.rows * each.columns


# Where attention by documents is worth it without any padding: eager attention keeps several tensors of rows x heads x
# columns^2 in every layer, and reads and writes some more.
_EAGER_IS_SLOW = {"cuda"}

_STATES: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
# Backbones of a model that was patched: a walk over all modules takes milliseconds, at every step.
_OF_MODEL: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


def _states(model: nn.Module) -> list[_State]:
    return [_STATES[each] for each in _OF_MODEL.get(model, ()) if each in _STATES]


def finish_steps() -> None:
    """Ends the present step: the backward pass of micro-batches whose last one will not be computed here."""
    for state in list(_STATES.values()):
        step, state.step = state.step, None
        if step is not None:
            step.finish()


# ------------------------------------------------------------------------------------------------------------- backbone


def _make_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    parameters = [
        each for each in inspect.signature(stock).parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    names = [each.name for each in parameters[1:]]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = _STATES.get(self)
        if torch.compiler.is_compiling() or state is None or len(args) > len(names):
            return stock(self, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        rest = {name: value for name, value in kwargs.items() if name not in _FLATTENED | _OF_LOSS | _OF_PACKING}
        if not torch.is_grad_enabled():
            reference = _without_gradients(self, stock, kwargs, rest, state)
            return stock(self, **kwargs) if reference is None else reference
        claimed = _claim(self, kwargs, rest, state)
        if claimed is not None and not claimed[0].is_computed:
            claimed = _computed(self, stock, kwargs, rest, claimed, state)
        if claimed is None:
            return stock(self, **_with_dense_mask(kwargs, state))
        computed, place = claimed
        output = computed.hand_out(place)
        if place and state.step is not None and state.step.is_collective:
            sharded.touch(self, output.last_hidden_state)
        return output

    return forward


def _claim(backbone: Any, kwargs: dict[str, Any], rest: dict[str, Any], state: _State) -> tuple[Pass, int] | None:
    """The pass that a call belongs to, and its place there; None where stock computes it."""
    if not (state.in_step or state.acts_everywhere):
        return None
    claimed = None if state.step is None else state.step.claim(kwargs, rest)
    if claimed is not None and claimed[0].is_computed:
        return claimed
    if claimed is None:
        state.look()
    # What began goes on to the end of its step: other processes count on it where weights are sharded.
    is_off = not is_live() or not backbone.training or state.skip or (state.reason and claimed is None)
    if is_off or state.is_hooked() or not _may_flatten(backbone, kwargs, state):
        return None
    if claimed is None:
        claimed = Pass([_micro_batch(kwargs)], state.gradient_at_padding), 0
    micro_batches = claimed[0].micro_batches
    if len(micro_batches) > 1 or not micro_batches[0].is_dense:
        return claimed
    is_recorded = state.graphs is not None and not state.graphs.reason
    is_slow = state.attention == "eager" and micro_batches[0].device.type in _EAGER_IS_SLOW
    return claimed if is_recorded or is_slow else None


def _with_dense_mask(kwargs: dict[str, Any], state: _State) -> dict[str, Any]:
    """The arguments of a call that stock computes: with a mask that is known to mask nothing, it says so."""
    mask = kwargs.get("attention_mask")
    if not (is_live() and state.in_step and type(mask) is torch.Tensor and mask.ndim == 2):
        return kwargs
    if not any(each.is_dense and each.is_called_with(kwargs) for each in state.foreseen):
        return kwargs
    return {**kwargs, "attention_mask": dense_masks.dense(mask)}


def _without_gradients(
    backbone: Any, stock: Callable[..., Any], kwargs: dict[str, Any], rest: dict[str, Any], state: _State
) -> Any:
    """The output for a call inside a training step that asks for no gradients: log-probabilities of a reference model,
    or of the policy as it was. None where stock computes it."""
    if not (is_live() and state.in_step and state.masks_reference) or state.reason or state.skip or state.is_hooked():
        return None
    if not _may_flatten(backbone, kwargs, state):
        return None
    foreseen = (each for each in state.foreseen if each.is_called_with(kwargs))
    of = Pass([next(foreseen, None) or _micro_batch(kwargs)], state.gradient_at_padding)
    if of.micro_batches[0].is_dense:
        return None
    random = random_states(of.device)
    try:
        output, _ = _flattened(backbone, stock, kwargs, rest, of, state)
    except varlen.NotUnderstood as error:
        state.reason = str(error)
    if state.reason:
        set_random_states(random, of.device)
        return None
    of.computed(output, rest)
    state.count(of)
    return of.hand_out(0)


def _flattened(
    backbone: Any, stock: Callable[..., Any], kwargs: dict[str, Any], rest: dict[str, Any], of: Pass, state: _State
) -> tuple[Any, varlen.Documents]:
    """What the backbone returns for the tokens of a pass, and the documents that its layers attended to.

    Raises:
        NotUnderstood: it turns out that it cannot be done.
    """
    lengths = of.lengths()
    rows = 1 if attention_seams.is_computed_here(state.attention) else 0
    documents, mask = varlen.Documents.of(lengths, of.device), varlen.no_mask(sum(lengths), of.device, rows)
    # The config's default may be a cache, where a plain loop leaves it on: nobody generates from this pass.
    arguments = {**rest, **of.arguments(kwargs), "attention_mask": mask, "documents": documents, "use_cache": False}
    output = stock(backbone, **arguments)
    layers = len(backbone.layers)
    if not state.tried and documents.calls != layers:
        raise varlen.NotUnderstood(f"{documents.calls} of {layers} layers attend through the registry")
    state.tried = True
    return output, documents


def _micro_batch(kwargs: dict[str, Any]) -> MicroBatch:
    """That of a call which no trainer has announced: its lengths are read off the device, which waits for it."""
    inputs = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    return MicroBatch(
        (inputs.shape[0], inputs.shape[1]),
        None if mask is None else mask.cpu(),
        None if positions is None else positions.cpu(),
        inputs.device,
    )


def _computed(
    backbone: Any,
    stock: Callable[..., Any],
    kwargs: dict[str, Any],
    rest: dict[str, Any],
    claimed: tuple[Pass, int],
    state: _State,
) -> tuple[Pass, int] | None:
    """The pass after the backbone has computed it: a smaller one where memory ran out; None where it cannot be done."""
    together, _ = claimed
    device = together.device
    random = random_states(device)
    try:
        _run(backbone, stock, kwargs, rest, together, state)
        return claimed
    except varlen.NotUnderstood as error:
        state.reason, state.step = str(error), None
    except torch.OutOfMemoryError:
        if state.step is not None and state.step.is_collective:
            raise
        tightened = kept_layers.tighten(backbone)
        if state.graphs is not None:
            state.graphs.forget()
        if not tightened and (len(together.micro_batches) == 1 or state.step is None):
            raise
        state.kept_per_token = state.kept_per_token and 2 * state.kept_per_token
    # Outside of the handlers: they hold on to the tensors of the pass that failed.
    set_random_states(random, device)
    if state.reason:
        return None
    torch.cuda.empty_cache()
    if state.step is None or len(together.micro_batches) == 1:
        return _computed(backbone, stock, kwargs, rest, claimed, state)
    state.step.split(together)
    smaller = _claim(backbone, kwargs, rest, state)
    return smaller and _computed(backbone, stock, kwargs, rest, smaller, state)


def _run(
    backbone: Any, stock: Callable[..., Any], kwargs: dict[str, Any], rest: dict[str, Any], of: Pass, state: _State
) -> None:
    """Has the backbone compute a pass.

    Raises:
        NotUnderstood: it turns out that it cannot be done.
    """
    if state.graphs is not None and state.tried:
        recorded = state.graphs.output(stock, of, kwargs, rest, state.worst, state.kept_per_token)
        if recorded is not None:
            of.computed(recorded, rest)
            state.count(of)
            return
    lengths, device = of.lengths(), of.device
    before = device_memory.allocated(device) if state.measured < _MEASURED_PASSES else None
    random = random_states(device) if state.graphs is not None else []
    with nullcontext() if state.graphs is None else state.graphs.observed(sum(lengths), device):
        output, documents = _flattened(backbone, stock, kwargs, rest, of, state)
    if before is not None:
        # What is kept instead of recomputed is a matter of its own.
        kept = (device_memory.allocated(device) or 0) - before - kept_layers.kept_bytes(backbone)
        state.kept_per_token = max(state.kept_per_token or 0.0, kept / max(sum(lengths), 1))
        state.measured += 1
    if state.graphs is not None:
        drew = any(not torch.equal(a, b) for a, b in zip(random, random_states(device), strict=True))
        against = "it draws random numbers" if drew else ""
        if documents.needs_lengths:
            against = "its attention does not take lengths from the device"
        state.graphs.computed(output, against)
    of.computed(output, rest)
    state.count(of)


def _may_flatten(backbone: Any, kwargs: dict[str, Any], state: _State) -> bool:
    """Whether this call is one on rows of tokens, and asks for nothing but hidden states."""
    mask, config = kwargs.get("attention_mask"), backbone.config
    inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    position_ids = kwargs.get("position_ids")
    if not (
        isinstance(inputs, torch.Tensor)
        and inputs.numel() > 0
        and inputs.device.type in padding_conflicts.DEVICES
        and (mask is None or _is_mask(mask, inputs))
        and config._attn_implementation == state.attention
        and kwargs.get("past_key_values") is None
        and not kwargs.get("use_cache")
        and kwargs.get("return_dict") is not False
    ):
        return False
    if any(getattr(config, name, False) if kwargs.get(name) is None else kwargs[name] for name in _OFF):
        return False
    if position_ids is not None and not (position_ids.ndim == 2 and position_ids.shape[1] == inputs.shape[1]):
        return False
    if mask is None and position_ids is not None and (len(inputs) > 1 or not _keeps_documents_apart(config, kwargs)):
        return False
    if len(inputs) == 1 and position_ids is not None and not state.takes_packed_rows:
        return False
    # Anything else that goes by token would have to be flattened too.
    known = _FLATTENED | _OF_LOSS | (_OF_PACKING if mask is None else set())
    return not any(isinstance(value, torch.Tensor) for name, value in kwargs.items() if name not in known)


def _keeps_documents_apart(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether stock keeps the documents of a packed row apart: not where it makes a cache."""
    use_cache = kwargs.get("use_cache")
    return not (config.use_cache if use_cache is None else use_cache)


def _is_mask(mask: Any, inputs: torch.Tensor) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape == inputs.shape[:2]


# ------------------------------------------------------------------------------------------------------------- findings


def backbones(model: nn.Module) -> dict[str, Any]:
    """Text backbones of transformers inside a model, by name."""
    cls = getattr(sys.modules.get(attention_seams.MODELS), "PreTrainedModel", None)
    return {
        name: module
        for name, module in model.named_modules()
        if cls is not None
        and isinstance(module, cls)
        and isinstance(getattr(module, "layers", None), nn.ModuleList)
        and hasattr(module, "embed_tokens")
    }


def find(model: nn.Module, *, device_type: str, everywhere: bool = True) -> Finding:
    """Class swaps for backbones that may compute flattened batches, and the seam in attention.

    Args:
        everywhere: whether they do wherever they are called; else within `training_step` alone.
    """
    finding = Finding("padding", "varlen_attention", Exactness.REASSOCIATED)
    swaps: list[Patch] = []
    seams: dict[Patch, None] = {}
    for name, backbone in backbones(model).items():
        finding.found += 1
        state = _STATES.get(backbone)
        reason = (state.reason if state else "") or padding_conflicts.conflict(backbone, device_type)
        if reason:
            finding.refuse(reason)
            continue
        finding.patched += 1
        if any(p > 0 for p in padding_conflicts.dropouts(backbone)):
            finding.exactness = Exactness.REDRAWN
        if not is_swapped(backbone):
            _STATES[backbone] = _State(backbone)
            subclass = same_name_subclass(stock_class(backbone), _make_forward)
            swaps.append(ClassSwap(f"padding:{name}", backbone, subclass))
            seams.update(dict.fromkeys(attention_seams.seams(backbone)))
        _STATES[backbone].acts_everywhere = everywhere
        _OF_MODEL.setdefault(model, weakref.WeakSet()).add(backbone)
    finding.patches = [*seams, *swaps]
    return finding


def find_merging(model: nn.Module) -> Finding:
    """Backbones whose micro-batches may share passes: those of `find`, unless something watches each gradient."""
    finding = Finding("merging", "shared passes", Exactness.REASSOCIATED)
    for backbone in backbones(model).values():
        finding.found += 1
        if backbone not in _OF_MODEL.get(model, ()):
            finding.refuse("its padding is computed")
        elif _STATES[backbone].has_gradient_hooks():
            finding.refuse("hooks on the gradients of its parameters")
        else:
            finding.patched += 1
            if any(p > 0 for p in padding_conflicts.dropouts(backbone)):
                finding.exactness = Exactness.REDRAWN
    return finding


class _Recorded(Patch):
    """Lets the passes of a backbone be recorded."""

    def __init__(self, name: str, backbone: Any, is_offloaded: bool):
        self.id, self._backbone, self._is_offloaded = f"graphs:{name}", weakref.ref(backbone), is_offloaded

    def apply(self) -> None:
        backbone = self._backbone()
        if backbone is not None and backbone in _STATES:
            _STATES[backbone].graphs = graphs.Graphs(backbone, self._is_offloaded)

    def revert(self) -> bool:
        backbone = self._backbone()
        if backbone is not None and backbone in _STATES:
            _STATES[backbone].graphs = None
        return True


def find_graphs(model: nn.Module, *, device_type: str, checkpointed: bool | None) -> Finding:
    """Backbones whose passes may be recorded; to be asked after all other roles.

    Args:
        checkpointed: whether the training checkpoints.
    """
    finding = Finding("graphs", "CUDA graphs", Exactness.REASSOCIATED)
    for name, backbone in backbones(model).items():
        finding.found += 1
        state = _STATES.get(backbone)
        if state is not None:
            state.graphs = None  # of an earlier training
        reason = graphs.conflict(backbone, device_type)
        if checkpointed and not checkpointing.is_recomputed(backbone):
            reason = reason or "its layers are recomputed by torch"
        if reason is None and backbone not in _OF_MODEL.get(model, ()):
            reason = "its padding is computed"
        if reason is not None:
            finding.refuse(reason)
            continue
        finding.patched += 1
        finding.patches.append(_Recorded(name, backbone, checkpointing.is_offloaded(backbone)))
    return finding


# ----------------------------------------------------------------------------------------------------------------- host


@contextmanager
def training_step(models: list[nn.Module], masks_reference: bool) -> Iterator[None]:
    """Around a trainer's training step with these models: the one trained, and the one it is held against.

    Args:
        masks_reference: whether what it computes without gradients is of real tokens alone.
    """
    states = [state for model in models for state in _states(model)]
    for state in states:
        state.in_step, state.masks_reference = True, masks_reference
    try:
        yield
    finally:
        for state in states:
            state.in_step = False


def batches_fetched(
    model: nn.Module,
    batches: list[Any],
    plan: Plan | None,
    is_collective: bool = False,
    references: Sequence[nn.Module] = (),
    is_anchored: bool = False,
) -> list[MicroBatch | None]:
    """Looks at the micro-batches of the next step.

    Args:
        plan: how many of them share a pass; None where each is one of its own.
        is_collective: whether every process has to compute the same passes, since they gather weights for each other.
        references: models that are asked for the same micro-batches without gradients.
        is_anchored: whether the backward of every micro-batch has to come to a parameter.

    Returns:
        What is known of them; nothing where no backbone of the model is patched.
    """
    states = _states(model)
    others = [state for reference in references for state in _states(reference)]
    if not (states or others):
        return []
    micro_batches = [foresee(batch) for batch in batches]
    may_pad = (each is None or each.padding is not None for each in micro_batches)
    skip = any(labels_on_padding(batch) for batch, may in zip(batches, may_pad, strict=True) if may)
    reason = next((state.reason for state in states if state.reason), "")
    for state in others:
        state.reason = state.reason or reason
    for state in (*states, *others):
        state.skip, state.foreseen = skip, [each for each in micro_batches if each is not None]
    for state in states:
        state.look()
        if state.step is not None and state.step.has_waiting_gradients:
            state.reason = "a micro-batch of a shared pass was left out"
            warnings.warn(
                "hf_turbo: gradients of the last step are missing, because the last micro-batch of a shared pass was "
                "left out; from here on nothing is shared. Use merging=False for this training",
                RuntimeWarning,
                stacklevel=2,
            )
        state.step = None
        packed = any(each.rows == 1 and "position_ids" in each.inputs for each in state.foreseen)
        is_foreseen = len(state.foreseen) == len(batches) and (state.takes_packed_rows or not packed)
        is_foreseen = is_foreseen and not skip and not state.reason
        state.worst = max([state.worst, *(each.rows * each.columns for each in state.foreseen)])
        counts = [1] * len(batches)
        if plan is not None:  # where others plan, too, it is asked whatever comes of it
            tokens = [0 if each is None else each.tokens for each in micro_batches]
            may_share = is_foreseen and not state.has_gradient_hooks()
            counts = plan(tokens, state.worst, state.kept_per_token, may_share)
        if is_foreseen:
            rest = iter(state.foreseen)
            anchor = state.smallest_trained() if is_anchored else None
            passes = [Pass([next(rest) for _ in range(n)], state.gradient_at_padding, anchor) for n in counts]
            state.step = Step(passes, is_collective)
    return micro_batches


def begin_again(models: list[nn.Module]) -> list[str]:
    """The present step is done again from its first micro-batch, after memory ran out: each in a pass of its own.

    Returns:
        What is different then.
    """
    shared = recorded = False
    for state in [state for model in models for state in _states(model)]:
        if state.graphs is not None:  # recordings hold memory for good
            recorded = recorded or len(state.graphs) > 0
            state.graphs.forget()
            state.graphs.reason = "memory ran out"
        if state.kept_per_token is not None:
            state.kept_per_token *= 2
        if state.step is not None:
            shared = shared or any(len(each.micro_batches) > 1 for each in state.step.passes)
            passes = [Pass([each], state.gradient_at_padding) for each in state.foreseen]
            state.step = Step(passes, state.step.is_collective)
    changes = (("each micro-batch in a pass of its own", shared), ("no recordings", recorded))
    return [change for change, is_made in changes if is_made]


def end_training(models: list[nn.Module]) -> str | None:
    """What came of it, for the report; None where nothing was flattened."""
    states = [state for model in models for state in _states(model)]
    for state in states:
        state.look()
    names = ("stock_tokens", "tokens", "micro_batches", "passes")
    stock_tokens, tokens, micro_batches, passes = (sum(getattr(state, name) for state in states) for name in names)
    reasons = {state.reason for state in states if state.reason}
    recorded = "; ".join(filter(None, (_about_recordings(state) for state in states)))
    for state in states:
        state.end_training()
    if reasons:
        return f"padding: computed after all, because {'; '.join(sorted(reasons))}"
    if not stock_tokens:
        return None
    removed = 1 - tokens / stock_tokens
    note = f"padding: {tokens:,} tokens computed where stock computes {stock_tokens:,} ({removed:.0%} removed)"
    if passes < micro_batches:
        note += f", in {passes:,} passes instead of {micro_batches:,}"
    return f"{note}; {recorded}" if recorded else note


def _about_recordings(state: _State) -> str:
    if state.graphs is None:
        return ""
    if state.graphs.reason:
        return f"passes are not recorded: {state.graphs.reason}"
    held = f" ({state.graphs.held_bytes / 2**30:.1f} GiB)" if state.graphs.held_bytes else ""
    return f"{state.graphs.replays:,} of {state.passes:,} passes by {len(state.graphs)} CUDA graphs{held}"
