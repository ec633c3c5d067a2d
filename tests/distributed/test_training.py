"""Training on 2 and 4 ranks equals training in one process, in float64, to 1e-9."""

import pytest
from launcher import found

WHAT = ("logits", "grads", "norms", "losses", "weights")
CASES = {
    world: [
        f"{layout}-{mode}-{routing}"
        for layout in layouts
        for mode, routings in {
            "replicate-1": ("natural", "same", "empty_expert", "empty_rank"),
            "replicate-3": ("natural", "empty_rank"),
            "shard-1": ("natural", "same", "empty_expert", "empty_rank"),
        }.items()
        for routing in routings
    ]
    for world, layouts in {2: ("1x2", "2x1"), 4: ("2x2", "4x1")}.items()
}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return found("train_ranks.py", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return found("train_ranks.py", 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("case", CASES[2])
def test_two_ranks(of_two, case):
    """Names are expert x data, how parameters are held, chunks, routing."""
    check(of_two, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[4])
def test_four_ranks(of_four, case):
    check(of_four, case)


def check(results, case):
    errors = results[case]
    assert tuple(errors) == WHAT
    assert all(error < 1e-9 for error in errors.values()), errors


def test_every_case_is_tested(of_two):
    assert sorted(of_two) == sorted(CASES[2])
