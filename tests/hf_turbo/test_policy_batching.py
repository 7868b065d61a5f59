"""How micro-batches share passes: in order, within the limit, in as few passes as can be, evenly."""

from __future__ import annotations

import itertools
import random

import pytest

from hf_turbo.policies.batching import ENOUGH_TOKENS, passes, token_limit


def test_more_stays_free_where_weights_are_gathered():
    alone, gathered = (token_limit(0, 1e6, 10**10, gathers=each) for each in (False, True))
    assert 0 < gathered < 0.7 * alone


@pytest.mark.parametrize(
    ("tokens", "limit", "expected"),
    [
        ([], 10, []),
        ([5], 10, [1]),
        ([50], 10, [1]),
        ([5, 5, 5, 5], 20, [4]),
        ([5, 5, 5, 5], 19, [2, 2]),
        ([5, 5, 5, 5], 1, [1, 1, 1, 1]),
        ([1, 1, 50, 1, 1], 10, [2, 1, 2]),
        ([0, 0, 0], 10, [3]),
        ([9, 1, 1, 9], 12, [2, 2]),
    ],
)
def test_passes(tokens, limit, expected):
    assert passes(tokens, limit) == expected


def fewest_and_flattest(tokens: list[int], limit: int) -> tuple[int, int]:
    """Passes and tokens of the largest, of the best division there is: by trying all."""
    best = (len(tokens), max(tokens))
    for cuts in range(2 ** (len(tokens) - 1)):
        bounds = [0, *(i + 1 for i in range(len(tokens) - 1) if cuts >> i & 1), len(tokens)]
        sums = [sum(tokens[a:b]) for a, b in itertools.pairwise(bounds)]
        alone = all(s <= limit or b - a == 1 for s, (a, b) in zip(sums, itertools.pairwise(bounds), strict=True))
        if alone:
            best = min(best, (len(sums), max(sums)))
    return best


def test_no_division_is_better():
    draw = random.Random(0)
    for _ in range(300):
        tokens = [draw.randint(1, 30) for _ in range(draw.randint(1, 8))]
        limit = draw.randint(1, 90)
        counts, bounds = passes(tokens, limit), [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        assert bounds[-1] == len(tokens)
        sums = [sum(tokens[a:b]) for a, b in itertools.pairwise(bounds)]
        assert all(s <= limit or n == 1 for s, n in zip(sums, counts, strict=True))
        assert (len(sums), max(sums)) == fewest_and_flattest(tokens, limit)


def test_until_something_is_measured_a_pass_is_as_large_as_the_script_would_have_it():
    assert token_limit(300, None, 10**12) == 300
    assert token_limit(300, 1e6, None) == 300


def test_with_free_memory():
    assert token_limit(300, 1e6, 8 * 10**9) == 2000
    assert token_limit(300, 1e6, 10**8) == 300, "never less than the script's own"
    assert token_limit(300, 1e6, 10**12) == ENOUGH_TOKENS
    assert token_limit(20_000, 1e6, 10**12) == 20_000
    assert token_limit(300, 0.0, 10**12) == ENOUGH_TOKENS
