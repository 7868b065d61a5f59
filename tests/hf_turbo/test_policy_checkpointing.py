"""When layer inputs go to host memory: what the policy says of models and devices that people use."""

import pytest

from hf_turbo.policies.checkpointing import (
    ACHIEVED_SHARE_OF_PEAK,
    host_budget,
    keep_on_device_reason,
    layers_that_leave,
)

# FLOP/s, and bytes per second of the link to the host.
DEVICES = {
    "B200": (2250e12, 55e9),
    "H200": (989e12, 55e9),
    "H100 in an old slot": (989e12, 13e9),
    "A100": (312e12, 25e9),
    "RTX 4090 with 8 lanes": (165e12, 13e9),
}
# Hidden size and weights of one layer, of experts those that a token visits.
LAYERS = {
    "Llama-1B": (2048, 60.8e6),
    "Qwen3-4B": (2560, 100.9e6),
    "Llama-8B": (4096, 218.1e6),
    "Llama-70B": (8192, 855.6e6),
    "Qwen3-30B-A3B": (2048, 56.6e6),
}


def stays(device: str, model: str, itemsize: int = 2) -> str | None:
    hidden_size, weights = LAYERS[model]
    return keep_on_device_reason(hidden_size * itemsize, 2 * weights, *DEVICES[device])


@pytest.mark.parametrize(
    ("device", "models"),
    [
        ("B200", {"Llama-8B", "Llama-70B"}),
        ("H200", set(LAYERS)),
        ("H100 in an old slot", {"Llama-70B"}),
        ("A100", set(LAYERS)),
        ("RTX 4090 with 8 lanes", set(LAYERS)),
    ],
)
def test_which_models_offload_where(device, models):
    assert {model for model in LAYERS if stays(device, model) is None} == models


def test_wide_residuals_of_fp32_weights_take_twice_the_time():
    assert stays("H200", "Llama-1B", itemsize=2) is None
    assert stays("H200", "Llama-1B", itemsize=4) is not None


def test_the_reason_says_how_far_off_it_is_and_what_to_do():
    assert stays("H100 in an old slot", "Llama-1B") == (
        "a layer computes for 0.25 us per token, too short to hide a copy of 0.32 us; "
        "offload=True offloads all the same"
    )


def test_a_device_of_unknown_speed_keeps_them():
    assert "unknown" in keep_on_device_reason(8192, 4e8, None, 5e10)
    assert "unknown" in keep_on_device_reason(8192, 4e8, 1e15, None)


def test_the_copy_may_take_half_the_time():
    size, peak, link = 8192, 1e15, 25e9
    compute = 2 * size / link  # seconds: twice those of the copy
    flops = compute * ACHIEVED_SHARE_OF_PEAK * peak
    assert keep_on_device_reason(size, 1.001 * flops, peak, link) is None
    assert keep_on_device_reason(size, 0.999 * flops, peak, link) is not None


@pytest.mark.parametrize(("available", "processes", "bytes_"), [(64, 1, 32), (64, 4, 8), (0, 8, 0), (64, 0, 32)])
def test_processes_of_a_host_share_half_of_what_is_free(available, processes, bytes_):
    assert host_budget(available * 2**30, processes) == bytes_ * 2**30


def test_as_many_products_leave_as_the_computation_hides():
    """Llama-1B on an H200: a layer's copy takes 298 ns a token, its computation 176."""
    leave = layers_that_leave([16_384] * 16, [2 * 60.8e6] * 16, 989e12, 55e9)
    assert leave[:5] == [True, False, True, False, True]
    assert sum(leave) == 9  # 16 * 176 / 298


@pytest.mark.parametrize(("link", "expected"), [(1e15, 6), (1e3, 1), (None, 6)])
def test_products_and_fast_links_slow_links_and_unknown_ones(link, expected):
    assert sum(layers_that_leave([16_384] * 6, [1e8] * 6, 989e12, link)) == expected
