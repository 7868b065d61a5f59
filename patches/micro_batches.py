"""The micro-batches of an optimizer step, and the passes in which the backbone computes them.

Every micro-batch keeps its own call of the model, its own loss, its own metrics and its own backward, in the script's
order. Only the backbone's work is shared: the first micro-batch of a pass has the tokens of all of them computed, each
is handed its own hidden states, and backward stops there until it comes to the last micro-batch of the pass, whose way
leads through the backbone for all. Whatever the loss is, the gradient is the same sum, in fewer and larger products.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hf_turbo.kernels._launch import once_differentiable

from . import host_copies

# On a GPU the tokens of a pass are filled up to a multiple of this. Kernels are compiled apart for numbers that divide
# by 16 and for those that do not: seconds in the middle of a training. And memory is reused where sizes come again.
GRAIN = {"cuda": 64}


class MicroBatch:
    """What the backbone is to compute of one micro-batch.

    Attributes:
        rows, columns: of its padded shape.
        lengths: of its documents in tokens, in order.
        index: [tokens] of the real tokens among `rows * columns`; None where all are.
        padding: [rows * columns - tokens] of the others; None where there are none.
        device: of these.
        inputs: the tensors that the script will call the model with, by name; empty where it has called it already.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        device: torch.device,
        inputs: dict[str, torch.Tensor] | None = None,
    ):
        """`mask` and `position_ids` are on the CPU, so that nothing here waits for the device."""
        self.rows, self.columns = shape
        self.inputs = {} if inputs is None else inputs
        self._versions = {name: each._version for name, each in self.inputs.items()}
        self.device, self._position_ids = device, position_ids
        self.index: torch.Tensor | None = None
        self.padding: torch.Tensor | None = None
        self._real: torch.Tensor | None = None  # `index` on the CPU
        if mask is not None:
            real = mask != 0
            self.lengths: list[int] = real.sum(1).tolist()
            if self.tokens < self.rows * self.columns:
                real = real.flatten()
                self._real = real.nonzero().flatten()
                self.index = self._real.to(device, non_blocking=True)
                self.padding = (~real).nonzero().flatten().to(device, non_blocking=True)
        elif position_ids is not None and self.rows == 1:
            # As stock finds the documents of a packed row: where positions do not go on.
            starts = (position_ids.flatten().diff() != 1).nonzero().flatten() + 1
            self.lengths = [end - start for start, end in pairwise([0, *starts.tolist(), self.columns])]
        else:
            self.lengths = [self.columns] * self.rows

    @functools.cached_property
    def positions(self) -> torch.Tensor:
        """[tokens] on the device; not asked for where stock computes the micro-batch."""
        positions = torch.arange(self.columns)[None] if self._position_ids is None else self._position_ids
        positions = positions.expand(self.rows, self.columns).flatten()
        return (positions if self._real is None else positions[self._real]).to(self.device, non_blocking=True)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def is_dense(self) -> bool:
        """Whether stock computes nothing needless: no padding, and no mask of a packed row."""
        return self.index is None and len(self.lengths) == self.rows

    def is_called_with(self, kwargs: dict[str, Any]) -> bool:
        """Whether these are the very tensors that were foreseen, unchanged; on a CPU also copies of them.

        Trainer copies what it calls the model with where a process of several trains on a CPU: to "cpu:0" from "cpu".
        """
        if not self.inputs or kwargs.get("inputs_embeds") is not None:
            return False
        for name in ("input_ids", "attention_mask", "position_ids"):
            given, foreseen = kwargs.get(name), self.inputs.get(name)
            if given is None and foreseen is None:
                continue
            if given is None or foreseen is None or foreseen._version != self._versions[name]:
                return False
            if not _is_same_memory(given, foreseen):
                if not _is_copy_on_cpu(given, foreseen):
                    return False
            elif given._version != self._versions[name]:
                return False
        return True

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """[rows, columns, ...] to [tokens, ...]."""
        tensor = tensor.flatten(0, 1)
        return tensor if self.index is None else tensor.index_select(0, self.index)

    def padded(self, flat: torch.Tensor) -> torch.Tensor:
        """[tokens, H] to [rows, columns, H], zeros elsewhere."""
        if self.index is not None:
            zeros = flat.new_zeros(self.rows * self.columns, flat.shape[-1])
            flat = zeros.index_copy_(0, self.index, flat)
        return flat.view(self.rows, self.columns, -1)


