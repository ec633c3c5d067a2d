"""Tensor descriptors give the numbers that pointers give, and are made only where TMA can read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from unimoe_kernels import moe_mlp, use_backend
from unimoe_kernels._triton import descriptors, tiles
from unimoe_kernels._triton.launch import interpreted
from unimoe_kernels._triton.planned import layout_of
from unimoe_kernels._triton.tiles import Tile
from unimoe_kernels.ops.grouped_mm import kernel
from unimoe_kernels.testing import relative_error, sample_routing

pytestmark = pytest.mark.skipif(not interpreted(), reason="Triton compiles for a GPU here")

POINTERS = Tile(16, 32, 32, 2, 4, 1)
DESCRIPTORS = POINTERS._replace(descriptors=True)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def made(monkeypatch):
    """Lists the block of every descriptor that is made."""
    blocks = []
    for name in ("TensorDescriptor", "create_ragged_descriptor"):
        original = getattr(descriptors, name)

        def make(*args, original=original):
            result = original(*args)
            blocks.append(list(result.block_shape))
            return result

        monkeypatch.setattr(descriptors, name, make)
    return blocks


def weight_in(layout, experts, n, k, dtype):
    """A weight `[E, N, K]` of order one whose memory is laid out in some way."""
    weight = (torch.randn(experts, n, k) / max(k, 1) ** 0.5).to(dtype)
    if layout == "transposed":
        return weight.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        return torch.cat([weight, weight], 2)[:, :, :k]
    if layout == "every second":
        return torch.stack([weight, weight], 3).flatten(2)[:, :, ::2]
    if layout == "offset":
        flat = torch.cat([weight.new_zeros(1), weight.flatten()])
        return flat[1:].view_as(weight)
    if layout == "expanded":
        return weight[:1].expand(experts, n, k)
    assert layout == "contiguous"
    return weight


def assert_same(actual, expected, dtype=None):
    """Bit for bit, but in float16: the interpreter's products are numpy's, which on some CPUs round
    them by where operands lie in memory.
    """
    if (dtype or actual.dtype) == torch.float16 and expected.any():
        assert relative_error(actual, expected) < torch.finfo(torch.float16).eps
    else:
        assert torch.equal(actual, expected)


def by_hand(x, weight, offsets):
    x, weight = x.double(), weight.double()
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    y = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    for e, (begin, end) in enumerate(bounds):
        y[begin:end] = x[begin:end] @ weight[e].t()
    return y, bounds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "block"),
    [
        ("contiguous", [1, 32, 32]),
        ("padded", [1, 32, 32]),
        ("transposed", [1, 32, 32]),
        ("every second", None),
        ("offset", None),
        ("expanded", None),
    ],
)
# Sizes that tiles divide and sizes that they do not.
@pytest.mark.parametrize(("n", "k"), [(64, 96), (40, 72)])
def test_rows_times_weights(made, layout, block, n, k, dtype):
    counts = [20, 0, 33, 1]
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    x, weight = torch.randn(sum(counts) + 5, k).to(dtype), weight_in(layout, 4, n, k, dtype)
    expected = kernel.grouped_mm(x, weight, offsets, None, tile=POINTERS)
    assert not made
    actual = kernel.grouped_mm(x, weight, offsets, None, tile=DESCRIPTORS)
    assert made == [[16, 32]] + ([block] if block else [])
    assert_same(actual, expected)
    exact, _ = by_hand(x, weight, offsets)
    assert relative_error(actual, exact) < 1e-2


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    n=st.integers(1, 6),
    k=st.integers(1, 6),
    eight=st.sampled_from([8, 5]),
    transposed=st.booleans(),
)
@settings(max_examples=8)
def test_drawn_shapes(counts, n, k, eight, transposed):
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    n, k = n * eight, k * eight
    x = torch.randn(sum(counts) + 3, k).half()
    weight = weight_in("transposed" if transposed else "contiguous", len(counts), n, k, x.dtype)
    results = [kernel.grouped_mm(x, weight, offsets, None, tile=t) for t in (POINTERS, DESCRIPTORS)]
    assert_same(*results)
    grad = torch.randn(x.shape[0], n).half()
    results = [
        kernel.grouped_mm_wgrad(grad, x, offsets, False, tile=t)[0] for t in (POINTERS, DESCRIPTORS)
    ]
    assert_same(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(32, 64), (40, 72)])
def test_sums_over_rows_of_an_expert(made, height, width, dtype):
    counts = [35, 0, 1, 22]
    rows = sum(counts) + 6
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    operands = {"grad": torch.randn(rows, height), "x": torch.randn(rows, width)}
    # What belongs to no expert may be anything.
    operands = {name: value.to(dtype) for name, value in operands.items()}
    for value in operands.values():
        value[sum(counts) :] = float("nan")
    results = [
        kernel.grouped_mm_wgrad(operands["grad"], operands["x"], offsets, False, tile=tile)
        for tile in (POINTERS, DESCRIPTORS)
    ]
    assert len(made) == 2
    assert_same(results[0][0], results[1][0])
    start = 0
    for e, count in enumerate(counts):
        own = slice(start, start + count)
        exact = operands["grad"][own].double().t() @ operands["x"][own].double()
        assert relative_error(results[1][0][e], exact) < 1e-2 if count else not exact.any()
        assert results[1][0][e].any() == bool(count)
        start += count


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_infinity_of_one_expert_stays_there():
    offsets = torch.tensor([0, 5, 9], dtype=torch.int32)
    grad, x = torch.randn(9, 16).half(), torch.randn(9, 16).half()
    x[5:] = float("inf")
    result, _ = kernel.grouped_mm_wgrad(grad, x, offsets, False, tile=DESCRIPTORS)
    assert result[0].isfinite().all()
    assert not result[1].isfinite().any()


# The second width is no multiple of the tile, so that a tile of gate reads into up.
@pytest.mark.parametrize(
    ("expert_width", "kind", "dtype"),
    [(64, "empty_experts", torch.bfloat16), (40, "uniform", torch.float16)],
)
def test_fused_layer(made, monkeypatch, expert_width, kind, dtype):
    ids, scores = sample_routing(kind, 12, 2, 4)
    values = {
        "x": torch.randn(12, 48),
        "gate_up_proj": torch.randn(4, 2 * expert_width, 48) / 48**0.5,
        "down_proj": torch.randn(4, 48, expert_width) / expert_width**0.5,
        "scores": scores,
    }
    values = {
        name: value.to(torch.float32 if name == "scores" else dtype).requires_grad_()
        for name, value in values.items()
    }
    grad = torch.randn(12, 48).to(dtype)

    def run(tile):
        monkeypatch.setattr(tiles, "INTERPRETED", tile)
        tiles.choose.cache_clear()
        with use_backend("triton"):
            y = moe_mlp(**values, ids=ids)
            return y, *torch.autograd.grad(y, list(values.values()), grad)

    try:
        expected = run(POINTERS)
        assert not made
        actual = run(DESCRIPTORS)
    finally:
        monkeypatch.undo()
        tiles.choose.cache_clear()
    # Weights of both matmuls forward and of both backward, rows of two, both operands of two sums
    # over rows.
    assert len(made) == 10
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b, dtype)
        assert a.float().abs().max() > 0.1


def test_what_descriptors_may_read():
    def half(*size):
        return torch.zeros(size, dtype=torch.float16)

    def describable(tensor):
        return descriptors.describable(layout_of(tensor))

    assert describable(half(4, 8))
    assert describable(half(4, 3, 16)[:, :, :5])
    assert not describable(half(4, 12))
    assert not describable(half(8, 4).t())
    assert not describable(half(4, 16)[:, ::2])
    assert not describable(half(1, 8).expand(4, 8))
    assert not describable(half(33)[1:].view(4, 8))
    assert not describable(half(0, 8))
    assert not describable(half(4, 0))
    assert not describable(half(4, 8).float())


def test_tiles_ask_for_descriptors_only_where_asked(made):
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        x, weight = torch.randn(4, 16, dtype=dtype), torch.randn(1, 16, 16, dtype=dtype)
        kernel.grouped_mm(x, weight, offsets, None, tile=DESCRIPTORS)
        kernel.grouped_mm_wgrad(x, x, offsets, False, tile=DESCRIPTORS)
    assert not made
