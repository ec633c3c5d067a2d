"""Ranks that share experts generate the same tokens as one process."""

import pytest
from launcher import found


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    return found("generate_ranks.py", request.param, tmp_path_factory.mktemp("generate"))


@pytest.mark.parametrize("case", ["different lengths", "early stop", "beams", "sampled"])
def test_same_tokens_as_one_process(results, case):
    """Prompts of 5, 9 and 14 tokens, one with a picture; each rank sends rows to the other."""
    for equal, _, sent in results[case]:
        assert equal
        assert sent


def test_ranks_stop_at_different_times(results):
    for case in ("different lengths", "early stop"):
        produced = [length - (9, 14)[rank % 2] for rank, (_, length, _) in enumerate(results[case])]
        assert len(set(produced)) > 1, (case, produced)


def test_a_rank_without_prompts_takes_part(results):
    assert all(results["no prompts"])


def test_generation_without_cache_is_refused(results):
    assert set(results["no cache"]) == {
        "use_cache (False) must be True when ranks generate together"
    }


def test_a_rank_loads_its_own_experts(results):
    """From a folder with one file, and from one with an index of several."""
    ranks = len(results["loaded"])
    for whole, parts in results["loaded"]:
        assert whole == [True, 4 // ranks, 1]
        assert parts[:2] == [True, 4 // ranks]
        assert parts[2] > 1
