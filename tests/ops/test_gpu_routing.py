"""What only a GPU can show of the kernels around the matmuls: many blocks at once, real sizes."""

import pytest
import torch

from unimoe_kernels import expert_sort, permute, topk_router, unpermute, use_backend
from unimoe_kernels.testing import assert_close_to_float64, sample_routing

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LOSSES = ("load_balancing_loss", "router_z_loss")


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def gpu_backend(request):
    try:
        context = use_backend(request.param)
        context.__enter__()
    except RuntimeError as problem:
        pytest.skip(str(problem))
    yield request.param
    context.__exit__(None, None, None)


def route(logits, top_k, **options):
    """Returns the routing, and the gradient of its losses and of weighted scores."""
    out = topk_router(logits, top_k, **options)
    generator = torch.Generator(DEVICE).manual_seed(3)
    weight = torch.randn(out.scores.shape, generator=generator, device=DEVICE)
    loss = (out.scores * weight).sum()
    loss = loss + out.load_balancing_loss + out.router_z_loss
    return out, *torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("mode", ["topk_softmax", "softmax_topk", "sigmoid_renorm"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "groups"),
    [
        *((16, 128, 8, (1, 1)), (32_768, 128, 8, (1, 1)), (8192, 256, 8, (8, 4))),
        *((32_768, 4, 2, (1, 1)), (5000, 384, 8, (1, 1)), (2000, 513, 6, (1, 1))),
        *((3000, 128, 50, (64, 40)), (1000, 2000, 4, (1, 1))),
    ],
)
def test_router_at_real_sizes(num_tokens, num_experts, top_k, groups, mode):
    # Apart from each other by more than rounding.
    value_E = torch.arange(num_experts, device=DEVICE) * (8 / num_experts) - 4
    order_TE = torch.rand(num_tokens, num_experts, device=DEVICE).argsort(1)
    logits = value_E[order_TE].requires_grad_()
    mask = torch.rand(num_tokens, device=DEVICE) < 0.8
    options = {"mode": mode, "token_mask": mask, "scale": 2.5}
    options |= {"num_groups": groups[0], "top_groups": groups[1]}
    out, grad = route(logits, top_k, **options)
    with use_backend("reference"):
        expected, expected_grad = route(logits.detach().double().requires_grad_(), top_k, **options)
    assert torch.equal(out.ids, expected.ids)
    assert torch.equal(out.tokens_per_expert, expected.tokens_per_expert)
    for name in ("scores", *LOSSES):
        assert_close_to_float64(getattr(out, name), getattr(expected, name), name=name)
    assert_close_to_float64(grad, expected_grad, name="grad of logits")
    for _ in range(19):
        again, grad_again = route(logits, top_k, **options)
        assert all(torch.equal(a, b) for a, b in zip(again, out, strict=True))
        assert torch.equal(grad_again, grad)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "zipf", "one expert"])
@pytest.mark.parametrize(
    ("num_rows", "num_experts"),
    [
        *((8, 128), (8192, 128), (8200, 128), (262_144, 128), (262_143, 4), (262_144, 1000)),
        *((3_000_001, 64), (100_000, 12_000)),
    ],
)
def test_sort_at_real_sizes(num_rows, num_experts, kind, dtype):
    generator = torch.Generator(DEVICE).manual_seed(7)
    share = torch.rand(num_rows, generator=generator, device=DEVICE)
    share = {"uniform": share, "zipf": share**6, "one expert": 0 * share}[kind]
    # A tenth of the experts belongs to another rank.
    held = max(1, num_experts * 9 // 10)
    ids = (share * num_experts).to(dtype)
    first = expert_sort(ids, held)
    buckets, order = ids.clamp(max=held).sort(stable=True)
    assert torch.equal(first.row_order, order.int())
    inverse = torch.empty_like(first.inverse_order)
    inverse[order] = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    assert torch.equal(first.inverse_order, inverse)
    counts = buckets.bincount(minlength=held + 1)[:held]
    assert torch.equal(first.tokens_per_expert, counts.int())
    assert first.expert_offsets[0] == 0
    assert torch.equal(first.expert_offsets[1:], counts.cumsum(0).int())
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(expert_sort(ids, held), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "width", "top_k"),
    [(1, 8192, 8), (7, 33, 3), (5000, 1, 1), (5000, 200, 13), (4096, 2048, 8), (3000, 14_337, 2)],
)
def test_rows_are_copied_and_summed_at_real_sizes(num_tokens, width, top_k, dtype):
    ids, _ = sample_routing("uniform", num_tokens, top_k, 16, device=DEVICE)
    sort = expert_sort(ids, 13)  # three experts belong to another rank
    x = torch.randn(num_tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    rows = permute(x, sort, top_k)
    routed = int(sort.expert_offsets[-1])
    assert torch.equal(rows[:routed], x[sort.row_order[:routed].long() // top_k])
    assert not rows[routed:].any()
    y = unpermute(rows, sort, top_k)
    # Every row is the token: its gradient counts the choices that are held here.
    (grad,) = torch.autograd.grad(rows, x, torch.ones_like(rows))
    held = (ids < 13).sum(1, keepdim=True)
    assert torch.equal(grad, held.to(dtype).expand_as(grad))
    assert_close_to_float64(y, held * x.detach().double())


def test_graph_replays_with_other_routing():
    logits = torch.randn(4096, 128, device=DEVICE)
    x = torch.randn(4096, 256, device=DEVICE).bfloat16()

    def step():
        out = topk_router(logits, 8)
        sort = expert_sort(out.ids, 100)
        return *out, *sort, permute(x, sort, 8)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        logits.normal_()
        x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
