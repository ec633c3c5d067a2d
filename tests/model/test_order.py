"""Samples of a step: alternating mixtures, passes over all samples, and parts of a batch."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from unimoe_model.data.encoded_media import Row
from unimoe_model.data.mixture import Epochs, Mixture, Turns
from unimoe_model.tokenization import TokenizedText
from unimoe_model.training.batches import parts_of

TASKS = {"a": [f"a{i}" for i in range(5)], "b": ["b0", "b1"]}


@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6), size=st.integers(1, 30))
def test_batch_is_a_function_of_seed_and_step(seed, step, size):
    weights = {"a": 1, "b": 0.5}
    batch = Mixture(TASKS, weights, (seed, 1)).batch(step, size)
    again = Mixture(TASKS, weights, (seed, 1))
    again.batch(step + 1, 7)
    assert again.batch(step, size) == batch
    assert len(batch) == size
    assert set(batch) <= {*TASKS["a"], *TASKS["b"]}


def test_steps_stages_and_seeds_differ():
    tasks = {"a": list(range(100))}
    batches = [
        Mixture(tasks, {"a": 1}, seed).batch(step, 8)
        for seed in ((0, 0), (0, 1), (1, 0))
        for step in (0, 1)
    ]
    assert len({tuple(batch) for batch in batches}) == len(batches)


def test_shares_follow_the_weights():
    mixture = Mixture(TASKS, {"a": 3, "b": 1}, (0,))
    counts = Counter(item[0] for step in range(40) for item in mixture.batch(step, 100))
    assert counts["a"] / counts.total() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"z": 1}, r"task \(z\) must be one with examples: \['a', 'b'\]"),
        ({"empty": 1}, r"task \(empty\)"),
        ({"a": 0}, r"weight of task a \(0\) must be positive"),
    ],
)
def test_mixture_checks_its_tasks(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(TASKS | {"empty": []}, weights, (0,))


def test_mixtures_take_turns():
    mixtures = [Mixture(TASKS, {name: 1}, (0, number)) for number, name in enumerate("ab")]
    turns = Turns(mixtures)
    for step in range(6):
        assert turns.batch(step, 4) == mixtures[step % 2].batch(step // 2, 4)


@given(seed=st.integers(0, 99), size=st.integers(1, 20), repeats=st.integers(1, 3))
def test_a_pass_sees_every_sample_as_often_as_it_is_repeated(seed, size, repeats):
    epochs = Epochs(TASKS, {"a": 1, "b": repeats}, (seed,))
    total = 5 + 2 * repeats
    steps = -(-2 * total // size)
    seen = [item for step in range(steps) for item in epochs.batch(step, size)]
    once = Counter(TASKS["a"]) + Counter(TASKS["b"] * repeats)
    assert Counter(seen[:total]) == once
    assert Counter(seen[total : 2 * total]) == once


def test_passes_differ_and_a_step_depends_on_no_other():
    epochs = Epochs({"a": list(range(50))}, {"a": 1}, (1, 2))
    first, second = epochs.batch(0, 50), epochs.batch(1, 50)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))
    again = Epochs({"a": list(range(50))}, {"a": 1}, (1, 2))
    assert again.batch(1, 50) == second
    assert again.batch(0, 50) == first


def row(length):
    return Row(TokenizedText([0] * length, [0] * length))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    tokens=st.integers(1, 100),
    least=st.integers(1, 4),
)
def test_parts_keep_the_order_and_the_limit(lengths, tokens, least):
    rows = [row(length) for length in lengths]
    parts = parts_of(rows, tokens, least)
    assert [r for part in parts for r in part] == rows
    for part in parts:
        assert len(part) >= min(least, len(rows))
        padded = len(part) * max(len(r.text.ids) for r in part)
        # The last rows may be too few for a part of their own.
        assert padded <= tokens or len(part) < 2 * least


def test_short_rows_share_a_part():
    assert [len(part) for part in parts_of([row(10)] * 7, 30, 1)] == [3, 3, 1]
    assert [len(part) for part in parts_of([row(5), row(50), row(5)], 60, 1)] == [1, 1, 1]


@pytest.mark.parametrize("least", [2, 3])
def test_each_process_has_a_row_of_every_part(least):
    for part in parts_of([row(40)] * 7, 40, least):
        assert len(part) >= least