class Pass:
    """Micro-batches that the backbone computes together.

    Attributes:
        micro_batches: in the order in which the script calls the model with them.
        filling: tokens of a last document that nobody asked for, and that is left out of what is handed out.
        on_padding_gradient: called with the gradient at padding, [tokens of padding, H], where a backward has one.
        anchor: a parameter that every backward comes to, with a gradient of zeros if with no other.
    """

    def __init__(
        self,
        micro_batches: list[MicroBatch],
        on_padding_gradient: Callable[[torch.Tensor], None],
        anchor: torch.Tensor | None = None,
    ):
        self.micro_batches, self.on_padding_gradient, self.anchor = micro_batches, on_padding_gradient, anchor
        self._output: Any = None
        self._rest: dict[str, Any] = {}
        self._gradients: dict[int, torch.Tensor] = {}
        self._handed_out: set[int] = set()
        self._is_over = False  # the last one was handed out
        self.fill_to(0)

    @property
    def is_computed(self) -> bool:
        return self._output is not None

    @property
    def device(self) -> torch.device:
        return self.micro_batches[0].device

    @property
    def tokens(self) -> int:
        """Filling not included."""
        return sum(each.tokens for each in self.micro_batches)

    def fill_to(self, tokens: int) -> None:
        """Sets the number of tokens, filling included; rounded up to the grain, and none are left out."""
        most = max(tokens, self.tokens)
        self.filling = most - self.tokens + -most % GRAIN.get(self.device.type, 1)

    def lengths(self) -> list[int]:
        """Of all documents, the filling being the last."""
        filling = [self.filling] if self.filling else []
        return [length for each in self.micro_batches for length in each.lengths] + filling

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Of a call for all of them, given those for one: input ids or embeddings, and positions."""
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        parts = [each.flat(each.inputs.get(name, kwargs[name])) for each in self.micro_batches]
        positions = [each.positions for each in self.micro_batches]
        return {name: self._joined(parts), "position_ids": self._joined(positions)}

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """[1, tokens, ...], zeros for the filling."""
        if self.filling:
            parts = [*parts, parts[0].new_zeros(self.filling, *parts[0].shape[1:])]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def awaits(self, place: int) -> bool:
        """Whether a micro-batch may still be handed out."""
        return place not in self._handed_out and not self._is_over

    def serves(self, rest: dict[str, Any]) -> bool:
        """Whether the pass is one of a call with these other arguments."""
        if not self.is_computed:
            return True
        return rest.keys() == self._rest.keys() and all(_same(rest[name], self._rest[name]) for name in rest)

    def computed(self, output: Any, rest: dict[str, Any]) -> None:
        """Takes what the backbone returned, `last_hidden_state` being [1, tokens, H]."""
        self._output, self._rest = output, rest

    def hand_out(self, place: int) -> Any:
        """The output for one micro-batch, as if the backbone had been called with it alone."""
        self._handed_out.add(place)
        micro_batch, hidden = self.micro_batches[place], self._output.last_hidden_state
        is_last = place == len(self.micro_batches) - 1
        start = sum(each.tokens for each in self.micro_batches[:place])
        values = hidden.detach()[0, start : start + micro_batch.tokens]
        if hidden.requires_grad:
            elsewhere = torch.empty(0, requires_grad=True) if self.anchor is None else self.anchor
            source = hidden if is_last else elsewhere
            states = _HandOut.apply(source, values, self, place)
        else:
            states = micro_batch.padded(values)
        output = copy.copy(self._output)
        output.last_hidden_state = states
        if is_last:
            self._output, self._is_over = None, True
        return output

    def take_gradient(self, place: int, gradient: torch.Tensor) -> None:
        """Of a micro-batch's hidden states, [tokens, H]."""
        earlier = self._gradients.get(place)
        self._gradients[place] = gradient if earlier is None else earlier + gradient

    @property
    def has_waiting_gradients(self) -> bool:
        """Of micro-batches whose last one has not come."""
        return bool(self._gradients)

    def finish(self) -> None:
        """Goes backward for the micro-batches that have, if the last one will not be computed here."""
        if self._output is not None and self._gradients:
            torch.autograd.backward(self._output.last_hidden_state, self.whole_gradient())
        self._output, self._is_over = None, True

    def whole_gradient(self) -> torch.Tensor:
        """[1, tokens, H]; zeros where no backward came to a micro-batch, and for the filling."""
        like = next(iter(self._gradients.values()))
        parts = [
            self._gradients.get(place, like.new_zeros(1).expand(each.tokens, like.shape[-1]))
            for place, each in enumerate(self.micro_batches)
        ]
        self._gradients.clear()
        return self._joined(parts)


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    )


