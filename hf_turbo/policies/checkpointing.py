"""When what layers keep for backward goes to host memory, and how much of it that may take.

A layer's input leaves while the following layers compute, so it costs nothing as long as the copy takes less time than
a layer's forward. Both grow with the number of tokens, which therefore drops out: bytes per token over the host link,
against FLOP per token over what the device achieves. Backward computes three times as much per layer, and hides the
way back wherever forward hides the way there.

A layer that is not checkpointed keeps far more than its input. Of its largest tensor only some layers' leave: as many
as the computation of all hides.
"""

from __future__ import annotations

# Of the device's dense bf16 peak, over a whole layer: GEMMs of 4,096 tokens reach 0.7 to 0.8, the rest is memory-bound.
ACHIEVED_SHARE_OF_PEAK = 0.5
# The copy may take this much of the layer's time: room for a link that others use too, and for faster kernels.
SHARE_OF_COMPUTE_TIME = 0.5
# The same where the user asks for it by name, and pays with time for what does not hide.
ACHIEVED_WHEN_ASKED = 0.7
# Pinned memory cannot be swapped out. Data loaders, the page cache and saving a checkpoint need the rest.
SHARE_OF_HOST_MEMORY = 0.5


def keep_on_device_reason(
    bytes_per_token: int, flops_per_token: float, peak_flops: float | None, link_speed: float | None
) -> str | None:
    """Why layer inputs had better stay on the device; None where the copy hides behind the computation.

    Args:
        bytes_per_token: of the layer's input: hidden size times bytes per element.
        flops_per_token: of the layer's forward: twice its weights, of experts those that a token visits.
        peak_flops: dense bf16 FLOP/s of the device, None where unknown.
        link_speed: bytes per second between the device and pinned host memory, None where unknown.
    """
    if peak_flops is None or link_speed is None:
        return "the speed of this device is unknown; offload=True offloads all the same"
    copy = bytes_per_token / link_speed
    compute = flops_per_token / (ACHIEVED_SHARE_OF_PEAK * peak_flops)
    if copy <= SHARE_OF_COMPUTE_TIME * compute:
        return None
    return (
        f"a layer computes for {compute * 1e6:.2g} us per token, too short to hide a copy of {copy * 1e6:.2g} us; "
        "offload=True offloads all the same"
    )


def layers_that_leave(
    bytes_per_token: list[int], flops_per_token: list[float], peak_flops: float | None, link_speed: float | None
) -> list[bool]:
    """Of which layers, in order, a tensor leaves while those behind it compute: of the first, and of each by which all
    so far have computed for as long as copies will have taken.

    Args:
        bytes_per_token: of that tensor, by layer.
        flops_per_token: of the layer's forward.
        peak_flops, link_speed: as above; all leave where one is unknown.
    """
    if peak_flops is None or link_speed is None:
        return [True] * len(bytes_per_token)
    leave, ahead = [], 0.0  # seconds of computation that no copy fills
    for size, flops in zip(bytes_per_token, flops_per_token, strict=True):
        leave.append(ahead >= 0.0)
        ahead += flops / (ACHIEVED_WHEN_ASKED * peak_flops) - leave[-1] * size / link_speed
    return leave


def host_budget(available: int, processes: int) -> int:
    """Bytes of host memory that one process may pin.

    Args:
        available: bytes that the host can still give.
        processes: training processes on this host, each of which pins its own.
    """
    return int(available * SHARE_OF_HOST_MEMORY) // max(processes, 1)
