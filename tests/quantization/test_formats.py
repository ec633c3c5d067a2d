"""Formats of quantised weights: golden bytes, written out by hand, errors and refusals."""

import pickle

import pytest
import torch

from unimoe_kernels.quantization.formats import GROUP_SIZES
from unimoe_kernels.quantization.rounding import (
    dequantize_weight,
    pack_int4,
    quantize_weight,
    unpack_int4,
)
from unimoe_kernels.quantization.weight import QuantizedWeight, check_quantized

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Format, group size, zero points: every layout.
LAYOUTS = [
    ("int8", None, False),
    *(("int8", group, False) for group in GROUP_SIZES),
    *(("int4", group, zeros) for group in GROUP_SIZES for zeros in (False, True)),
]
layouts = pytest.mark.parametrize(
    ("format", "group_size", "zero_points"),
    [pytest.param(*one, id=f"{one[0]}-{one[1]}{'-zeros' * one[2]}") for one in LAYOUTS],
)
# Root-mean-square errors of normally distributed weights beside their own size, in percent: just
# above those measured. With max|w| / 7 as the scale, int4 has 11.7, 10.8 and 9.7.
LIMITS = {
    ("int8", None, False): 0.85,
    ("int8", 128, False): 0.66,
    ("int8", 64, False): 0.61,
    ("int8", 32, False): 0.56,
    ("int4", 128, False): 10.5,
    ("int4", 64, False): 9.7,
    ("int4", 32, False): 8.8,
    ("int4", 128, True): 10.3,
    ("int4", 64, True): 9.3,
    ("int4", 32, True): 8.3,
}


