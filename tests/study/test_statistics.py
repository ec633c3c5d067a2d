"""The exact tests of a study, against plain enumeration and their definitions."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_model.study.statistics import MOST_PAIRS, holm, interval, sign_flip_p

NUMBERS = st.floats(-4, 4).map(lambda value: round(value, 2))


@given(st.lists(NUMBERS, min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_p_is_the_share_of_sign_patterns(differences):
    seen = sum(differences)
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((1, -1), repeat=len(differences))
    ]
    expected = np.mean([value >= seen - 1e-9 for value in sums])
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_least_p():
    assert sign_flip_p([1.0] * 8) == 1 / 256
    assert sign_flip_p(range(1, 9)) == 1 / 256
    assert sign_flip_p([1.0] * 7 + [-1.0]) == (1 + 8) / 256
    assert sign_flip_p([-1.0] * 8) == 1.0
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_interval_contains_what_the_test_does_not_reject():
    """A shift inside the interval leaves p above alpha; one outside does not."""
    differences = np.random.default_rng(1).normal(2, 1, 8)
    alpha = 0.05
    low, high = interval(differences, alpha)
    assert low < differences.mean() < high
    for inside in np.linspace(low + 1e-6, high - 1e-6, 25):
        assert sign_flip_p(differences - inside) > alpha / 2
        assert sign_flip_p(inside - differences) > alpha / 2
    assert sign_flip_p(differences - low + 1e-6) <= alpha / 2
    assert sign_flip_p(high + 1e-6 - differences) <= alpha / 2


def test_interval_covers_the_mean():
    rng = np.random.default_rng(2)
    misses = 0
    for _ in range(400):
        low, high = interval(rng.normal(1, 1, 8), 0.05)
        misses += not low <= 1 <= high
    assert misses / 400 < 0.09


def test_interval_of_few_pairs_is_infinite():
    assert interval([1.0, 2.0, 3.0], 0.05) == (-np.inf, np.inf)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("count", [0, MOST_PAIRS + 1])
def test_number_of_pairs(count):
    for function in (sign_flip_p, lambda values: interval(values, 0.05)):
        with pytest.raises(ValueError, match=rf"differences \({count}\) must be 1 to {MOST_PAIRS}"):
            function([1.0] * count)
