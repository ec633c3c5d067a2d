"""Matmuls in CUDA C++ on a GPU of compute capability 9.0, beside float64.

Every test first sees that the kernel it is about takes the call, so that none passes on Triton.
"""

from itertools import pairwise

import pytest
import torch
from error_limit import error_limit

from unimoe_kernels import grouped_mm, moe_mlp, use_backend
from unimoe_kernels.ops import cuda_matmul
from unimoe_kernels.ops.moe_mlp import compiled
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Gate
from unimoe_kernels.testing import ROUTINGS, relative_error, sample_routing

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
OPS = torch.ops.unimoe
NAMES = ("x", "gate_up_proj", "down_proj", "scores")
LARGE = 2**31 + 2**20  # elements, more than an int32 can count
SHAPES = {
    # tokens, width, expert width, experts, top k: full tiles, ragged ones, sizes that fill none
    "fine": (1000, 512, 256, 32, 4),
    "coarse": (2048, 1024, 2816, 4, 2),
    "odd": (333, 200, 328, 5, 3),
    "tiny": (40, 8, 16, 3, 2),
    "many experts": (512, 128, 136, 512, 8),
}
DTYPES = (torch.bfloat16, torch.float16)
# Rows of each expert: none, fewer and more than a tile, exactly full ones.
COUNTS = [0, 1, 127, 128, 129, 0, 600, 3]


@pytest.fixture(autouse=True)
def cuda_backend():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    gpu = cuda_matmul.gpu_of(torch.empty(0, device=DEVICE))
    if gpu.capability != (9, 0) or "9.0a" not in gpu.archs:
        pytest.skip(f"needs compute capability 9.0 and the extension for 9.0a, not {gpu}")
    with use_backend("cuda"):
        yield


def sample(shape="fine", kind="uniform", dtype=torch.bfloat16, sentinels=False):
    """Arguments of `moe_mlp`; outputs and gradients are of order one."""
    tokens, width, expert_width, experts, top_k = SHAPES[shape]
    ids, scores = sample_routing(kind, tokens, top_k, experts, device=DEVICE)
    if sentinels:
        ids = ids.masked_fill(torch.rand(ids.shape, device=DEVICE) < 0.3, experts)
        ids[0] = experts
    floats = {
        "x": torch.randn(tokens, width),
        "gate_up_proj": torch.randn(experts, 2 * expert_width, width) / width**0.5,
        "down_proj": torch.randn(experts, width, expert_width) / expert_width**0.5,
    }
    arguments = {name: value.to(DEVICE, dtype) for name, value in floats.items()}
    arguments["scores"] = scores
    return {name: value.requires_grad_() for name, value in arguments.items()} | {"ids": ids}


def assert_taken(arguments, keep_hidden):
    weights = ExpertWeights(arguments["gate_up_proj"], arguments["down_proj"], None, None)
    gate = Gate("silu", 7.0, 1.702)
    assert compiled.takes(arguments["x"].detach(), arguments["ids"], weights, gate, keep_hidden)


def run(arguments, grad):
    """Returns the output and all gradients."""
    y = moe_mlp(**arguments)
    return y, *torch.autograd.grad(y, [arguments[name] for name in NAMES], grad.to(y.dtype))


def grouped(counts=COUNTS, inner=200, width=328, dtype=torch.bfloat16, tail=70):
    """Rows in expert order, `tail` more of NaN that no expert owns, weights and offsets."""
    x = torch.randn(sum(counts) + tail, inner, device=DEVICE).to(dtype)
    x[sum(counts) :] = float("nan")
    weight = (torch.randn(len(counts), width, inner, device=DEVICE) / inner**0.5).to(dtype)
    offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    return x, weight, offsets


def products(x, weight, offsets):
    """`grouped_mm` in float64."""
    y = x.new_zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        y[begin:end] = x[begin:end].double() @ weight[e].double().T
    return y


