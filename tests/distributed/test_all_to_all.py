"""The `all_to_all` operator between gloo processes; `op_ranks.py` is what they run."""

import pytest


def test_example_of_the_docstring(ops):
    if len(ops["opcheck"]) != 2:
        pytest.skip("the example has two ranks")
    assert ops["example"][0] == [[3, 0], [3, 0]]


def test_rows_and_gradients_go_where_the_splits_say(ops):
    """In four dtypes, with splits that differ for every pair, some of them zero."""
    assert all(error == 0 for error in ops["values_and_gradients"])


def test_opcheck(ops):
    assert all(found == ["SUCCESS"] for found in ops["opcheck"])


def test_compiles_without_graph_breaks(ops):
    assert all(error == 0 for error in ops["compiled"])


def test_counts_the_bytes_it_moves(ops):
    assert all(all(checks) and len(checks) == 5 for checks in ops["traffic"])


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (0, "input_splits ([3]) must have one number for each of the"),
        (1, "output_splits ([-1, 0"),
        (2, "must add up to R = 3"),
        (3, "rows ([1]) must be a tensor of shape [R, ...]"),
    ],
)
def test_refuses_what_does_not_fit(ops, place, text):
    assert all(text in texts[place] for texts in ops["refusals"])
    assert all(texts[place].startswith("ValueError") for texts in ops["refusals"])


def test_checks_find_splits_that_disagree_on_every_rank(ops):
    last = len(ops["opcheck"]) - 1
    for text in ops["disagreeing_splits"]:
        assert f"rank 0 sends 1 rows to rank {last}, which expects 2 in its output_splits" in text
