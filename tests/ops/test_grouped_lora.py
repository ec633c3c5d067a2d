import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_kernels import available_backends, grouped_lora, grouped_mm, use_backend
from unimoe_kernels.testing import assert_close_to_float64

OP = "grouped_lora"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Rows of each expert, rows of none, D, F, r.
CASES = {
    "ragged": ((5, 0, 7, 1), 3, 24, 16, 4),
    "one row": ((0, 1), 0, 40, 70, 16),
    "one expert has all": ((0, 37, 0), 0, 70, 33, 1),
    "wide": ((18, 3), 1, 33, 150, 17),
    "high rank": ((20, 0, 4), 2, 48, 24, 40),
    "no rows": ((0, 0), 2, 8, 8, 2),
    "nothing at all": ((0, 0), 0, 8, 8, 2),
}


def lora_by_hand(x, lora_A, lora_B, counts, scale):
    """The definition in float64, with the products built."""
    x, delta = x.double(), scale * lora_B.double() @ lora_A.double()
    parts, start = [], 0
    for e, count in enumerate(counts):
        parts.append(x[start : start + count] @ delta[e].t())
        start += count
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, delta.shape[1])])


def sample(counts=(5, 0, 7, 1), extra=3, d=24, f=16, rank=4, dtype=torch.float32, device="cpu"):
    x = torch.randn(sum(counts) + extra, d).to(device, dtype)
    lora_A = (torch.randn(len(counts), rank, d) / d**0.5).to(device, dtype)
    lora_B = (torch.randn(len(counts), f, rank) / rank**0.5).to(device, dtype)
    return x, lora_A, lora_B, torch.tensor([0, *counts]).cumsum(0).int().to(device)


def test_grouped_lora_example(backend):
    x, lora_A, lora_B, offsets = sample(device=backend.device)
    weight = torch.randn(4, 16, 24, device=backend.device)
    merged = grouped_mm(x, weight + 0.5 * lora_B @ lora_A, offsets)
    update = grouped_lora(x, lora_A, lora_B, offsets, 0.5)
    torch.testing.assert_close(grouped_mm(x, weight, offsets) + update, merged)
    assert not update[13:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_grouped_lora_matches_float64(backend, dtype, case):
    counts, *sizes = CASES[case]
    x, lora_A, lora_B, offsets = sample(counts, *sizes, dtype=dtype, device=backend.device)
    inputs = [value.requires_grad_() for value in (x, lora_A, lora_B)]
    grad = torch.randn(x.shape[0], lora_B.shape[1]).to(x)

    def run():
        # No scale that float32 holds exactly.
        y = grouped_lora(x, lora_A, lora_B, offsets, -0.7)
        return y, *torch.autograd.grad(y, inputs, grad)

    actual = run()
    with use_backend("reference"):
        baseline = run()
    exact = [value.detach().double().requires_grad_() for value in inputs]
    y = lora_by_hand(*exact, counts, -0.7)
    expected = y, *torch.autograd.grad(y, exact, grad.double())
    assert actual[0].dtype == dtype
    names = ("y", "grad of x", "grad of lora_A", "grad of lora_B")
    for name, *values in zip(names, actual, expected, baseline, strict=True):
        if sum(counts):
            assert_close_to_float64(*values, name)
        else:
            assert not values[0].any(), name


def test_grouped_lora_reads_nothing_of_others(backend):
    """Rows of no expert, and weights of experts without rows, may hold anything."""
    counts, extra = (5, 0, 20, 0), 3
    x, lora_A, lora_B, offsets = sample(counts, extra, device=backend.device)
    expected = lora_by_hand(x[:25], lora_A, lora_B, counts, 1.0)
    x[25:], lora_A[1::2], lora_B[1::2] = torch.nan, torch.nan, torch.inf
    inputs = [value.requires_grad_() for value in (x, lora_A, lora_B)]
    y = grouped_lora(x, lora_A, lora_B, offsets)
    assert_close_to_float64(y[:25], expected)
    assert not y[25:].any()
    grad = torch.ones_like(y)
    grad[25:] = torch.nan
    grad_x, *grads = torch.autograd.grad(y, inputs, grad)
    assert not grad_x[25:].any()
    for value in (grad_x, *grads):
        assert value.isfinite().all()
    for value in grads:
        assert value[::2].any()
        assert not value[1::2].any()


def test_grouped_lora_with_a_scale_of_zero(backend):
    x, lora_A, lora_B, offsets = sample(device=backend.device)
    inputs = [value.requires_grad_() for value in (x, lora_A, lora_B)]
    y = grouped_lora(x, lora_A, lora_B, offsets, 0.0)
    assert not y.any()
    assert not any(g.any() for g in torch.autograd.grad(y, inputs, torch.ones_like(y)))


def test_grouped_lora_takes_any_layout(backend, layout):
    x, lora_A, lora_B, offsets = sample(device=backend.device)
    expected = grouped_lora(x, lora_A, lora_B, offsets)
    turned = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in (lora_A, lora_B)]
    torch.testing.assert_close(grouped_lora(layout(x), *turned, offsets), expected)


