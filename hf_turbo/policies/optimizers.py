"""Whether an optimizer's states fit on the device, and in what form of the same they need not.

Never a less precise one. AdamW of torch keeps averages in the dtype of the weights; its paged form is bitsandbytes' in
32 bits, which of bf16 weights is the more precise one, and twice as large where there is room: in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import footprint
from .footprint import Trained

# By `optim` of TrainingArguments.
PAGED_FORMS = {
    "adamw_torch": "paged_adamw_32bit",
    "adamw_torch_fused": "paged_adamw_32bit",
    "adamw_bnb_8bit": "paged_adamw_8bit",
    "adamw_8bit": "paged_adamw_8bit",
}
# Of the host's memory that is available: the rest is for data loaders and for saving checkpoints.
SHARE_OF_HOST_MEMORY = 0.8

# Of gradients that are used within backward: so many bytes at a time at least, and no more than so many times.
_LEAST_BUCKET, _MOST_BUCKETS = 2**25, 32

_LAYER_HIDDEN, _LAYER_INTERMEDIATE = 8, 4  # tensors of a layer of these widths that its backward holds at one time


def least_pass_bytes(tokens: int, layers: int, hidden: int, intermediate: int, itemsize: int) -> int:
    """What forward and backward hold at least: the input of each layer, and one layer while it is recomputed."""
    width = layers * hidden + _LAYER_HIDDEN * hidden + _LAYER_INTERMEDIATE * intermediate
    return tokens * width * itemsize


def bucket_bytes(gradients: int) -> int:
    """Of gradients that the optimizer uses together within backward.

    Args:
        gradients: bytes of all.
    """
    return max(_LEAST_BUCKET, gradients // _MOST_BUCKETS)


def standing_bytes(trained: Sequence[Trained]) -> int:
    """The most bytes of gradients that stand at one time where the optimizer steps within backward."""
    gradients = footprint.gradient_bytes(trained)
    largest = max((each.elements * each.itemsize for each in trained), default=0)
    return min(gradients, bucket_bytes(gradients) + largest)


def fits(states: int, gradients: int, in_pass: int, weights: int, free: int) -> bool:
    """Whether states have room on the device.

    Args:
        gradients: of all that is trained.
        in_pass: the least that forward and backward take.
        weights: those that are still to come to the device.
        free: bytes of device memory.
    """
    needed = weights + states + max(gradients, in_pass) + footprint.WORKSPACES
    return needed * (1 + footprint.FRAGMENTATION) <= free


def paged_form(optim: str, trained: Sequence[Trained], exact_masters: bool, host: int) -> tuple[str | None, str]:
    """What stands in for `optim`, whose states do not fit on the device; or None, and why.

    Args:
        exact_masters: bf16 weights have 16 bits more each.
        host: bytes of host memory that are available to this process.
    """
    paged = PAGED_FORMS[optim]
    _, in_host = footprint.optimizer_bytes(paged, trained, exact_masters)
    if in_host > SHARE_OF_HOST_MEMORY * host:
        smaller = (
            "" if "8bit" in paged else "; what would take a quarter of that, in 8 bits, is optim='paged_adamw_8bit'"
        )
        return None, f"host memory has {host / 2**30:.1f} GiB, and they take {in_host / 2**30:.1f} GiB{smaller}"
    return paged, ""
