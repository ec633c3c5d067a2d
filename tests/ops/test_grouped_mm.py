import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_kernels import available_backends, grouped_mm, use_backend
from unimoe_kernels.testing import assert_close_to_float64

OP = "grouped_mm"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COUNTS = {
    "ragged": ([5, 0, 7, 1], 0),
    "rows of another rank": ([3, 2, 0, 4], 5),
    "one expert has all": ([0, 9, 0, 0], 0),
    "no rows": ([0, 0, 0, 0], 0),
    "one expert": ([6], 0),
}


def grouped_mm_by_hand(x, weight, counts, bias=None):
    """The definition in float64, one expert at a time."""
    x, weight = x.double(), weight.double()
    parts, start = [], 0
    for e, count in enumerate(counts):
        y = x[start : start + count] @ weight[e].t()
        parts.append(y if bias is None else y + bias[e].double())
        start += count
    parts.append(x.new_zeros(x.shape[0] - start, weight.shape[1]))
    return torch.cat(parts)


def sample(counts, extra=0, d=24, f=16, dtype=torch.float32, device="cpu", seed=0):
    """Rows, weights and biases whose products are of order one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts) + extra, d, generator=generator)
    weight = torch.randn(len(counts), f, d, generator=generator) / max(d, 1) ** 0.5
    bias = torch.randn(len(counts), f, generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    return x.to(device, dtype), weight.to(device, dtype), offsets, bias.to(device, dtype)


def test_grouped_mm_example(backend):
    x = torch.tensor([[1.0], [2.0], [3.0]], device=backend.device)
    weight = torch.tensor([[[10.0]], [[100.0]]], device=backend.device)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32, device=backend.device)
    assert grouped_mm(x, weight, offsets).tolist() == [[10], [200], [0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("case", COUNTS)
def test_grouped_mm_matches_float64(backend, dtype, has_bias, case):
    counts, extra = COUNTS[case]
    x, weight, offsets, bias = sample(counts, extra, dtype=dtype, device=backend.device)
    bias = bias if has_bias else None
    inputs = [value.requires_grad_() for value in (x, weight, bias) if value is not None]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    grad = torch.randn(x.shape[0], 16).to(x)

    def run():
        y = grouped_mm(x, weight, offsets, bias)
        return y, *torch.autograd.grad(y, inputs, grad)

    actual = run()
    with use_backend("reference"):
        baseline = run()
    y = grouped_mm_by_hand(exact[0], exact[1], counts, exact[2] if has_bias else None)
    expected = y, *torch.autograd.grad(y, exact, grad.double(), materialize_grads=True)
    assert actual[0].dtype == dtype
    for name, *values in zip(
        ("y", "grad of x", "grad of weight", "grad of bias"),
        actual,
        expected,
        baseline,
        strict=False,
    ):
        if sum(counts):
            assert_close_to_float64(*values, name)
        else:
            assert not values[0].any(), name


def test_grouped_mm_layouts(backend, layout):
    counts, extra = COUNTS["rows of another rank"]
    x, weight, offsets, _ = sample(counts, extra, device=backend.device)
    expected = grouped_mm_by_hand(x, weight, counts)
    assert_close_to_float64(grouped_mm(layout(x), weight, offsets), expected)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close_to_float64(grouped_mm(x, turned, offsets), expected)
    if backend.name != "cpp":  # which refuses them
        strided = torch.stack([offsets, offsets + 1], 1)[:, 0]
        assert_close_to_float64(grouped_mm(x, weight, strided), expected)
    # A sum gives a gradient with strides 0.
    x.requires_grad_()
    grouped_mm(layout(x), weight, offsets).sum().backward()
    exact = x.detach().double().requires_grad_()
    grouped_mm_by_hand(exact, weight, counts).sum().backward()
    assert_close_to_float64(x.grad, exact.grad)


@pytest.mark.parametrize("case", COUNTS)
def test_grouped_mm_gradcheck(backend, case):
    counts, extra = COUNTS[case]
    x, weight, offsets, bias = sample(counts, extra, 3, 2, torch.float64, backend.device)
    inputs = [value.requires_grad_() for value in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: grouped_mm(x, w, offsets, b), inputs, fast_mode=backend.interpreted
    )


@pytest.mark.parametrize("frozen", [(1, 2), (0, 2), (0, 1), (0,), (1,)])
def test_grouped_mm_frozen_inputs(frozen):
    counts, extra = COUNTS["ragged"]
    x, weight, offsets, bias = sample(counts, extra, 3, 2, torch.float64)
    inputs = [value.requires_grad_(i not in frozen) for i, value in enumerate((x, weight, bias))]
    assert torch.autograd.gradcheck(lambda x, w, b: grouped_mm(x, w, offsets, b), inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", ["rows of another rank", "no rows"])
def test_grouped_mm_opcheck(overload, requires_grad, case):
    x, weight, offsets, bias = sample(*COUNTS[case])
    x, weight = x.requires_grad_(requires_grad), weight.requires_grad_(requires_grad)
    op = getattr(torch.ops.unimoe.grouped_mm, overload)
    torch.library.opcheck(op, (x, weight, offsets, None))
    torch.library.opcheck(op, (x, weight, offsets, bias.requires_grad_(requires_grad)))
    wgrad = getattr(torch.ops.unimoe.grouped_mm_wgrad, overload)
    grad = torch.randn(x.shape[0], 16)
    torch.library.opcheck(wgrad, (grad, x.detach(), offsets, requires_grad))


def test_grouped_mm_opcheck_layouts(layout):
    x, weight, offsets, bias = sample(*COUNTS["ragged"])
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    op = torch.ops.unimoe.grouped_mm.reference
    torch.library.opcheck(op, (layout(x).requires_grad_(), turned, offsets, layout(bias)))


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    extra=st.integers(0, 3),
    d=st.sampled_from([1, 5, 16, 33]),
    f=st.sampled_from([1, 8, 17]),
)
def test_grouped_mm_any_shape(counts, extra, d, f):
    x, weight, offsets, bias = sample(counts, extra, d, f)
    expected = grouped_mm_by_hand(x, weight, counts, bias)
    for name in available_backends(OP, "cpu"):
        with use_backend(name):
            actual = grouped_mm(x, weight, offsets, bias)
        if sum(counts):
            assert_close_to_float64(actual, expected, name=name)
        else:
            assert not actual.any()


def test_grouped_mm_reads_no_row_of_another_rank(backend):
    x, weight, offsets, bias = sample([2, 3], 4, device=backend.device)
    x[5:] = float("nan")
    x.requires_grad_()
    weight.requires_grad_()
    y = grouped_mm(x, weight, offsets, bias)
    assert not y[5:].any()
    grad = torch.ones_like(y)
    grad[5:] = float("nan")
    y.backward(grad)
    assert not x.grad[5:].any()
    assert weight.grad.isfinite().all()


def test_grouped_mm_float64_weights_of_one_row_are_exact(backend):
    x, weight, offsets, _ = sample([1], 0, 1, 1, torch.float64, backend.device)
    assert torch.equal(grouped_mm(x, weight, offsets), x * weight[0])


def test_grouped_mm_rejects_bad_arguments():
    x, weight, offsets, bias = sample([2, 3])
    with pytest.raises(ValueError, match=r"x \(shape \(24,\)\) must have shape \[N, D\]"):
        grouped_mm(x[0], weight, offsets)
    with pytest.raises(ValueError, match=r"weight \(shape \(2, 16, 23\)\) must have size 24"):
        grouped_mm(x, weight[:, :, 1:], offsets)
    with pytest.raises(TypeError, match=r"weight \(torch.float64\) must have the dtype of x"):
        grouped_mm(x, weight.double(), offsets)
    with pytest.raises(TypeError, match=r"expert_offsets \(torch.int64\) must have dtype int32"):
        grouped_mm(x, weight, offsets.long())
    with pytest.raises(ValueError, match=r"expert_offsets \(shape \(2,\)\) must have size 3"):
        grouped_mm(x, weight, offsets[1:])
    with pytest.raises(ValueError, match=r"bias \(shape \(2, 15\)\) must have size 16"):
        grouped_mm(x, weight, offsets, bias[:, 1:])
    with pytest.raises(ValueError, match=r"weight \(on meta\) must be on the device of x \(cpu\)"):
        grouped_mm(x, weight.to("meta"), offsets)
