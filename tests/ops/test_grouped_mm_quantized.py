import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_kernels import (
    available_backends,
    dequantize_weight,
    grouped_mm,
    grouped_mm_quantized,
    quantize_weight,
    use_backend,
)
from unimoe_kernels.testing import assert_close_to_float64, relative_error

OP = "grouped_mm_quantized"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Format, group size, options.
FORMATS = {
    "int8": ("int8", None, {}),
    "int8-32": ("int8", 32, {}),
    "int8-128": ("int8", 128, {}),
    "int4-32": ("int4", 32, {}),
    "int4-64": ("int4", 64, {}),
    "int4-32-zeros": ("int4", 32, {"zero_points": True}),
    "int4-128-zeros": ("int4", 128, {"zero_points": True}),
}
# Rows of each expert, rows of none, D, F.
CASES = {
    "ragged": ((5, 0, 7, 1), 3, 128, 16),
    "one row": ((0, 1), 0, 256, 70),
    "few and many": ((2, 3, 4, 40), 0, 384, 100),
    "many": ((0, 67, 9), 5, 128, 51),
    "no rows": ((0, 0), 2, 128, 8),
    "nothing at all": ((0, 0), 0, 128, 8),
    "no columns": ((1, 2), 0, 128, 0),
}


def sample(
    counts=(5, 0, 7, 1),
    extra=3,
    d=128,
    f=16,
    format="int4-64",
    dtype=torch.float32,
    device="cpu",
    transposed=False,
):
    """x, weight, offsets and bias."""
    name, group_size, options = FORMATS[format]
    floats = torch.randn(len(counts), f, d).to(dtype) / (f if transposed else d) ** 0.5
    weight = quantize_weight(floats.to(device), name, group_size, **options)
    width, depth = (d, f) if transposed else (f, d)
    x = torch.randn(sum(counts) + extra, depth).to(device, dtype)
    bias = torch.randn(len(counts), width).to(device, dtype)
    return x, weight, torch.tensor([0, *counts]).cumsum(0).int().to(device), bias


def by_hand(x, weight, counts, bias=None, transposed=False):
    """The definition in float64, with the weight as floats."""
    floats = dequantize_weight(weight, torch.float64)
    floats = floats.transpose(1, 2) if transposed else floats
    parts, start = [], 0
    for e, count in enumerate(counts):
        own = x[start : start + count].double() @ floats[e].t()
        parts.append(own if bias is None else own + bias[e].double())
        start += count
    return torch.cat([*parts, x.new_zeros(len(x) - start, floats.shape[1], dtype=torch.float64)])


def assert_close(dtype, actual, expected, baseline, name):
    """In float64 the reference adds up as `expected` does, and says nothing of the error."""
    if dtype == torch.float64:
        assert relative_error(actual, expected) < 1e-13, name
    else:
        assert_close_to_float64(actual, expected, baseline, name, dtype)


def test_grouped_mm_quantized_example(backend):
    w = torch.randn(2, 5, 7)
    x, offsets = torch.randn(4, 7), torch.tensor([0, 3, 4], dtype=torch.int32)
    weight = quantize_weight(w.to(backend.device), "int8")
    x, offsets = x.to(backend.device), offsets.to(backend.device)
    y = grouped_mm_quantized(x, weight, offsets)
    torch.testing.assert_close(y, grouped_mm(x, dequantize_weight(weight, x.dtype), offsets))
    # What the weight was rounded from is not far.
    assert 1e-4 < relative_error(y, grouped_mm(x, w.to(x), offsets).double()) < 0.02


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_grouped_mm_quantized_matches_float64(backend, case, format, dtype, transposed):
    counts, extra, d, f = CASES[case]
    if backend.interpreted and (dtype != torch.float32 or "64" in format or case[:3] == "few"):
        pytest.skip("takes long in the interpreter")
    x, weight, offsets, bias = sample(
        counts, extra, d, f, format, dtype, backend.device, transposed
    )
    inputs = x.requires_grad_(), bias.requires_grad_()
    grad = torch.randn(x.shape[0], bias.shape[1]).to(x)

    def run():
        y = grouped_mm_quantized(x, weight, offsets, bias, transposed=transposed)
        return y, *torch.autograd.grad(y, inputs, grad)

    actual = run()
    with use_backend("reference"):
        baseline = run()
    exact = [value.detach().double().requires_grad_() for value in inputs]
    y = by_hand(exact[0], weight, counts, exact[1], transposed)
    expected = y, *torch.autograd.grad(y, exact, grad.double())
    assert actual[0].dtype == dtype
    names = ("y", "grad of x", "grad of the bias")
    for name, *values in zip(names, actual, expected, baseline, strict=True):
        if sum(counts) and values[1].any():
            assert_close(dtype, *values, name)
        else:
            assert not values[0].any(), name


def test_grouped_mm_quantized_reads_nothing_of_others(backend):
    """Rows of no expert, and weights of experts without rows, may hold anything."""
    counts, extra = (5, 0, 20, 0), 3
    x, weight, offsets, _ = sample(counts, extra, device=backend.device)
    expected = by_hand(x[:25], weight, counts)
    x[25:], weight.scales[1::2] = torch.nan, torch.nan
    y = grouped_mm_quantized(x.requires_grad_(), weight, offsets)
    assert_close_to_float64(y[:25], expected)
    assert not y[25:].any()
    grad = torch.ones_like(y)
    grad[25:] = torch.nan
    (grad_x,) = torch.autograd.grad(y, [x], grad)
    assert grad_x.isfinite().all()
    assert grad_x[:25].any()
    assert not grad_x[25:].any()


