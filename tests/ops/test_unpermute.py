import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_kernels import available_backends, expert_sort, unpermute, use_backend
from unimoe_kernels.testing import ROUTINGS, assert_close_to_float64, sample_routing

OP = "unpermute"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def unpermute_by_hand(rows, sort, scores, top_k):
    """The definition in float64, differentiable, one row at a time."""
    rows, scores = rows.double(), None if scores is None else scores.double()
    tokens = []
    for t in range(len(sort.inverse_order) // top_k):
        total = rows.new_zeros(rows.shape[1])
        for k in range(top_k):
            position = sort.inverse_order[t * top_k + k].item()
            if position < sort.expert_offsets[-1]:
                total = total + (1 if scores is None else scores[t, k]) * rows[position]
        tokens.append(total)
    return torch.stack(tokens) if tokens else rows.new_zeros(0, rows.shape[1])


def sample(num_tokens=7, top_k=2, num_experts=4, held=None, width=40, kind="uniform", **options):
    ids, scores = sample_routing(kind, num_tokens, top_k, num_experts)
    sort = expert_sort(ids, held or num_experts)
    rows = torch.randn(num_tokens * top_k, width).to(**options)
    device = rows.device
    return rows, type(sort)(*(part.to(device) for part in sort)), scores.to(device)


def test_unpermute_example(backend):
    sort = expert_sort(torch.tensor([[0, 2], [2, 1], [0, 1]], device=backend.device), 3)
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]], device=backend.device)
    assert unpermute(rows, sort, 2).flatten().tolist() == [1 + 16, 32 + 4, 2 + 8]
    scores = torch.tensor([[0.5, 0.25], [1.0, 0.0], [2.0, 3.0]], device=backend.device)
    assert unpermute(rows, sort, 2, scores).flatten().tolist() == [4.5, 32, 28]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_matches_float64(backend, dtype, weighted):
    if backend.interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not round to bfloat16")
    rows, sort, scores = sample(held=3, dtype=dtype, device=backend.device)
    scores = scores if weighted else None
    actual = unpermute(rows, sort, 2, scores)
    with use_backend("reference"):
        baseline = unpermute(rows, sort, 2, scores)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert_close_to_float64(actual, unpermute_by_hand(rows, sort, scores, 2), baseline)


