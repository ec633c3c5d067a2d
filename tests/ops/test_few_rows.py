"""Grouped matmuls for few rows: on a GPU, and emulated where `cuda_on_cpu` is loaded."""

import os
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from unimoe_kernels import expert_sort
from unimoe_kernels.testing import ROUTINGS, relative_error, sample_routing

OPS = torch.ops.unimoe
EMULATED = "UNIMOE_CUDA_ON_CPU" in os.environ
DEVICES = [*(["cpu"] if EMULATED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16]
# Rows of each expert: with those of the first list tiles have 16 rows, with the others 32.
COUNTS = {
    "few": [1, 0, 15, 16, 17, 33, 0, 0, 0, 0, 0, 2],
    "many": [17, 0, 33, 1, 16, 15, 40],
    "one": [3],
}


@pytest.fixture(params=DEVICES)
def device(request):
    kernel = "CUDA" if request.param == "cuda" else "CPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("unimoe::gated_few_rows", kernel):
        pytest.skip("the extension is compiled without CUDA")
    return request.param


@pytest.fixture(params=[1, 16], ids=["whole", "split"])
def multiprocessors(request, monkeypatch):
    """Of the emulated device: with many of them the sums of narrow outputs are split."""
    monkeypatch.setenv("UNIMOE_MULTIPROCESSORS", str(request.param))


def sample(counts, inner, width, dtype, device, tail=3):
    """Rows in expert order with `tail` more, weights and offsets; outputs are of order one."""
    x = torch.randn(sum(counts) + tail, inner)
    weight = torch.randn(len(counts), width, inner) / max(1, inner) ** 0.5
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    return x.to(device, dtype), weight.to(device, dtype), offsets.to(device)


def multiply(x, weight, offsets):
    """The same in float64, with zeros for rows of no expert."""
    y = x.new_zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    bounds = offsets.tolist()
    for e, (begin, end) in enumerate(pairwise(bounds)):
        y[begin:end] = x[begin:end].double() @ weight[e].double().T
    return y


def gate(hidden):
    gate_half, up_half = hidden.chunk(2, dim=1)
    return F.silu(gate_half) * up_half


def assert_rounded_once(actual, expected):
    """Sums in float32 leave little more than the one rounding to the dtype of the result.

    Tensor cores truncate their sums: up to 1e-7 in each of a few hundred steps.
    """
    assert expected.any()
    assert relative_error(actual, expected) <= 0.55 * torch.finfo(actual.dtype).eps + 5e-5


def sample_gated(kind, tokens, top_k, experts, inner, width, dtype, device, absent=0):
    """Arguments of `gated_few_rows`; the last `absent` experts are of another rank."""
    ids, _ = sample_routing(kind, tokens, top_k, experts + absent)
    route = expert_sort(ids.to(device), experts)
    x, weight, _ = sample([tokens] + [0] * (experts - 1), inner, 2 * width, dtype, device, 0)
    return x, weight, route.expert_offsets, route.row_order, top_k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("counts", "inner", "width"),
    [("few", 24, 33), ("many", 64, 20), ("one", 8, 1), ("one", 2048, 40)],
)
def test_matmul_is_near_float64(device, multiprocessors, dtype, counts, inner, width):
    x, weight, offsets = sample(COUNTS[counts], inner, width, dtype, device)
    y = OPS.grouped_mm_few_rows(x, weight, offsets)
    assert_rounded_once(y, multiply(x, weight, offsets))
    assert not y[-3:].any()


@pytest.mark.slow
@pytest.mark.parametrize("counts", ["few", "many"])
@pytest.mark.parametrize(("inner", "width"), [(8, 7), (264, 65), (520, 32), (2048, 33)])
def test_matmul_of_more_shapes(device, multiprocessors, counts, inner, width):
    x, weight, offsets = sample(COUNTS[counts], inner, width, torch.bfloat16, device)
    y = OPS.grouped_mm_few_rows(x, weight, offsets)
    assert_rounded_once(y, multiply(x, weight, offsets))
    assert not y[-3:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ROUTINGS)
