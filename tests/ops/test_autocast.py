"""Operators under `torch.autocast`: those that multiply follow it as torch's matmuls do."""

import pytest
import torch

from unimoe_kernels import (
    available_backends,
    expert_sort,
    grouped_lora,
    grouped_mm,
    moe_mlp,
    swiglu,
    use_backend,
)
from unimoe_kernels.testing import relative_error, sample_routing

T, D, F, E, K, R = 5, 8, 6, 3, 2, 2
IDS, SCORES = sample_routing("uniform", T, K, E)
OFFSETS = expert_sort(IDS, E).expert_offsets


def experts(x, gate_up, down, gate_up_bias, down_bias):
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    return moe_mlp(x, gate_up, down, IDS, SCORES, **biases)


CASES = {
    "grouped_mm": (
        lambda x, weight, bias: grouped_mm(x, weight, OFFSETS, bias),
        ((T * K, D), (E, F, D), (E, F)),
    ),
    "grouped_lora": (
        lambda x, lora_A, lora_B: grouped_lora(x, lora_A, lora_B, OFFSETS),
        ((T * K, D), (E, R, D), (E, F, R)),
    ),
    "moe_mlp": (experts, ((T, D), (E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D))),
}


def runs():
    return [(op, name) for op in CASES for name in available_backends(op, "cpu")]


def inputs(shapes, x_dtype):
    first, *others = (torch.randn(shape) for shape in shapes)
    return [value.requires_grad_() for value in (first.to(x_dtype), *others)]


@pytest.mark.parametrize(("op", "name"), runs())
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_run_in_the_dtype_of_autocast(op, name, x_dtype):
    function, shapes = CASES[op]
    given = inputs(shapes, x_dtype)
    with use_backend(name), torch.autocast("cpu", torch.bfloat16):
        y = function(*given)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), given)
    exact = [value.detach().double().requires_grad_() for value in given]
    expected = function(*exact)
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)
    assert relative_error(y, expected) < 3e-2
    for value, grad, other in zip(given, grads, expected_grads, strict=True):
        assert grad.dtype == value.dtype
        assert relative_error(grad, other) < 6e-2


@pytest.mark.parametrize("op", CASES)
def test_float64_is_left_alone_and_not_mixed(op):
    function, shapes = CASES[op]
    given = [value.detach().double() for value in inputs(shapes, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*given).dtype == torch.float64
        given[1] = given[1].float()
        with pytest.raises(TypeError, match="must have the dtype of x"):
            function(*given)


def test_what_does_not_multiply_keeps_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert swiglu(torch.randn(2, 4)).dtype == torch.float32


@pytest.mark.parametrize("op", CASES)
def test_transforms_follow_autocast_too(op):
    function, shapes = CASES[op]
    given = tuple(value.detach() for value in inputs(shapes, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        expected, (actual, _) = function(*given), torch.func.jvp(function, given, given)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected.double()) < 3e-2


@pytest.mark.parametrize("op", CASES)
def test_compiled_operators_follow_autocast(op):
    function, shapes = CASES[op]
    given = tuple(value.detach() for value in inputs(shapes, torch.float32))
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(*given).equal(function(*given))
    torch._dynamo.reset()