def test_unpermute_takes_any_layout(backend, layout):
    rows, sort, scores = sample(held=3, device=backend.device)
    actual = unpermute(layout(rows), sort, 2, layout(scores))
    assert torch.equal(actual, unpermute(rows, sort, 2, scores))
    rows.requires_grad_()
    # A sum gives a gradient with strides 0.
    unpermute(layout(rows), sort, 2, scores).sum().backward()
    expected = scores.flatten()[sort.row_order.long()]
    expected[sort.expert_offsets[-1] :] = 0
    torch.testing.assert_close(rows.grad, expected[:, None].expand(14, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_gradients_match_float64(backend, dtype, weighted):
    if backend.interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not round to bfloat16")
    rows, sort, scores = sample(top_k=3, held=3, dtype=dtype, device=backend.device)
    inputs = [rows.requires_grad_()] + ([scores.requires_grad_()] if weighted else [])
    scores = scores if weighted else None
    grad = torch.randn(7, 40, device=backend.device).to(dtype)
    actual = torch.autograd.grad(unpermute(rows, sort, 3, scores), inputs, grad)
    with use_backend("reference"):
        baseline = torch.autograd.grad(unpermute(rows, sort, 3, scores), inputs, grad)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    y = unpermute_by_hand(exact[0], sort, exact[1] if weighted else None, 3)
    expected = torch.autograd.grad(y, exact, grad.double())
    for name, *grads in zip(("rows", "scores"), actual, expected, baseline, strict=False):
        assert_close_to_float64(*grads, f"grad of {name}")


def test_unpermute_gradcheck(backend):
    rows, sort, scores = sample(
        num_tokens=4, held=3, width=3, dtype=torch.float64, device=backend.device
    )
    rows, scores = rows.requires_grad_(), scores.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda r, s: unpermute(r, sort, 2, s), (rows, scores))
    assert torch.autograd.gradcheck(lambda r: unpermute(r, sort, 2), rows)
    frozen = rows.detach()
    assert torch.autograd.gradcheck(lambda s: unpermute(frozen, sort, 2, s), scores)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_unpermute_opcheck(overload, requires_grad):
    op = getattr(torch.ops.unimoe.unpermute, overload)
    backward = getattr(torch.ops.unimoe.unpermute_backward, overload)
    for num_tokens in (0, 5):
        rows, sort, scores = sample(num_tokens=num_tokens, held=3, width=6)
        grad = torch.randn(num_tokens, 6)
        orders = (sort.inverse_order, sort.expert_offsets)
        torch.library.opcheck(backward, (grad, rows, *orders, scores, 2))
        rows.requires_grad_(requires_grad)
        torch.library.opcheck(op, (rows, *orders, None, 2))
        torch.library.opcheck(op, (rows, *orders, scores.requires_grad_(requires_grad), 2))


def test_unpermute_opcheck_layouts(layout):
    rows, sort, scores = sample(width=6)
    rows, scores = layout(rows).requires_grad_(), layout(scores).requires_grad_()
    op = torch.ops.unimoe.unpermute.reference
    torch.library.opcheck(op, (rows, sort.inverse_order, sort.expert_offsets, scores, 2))


@settings(max_examples=12)
@given(
    num_tokens=st.integers(0, 33),
    width=st.sampled_from([1, 3, 16, 33]),
    num_experts=st.integers(1, 6),
    kind=st.sampled_from(ROUTINGS),
    weighted=st.booleans(),
    data=st.data(),
)
def test_unpermute_any_shape(num_tokens, width, num_experts, kind, weighted, data):
    top_k = data.draw(st.integers(1, num_experts))
    held = data.draw(st.integers(1, num_experts))
    rows, sort, scores = sample(num_tokens, top_k, num_experts, held, width, kind)
    scores = scores if weighted else None
    expected = unpermute_by_hand(rows, sort, scores, top_k)
    for name in available_backends(OP, "cpu"):
        with use_backend(name):
            actual = unpermute(rows, sort, top_k, scores)
        if sort.expert_offsets[-1]:
            assert_close_to_float64(actual, expected, name=name)
        else:
            assert not actual.any()


def test_unpermute_sentinel_rows_are_never_read(backend):
    sort = expert_sort(torch.tensor([[0, 9], [9, 8]], device=backend.device), 1)
    nan = float("nan")
    rows = torch.tensor([[3.0], [nan], [nan], [nan]], device=backend.device, requires_grad=True)
    scores = torch.tensor([[2.0, nan], [nan, nan]], device=backend.device, requires_grad=True)
    y = unpermute(rows, sort, 2, scores)
    assert y.flatten().tolist() == [6, 0]
    y.sum().backward()
    assert rows.grad.flatten().tolist() == [2, 0, 0, 0]
    assert scores.grad.tolist() == [[3, 0], [0, 0]]


@pytest.mark.parametrize("width", [0, 1, 1025])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_unpermute_edge(backend, num_tokens, width):
    rows, sort, _ = sample(num_tokens, 1, 1, width=width, device=backend.device)
    rows.requires_grad_()
    y = unpermute(rows, sort, 1)
    assert torch.equal(y, rows)
    scores = torch.full((num_tokens, 1), 2.0, device=backend.device, requires_grad=True)
    unpermute(rows, sort, 1, scores).sum().backward()
    assert torch.equal(rows.grad, torch.full_like(rows, 2))
    assert torch.allclose(scores.grad, rows.sum(1, keepdim=True), atol=1e-4)


def test_unpermute_without_scores_keeps_no_rows():
    rows, sort, _ = sample()
    rows.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        unpermute(rows, sort, 2)
    assert sum(t.nbytes for t in kept) == sort.inverse_order.nbytes + sort.expert_offsets.nbytes


def test_unpermute_is_deterministic(backend):
    rows, sort, scores = sample(top_k=3, device=backend.device)
    assert torch.equal(unpermute(rows, sort, 3, scores), unpermute(rows, sort, 3, scores))


def test_unpermute_rejects_bad_arguments():
    rows, sort, scores = sample()
    with pytest.raises(ValueError, match=r"rows \(shape \(14,\)\) must have shape \[N, D\]"):
        unpermute(rows[:, 0], sort, 2)
    with pytest.raises(ValueError, match=r"rows \(shape \(13, 40\)\) must have size 14"):
        unpermute(rows[1:], sort, 2)
    with pytest.raises(ValueError, match=r"top_k \(3\) must divide the number of rows \(14\)"):
        unpermute(rows, sort, 3)
    with pytest.raises(ValueError, match=r"scores \(shape \(7, 1\)\) must have size 2"):
        unpermute(rows, sort, 2, scores[:, :1])
    with pytest.raises(ValueError, match=r"scores \(shape \(6, 2\)\) must have size 7"):
        unpermute(rows, sort, 2, scores[1:])
    with pytest.raises(TypeError, match=r"scores \(torch.int64\) must have dtype float32"):
        unpermute(rows, sort, 2, scores.long())
    with pytest.raises(ValueError, match=r"scores \(on meta\) must be on the device of rows"):
        unpermute(rows, sort, 2, scores.to("meta"))
