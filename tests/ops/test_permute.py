import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unimoe_kernels
from unimoe_kernels import expert_sort, permute, use_backend
from unimoe_kernels.ops.permute import reference
from unimoe_kernels.testing import ROUTINGS, assert_close_to_float64, sample_routing

OP = "permute"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def permute_by_hand(x, sort, top_k):
    """The definition, row by row."""
    out = torch.zeros(len(sort.row_order), x.shape[1], dtype=x.dtype)
    for i in range(sort.expert_offsets[-1]):
        out[i] = x[sort.row_order[i] // top_k].cpu()
    return out


def routed(num_tokens=7, top_k=2, num_experts=4, kind="uniform", held=None, device="cpu"):
    ids, scores = sample_routing(kind, num_tokens, top_k, num_experts, device=device)
    return expert_sort(ids, held or num_experts), scores


def test_permute_example(backend):
    sort = expert_sort(torch.tensor([[0, 2], [2, 1], [0, 1]], device=backend.device), 3)
    x = torch.tensor([[1.0], [2.0], [3.0]], device=backend.device)
    assert permute(x, sort, 2).flatten().tolist() == [1, 3, 2, 3, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permute_matches_definition(backend, dtype):
    # Expert 3 belongs to another rank: its rows are zeros at the end.
    sort, _ = routed(held=3, device=backend.device)
    x = torch.randn(7, 40, device=backend.device).to(dtype)
    out = permute(x, sort, 2)
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert torch.equal(out.cpu(), permute_by_hand(x, sort, 2))


def test_permute_takes_any_layout(backend, layout):
    sort, _ = routed(device=backend.device)
    x = torch.randn(7, 40, device=backend.device, requires_grad=True)
    out = permute(layout(x), sort, 2)
    assert torch.equal(out, permute(x, sort, 2))
    # A sum gives a gradient with strides 0.
    out.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_permute_gradient_matches_float64(backend, dtype):
    if backend.interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not round to bfloat16")
    sort, _ = routed(top_k=3, held=3, device=backend.device)
    x = torch.randn(7, 40, device=backend.device, dtype=dtype, requires_grad=True)
    grad = torch.randn(21, 40, device=backend.device, dtype=dtype)
    (actual,) = torch.autograd.grad(permute(x, sort, 3), x, grad)
    with use_backend("reference"):
        (baseline,) = torch.autograd.grad(permute(x, sort, 3), x, grad)
    x64 = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(
        reference.permute(x64, sort.inverse_order, sort.expert_offsets, 3), x64, grad.double()
    )
    assert_close_to_float64(actual, expected[0], baseline, "grad of x")


def test_permute_gradcheck(backend):
    sort, _ = routed(num_tokens=4, held=3, device=backend.device)
    x = torch.randn(4, 3, dtype=torch.float64, device=backend.device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, sort, 2), x)
    assert torch.autograd.gradgradcheck(lambda x: permute(x, sort, 2), x)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_permute_opcheck(overload, requires_grad):
    op = getattr(torch.ops.unimoe.permute, overload)
    for num_tokens in (0, 5):
        sort, _ = routed(num_tokens=num_tokens, held=3)
        x = torch.randn(num_tokens, 6, requires_grad=requires_grad)
        torch.library.opcheck(op, (x, sort.inverse_order, sort.expert_offsets, 2))


def test_permute_opcheck_layouts(layout):
    sort, _ = routed()
    x = layout(torch.randn(7, 6)).requires_grad_()
    op = torch.ops.unimoe.permute.reference
    torch.library.opcheck(op, (x, sort.inverse_order, sort.expert_offsets, 2))


@settings(max_examples=15)
@given(
    num_tokens=st.integers(0, 65),
    width=st.sampled_from([1, 3, 16, 33]),
    num_experts=st.integers(1, 6),
    kind=st.sampled_from(ROUTINGS),
    data=st.data(),
)
def test_permute_any_shape(num_tokens, width, num_experts, kind, data):
    top_k = data.draw(st.integers(1, num_experts))
    sort, _ = routed(num_tokens, top_k, num_experts, kind, data.draw(st.integers(1, num_experts)))
    x = torch.randn(width, num_tokens).t()
    for name in unimoe_kernels.available_backends(OP, "cpu"):
        with use_backend(name):
            assert torch.equal(permute(x, sort, top_k), permute_by_hand(x, sort, top_k)), name


def test_permute_reads_no_row_of_another_rank(backend):
    sort = expert_sort(torch.tensor([[0], [9]], device=backend.device), 1)
    x = torch.tensor([[1.0], [float("nan")]], device=backend.device)
    assert permute(x, sort, 1).flatten().tolist() == [1, 0]


@pytest.mark.parametrize("width", [0, 1, 1025])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_permute_edge(backend, num_tokens, width):
    sort, _ = routed(num_tokens, top_k=1, num_experts=1, device=backend.device)
    x = torch.randn(num_tokens, width, device=backend.device)
    assert torch.equal(permute(x, sort, 1), x)


def test_permute_rejects_bad_arguments():
    sort, _ = routed()
    x = torch.randn(7, 6)
    with pytest.raises(ValueError, match=r"x \(shape \(7,\)\) must have shape \[T, D\]"):
        permute(x[:, 0], sort, 2)
    with pytest.raises(TypeError, match=r"x \(torch.int64\) must have dtype float32"):
        permute(x.long(), sort, 2)
    with pytest.raises(ValueError, match=r"top_k \(0\) must be at least 1"):
        permute(x, sort, 0)
    with pytest.raises(
        ValueError, match=r"sort.inverse_order \(shape \(14,\)\) must have size 21 in dimension 0"
    ):
        permute(x, sort, 3)
    with pytest.raises(ValueError, match=r"sort \(on cpu\) must be on the device of x \(meta\)"):
        permute(x.to("meta"), sort, 2)
