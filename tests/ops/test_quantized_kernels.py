"""Triton kernels of quantised products in tiles and parts that the interpreter would not choose."""

import pytest
import torch

pytest.importorskip("triton")

from unimoe_kernels import dequantize_weight, moe_mlp_quantized, quantize_weight, use_backend
from unimoe_kernels._triton import launch, quantized_launch
from unimoe_kernels._triton.launch import interpreted
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels.ops.grouped_mm_quantized import kernel
from unimoe_kernels.ops.moe_mlp_quantized import kernel as layer_kernel
from unimoe_kernels.testing import assert_close_to_float64, sample_routing

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="Triton compiles for a GPU here")

COUNTS, EXTRA = (5, 0, 20), 3
OFFSETS = torch.tensor([0, 5, 5, 25], dtype=torch.int32)
# Several groups in a block, one group, and a part of one.
TILES = {
    "long": Tile(16, 32, 128, 2, 4, 1),
    "wide": Tile(16, 128, 32, 2, 4, 1),
    "tall": Tile(64, 64, 64, 2, 4, 1),
}
FORMATS = {
    "int8": ("int8", None, {}),
    "int8-32": ("int8", 32, {}),
    "int4-64": ("int4", 64, {}),
    "int4-32-zeros": ("int4", 32, {"zero_points": True}),
}
DEVICES = [
    launch.Device(80, 108, 163 * 1024),
    launch.Device(90, 132, 227 * 1024),
    launch.Device(120, 170, 99 * 1024),
]


def sample(format, dtype=torch.float32, transposed=False, d=192, f=40):
    name, group_size, options = FORMATS[format]
    floats = torch.randn(len(COUNTS), f, d) / (f if transposed else d) ** 0.5
    weight = quantize_weight(floats.to(dtype), name, group_size, **options)
    width, depth = (d, f) if transposed else (f, d)
    x = torch.randn(sum(COUNTS) + EXTRA, depth).to(dtype)
    return x, weight, torch.randn(len(COUNTS), width).to(dtype)


def by_hand(x, weight, bias, transposed):
    floats = dequantize_weight(weight, torch.float64)
    floats = floats.transpose(1, 2) if transposed else floats
    y, start = torch.zeros(len(x), floats.shape[1], dtype=torch.float64), 0
    for e, count in enumerate(COUNTS):
        own = slice(start, start + count)
        y[own] = x[own].double() @ floats[e].t() + bias[e].double()
        start += count
    return y


@needs_interpreter
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_and_parts(tile, format, transposed):
    x, weight, bias = sample(format, transposed=transposed)
    expected = by_hand(x, weight, bias, transposed)
    for parts in (1, 2, 4):
        y = kernel.grouped_mm_quantized(
            x, *weight[:3], OFFSETS, bias, transposed, tile=TILES[tile], num_parts=parts
        )
        assert_close_to_float64(y[:25], expected[:25], name=f"{parts} parts")
        assert not y[25:].any()


@needs_interpreter
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types(dtype, transposed):
    x, weight, bias = sample("int4-64", dtype, transposed)
    y = kernel.grouped_mm_quantized(x, *weight[:3], OFFSETS, bias, transposed)
    expected = by_hand(x, weight, bias, transposed)
    floats = dequantize_weight(weight, dtype)
    floats = floats.transpose(1, 2) if transposed else floats
    baseline = torch.cat([x[:5] @ floats[0].t() + bias[0], x[5:25] @ floats[2].t() + bias[2]])
    assert y.dtype == dtype
    assert_close_to_float64(y[:25], expected[:25], baseline, "y", dtype)


@needs_interpreter
def test_rows_through_a_descriptor():
    x, weight, bias = sample("int4-64", torch.bfloat16)
    tile = TILES["long"]
    pair = [
        kernel.grouped_mm_quantized(x, *weight[:3], OFFSETS, bias, tile=one)
        for one in (tile, tile._replace(descriptors=True))
    ]
    assert pair[0][:25].any()
    assert torch.equal(*pair)


@needs_interpreter
@pytest.mark.parametrize("format", ["int8", "int4-32-zeros"])
@pytest.mark.parametrize("keep", [False, True], ids=["", "training"])
def test_layer_in_parts(monkeypatch, format, keep):
    """What the first matmul returns does not depend on how its sums are cut."""
    name, group_size, options = FORMATS[format]
    first, down = (
        quantize_weight(torch.randn(shape) / shape[2] ** 0.5, name, group_size, **options)
        for shape in ((4, 128, 96), (4, 96, 64))
    )
    ids, scores = sample_routing("uniform", 3, 2, 4)
    ids[-1, -1] = 4
    x, biases = torch.randn(3, 96), (torch.randn(4, 128), torch.randn(4, 96))
    x.requires_grad_(keep)

    def run():
        y = moe_mlp_quantized(
            x, first, down, ids, scores, gate_up_bias=biases[0], down_bias=biases[1]
        )
        return (y, *torch.autograd.grad(y.square().sum(), [x])) if keep else (y,)

    with use_backend("reference"):
        expected = run()
    monkeypatch.setattr(layer_kernel, "num_parts", lambda *_: 2)
    with use_backend("triton"):
        actual = run()
    for one, other in zip(actual, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device.capability}")
def test_tiles_fit_and_parts_fill(device):
    for kind in ("rows", "gated"):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for rows in (1, 32, 64, 4096):
                for group, four_bits in ((2048, False), (32, True), (64, True), (128, True)):
                    weight = quantized_launch.Stored(128, 768, 2048, group, four_bits, False)
                    problem = Problem(kind, 2048, 768, 0, 128, 8, dtype, rows)
                    tile = quantized_launch.choose(problem, weight, device)
                    held = tile.num_stages * quantized_launch._stage_bytes(problem, weight, tile)
                    held += quantized_launch._block_bytes(problem, tile)
                    assert held <= device.shared_bytes, (problem, tile)
                    parts = quantized_launch.num_parts(problem, tile, 8, device)
                    columns = 768 * (2 if kind == "gated" else 1)
                    tiles = 8 * -(-columns // tile.block_n)
                    wanted = quantized_launch.AT_ONCE * device.processors if rows <= 32 else 1
                    longest = 2048 // quantized_launch.SHORTEST_PART
                    assert tiles * parts >= wanted or parts == longest, (problem, tile, parts)
                    assert parts == 1 or tiles * parts // 2 < wanted, (problem, tile, parts)
                    length = quantized_launch.part_length(2048, tile, parts)
                    assert length % tile.block_k == 0
                    assert length * parts >= 2048