def assert_close(actual, expected, dtype):
    assert relative_error(actual, expected) < 2 * torch.finfo(dtype).eps
    assert relative_error(torch.zeros_like(actual), expected) > 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("inner", "width"), [(8, 8), (64, 256), (200, 328), (1024, 136), (72, 2056)]
)
def test_products_are_close_to_float64(inner, width, dtype):
    x, weight, offsets = grouped(inner=inner, width=width, dtype=dtype)
    expected = products(x, weight, offsets)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    room = torch.zeros(len(COUNTS), width, inner + 8, device=DEVICE, dtype=dtype)
    room[..., :inner] = weight
    for given in (weight, turned, room[..., :inner]):
        y = OPS.grouped_mm_sm90(x, given, offsets)
        assert_close(y, expected, dtype)
        assert not y[sum(COUNTS) :].any()
        assert torch.equal(OPS.grouped_mm_sm90(x, given, offsets), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("inner", "width"), [(8, 8), (128, 256), (200, 328), (1024, 136), (72, 2056)]
)
def test_weight_gradients_are_close_to_float64(inner, width, dtype):
    x, _, offsets = grouped(inner=inner, width=width, dtype=dtype)
    grad = torch.randn(x.shape[0], width, device=DEVICE).to(dtype)
    grad[sum(COUNTS) :] = float("nan")
    actual = OPS.grouped_mm_wgrad_sm90(grad, x, offsets)
    bounds = pairwise(offsets.tolist())
    expected = torch.stack([grad[a:b].double().T @ x[a:b].double() for a, b in bounds])
    assert_close(actual, expected, dtype)
    for e, count in enumerate(COUNTS):
        assert actual[e].any() == (count > 0)
    for _ in range(5):
        assert torch.equal(OPS.grouped_mm_wgrad_sm90(grad, x, offsets), actual)


def test_public_product_and_its_gradients():
    # No NaN here: what no expert owns takes part in autograd's own sums.
    x, weight, offsets = grouped(tail=0)
    x.requires_grad_()
    weight.requires_grad_()
    layouts = cuda_matmul.layout_of(x.detach()), cuda_matmul.layout_of(weight.detach())
    assert cuda_matmul.choose_product(cuda_matmul.gpu_of(x), *layouts, False).kernel == "sm90"
    y = grouped_mm(x, weight, offsets)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, weight), grad)
    exact = [value.detach().double().requires_grad_() for value in (x, weight)]
    with use_backend("reference"):
        expected = grouped_mm(*exact, offsets)
    assert_close(y, expected, y.dtype)
    for a, b in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_close(a, b, y.dtype)


def test_experts_do_not_see_one_another():
    """NaN of one expert's rows and weight stay there, also where a tile reads past its end."""
    counts = [100, 50, 130]
    x, weight, offsets = grouped(counts, inner=72, width=72, tail=0)
    expected = products(x, weight, offsets)
    x[100:150] = float("nan")
    weight[1] = float("nan")
    for given in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2)):
        y = OPS.grouped_mm_sm90(x, given, offsets)
        for rows in (slice(0, 100), slice(150, 280)):
            assert relative_error(y[rows], expected[rows]) < 1e-2
        assert y[100:150].isnan().all()


@pytest.mark.parametrize("sentinels", [False, True])
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_error_is_at_most_twice_that_of_torch(shape, kind, dtype, sentinels):
    arguments = sample(shape, kind, dtype, sentinels)
    assert_taken(arguments, True)
    grad = torch.randn(arguments["x"].shape, device=DEVICE)
    actual = run(arguments, grad)
    exact = {
        name: value.detach().double().requires_grad_() if name in NAMES else value
        for name, value in arguments.items()
    }
    with use_backend("reference"):
        baseline, expected = run(arguments, grad), run(exact, grad)
    tokens, width, expert_width, experts, _ = SHAPES[shape]
    depth = max(tokens, width, 2 * expert_width)
    for name, *values in zip(("y", *NAMES), actual, baseline, expected, strict=True):
        ours, torchs = (relative_error(value, values[2]) for value in values[:2])
        assert ours <= error_limit(torchs, dtype, depth), name
    if sentinels:
        assert not actual[0][0].any()
        assert not actual[4][arguments["ids"] == experts].any()


