"""How many rows of an MLP are computed at a time."""

import pytest

from hf_turbo.policies import tiling


@pytest.mark.parametrize(
    ("tokens", "width", "expected"),
    [
        (4096, 14_336, None),  # one tile
        (32_768, 14_336, 4096),  # eight of the same size
        (131_072, 14_336, 4608),
        (8192, 8192, None),
        (8193, 8192, 4224),  # two halves
        (100_000, 1024, 14_336),  # no more rows than are of use
        (100_000, 500_000, 2048),  # no fewer
    ],
)
def test_little_memory(tokens, width, expected):
    assert tiling.rows(tokens, width, False, "min_memory") == expected
    assert tiling.rows(tokens, width, True, "min_memory") == expected


@pytest.mark.parametrize("choice", ["auto", "as_is", "max_speed"])
def test_long_passes_that_are_recomputed(choice):
    assert tiling.rows(16_384, 14_336, True, choice) is None
    assert tiling.rows(32_768, 14_336, True, choice) == 8192
    assert tiling.rows(32_768, 14_336, False, choice) is None


@pytest.mark.parametrize("tokens", [16_385, 20_000, 65_537, 1_000_003])
def test_tiles_cover_all_rows_evenly(tokens):
    rows = tiling.rows(tokens, 14_336, True, "auto")
    assert rows % 128 == 0
    count = -(-tokens // rows)
    assert rows - tokens / count < 256
