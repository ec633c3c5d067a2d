"""What only a GPU can show: 16-bit accuracy at real sizes, graphs, streams, large tensors."""

import pytest
import torch
from error_limit import error_limit
from torch.utils.checkpoint import checkpoint

from unimoe_kernels import (
    expert_sort,
    grouped_lora,
    grouped_mm,
    moe_mlp,
    permute,
    swiglu,
    topk_router,
    unpermute,
    use_backend,
)
from unimoe_kernels.testing import ROUTINGS, relative_error, sample_routing

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
NAMES = ("x", "gate_up_proj", "down_proj", "scores")
LARGE = 2**31 + 2**20  # elements, more than an int32 can count
SHAPES = {
    # tokens, width, expert width, experts, top k: few rows, ragged ones, full tiles, odd sizes
    "decode": (4, 1024, 512, 64, 8),
    "fine": (1000, 512, 256, 32, 4),
    "coarse": (2048, 1024, 2816, 4, 2),
    "odd": (333, 200, 300, 5, 3),
}


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def gpu_backend(request):
    try:
        context = use_backend(request.param)
        context.__enter__()
    except RuntimeError as problem:
        pytest.skip(str(problem))
    yield request.param
    context.__exit__(None, None, None)


def sample(shape="fine", kind="uniform", dtype=torch.bfloat16):
    """Arguments of `moe_mlp`; outputs and gradients are of order one."""
    tokens, width, expert_width, experts, top_k = SHAPES[shape]
    ids, scores = sample_routing(kind, tokens, top_k, experts, device=DEVICE)
    floats = {
        "x": torch.randn(tokens, width),
        "gate_up_proj": torch.randn(experts, 2 * expert_width, width) / width**0.5,
        "down_proj": torch.randn(experts, width, expert_width) / expert_width**0.5,
    }
    arguments = {name: value.to(DEVICE, dtype) for name, value in floats.items()}
    arguments["scores"] = scores
    return {name: value.requires_grad_() for name, value in arguments.items()} | {"ids": ids}


def run(arguments, grad):
    """Returns the output and all gradients."""
    y = moe_mlp(**arguments)
    return y, *torch.autograd.grad(y, [arguments[name] for name in NAMES], grad.to(y.dtype))


def sample_lora(shape="fine", kind="uniform", rank=16, dtype=torch.bfloat16, extra=0):
    """Arguments of `grouped_lora`; `extra` rows belong to no expert."""
    tokens, width, expert_width, experts, top_k = SHAPES[shape]
    ids, _ = sample_routing(kind, tokens, top_k, experts, device=DEVICE)
    offsets = expert_sort(ids, experts).expert_offsets
    floats = (
        torch.randn(tokens * top_k + extra, width),
        torch.randn(experts, rank, width) / width**0.5,
        torch.randn(experts, 2 * expert_width, rank) / rank**0.5,
    )
    return [value.to(DEVICE, dtype).requires_grad_() for value in floats], offsets


def run_lora(inputs, offsets):
    """Returns the output and all gradients, for a gradient that is always the same."""
    y = grouped_lora(*inputs, offsets, 0.3)
    generator = torch.Generator(DEVICE).manual_seed(3)
    grad = torch.randn(y.shape, generator=generator, device=DEVICE)
    return y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))


def layer(arguments, logits):
    """A router in front of the experts; returns output, loss and gradients."""
    route = topk_router(logits, arguments["ids"].shape[1], mode="sigmoid_renorm")
    y = moe_mlp(**{**arguments, "ids": route.ids, "scores": route.scores})
    loss = y.float().square().mean() + route.load_balancing_loss + route.router_z_loss
    inputs = [logits, *(arguments[name] for name in NAMES[:3])]
    return y.detach(), loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_torch(shape, kind, dtype):
    arguments = sample(shape, kind, dtype)
    grad = torch.randn(arguments["x"].shape, device=DEVICE)
    actual = run(arguments, grad)
    exact = {
        name: value.detach().double().requires_grad_() if name in NAMES else value
        for name, value in arguments.items()
    }
    with use_backend("reference"):
        baseline, expected = run(arguments, grad), run(exact, grad)
    tokens, width, expert_width, _, _ = SHAPES[shape]
    depth = max(tokens, width, 2 * expert_width)
    for name, *values in zip(("y", *NAMES), actual, baseline, expected, strict=True):
        ours, torchs = (relative_error(value, values[2]) for value in values[:2])
        assert ours <= error_limit(torchs, dtype, depth), name


