"""The helpers that the other tests trust."""

import pytest
import torch

from unimoe_kernels.testing import (
    ROUTINGS,
    assert_close_to_float64,
    relative_error,
    sample_routing,
)


def test_relative_error_example():
    expected = torch.tensor([4.0, -2.0])
    assert relative_error(torch.tensor([4.0, -1.0]), expected) == 0.25
    assert relative_error(expected, expected) == 0
    assert relative_error(torch.zeros(2), expected) == 1
    assert relative_error(torch.tensor([4.0, torch.nan]), expected) == float("inf")
    assert relative_error(expected, torch.zeros(2)) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.empty(0), torch.empty(0)) == 0
    with pytest.raises(ValueError, match=r"actual \(shape \(2,\)\) must have the shape"):
        relative_error(expected, torch.zeros(3))


def test_assert_close_to_float64_sees_wrong_results():
    expected = torch.randn(50, dtype=torch.float64)
    baseline = expected.bfloat16()
    assert_close_to_float64(expected.float(), expected)
    assert_close_to_float64(baseline, expected, baseline)
    for wrong in (torch.zeros(50), expected.float() * 1.001, expected.float().roll(1)):
        with pytest.raises(AssertionError, match="output: relative error"):
            assert_close_to_float64(wrong, expected)
    with pytest.raises(AssertionError, match="y: relative error"):
        assert_close_to_float64(baseline * 1.05, expected, baseline, "y")
    # A wrong baseline excuses nothing.
    with pytest.raises(AssertionError, match="output: relative error"):
        assert_close_to_float64(torch.zeros(50), expected, torch.zeros(50))
    with pytest.raises(AssertionError, match="zero everywhere"):
        assert_close_to_float64(torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(AssertionError, match=r"expected \(torch.float32\) must be float64"):
        assert_close_to_float64(torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("kind", ROUTINGS)
def test_sample_routing_is_valid(kind):
    ids, scores = sample_routing(kind, 200, 3, 8, seed=1)
    assert ids.dtype == torch.int32
    assert ids.shape == scores.shape == (200, 3)
    assert all(len(set(row)) == 3 for row in ids.tolist())
    torch.testing.assert_close(scores.sum(1), torch.ones(200))
    again, _ = sample_routing(kind, 200, 3, 8, seed=1)
    assert ids.equal(again)


def test_sample_routing_skew():
    def counts(kind):
        return torch.bincount(sample_routing(kind, 2000, 2, 8)[0].flatten(), minlength=8)

    assert counts("uniform").max() < 1.2 * counts("uniform").min()
    assert counts("zipf")[0] > 3 * counts("zipf")[7]
    assert counts("one_hot").tolist() == [2000, 2000, 0, 0, 0, 0, 0, 0]
    assert counts("empty_experts")[:4].tolist() == [0] * 4
    assert sample_routing("empty_experts", 5, 8, 8)[0].sort(1).values.tolist() == [[*range(8)]] * 5


def test_sample_routing_rejects_bad_arguments():
    with pytest.raises(ValueError, match=r"kind \('even'\) must be one of uniform"):
        sample_routing("even", 1, 1, 1)
    with pytest.raises(ValueError, match=r"top_k \(3\) must be at most num_experts \(2\)"):
        sample_routing("zipf", 1, 3, 2)