def _is_copy_on_cpu(a: torch.Tensor, b: torch.Tensor) -> bool:
    """By value, which elsewhere would wait for the device."""
    return {a.device.type, b.device.type} == {"cpu"} and a.dtype == b.dtype and torch.equal(a, b)


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and bool(a == b))


class _HandOut(torch.autograd.Function):
    """Hidden states of one micro-batch at their places; backward goes on for the last one of the pass alone."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, values: torch.Tensor, of: Pass, place: int) -> torch.Tensor:
        ctx.of, ctx.place = of, place
        return of.micro_batches[place].padded(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of, place = ctx.of, ctx.place
        micro_batch = of.micro_batches[place]
        if micro_batch.padding is not None:
            of.on_padding_gradient(dy.flatten(0, 1).index_select(0, micro_batch.padding))
        of.take_gradient(place, micro_batch.flat(dy))
        if place == len(of.micro_batches) - 1:
            gradient = of.whole_gradient()
        else:
            gradient = None if of.anchor is None else torch.zeros_like(of.anchor)
        return gradient, None, None, None


class Step:
    """The passes of one optimizer step.

    Attributes:
        is_collective: whether other processes compute as many, each at the same micro-batch.
    """

    def __init__(self, passes: list[Pass], is_collective: bool = False):
        self.passes, self.is_collective = passes, is_collective

    def claim(self, kwargs: dict[str, Any], rest: dict[str, Any]) -> tuple[Pass, int] | None:
        """The pass and the place in it that a call of the backbone belongs to; None if it was not foreseen."""
        for each in self.passes:
            for place, micro_batch in enumerate(each.micro_batches):
                if each.awaits(place) and micro_batch.is_called_with(kwargs):
                    if each.serves(rest):
                        return each, place
                    if place == len(each.micro_batches) - 1:  # computed alone: the others wait for it no longer
                        each.finish()
        return None

    @property
    def has_waiting_gradients(self) -> bool:
        return any(each.has_waiting_gradients for each in self.passes)

    def finish(self) -> None:
        """Ends the step before its last micro-batch: no gradient that waits is lost."""
        for each in self.passes:
            each.finish()

    def split(self, whole: Pass) -> None:
        """Makes each micro-batch of a pass that has not been computed a pass of its own."""
        alone = [Pass([each], whole.on_padding_gradient) for each in whole.micro_batches]
        at = self.passes.index(whole)
        self.passes[at : at + 1] = alone


def foresee(batch: Any) -> MicroBatch | None:
    """What the backbone will compute for a batch of a data loader, if its model is called with it as it is."""
    if not hasattr(batch, "get"):
        return None
    ids, mask, positions = (batch.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.numel():
        return None
    inputs = {"input_ids": ids}
    for name, tensor in (("attention_mask", mask), ("position_ids", positions)):
        if tensor is not None:
            if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or tensor.shape[1] != ids.shape[1]:
                return None
            inputs[name] = tensor
    if mask is None and positions is not None and len(ids) > 1:
        return None
    return MicroBatch(
        (ids.shape[0], ids.shape[1]),
        None if mask is None else host_copies.of(mask),
        None if positions is None else host_copies.of(positions),
        ids.device,
        inputs,
    )


def labels_on_padding(batch: Any) -> bool:
    """Whether a label of a micro-batch is predicted by padding: the one before it in its row, or itself."""
    labels, mask = (batch.get(name) for name in ("labels", "attention_mask")) if hasattr(batch, "get") else (None, None)
    if not (isinstance(labels, torch.Tensor) and isinstance(mask, torch.Tensor)) or labels.shape != mask.shape:
        return False
    if labels.ndim != 2:
        return False
    labels, mask = map(host_copies.of, (labels, mask))
    padding = mask == 0
    return bool(((labels != -100)[:, 1:] & padding[:, :-1]).any())