def root_mean_square(actual, expected):
    """The error beside the size of what is expected."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def test_int8_golden_values():
    weight = torch.tensor([[[254.0, -127.0, 3.0, 0.9], [0.0, 0.0, 0.0, 0.0]]])
    quantized = quantize_weight(weight, "int8")
    # The scale of the first row is 254 / 127 = 2; 0.45 rounds to 0, 1.5 to even.
    assert quantized.scales.tolist() == [[[2.0], [0.0]]]
    assert quantized.values.view(torch.uint8).tolist() == [
        [[0b0111_1111, 0b1100_0000, 0b0000_0010, 0b0000_0000], [0, 0, 0, 0]]
    ]
    assert quantized.zeros is None
    assert quantized.group_size == 4
    assert dequantize_weight(quantized).tolist() == [[[254.0, -128.0, 4.0, 0.0], [0.0] * 4]]


def test_int4_golden_values():
    row = torch.zeros(32)
    # The largest magnitude, 4, becomes -8: the scale is -0.5, and w is stored as 8 - 2 w.
    row[:6] = torch.tensor([4.0, -3.5, 0.5, 1.0, -1.0, 0.2])
    quantized = quantize_weight(row.view(1, 1, 32), "int4", 32)
    assert quantized.scales.tolist() == [[[-0.5]]]
    expected = [0b1111_0000, 0b0110_0111, 0b1000_1010] + [0b1000_1000] * 13
    assert quantized.values.flatten().tolist() == expected
    values = dequantize_weight(quantized).flatten()
    assert values[:6].tolist() == [4.0, -3.5, 0.5, 1.0, -1.0, 0.0]
    assert not values[6:].any()


def test_int4_golden_values_with_zero_points():
    row = torch.full((64,), 1.0)
    # From -1 to 6.5 in steps of 0.5: the zero point is 2, and w is stored as 2 + 2 w.
    row[:4] = torch.tensor([-1.0, 6.5, 0.0, 3.2])
    # All of one sign: zero is inside of the range, so steps are 3 / 15.
    row[32:] = -3.0
    quantized = quantize_weight(row.view(1, 1, 64), "int4", 32, zero_points=True)
    assert quantized.zeros.tolist() == [[[2, 15]]]
    torch.testing.assert_close(quantized.scales, torch.tensor([[[0.5, 0.2]]]))
    expected = [0b1111_0000, 0b1000_0010] + [0b0100_0100] * 14 + [0b0000_0000] * 16
    assert quantized.values.flatten().tolist() == expected
    values = dequantize_weight(quantized).flatten()
    assert values[:5].tolist() == [-1.0, 6.5, 0.0, 3.0, 1.0]
    torch.testing.assert_close(values[32:], torch.full((32,), -3.0))


def test_groups_have_scales_of_their_own():
    weight = torch.cat([torch.full((32,), 127.0), torch.full((32,), 1.27)]).view(1, 1, 64)
    quantized = quantize_weight(weight, "int8", 32)
    torch.testing.assert_close(quantized.scales, torch.tensor([[[1.0, 0.01]]]))
    assert quantized.values.unique().tolist() == [127]
    assert quantize_weight(weight, "int8").values.unique().tolist() == [1, 127]


def test_nibbles_are_packed_low_first():
    integers = torch.arange(16, dtype=torch.uint8)
    packed = pack_int4(integers)
    assert packed.tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(unpack_int4(packed), integers)


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_the_format(format, group_size, zero_points, dtype):
    weight = (torch.randn(3, 40, 256) * 0.02).to(dtype)
    quantized = quantize_weight(weight, format, group_size, zero_points=zero_points)
    check_quantized("weight", quantized)
    assert quantized.shape == weight.shape
    wide = dtype in (torch.float32, torch.float64)
    assert quantized.scales.dtype == (torch.float32 if wide else torch.bfloat16)
    error = root_mean_square(dequantize_weight(quantized, torch.float64), weight)
    limit = LIMITS[format, group_size, zero_points] / 100
    assert 0.5 * limit < error < limit
    # What an expert is rounded to depends on nothing else.
    alone = quantize_weight(weight[1:2], format, group_size, zero_points=zero_points)
    for one, other in zip(alone[:3], quantized.of_experts(1, 2)[:3], strict=True):
        assert one is other is None or torch.equal(one, other)


@layouts
def test_rounding_again_changes_nothing(format, group_size, zero_points):
    weight = torch.randn(2, 8, 128)
    options = {"group_size": group_size, "zero_points": zero_points}
    values = dequantize_weight(quantize_weight(weight, format, **options))
    again = dequantize_weight(quantize_weight(values, format, **options))
    torch.testing.assert_close(again, values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes_are_those_of_the_format(layout):
    format, group_size, zero_points = layout
    weight = torch.randn(2, 8, 256, dtype=torch.bfloat16)
    quantized = quantize_weight(weight, format, group_size, zero_points=zero_points)
    groups = 16 * (256 // (group_size or 256))
    numbers = weight.numel() if format == "int8" else weight.numel() // 2
    assert quantized.nbytes == numbers + (3 if zero_points else 2) * groups


def test_numbers_of_any_size():
    tiny = torch.tensor([[[1e-30, -3e-30] * 16]])
    huge = torch.tensor([[[1e38, -3e38] * 16]])
    for weight in (tiny, huge, torch.zeros_like(tiny), -tiny.abs()):
        for format, zero_points in (("int8", False), ("int4", False), ("int4", True)):
            quantized = quantize_weight(weight, format, 32, zero_points=zero_points)
            values = dequantize_weight(quantized, torch.float64)
            assert (values - weight).abs().max() <= 0.1 * weight.abs().max().double()


def test_meta_tensors_and_pickle():
    weight = torch.randn(2, 8, 64)
    for zero_points in (False, True):
        quantized = quantize_weight(weight, "int4", 32, zero_points=zero_points)
        loaded = pickle.loads(pickle.dumps(quantized))
        assert torch.equal(loaded.values, quantized.values)
        assert loaded.format == "int4"
        shapes = quantize_weight(weight.to("meta"), "int4", 32, zero_points=zero_points)
        for one, other in zip(shapes[:3], quantized[:3], strict=True):
            assert one is other is None or (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one is None or one.is_meta


def test_bad_weights_are_refused():
    weight = torch.randn(2, 4, 96)
    with pytest.raises(ValueError, match=r"format \('int3'\) must be one of int8, int4"):
        quantize_weight(weight, "int3")
    with pytest.raises(ValueError, match=r"group_size \(48\) must be one of \(32, 64, 128\)"):
        quantize_weight(weight, "int4", 48)
    with pytest.raises(ValueError, match=r"down has rows of 96 .* multiple of group_size \(64\)"):
        quantize_weight(weight, "int4", name="down")
    for size in ("64", 64.0, True):
        with pytest.raises(ValueError, match=rf"group_size \({size!r}\) must be one of"):
            quantize_weight(weight, "int4", size)
    with pytest.raises(TypeError, match=r"zero_points \('no'\) must be a bool"):
        quantize_weight(weight, "int4", 32, zero_points="no")
    with pytest.raises(TypeError, match=r"weight \(Tensor\) must be a QuantizedWeight"):
        dequantize_weight(weight)
    with pytest.raises(TypeError, match=r"dtype \(torch.int8\) must be a floating-point dtype"):
        dequantize_weight(quantize_weight(weight, "int8"), torch.int8)
    with pytest.raises(ValueError, match=r"zero_points \(True\) must be False with .*int8"):
        quantize_weight(weight, "int8", 32, zero_points=True)
    with pytest.raises(TypeError, match=r"weight is quantised already \(int8\)"):
        quantize_weight(quantize_weight(weight, "int8"), "int8")
    with pytest.raises(TypeError, match=r"weight \(torch.int8\) must have dtype float32"):
        quantize_weight(weight.to(torch.int8), "int8")
    with pytest.raises(ValueError, match=r"weight \(shape \(4, 96\)\) must have shape"):
        quantize_weight(weight[0], "int8")
    for bad, word in ((torch.nan, "NaN"), (torch.inf, "infinity")):
        broken = weight.clone()
        broken[1, 2, 3] = bad
        with pytest.raises(ValueError, match=rf"weight holds {word} in expert 1"):
            quantize_weight(broken, "int8")
    with pytest.raises(ValueError, match=r"holds infinity in expert 0"):
        quantize_weight(weight.double() * 1e300, "int8")


def test_parts_that_do_not_fit_are_refused():
    good = quantize_weight(torch.randn(2, 4, 96), "int4", 32, zero_points=True)
    check_quantized("w", good)
    for wrong, kind, message in [
        ({"format": "fp3"}, ValueError, r"format \('fp3'\) must be one of"),
        ({"format": "int8"}, TypeError, r"w.values \(torch.uint8\) must have dtype int8"),
        ({"group_size": 48}, ValueError, r"w.group_size \(48\) must be one of"),
        ({"group_size": 64}, ValueError, r"w has rows of 96 .* multiple of group_size \(64\)"),
        ({"scales": good.scales[:, :, 1:]}, ValueError, r"w.scales \(shape .*2\)\) must be .*3\)"),
        ({"scales": good.scales.half()}, TypeError, r"w.scales \(torch.float16\) must have dtype"),
        ({"scales": good.scales.to("meta")}, ValueError, r"w.scales \(on meta\) must be on the"),
        ({"zeros": good.zeros[1:]}, ValueError, r"w.zeros \(shape \(1, 4, 3\)\) must be"),
        ({"zeros": good.zeros.int()}, TypeError, r"w.zeros \(torch.int32\) must have dtype uint8"),
    ]:
        with pytest.raises(kind, match=message):
            check_quantized("w", good._replace(**wrong))
    with pytest.raises(TypeError, match=r"w \(Tensor\) must be a QuantizedWeight"):
        check_quantized("w", good.scales)
    with pytest.raises(ValueError, match=r"w.zeros must be None"):
        check_quantized(
            "w",
            QuantizedWeight(
                good.scales.to(torch.int8), good.scales[..., :1], good.zeros[..., :1], "int8", 3
            ),
        )
