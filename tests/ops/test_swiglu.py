import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_kernels import available_backends, swiglu, use_backend
from unimoe_kernels.ops.swiglu.op import ACTIVATIONS
from unimoe_kernels.testing import assert_close_to_float64

OP = "swiglu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def swiglu_by_hand(gate_up, activation, limit=7.0, alpha=1.702):
    """The formulas in float64."""
    gate, up = gate_up.double().chunk(2, 1)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        return gate / (1 + torch.exp(-alpha * gate)) * up
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return gate * 0.5 * (1 + torch.tanh(inner)) * up
    return gate.relu() * up


def test_swiglu_example(backend):
    gate_up = torch.tensor([[1.0, -1.0, 3.0, 5.0]], device=backend.device)
    assert swiglu(gate_up, "relu").tolist() == [[3, 0]]
    # sigmoid(0) is a half, and the up half is clamped to 2 before 1 is added.
    clamped = torch.tensor([[3.0, 9.0]], device=backend.device)
    assert swiglu(clamped, "swiglu_clamped", limit=2.0, alpha=0.0).tolist() == [[0.5 * 2 * 3]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_matches_float64(backend, activation, dtype):
    gate_up = torch.randn(9, 26, device=backend.device).to(dtype)
    options = {"limit": 1.0} if activation == "swiglu_clamped" else {}
    given = gate_up.clone().requires_grad_()
    grad = torch.randn(9, 13, device=backend.device).to(dtype)

    def run():
        y = swiglu(given, activation, **options)
        return y, *torch.autograd.grad(y, given, grad)

    actual = run()
    with use_backend("reference"):
        baseline = run()
    exact = gate_up.double().requires_grad_()
    y = swiglu_by_hand(exact, activation, **options)
    expected = y, *torch.autograd.grad(y, exact, grad.double())
    assert actual[0].dtype == dtype
    assert actual[0].is_contiguous()
    for name, *values in zip(("y", "grad"), actual, expected, baseline, strict=True):
        assert_close_to_float64(*values, name)


def test_swiglu_takes_any_layout(backend, layout):
    gate_up = torch.randn(9, 26, device=backend.device, requires_grad=True)
    y = swiglu(layout(gate_up))
    assert torch.equal(y, swiglu(gate_up))
    # A sum gives a gradient with strides 0.
    (actual,) = torch.autograd.grad(y.sum(), gate_up)
    (expected,) = torch.autograd.grad(swiglu(gate_up), gate_up, torch.ones_like(y))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_swiglu_gradcheck(backend, activation):
    gate_up = 3 * torch.randn(9, 6, dtype=torch.float64, device=backend.device)
    # Both sides of every clamp are hit.
    assert (gate_up > 0.7).any(0).all()
    assert (gate_up < -0.7).any(0).all()
    gate_up.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: swiglu(x, activation, limit=0.7), gate_up)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_swiglu_opcheck(overload, requires_grad):
    activation = "swiglu_clamped" if requires_grad else "silu"
    op = getattr(torch.ops.unimoe.swiglu, overload)
    gate_up = torch.randn(5, 6, requires_grad=requires_grad)
    torch.library.opcheck(op, (gate_up, activation, 7.0, 1.702))
    backward = getattr(torch.ops.unimoe.swiglu_backward, overload)
    grad = torch.randn(5, 3)
    torch.library.opcheck(backward, (grad, gate_up.detach(), activation, 7.0, 1.702))


def test_swiglu_opcheck_layouts(layout):
    op = torch.ops.unimoe.swiglu.reference
    torch.library.opcheck(op, (layout(torch.randn(5, 6)).requires_grad_(), "silu", 7.0, 1.702))


@settings(max_examples=30)
@given(rows=st.integers(1, 65), width=st.integers(1, 40), activation=st.sampled_from(ACTIVATIONS))
def test_swiglu_any_shape(rows, width, activation):
    gate_up = torch.randn(2 * width, rows).t().abs()
    for name in available_backends(OP, "cpu"):
        with use_backend(name):
            actual = swiglu(gate_up, activation)
        assert_close_to_float64(actual, swiglu_by_hand(gate_up, activation), name=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_swiglu_edge(backend, activation):
    empty = torch.randn(0, 6, device=backend.device, requires_grad=True)
    y = swiglu(empty, activation)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert empty.grad.shape == (0, 6)
    # Large values neither overflow on the way nor give NaN gradients.
    large = torch.tensor([[-1e4, 1e4, 1.0, 1.0]], device=backend.device, requires_grad=True)
    y = swiglu(large, activation)
    y.sum().backward()
    assert y.isfinite().all()
    assert large.grad.isfinite().all()
    assert swiglu(torch.zeros(2, 4, device=backend.device), activation).any().item() is False


def special_pairs(dtype, device):
    """One row with every pair of a gate and an up out of NaN, infinities and plain numbers."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -1.0, 0.0])
    gate, up = torch.cartesian_prod(values, values).t()
    return torch.cat((gate, up))[None].to(device, dtype).requires_grad_()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_keeps_nan_and_infinity(backend, activation, dtype):
    def run(function, gate_up):
        y = function(gate_up, activation)
        (grad,) = torch.autograd.grad(y, gate_up, torch.ones_like(y))
        return y.detach(), *grad.chunk(2, 1)

    actual = run(swiglu, special_pairs(dtype, backend.device))
    expected = run(swiglu_by_hand, special_pairs(torch.float64, backend.device))
    gate, up = special_pairs(dtype, backend.device).detach().chunk(2, 1)
    assert actual[0][gate.isnan() | up.isnan()].isnan().all()
    for ours, exact in zip(actual, expected, strict=True):
        # Where 0 meets infinity on the way either may come out, but never a number.
        assert ours.isfinite().equal(exact.isfinite())
        numbers = exact.isfinite()
        torch.testing.assert_close(ours[numbers].double(), exact[numbers], rtol=1e-2, atol=1e-2)
        if activation == "relu":
            torch.testing.assert_close(ours.double(), exact, equal_nan=True)


def test_swiglu_rejects_bad_arguments():
    gate_up = torch.randn(3, 6)
    with pytest.raises(ValueError, match=r"gate_up \(shape \(6,\)\) must have shape \[N, 2F\]"):
        swiglu(gate_up[0])
    with pytest.raises(ValueError, match=r"gate_up \(shape \(3, 5\)\) must have an even last size"):
        swiglu(gate_up[:, 1:])
    with pytest.raises(ValueError, match=r"activation \('mish'\) must be one of silu, gelu"):
        swiglu(gate_up, "mish")
    with pytest.raises(TypeError, match=r"gate_up \(torch.int32\) must have dtype float32"):
        swiglu(gate_up.int())
