"""Checks of shapes, dtypes and devices run once for each signature that passes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unimoe_kernels import _checks, moe_mlp


@pytest.fixture
def checked():
    """A check that lists its calls, and refuses tensors with an odd number of rows."""
    calls = []

    @_checks.once_per_signature
    def check(x, name, other=None):
        calls.append(tuple(x.shape))
        if x.shape[0] % 2:
            raise ValueError(f"{name} has {x.shape[0]} rows")

    check.calls = calls
    return check


def test_one_run_for_a_signature(checked):
    for _ in range(3):
        checked(torch.ones(2, 3), "x")
    assert checked.calls == [(2, 3)]
    # Strides and numbers are no part of it; shape, dtype, device and other arguments are.
    checked(torch.zeros(3, 2).t(), "x")
    assert len(checked.calls) == 1
    others = [
        (torch.ones(4, 3), "x"),
        (torch.ones(2, 3).double(), "x"),
        (torch.ones(2, 3, device="meta"), "x"),
        (torch.ones(2, 3), "y"),
        (torch.ones(2, 3), "x", torch.ones(1)),
    ]
    for arguments in others:
        checked(*arguments)
    assert len(checked.calls) == 1 + len(others)


def test_what_is_refused_is_refused_again(checked):
    for _ in range(3):
        with pytest.raises(ValueError, match="x has 3 rows"):
            checked(torch.ones(3, 2), "x")
    assert len(checked.calls) == 3


def test_what_cannot_be_remembered_is_checked_each_time(checked):
    for _ in range(2):
        checked(torch.ones(2), ["x"])
    assert len(checked.calls) == 2


def test_memory_is_bounded(checked, monkeypatch):
    monkeypatch.setattr(_checks, "MOST_SIGNATURES", 3)
    for width in range(10):
        checked(torch.ones(2, width), "x")
        checked(torch.ones(2, width), "x")
    assert len(checked.calls) == 10
    checked(torch.ones(2, 0), "x")
    assert len(checked.calls) == 11


def test_a_wrong_call_after_a_right_one():
    gate_up, down = torch.randn(2, 8, 6), torch.randn(2, 6, 4)
    ids, scores = torch.tensor([[0], [1]]), torch.ones(2, 1)
    for _ in range(2):
        assert moe_mlp(torch.randn(2, 6), gate_up, down, ids, scores).shape == (2, 6)
        with pytest.raises(ValueError, match=r"must have size 5 in dimension 2: D of x"):
            moe_mlp(torch.randn(2, 5), gate_up, down, ids, scores)
        with pytest.raises(TypeError, match=r"must have the dtype of x"):
            moe_mlp(torch.randn(2, 6).double(), gate_up, down, ids, scores)


def test_inference_on_tensors_without_numbers():
    with FakeTensorMode():
        x, gate_up, down = torch.empty(3, 6), torch.empty(2, 8, 6), torch.empty(2, 6, 4)
        ids, scores = torch.empty(3, 1, dtype=torch.int64), torch.empty(3, 1)
        assert moe_mlp(x, gate_up, down, ids, scores).shape == (3, 6)
        y = moe_mlp(x.requires_grad_(), gate_up, down, ids, scores)
        assert torch.autograd.grad(y.sum(), x)[0].shape == (3, 6)


def test_ids_that_int32_cannot_hold_are_dropped():
    x, gate_up, down = torch.randn(3, 6), torch.randn(2, 8, 6), torch.randn(2, 6, 4)
    ids = torch.tensor([[0, 2**32], [2**40 + 1, 1], [2, -(2**33)]])
    scores = torch.rand(3, 2)
    dropped = torch.tensor([[0, 9], [9, 1], [9, 9]])
    assert torch.equal(
        moe_mlp(x, gate_up, down, ids, scores), moe_mlp(x, gate_up, down, dropped, scores)
    )
    x.requires_grad_()
    assert torch.equal(
        moe_mlp(x, gate_up, down, ids, scores), moe_mlp(x, gate_up, down, dropped, scores)
    )
    assert not moe_mlp(x, gate_up, down, ids, scores)[2].any()
