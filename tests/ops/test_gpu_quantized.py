"""What only a GPU can show of quantised experts: accuracy at real sizes, graphs, repeated runs."""

import pytest
import torch
from error_limit import error_limit

from unimoe_kernels import dequantize_weight, moe_mlp, moe_mlp_quantized, quantize_weight
from unimoe_kernels import use_backend as use
from unimoe_kernels.testing import relative_error, sample_routing

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = {
    # tokens, width, expert width, experts, top k: sums in parts, few rows, ragged ones, full tiles
    "one token": (1, 2048, 768, 64, 8),
    "decode": (16, 1024, 512, 64, 8),
    "fine": (1000, 512, 256, 32, 4),
    "coarse": (2048, 1024, 2816, 4, 2),
}
FORMATS = {
    "int8": ("int8", None, {}),
    "int8-32": ("int8", 32, {}),
    "int4-64": ("int4", 64, {}),
    "int4-32-zeros": ("int4", 32, {"zero_points": True}),
}


@pytest.fixture(autouse=True)
def triton_backend():
    with use("triton"):
        yield


def sample(shape, format, dtype=torch.bfloat16):
    tokens, width, expert_width, experts, top_k = SHAPES[shape]
    name, group_size, options = FORMATS[format]
    weights = [
        quantize_weight(
            (torch.randn(size, device=DEVICE) / size[2] ** 0.5).to(dtype),
            name,
            group_size,
            **options,
        )
        for size in ((experts, 2 * expert_width, width), (experts, width, expert_width))
    ]
    ids, scores = sample_routing("uniform", tokens, top_k, experts, device=DEVICE)
    ids[-1, -1] = experts
    x = torch.randn(tokens, width, device=DEVICE).to(dtype)
    return x, weights, ids, scores


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_torch(shape, format, dtype):
    x, weights, ids, scores = sample(shape, format, dtype)
    grad = torch.randn(x.shape, device=DEVICE)

    def run(function, x, scores, weights):
        x, scores = (value.detach().requires_grad_() for value in (x, scores))
        y = function(x, *weights, ids, scores)
        return y, *torch.autograd.grad(y, [x, scores], grad.to(y.dtype))

    actual = run(moe_mlp_quantized, x, scores, weights)
    with use("reference"):
        rounded = [dequantize_weight(weight, dtype) for weight in weights]
        baseline = run(moe_mlp, x, scores, rounded)
        exact = [dequantize_weight(weight, torch.float64) for weight in weights]
        expected = run(moe_mlp, x.double(), scores.double(), exact)
    _, width, expert_width, _, _ = SHAPES[shape]
    for name, *values in zip(("y", "x", "scores"), actual, baseline, expected, strict=True):
        assert values[2].any()
        ours, torchs = (relative_error(value, values[2]) for value in values[:2])
        assert ours <= error_limit(torchs, dtype, max(len(x), width, 2 * expert_width)), name


@pytest.mark.parametrize("shape", ["one token", "decode", "coarse"])
def test_graph_gives_the_same_bits(shape):
    x, weights, ids, scores = sample(shape, "int4-64")
    with torch.no_grad():
        expected = moe_mlp_quantized(x, *weights, ids, scores)
        assert torch.equal(expected, moe_mlp_quantized(x, *weights, ids, scores))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moe_mlp_quantized(x, *weights, ids, scores)
        y.zero_()
        graph.replay()
    assert expected.any()
    assert torch.equal(y, expected)


def test_no_float_weight_is_made():
    x, weights, ids, scores = sample("coarse", "int4-64")
    x.requires_grad_()
    moe_mlp_quantized(x, *weights, ids, scores).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    moe_mlp_quantized(x, *weights, ids, scores).sum().backward()
    tokens, width, expert_width, _, top_k = SHAPES["coarse"]
    rows = 2 * tokens * top_k * (2 * width + 6 * expert_width)
    assert torch.cuda.max_memory_allocated() - before < 2 * rows