@pytest.fixture
def lora_backend(gpu_backend):
    if gpu_backend == "cuda":
        pytest.skip("grouped_lora has Triton kernels alone")


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(
    ("shape", "rank"), [("decode", 16), ("fine", 8), ("coarse", 128), ("odd", 5), ("fine", 160)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lora_error_is_at_most_twice_that_of_torch(lora_backend, shape, kind, rank, dtype):
    inputs, offsets = sample_lora(shape, kind, rank, dtype, extra=70)
    actual = run_lora(inputs, offsets)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    with use_backend("reference"):
        baseline, expected = run_lora(inputs, offsets), run_lora(exact, offsets)
    names, y_width = ("y", "x", "lora_A", "lora_B"), inputs[2].shape[1]
    for name, *values in zip(names, actual, baseline, expected, strict=True):
        ours, torchs = (relative_error(value, values[2]) for value in values[:2])
        assert ours <= error_limit(torchs, dtype, max(inputs[0].shape[1], y_width)), name
    assert not actual[0][-70:].any()
    assert not actual[1][-70:].any()


@pytest.mark.parametrize("rank", [16, 64])
def test_lora_of_few_rows_and_long_sums(lora_backend, rank):
    """One to 64 rows of wide experts: columns of y, then sums too, are shared out."""
    width, out, experts = 14336, 4096, 8
    lora_A = (torch.randn(experts, rank, width, device=DEVICE) / width**0.5).bfloat16()
    lora_B = (torch.randn(experts, out, rank, device=DEVICE) / rank**0.5).bfloat16()
    for rows in (1, 2, 17, 64):
        x = torch.randn(rows, width, device=DEVICE).bfloat16()
        offsets = torch.tensor([0, 0, *[rows] * 7], dtype=torch.int32, device=DEVICE)
        expected = 0.3 * (x.double() @ lora_A[1].double().T) @ lora_B[1].double().T
        for weights in ((lora_A, lora_B), [w.mT.contiguous().mT for w in (lora_A, lora_B)]):
            assert relative_error(grouped_lora(x, *weights, offsets, 0.3), expected) < 1e-2


@pytest.mark.parametrize("shape", ["decode", "fine"])
def test_lora_repeats_and_replays_bit_for_bit(lora_backend, shape):
    inputs, offsets = sample_lora(shape, "zipf")
    first = run_lora(inputs, offsets)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run_lora(inputs, offsets), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = grouped_lora(*(value.detach() for value in inputs), offsets, 0.3)
    with torch.no_grad():
        inputs[0].normal_()
        # All rows to the last expert: the number of row tiles changes, the launch does not.
        offsets[:-1] = 0
    graph.replay()
    assert torch.equal(y, grouped_lora(*(value.detach() for value in inputs), offsets, 0.3))


def test_lora_writes_more_elements_than_int32_counts(lora_backend):
    inner, width, rank = 64, 4096, 16
    rows = LARGE // width
    x = torch.randn(rows, inner, device=DEVICE).bfloat16()
    lora_A = (torch.randn(2, rank, inner, device=DEVICE) / 8).bfloat16()
    lora_B = (torch.randn(2, width, rank, device=DEVICE) / 4).bfloat16().requires_grad_()
    offsets = torch.tensor([0, rows // 3, rows], dtype=torch.int32, device=DEVICE)
    y = grouped_lora(x, lora_A, lora_B, offsets)
    low = x[-100:].double() @ lora_A[1].double().t()
    assert relative_error(y[-100:], low @ lora_B[1].double().t()) < 1e-2
    grad = torch.zeros_like(y)
    grad[-100:] = 1
    (grad_B,) = torch.autograd.grad(y, lora_B, grad)
    assert relative_error(grad_B[1], low.sum(0).expand(width, rank)) < 1e-2
    assert not grad_B[0].any()


def test_float32_is_exact_unless_tf32_is_allowed(gpu_backend):
    if gpu_backend == "cuda":
        pytest.skip("float32 matmuls have Triton kernels alone")
    x, weight = torch.randn(256, 512, device=DEVICE), torch.randn(4, 128, 512, device=DEVICE)
    offsets = torch.tensor([0, 100, 100, 180, 256], dtype=torch.int32, device=DEVICE)
    with use_backend("reference"):
        expected = grouped_mm(x.double(), weight.double(), offsets)
    assert relative_error(grouped_mm(x, weight, offsets), expected) < 2e-6
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        error = relative_error(grouped_mm(x, weight, offsets), expected)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert 2e-6 < error < 3e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_descriptors_give_what_pointers_give(gpu_backend, monkeypatch, shape):
    if gpu_backend == "cuda":
        pytest.skip("descriptors are Triton's")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90 or later")
    from unimoe_kernels._triton import tiles
    from unimoe_kernels._triton.planned import forget_plans

    arguments = sample(shape, "zipf")
    grad = torch.randn(arguments["x"].shape, device=DEVICE)
    analytic, results = tiles.analytic, []
    try:
        for wanted in (False, True):

            def forced(*args, wanted=wanted):
                return analytic(*args)._replace(descriptors=wanted)

            monkeypatch.setattr(tiles, "analytic", forced)
            tiles.choose.cache_clear()
            forget_plans()
            results.append(run(arguments, grad))
    finally:
        monkeypatch.undo()
        tiles.choose.cache_clear()
        forget_plans()
    for name, a, b in zip(("y", *NAMES), *results, strict=True):
        assert relative_error(b, a) <= 4 * torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("shape", ["decode", "fine"])
def test_twenty_runs_are_bit_identical(shape):
    arguments = sample(shape, "zipf")
    tokens, experts = arguments["x"].shape[0], arguments["gate_up_proj"].shape[0]
    logits = torch.randn(tokens, experts, device=DEVICE, requires_grad=True)
    first = layer(arguments, logits)
    for _ in range(19):
        for a, b in zip(layer(arguments, logits), first, strict=True):
            assert torch.equal(a, b)


def test_graph_replays_with_other_tokens_and_routing():
    arguments = sample()
    logits = torch.randn(1000, 32, device=DEVICE, requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(arguments, logits)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(arguments, logits)
    for _ in range(3):
        with torch.no_grad():
            arguments["x"].normal_()
            logits.normal_()
        graph.replay()
        for a, b in zip(captured, layer(arguments, logits), strict=True):
            assert torch.equal(a, b)


def test_compiled_with_changing_token_counts():
    arguments = sample()
    weights = {name: arguments[name] for name in NAMES[1:3]}
    compiled = torch.compile(
        lambda x, ids, scores: moe_mlp(x, ids=ids, scores=scores, **weights).square().mean(),
        fullgraph=True,
    )
    for count in (1000, 999, 17, 2):
        part = [arguments[name].detach()[:count] for name in ("x", "ids", "scores")]
        with torch.no_grad():
            expected = moe_mlp(part[0], ids=part[1], scores=part[2], **weights)
        actual = compiled(*part)
        actual.backward()
        assert relative_error(actual, expected.double().square().mean()) < 1e-2
    assert all(weight.grad.isfinite().all() for weight in weights.values())


def test_launches_follow_the_current_stream():
    arguments = sample("coarse")
    grad = torch.randn(arguments["x"].shape, device=DEVICE)
    expected = run(arguments, grad)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Work that is queued on this stream alone must come first.
            torch.cuda._sleep(10_000_000)
            shifted = {**arguments, "x": (arguments["x"].detach() * 1).requires_grad_()}
            results.append(run(shifted, grad))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = sample()
    grad = torch.randn(arguments["x"].shape, device=DEVICE)
    expected = run(arguments, grad)
    moved = {
        name: value.detach().to("cuda:1").requires_grad_(value.requires_grad)
        for name, value in arguments.items()
    }
    assert torch.cuda.current_device() == 0
    for a, b in zip(run(moved, grad.to("cuda:1")), expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_checkpointing_and_two_backwards():
    arguments = sample()
    grad = torch.randn(arguments["x"].shape, device=DEVICE).bfloat16()
    inputs = [arguments[name] for name in NAMES]
    y, *expected = run(arguments, grad)
    again = checkpoint(lambda: moe_mlp(**arguments), use_reentrant=False)
    assert torch.equal(again, y)
    for retain in (True, False):
        grads = torch.autograd.grad(again, inputs, grad, retain_graph=retain)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_nothing_waits_for_the_gpu():
    arguments = sample()
    logits = torch.randn(1000, 32, device=DEVICE, requires_grad=True)
    layer(arguments, logits)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(arguments, logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_elements_than_int32_counts_are_copied_and_activated():
    width = 4096
    tokens = LARGE // width
    x = torch.randn(1, width, device=DEVICE).bfloat16().expand(tokens, width).contiguous()
    x[-1] = 2
    ids = torch.zeros(tokens, 1, dtype=torch.int32, device=DEVICE)
    sort = expert_sort(ids, 1)
    rows = permute(x, sort, 1)
    assert torch.equal(rows[-1], x[-1])
    assert torch.equal(rows[tokens // 2], x[0])
    del x
    y = unpermute(rows, sort, 1, torch.full((tokens, 1), 0.5, device=DEVICE))
    assert torch.equal(y[-1], rows[-1] / 2)
    del y
    activated = swiglu(rows, "relu")
    assert torch.equal(activated[-1], torch.full_like(activated[-1], 4))
    assert torch.equal(activated[0], swiglu(rows[:1], "relu")[0])


def test_more_elements_than_int32_counts_are_multiplied():
    inner, width = 64, 4096
    rows = LARGE // width
    x = torch.randn(rows, inner, device=DEVICE).bfloat16()
    weight = (torch.randn(2, width, inner, device=DEVICE) / 8).bfloat16().requires_grad_()
    offsets = torch.tensor([0, rows // 3, rows], dtype=torch.int32, device=DEVICE)
    y = grouped_mm(x, weight, offsets)
    last = x[-100:].double() @ weight[1].double().t()
    assert relative_error(y[-100:], last) < 1e-2
    grad = torch.zeros_like(y)
    grad[-100:] = 1
    (grad_weight,) = torch.autograd.grad(y, weight, grad)
    expected = x[-100:].double().sum(0).expand(width, inner)
    assert relative_error(grad_weight[1], expected) < 1e-2
    assert not grad_weight[0].any()


def test_fused_layer_keeps_more_elements_than_int32_counts():
    width, expert_width = 64, 2048
    tokens = LARGE // (2 * expert_width)
    ids = torch.arange(tokens, dtype=torch.int32, device=DEVICE).remainder(2).view(-1, 1)
    gate_up = (torch.randn(2, 2 * expert_width, width, device=DEVICE) / 8).bfloat16()
    down = (torch.randn(2, width, expert_width, device=DEVICE) / 45).bfloat16()
    x = torch.randn(tokens, width, device=DEVICE).bfloat16().requires_grad_()
    scores = torch.ones(tokens, 1, device=DEVICE, requires_grad=True)
    y = moe_mlp(x, gate_up, down, ids, scores)
    y.backward(torch.ones_like(y))
    tail = [value.detach()[-64:].double().requires_grad_() for value in (x, scores)]
    with use_backend("reference"):
        expected = moe_mlp(tail[0], gate_up.double(), down.double(), ids[-64:], tail[1])
        expected.backward(torch.ones_like(expected))
    assert relative_error(y[-64:], expected) < 2e-2
    assert relative_error(x.grad[-64:], tail[0].grad) < 2e-2
    assert relative_error(scores.grad[-64:], tail[1].grad) < 2e-2