@pytest.mark.parametrize("format", FORMATS)
def test_grouped_mm_quantized_is_deterministic(backend, format):
    x, weight, offsets, bias = sample((3, 20), 0, 128, 40, format, device=backend.device)
    results = [grouped_mm_quantized(x, weight, offsets, bias) for _ in range(2)]
    assert torch.equal(*results)


def test_grouped_mm_quantized_takes_any_layout(backend, layout):
    x, weight, offsets, _ = sample(device=backend.device)
    expected = grouped_mm_quantized(x, weight, offsets)
    turned = weight._replace(
        values=weight.values.transpose(1, 2).contiguous().transpose(1, 2),
        scales=weight.scales.flip(0).contiguous().flip(0),
    )
    torch.testing.assert_close(grouped_mm_quantized(layout(x), turned, offsets), expected)


def test_scales_of_either_dtype(backend):
    x, weight, offsets, _ = sample(device=backend.device)
    narrow = weight._replace(scales=weight.scales.bfloat16())
    y = grouped_mm_quantized(x, narrow, offsets)
    assert_close_to_float64(y, by_hand(x, narrow, (5, 0, 7, 1)))


@pytest.mark.parametrize("format", ["int8", "int4-32-zeros"])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm_quantized_gradcheck(backend, format, transposed):
    x, weight, offsets, bias = sample(
        (2, 0, 3), 2, 32, 3, format, torch.float64, backend.device, transposed
    )
    assert torch.autograd.gradcheck(
        lambda x, bias: grouped_mm_quantized(x, weight, offsets, bias, transposed=transposed),
        (x.requires_grad_(), bias.requires_grad_()),
        fast_mode=backend.interpreted,
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4-32-zeros"])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm_quantized_opcheck(overload, format, requires_grad, transposed):
    x, weight, offsets, bias = sample(format=format, transposed=transposed)
    values, scales, zeros, name, _ = weight
    inputs = x.requires_grad_(requires_grad), bias.requires_grad_(requires_grad)
    op = getattr(torch.ops.unimoe.grouped_mm_quantized, overload)
    arguments = (inputs[0], values, scales, zeros, offsets, inputs[1], name, transposed)
    torch.library.opcheck(op, arguments)


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    extra=st.integers(0, 3),
    groups=st.integers(1, 5),
    f=st.sampled_from([1, 7, 64, 100]),
    format=st.sampled_from(["int8", "int8-32", "int4-32", "int4-64", "int4-32-zeros"]),
    transposed=st.booleans(),
)
def test_grouped_mm_quantized_any_shape(counts, extra, groups, f, format, transposed):
    d = groups * 64 if format == "int4-64" else groups * 32
    x, weight, offsets, bias = sample(counts, extra, d, f, format, transposed=transposed)
    expected = by_hand(x, weight, counts, bias, transposed)
    # Whose matmuls have such a test of their own.
    for name in set(available_backends(OP, "cpu")) - {"triton"}:
        with use_backend(name):
            actual = grouped_mm_quantized(x, weight, offsets, bias, transposed=transposed)
        if sum(counts):
            assert_close_to_float64(actual, expected, name=name)
        else:
            assert not actual.any()


@pytest.mark.parametrize("d", [1, 2, 17, 47, 100])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_any_width_with_one_scale(backend, d, transposed):
    x, weight, offsets, bias = sample((2, 11), 1, d, 19, "int8", transposed=transposed)
    x, offsets, bias = (value.to(backend.device) for value in (x, offsets, bias))
    parts = [None if part is None else part.to(backend.device) for part in weight[:3]]
    actual = grouped_mm_quantized(
        x, weight._replace(values=parts[0], scales=parts[1]), offsets, bias, transposed=transposed
    )
    assert_close_to_float64(actual, by_hand(x, weight, (2, 11), bias, transposed).to(x.device))


def test_only_the_weight_is_kept():
    x, weight, offsets, _ = sample()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_mm_quantized(x.requires_grad_(), weight, offsets)
    assert sum(t.nbytes for t in kept) == weight.nbytes + offsets.nbytes


def test_grouped_mm_quantized_rejects_bad_arguments():
    x, weight, offsets, bias = sample(format="int4-64")
    with pytest.raises(ValueError, match=r"x \(shape \(16, 127\)\) must have size 128"):
        grouped_mm_quantized(x[:, 1:], weight, offsets)
    with pytest.raises(ValueError, match=r"x \(shape \(16, 128\)\) must have size 16"):
        grouped_mm_quantized(x, weight, offsets, transposed=True)
    with pytest.raises(TypeError, match=r"weight \(Tensor\) must be a QuantizedWeight"):
        grouped_mm_quantized(x, weight.values, offsets)
    with pytest.raises(ValueError, match=r"expert_offsets \(shape \(4,\)\) must have size 5"):
        grouped_mm_quantized(x, weight, offsets[1:])
    with pytest.raises(TypeError, match=r"bias \(torch.float64\) must have the dtype of x"):
        grouped_mm_quantized(x, weight, offsets, bias.double())
    with pytest.raises(ValueError, match=r"bias \(shape \(4, 15\)\) must have size 16"):
        grouped_mm_quantized(x, weight, offsets, bias[:, 1:])
    with pytest.raises(ValueError, match=r"weight.scales \(shape \(4, 16, 1\)\) must be"):
        grouped_mm_quantized(x, weight._replace(scales=weight.scales[..., 1:]), offsets)
    scales = weight.scales.clone().requires_grad_()
    with pytest.raises(ValueError, match="scales must not require gradients"):
        grouped_mm_quantized(x, weight._replace(scales=scales), offsets)
    with pytest.raises(ValueError, match=r"x \(shape \(128,\)\) must have shape \[N, D\]"):
        grouped_mm_quantized(x[0], weight, offsets)