@pytest.mark.parametrize("frozen_x", [False, True])
def test_grouped_lora_gradcheck(backend, frozen_x):
    x, lora_A, lora_B, offsets = sample((2, 0, 3), 2, 3, 2, 2, torch.float64, backend.device)
    inputs = [x.requires_grad_(not frozen_x), lora_A.requires_grad_(), lora_B.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda x, a, b: grouped_lora(x, a, b, offsets, scale=0.3),
        inputs,
        fast_mode=backend.interpreted,
    )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_grouped_lora_opcheck(overload, requires_grad):
    x, lora_A, lora_B, offsets = sample()
    op = getattr(torch.ops.unimoe.grouped_lora, overload)
    weights = [lora_A.requires_grad_(requires_grad), lora_B.requires_grad_(requires_grad)]
    torch.library.opcheck(op, (x.requires_grad_(requires_grad), *weights, offsets, 0.5))
    if requires_grad:
        return
    backward = getattr(torch.ops.unimoe.grouped_lora_backward, overload)
    saved = (torch.randn(16, 16), x, *weights, torch.randn(16, 4), offsets, 0.5)
    torch.library.opcheck(backward, (*saved, False))


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    extra=st.integers(0, 3),
    d=st.sampled_from([1, 16, 33]),
    f=st.sampled_from([1, 7, 64, 100]),
    rank=st.integers(1, 18),
)
def test_grouped_lora_any_shape(counts, extra, d, f, rank):
    x, lora_A, lora_B, offsets = sample(counts, extra, d, f, rank)
    expected = lora_by_hand(x, lora_A, lora_B, counts, 2.0)
    for name in available_backends(OP, "cpu"):
        with use_backend(name):
            actual = grouped_lora(x, lora_A, lora_B, offsets, 2.0)
        if sum(counts):
            assert_close_to_float64(actual, expected, name=name)
        else:
            assert not actual.any()


def test_grouped_lora_keeps_only_the_narrow_product():
    x, lora_A, lora_B, offsets = sample()
    lora_A.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_lora(x, lora_A, lora_B, offsets)
    weights = {lora_A.data_ptr(), lora_B.data_ptr()}
    rows = sum(t.nbytes for t in kept if t.data_ptr() not in weights)
    assert rows == x.nbytes + x.shape[0] * 4 * 4 + offsets.nbytes


def test_grouped_lora_rejects_bad_arguments():
    x, lora_A, lora_B, offsets = sample()
    with pytest.raises(ValueError, match=r"lora_A \(shape \(4, 4, 23\)\) must have size 24"):
        grouped_lora(x, lora_A[:, :, 1:], lora_B, offsets)
    with pytest.raises(ValueError, match=r"lora_B \(shape \(4, 16, 3\)\) must have size 4"):
        grouped_lora(x, lora_A, lora_B[:, :, 1:], offsets)
    with pytest.raises(ValueError, match=r"lora_B \(shape \(3, 16, 4\)\) must have size 4"):
        grouped_lora(x, lora_A, lora_B[1:], offsets)
    with pytest.raises(TypeError, match=r"lora_B \(torch.float64\) must have the dtype of x"):
        grouped_lora(x, lora_A, lora_B.double(), offsets)
    with pytest.raises(ValueError, match=r"expert_offsets \(shape \(4,\)\) must have size 5"):
        grouped_lora(x, lora_A, lora_B, offsets[1:])
    with pytest.raises(ValueError, match=r"x \(shape \(24,\)\) must have shape \[N, D\]"):
        grouped_lora(x[0], lora_A, lora_B, offsets)