@pytest.mark.parametrize("tokens", [1, 4, 33, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_is_close_to_float64(tokens, dtype):
    """Few rows and many: both kernels behind one call."""
    arguments = {name: value.detach() for name, value in sample(dtype=dtype).items()}
    for name in ("x", "ids", "scores"):
        arguments[name] = arguments[name][:tokens].contiguous()
    assert_taken(arguments, False)
    y = moe_mlp(**arguments)
    with use_backend("reference"):
        expected = moe_mlp(
            **{name: one.double() if name in NAMES else one for name, one in arguments.items()}
        )
    assert_close(y, expected, dtype)
    assert torch.equal(moe_mlp(**arguments | {"ids": arguments["ids"].long()}), y)


@pytest.mark.parametrize("needs", [("x",), ("gate_up_proj",), ("down_proj",), ("scores",)])
def test_single_gradients_are_those_of_all(needs):
    arguments = sample("odd")
    grad = torch.randn(arguments["x"].shape, device=DEVICE)
    expected = dict(zip(("y", *NAMES), run(arguments, grad), strict=True))
    some = {
        name: value.detach().requires_grad_(name in needs) if name in NAMES else value
        for name, value in arguments.items()
    }
    y = moe_mlp(**some)
    (actual,) = torch.autograd.grad(y, [some[name] for name in needs], grad.to(y.dtype))
    assert torch.equal(actual, expected[needs[0]])


@pytest.mark.parametrize("shape", ["fine", "coarse", "odd"])
def test_twenty_runs_are_bit_identical(shape):
    arguments = sample(shape, "zipf")
    grad = torch.randn(arguments["x"].shape, device=DEVICE)
    first = run(arguments, grad)
    for _ in range(19):
        for a, b in zip(run(arguments, grad), first, strict=True):
            assert torch.equal(a, b)


def test_graph_replays_with_other_tokens_and_routing():
    arguments = sample()
    grad = torch.randn(arguments["x"].shape, device=DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(arguments, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(arguments, grad)
    for kind in ("zipf", "one_hot", "empty_experts"):
        with torch.no_grad():
            arguments["x"].normal_()
            arguments["ids"].copy_(sample_routing(kind, 1000, 4, 32, device=DEVICE)[0])
        graph.replay()
        for a, b in zip(captured, run(arguments, grad), strict=True):
            assert torch.equal(a, b)


def test_nothing_waits_for_the_gpu():
    arguments = sample()
    grad = torch.randn(arguments["x"].shape, device=DEVICE)
    run(arguments, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(arguments, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_refused_runs_in_triton():
    arguments = sample(dtype=torch.float32)
    biases = {
        "gate_up_bias": torch.randn(32, 512, device=DEVICE),
        "down_bias": torch.randn(32, 512, device=DEVICE),
    }
    y = moe_mlp(**arguments, **biases)
    with use_backend("triton"):
        assert relative_error(y, moe_mlp(**arguments, **biases).double()) < 1e-5


def test_compiled_with_changing_token_counts():
    arguments = sample()
    weights = {name: arguments[name].detach() for name in NAMES[1:3]}
    layer = torch.compile(
        lambda x, ids, scores: moe_mlp(x, ids=ids, scores=scores, **weights), fullgraph=True
    )
    for count in (1000, 999, 17, 2):
        x, ids, scores = (arguments[name].detach()[:count] for name in ("x", "ids", "scores"))
        assert torch.equal(layer(x, ids, scores), moe_mlp(x, ids=ids, scores=scores, **weights))
