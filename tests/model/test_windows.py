"""Data that are shuffled in windows: every sample once a pass, and each draw a pure function."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import hypothesis.strategies as st
import pytest
from hypothesis import given

from unimoe_model.data.mixture import Epochs, Mixture, Turns
from unimoe_model.data.windows import Shuffle, WindowOrder
from unimoe_model.training.prefetch import prefetched

files = st.lists(st.integers(0, 12), min_size=1, max_size=6).map(tuple).filter(sum)
windows = st.integers(1, 40)
TASKS = {"big": [f"big{n}" for n in range(23)], "small": ["small0", "small1", "small2"]}
SHUFFLES = {"big": Shuffle(5, (9, 0, 14))}


@given(parts=files, window=windows, seed=st.integers(0, 99), number=st.integers(0, 3))
def test_a_pass_has_every_sample_once_file_behind_file_within_windows(parts, window, seed, number):
    order, total = WindowOrder(Shuffle(window, parts), (seed, 1)), sum(parts)
    drawn = [order.index(number * total + at) for at in range(total)]
    starts = [0, *accumulate(parts)]
    behind = [n for file in order._files(number)[0] for n in range(*starts[file : file + 2])]
    assert sorted(behind) == list(range(total))
    for at in range(0, total, window):
        assert sorted(drawn[at : at + window]) == sorted(behind[at : at + window])


def test_files_and_insides_of_windows_are_shuffled_anew_in_each_pass():
    order = WindowOrder(Shuffle(50, (100,) * 8), (3,))
    first, second = ([order.index(n * 800 + at) for at in range(800)] for n in (0, 1))
    assert [n // 100 for n in first] != [n // 100 for n in second]
    assert [n // 100 for n in first] != sorted(n // 100 for n in first)
    window = first[:50]
    assert window != sorted(window)
    assert [n % 100 for n in window] != [n % 100 for n in second[:50]]
    other = WindowOrder(Shuffle(50, (100,) * 8), (4,))
    assert [other.index(at) for at in range(800)] != first


def test_without_shuffling_files_come_in_sequence():
    order = WindowOrder(Shuffle(1, (4, 3)), (0,))
    assert [order.index(at) for at in range(7)] in ([*range(7)], [4, 5, 6, 0, 1, 2, 3])


def orders(shuffles):
    def mixture(seed):
        return Mixture(TASKS, {"big": 3, "small": 1}, (seed,), shuffles)

    return {
        "mixture": mixture(0),
        "turns": Turns([mixture(0), mixture(1)]),
        "epochs": Epochs(TASKS, {"big": 2, "small": 1}, (0,), shuffles),
    }


@pytest.mark.parametrize("name", ["mixture", "turns", "epochs"])
@given(step=st.integers(0, 200), size=st.integers(1, 30))
def test_a_step_is_the_same_whatever_was_drawn_before(name, step, size):
    order = orders(SHUFFLES)[name]
    for earlier in range(max(0, step - 3), step + 2):
        order.batch(earlier, size)
    order.batch(step, size + 1)
    assert order.batch(step, size) == orders(SHUFFLES)[name].batch(step, size)


@pytest.mark.parametrize("name", ["mixture", "turns", "epochs"])
def test_workers_see_one_order(name):
    plain = [orders(SHUFFLES)[name].batch(step, 7) for step in range(60)]
    for workers in (0, 1, 4):
        order = orders(SHUFFLES)[name]
        assert list(prefetched(lambda s, o=order: o.batch(s, 7), 0, 60, workers)) == plain
    order = orders(SHUFFLES)[name]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda step: order.batch(step, 7), range(60))) == plain


@given(size=st.integers(1, 20), repeats=st.integers(1, 3), seed=st.integers(0, 99))
def test_epochs_see_every_sample_as_often_as_it_is_repeated(size, repeats, seed):
    epochs = Epochs(TASKS, {"big": repeats, "small": 1}, (seed,), SHUFFLES)
    total = 23 * repeats + 3
    seen = [item for step in range(-(-2 * total // size)) for item in epochs.batch(step, size)]
    once = Counter(TASKS["big"] * repeats) + Counter(TASKS["small"])
    assert Counter(seen[:total]) == Counter(seen[total : 2 * total]) == once
    big = [item for item in seen[: 2 * total] if item.startswith("big")]
    for at in range(0, len(big), 23):  # each repetition is a pass through the files of its own
        assert sorted(big[at : at + 23]) == sorted(TASKS["big"])


@given(size=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_mixture_goes_through_windows_pass_after_pass(size, seed):
    mixture = Mixture(TASKS, {"big": 3, "small": 1}, (seed,), SHUFFLES)
    drawn = [item for step in range(120 // size + 1) for item in mixture.batch(step, size)]
    big = [item for item in drawn if item.startswith("big")]
    order = WindowOrder(SHUFFLES["big"], (seed, 0))
    assert big == [TASKS["big"][order.index(at)] for at in range(len(big))]


def test_tasks_beside_windows_are_drawn_as_without_them():
    apart = Epochs(TASKS, {"big": 1, "small": 1}, (5,))
    beside = Epochs(TASKS, {"big": 1, "small": 1}, (5,), SHUFFLES)
    for step in range(10):
        pairs = zip(apart.places(step, 6), beside.places(step, 6), strict=True)
        for (name, index), (other, number) in pairs:
            assert name == other
            assert index == number or name == "big"


def test_orders_without_windows_are_those_of_before():
    """A run that was begun goes on with the samples that it would have seen."""
    mixed = [("big", 0), ("small", 0), ("small", 1), ("big", 12), ("small", 1), ("small", 1)]
    assert orders(None)["mixture"].places(7, 6) == mixed
    assert orders(None)["epochs"].places(8, 6) == [("big", n) for n in (8, 9, 21, 8, 3, 18)]