def test_gated_is_near_float64(device, multiprocessors, dtype, kind):
    arguments = sample_gated(kind, 9, 2, 6, 72, 19, dtype, device, absent=2)
    x, weight, offsets, order, top_k = arguments
    act = OPS.gated_few_rows(*arguments)
    expected = gate(multiply(x[order.long() // top_k], weight, offsets))
    assert_rounded_once(act, expected)
    assert not act[offsets[-1] :].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "inner", "width"),
    [(1, 8, 128, 2048, 24), (16, 8, 40, 64, 33), (50, 2, 4, 200, 17), (33, 1, 3, 1024, 16)],
)
def test_gated_of_more_shapes(device, multiprocessors, kind, tokens, top_k, experts, inner, width):
    arguments = sample_gated(kind, tokens, top_k, experts, inner, width, torch.bfloat16, device)
    x, weight, offsets, order, _ = arguments
    expected = gate(multiply(x[order.long() // top_k], weight, offsets))
    assert_rounded_once(OPS.gated_few_rows(*arguments), expected)


def test_results_repeat(device, multiprocessors):
    """Bit for bit, split or not: in the emulator threads take turns in another order each time."""
    plain = sample([1, 0, 17], 1024, 8, torch.bfloat16, device)
    gated = sample_gated("zipf", 3, 2, 4, 1024, 8, torch.bfloat16, device)
    first = OPS.grouped_mm_few_rows(*plain), OPS.gated_few_rows(*gated)
    x, weight, offsets, order, top_k = gated
    assert_rounded_once(first[0], multiply(*plain))
    assert_rounded_once(first[1], gate(multiply(x[order.long() // top_k], weight, offsets)))
    for _ in range(2 if device == "cpu" else 50):
        again = OPS.grouped_mm_few_rows(*plain), OPS.gated_few_rows(*gated)
        assert all(map(torch.equal, first, again))


def test_rows_and_weights_of_others_do_not_matter(device, multiprocessors):
    """NaN in rows of one expert, of none, and in the weights of an expert without rows."""
    x, weight, offsets = sample([4, 0, 18, 3], 72, 21, torch.float16, device)
    expected = multiply(x, weight, offsets)
    x[4:22] = float("nan")
    x[25:] = float("nan")
    weight[1] = float("nan")
    y = OPS.grouped_mm_few_rows(x, weight, offsets)
    assert y[4:22].isnan().all()
    expected[4:22] = y[4:22] = 0
    assert_rounded_once(y, expected)


def test_nan_stays_in_its_row(device, multiprocessors):
    x, weight, offsets = sample([20], 64, 21, torch.bfloat16, device, tail=0)
    x[3, 7] = float("nan")
    weight[0, 5, 1] = float("inf")
    y = OPS.grouped_mm_few_rows(x, weight, offsets)
    wrong = torch.zeros_like(y, dtype=torch.bool)
    wrong[3] = wrong[:, 5] = True
    assert torch.equal(~y.isfinite(), wrong)


@pytest.mark.parametrize("rows", [0, 2])
def test_no_experts_rows_or_columns(device, rows):
    for experts, width in [(0, 4), (2, 0), (2, 4)]:
        x, weight, offsets = sample([0] * experts, 8, width, torch.float16, device, rows)
        y = OPS.grouped_mm_few_rows(x, weight, offsets)
        assert y.shape == (rows, width)
        assert not y.any()


def test_gate_far_out(device):
    """A gate so low that its exponential overflows gives 0, and a high one is not changed."""
    x = torch.tensor([[1.0] + [0] * 7], device=device).bfloat16()
    weight = torch.zeros(1, 4, 8, device=device, dtype=torch.bfloat16)
    weight[0, :, 0] = torch.tensor([-200.0, 200, 2, 3])
    offsets = torch.tensor([0, 1], dtype=torch.int32, device=device)
    order = torch.zeros(1, dtype=torch.int32, device=device)
    assert OPS.gated_few_rows(x, weight, offsets, order, 1).tolist() == [[0, 600]]


def test_strided_weights(device):
    """Weights that are part of a larger tensor are read in place."""
    x, weight, offsets = sample([2, 0, 5], 40, 18, torch.bfloat16, device)
    large = torch.full((3, 2, 20, 56), float("nan"), device=device).bfloat16()
    large[:, 1, 1:19, 8:48] = weight
    strided = large[:, 1, 1:19, 8:48]
    assert not strided.is_contiguous()
    assert_rounded_once(OPS.grouped_mm_few_rows(x, strided, offsets), multiply(x, weight, offsets))


WRONG = {
    "x must be bfloat16 or float16": lambda x, w, o: (x.float(), w.float(), o),
    r"x \(20 columns\) must have a positive multiple of 8": lambda x, w, o: (
        x[:, :20].contiguous(),
        w[..., :20],
        o,
    ),
    r"x \(0 columns\) must have a positive multiple of 8": lambda x, w, o: (
        x[:, :0].contiguous(),
        w[..., :0],
        o,
    ),
    "x must be contiguous": lambda x, w, o: (x[:, :16], w[..., :16], o),
    "x must start at a multiple of 16 bytes": lambda x, w, o: (
        x.flatten()[1:49].view(2, 24),
        w,
        o,
    ),
    "weight must have the dtype of x": lambda x, w, o: (x, w.half(), o),
    r"weight \(shape \[2, 6, 16\]\) must have 24 columns": lambda x, w, o: (x, w[..., :16], o),
    r"weight \(inner stride 6\) must have inner stride 1": lambda x, w, o: (
        x,
        w.mT.contiguous().mT,
        o,
    ),
    r"weight \(stride 28\) must have rows at multiples of 8": lambda x, w, o: (
        x,
        F.pad(w, (0, 4))[..., :24],
        o,
    ),
    "weight must start at a multiple of 16 bytes": lambda x, w, o: (
        x,
        F.pad(w, (4, 4))[..., 4:28],
        o,
    ),
    r"expert_offsets \(2 entries\) must have 3": lambda x, w, o: (x, w, o[:2]),
    "expert_offsets must be int32": lambda x, w, o: (x, w, o.long()),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_served_is_refused(device, message):
    arguments = WRONG[message](*sample([2, 3], 24, 6, torch.bfloat16, device))
    with pytest.raises(RuntimeError, match=message):
        OPS.grouped_mm_few_rows(*arguments)


def test_gated_refuses_by_name(device):
    x, weight, offsets, order, _ = sample_gated("uniform", 4, 2, 3, 16, 5, torch.half, device)
    with pytest.raises(RuntimeError, match=r"gate_up_proj \(9 rows per expert\)"):
        OPS.gated_few_rows(x, weight[:, :9], offsets, order, 2)
    with pytest.raises(RuntimeError, match=r"top_k \(0\) must be at least 1"):
        OPS.gated_few_rows(x, weight, offsets, order, 0)
    with pytest.raises(RuntimeError, match=r"row_order \(8 rows\) must have 12"):
        OPS.gated_few_rows(x, weight, offsets, order, 3)


def test_fake_tensors(device):
    arguments = sample([2, 1], 16, 6, torch.bfloat16, device)
    torch.library.opcheck(
        OPS.grouped_mm_few_rows.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    arguments = sample_gated("uniform", 3, 2, 4, 16, 5, torch.bfloat16, device)
    torch.library.opcheck(
        OPS.gated_few_rows.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


DECODE = {
    # tokens, top k, experts, width of the model, width of an expert
    "qwen3-1": (1, 8, 128, 2048, 768),
    "qwen3-16": (16, 8, 128, 2048, 768),
    "mixtral-1": (1, 2, 8, 4096, 14336),
    "mixtral-16": (16, 2, 8, 4096, 14336),
    "unimoe-16": (16, 2, 4, 4096, 11008),
    "narrow": (3, 1, 2, 8192, 40),
    "tall": (700, 4, 16, 1024, 200),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("shape", DECODE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_is_near_float64(dtype, shape, kind):
    tokens, top_k, experts, inner, width = DECODE[shape]
    arguments = sample_gated(kind, tokens, top_k, experts, inner, width, dtype, "cuda")
    x, weight, offsets, order, _ = arguments
    act = OPS.gated_few_rows(*arguments)
    assert_rounded_once(act, gate(multiply(x[order.long() // top_k], weight, offsets)))
    down = torch.randn(experts, inner, width, device="cuda", dtype=dtype) / width**0.5
    y = OPS.grouped_mm_few_rows(act, down, offsets)
    assert_rounded_once(y, multiply(act, down, offsets))
    for _ in range(10):
        assert torch.equal(act, OPS.gated_few_rows(*arguments))
        assert torch.equal(y, OPS.grouped_mm_few_rows(act, down, offsets))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["qwen3-16", "narrow"])
def test_graph_follows_new_routing(shape):
    """A captured call reads the offsets of each replay."""
    tokens, top_k, experts, inner, width = DECODE[shape]
    dtype = torch.bfloat16
    arguments = sample_gated("uniform", tokens, top_k, experts, inner, width, dtype, "cuda")
    OPS.gated_few_rows(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act = OPS.gated_few_rows(*arguments)
    x, weight, offsets, order, _ = arguments
    for seed, kind in enumerate(ROUTINGS):
        ids, _ = sample_routing(kind, tokens, top_k, experts, seed=seed + 5, device="cuda")
        route = expert_sort(ids, experts)
        offsets.copy_(route.expert_offsets)
        order.copy_(route.row_order)
        graph.replay()
        expected = gate(multiply(x[order.long() // top_k], weight, offsets))
        assert_rounded_once(act, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    experts, width, inner = 9, 2**15, 2**13
    weight = torch.randn(experts, width, inner, device="cuda", dtype=torch.bfloat16)
    weight /= inner**0.5
    assert weight.numel() > 2**31
    x = torch.randn(5, inner, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0] * 9 + [5], dtype=torch.int32, device="cuda")
    y = OPS.grouped_mm_few_rows(x, weight, offsets)
    assert_rounded_once(y, x.double() @ weight[-1].double().T)
