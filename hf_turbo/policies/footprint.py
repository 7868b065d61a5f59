"""What a training takes of a GPU's memory, from what was counted of its model and of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import memory

# Products of cuBLAS on the thread of forward and on that of backward, on Hopper; 8 MiB each on older GPUs.
WORKSPACES = 2 * 32 * 2**20
# The CUDA context with torch's and our kernels loaded.
CONTEXT = 2**29
# Of all in tensors: blocks that torch's allocator has from the driver and cannot fill.
FRAGMENTATION = 0.03

# Dense bf16 FLOP/s and bytes per second over the host link where the GPU is not known: an H100 and PCIe 5. Most GPUs
# compute less per byte of their link, so that copies of layer inputs hide sooner.
ASSUMED_FLOPS, ASSUMED_LINK = 989e12, 50e9

# bitsandbytes: tensors of fewer elements have 32-bit states; a scale for so many elements; paged from so many on.
_LEAST_8BIT, _BLOCK_8BIT, _LEAST_PAGED = 4096, 256, 100_000

# States per element, by `optim` of TrainingArguments: of torch's in the dtype of the parameter.
_TORCH = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1}
_BITSANDBYTES = {
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "lion_8bit": 1,
    "lion_32bit": 1,
    "rmsprop_bnb": 1,
    "rmsprop_bnb_8bit": 1,
    "rmsprop_bnb_32bit": 1,
    "ademamix": 3,
    "ademamix_8bit": 3,
    "paged_adamw_32bit": 2,
    "paged_adamw_8bit": 2,
    "paged_lion_32bit": 1,
    "paged_lion_8bit": 1,
    "paged_ademamix_32bit": 3,
    "paged_ademamix_8bit": 3,
}
OPTIMIZERS = (*_TORCH, *_BITSANDBYTES)


class Trained(NamedTuple):
    """A trained tensor.

    Attributes:
        elements: their number. itemsize: bytes of each.
        is_embedding: Trainer keeps the states of embeddings in 32 bits.
    """

    elements: int
    itemsize: int
    is_embedding: bool


def optimizer_bytes(optim: str, trained: Sequence[Trained], exact_masters: bool = False) -> tuple[int, int]:
    """Bytes of optimizer states on the device, and in memory that pages to the host.

    Args:
        exact_masters: bf16 weights have 16 bits more each, and averages of torch's are fp32 beside them.

    Raises:
        ValueError: an optimizer whose states are not known here.
    """
    if exact_masters:
        device, paged = optimizer_bytes(optim, [each._replace(itemsize=max(4, each.itemsize)) for each in trained])
        for each in trained:
            rest = 2 * each.elements if each.itemsize == 2 else 0
            pages = _pages(optim, each)
            device, paged = device + (0 if pages else rest), paged + (rest if pages else 0)
        return device, paged
    if optim in _TORCH:
        return _TORCH[optim] * sum(each.elements * each.itemsize for each in trained), 0
    if optim not in _BITSANDBYTES:
        raise ValueError(f"the states of --optim {optim} are not known: use one of {', '.join(OPTIMIZERS)}")
    device = paged = 0
    for each in trained:
        in_8bit = "8bit" in optim and each.elements >= _LEAST_8BIT and not each.is_embedding
        size = each.elements + 4 * -(-each.elements // _BLOCK_8BIT) if in_8bit else 4 * each.elements
        if _pages(optim, each):
            # The scales of 8-bit states do not page.
            data = each.elements if in_8bit else size
            paged, size = paged + _BITSANDBYTES[optim] * data, size - data
        device += _BITSANDBYTES[optim] * size
    return device, paged


def _pages(optim: str, each: Trained) -> bool:
    return optim.startswith("paged") and each.elements >= _LEAST_PAGED


def gradient_bytes(trained: Sequence[Trained]) -> int:
    """Bytes of all gradients."""
    return sum(each.elements * each.itemsize for each in trained)


class Footprint(NamedTuple):
    """Bytes of a training on a GPU.

    Attributes:
        resident: what is there between steps: weights, adapters, optimizer states.
        gradients: of all that is trained.
        states: of the optimizer, a part of `resident`.
        in_pass: the most that forward and backward take besides.
    """

    resident: int
    gradients: int
    states: int
    in_pass: int

    @property
    def peak(self) -> int:
        """The most in tensors at one time: torch's `max_memory_allocated`."""
        return self.resident + max(self.in_pass, self.gradients) + WORKSPACES

    @property
    def needed(self) -> int:
        """Of the GPU's memory."""
        return round(self.peak * (1 + FRAGMENTATION)) + CONTEXT


def layers_kept(
    of_recomputed: Footprint, layers: Sequence[memory.Layer], total: int, choice: memory.Choice = "auto"
) -> memory.Kept:
    """What a run keeps of its checkpointed layers.

    Args:
        of_recomputed: the run with all layers recomputed.
        layers: in the order of forward.
        total: bytes of the GPU's memory.
        choice: the option `memory`.
    """
    # As a run measures the rest: from the first pass to the second, so that states and workspaces are among it.
    rest = max(of_recomputed.in_pass, of_recomputed.gradients + of_recomputed.states) + WORKSPACES
    free = total - CONTEXT - of_recomputed.resident - WORKSPACES
    return memory.what_to_keep(layers, memory.room(free, rest, choice))


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The longest context that fits, to 1/128 of `most` and a multiple of 64 tokens; 0 where the shortest does not.

    Args:
        fits: whether a context of so many tokens does; if one does, shorter ones do.
        most: tokens that the model is made for.
    """
    step = max(64, most // 128 // 64 * 64)
    low, high = 0, most // step
    if not fits(step):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step
