"""Operators under `torch.autocast`: those that multiply follow it as torch's matmuls do."""

import cases
import pytest
import torch

from unimoe_kernels import available_backends, use_backend
from unimoe_kernels.testing import relative_error, sample_routing

SIZES = cases.Sizes(T=5, D=8, F=6, E=3, K=2, R=2)
IDS, _ = sample_routing("uniform", SIZES.T, SIZES.K, SIZES.E)


def follows(op):
    return getattr(cases.of(op), "FOLLOWS_AUTOCAST", False)


def calls(following):
    """Every call of the operators that follow autocast, or that do not."""
    return [
        pytest.param(op, case, id=f"{op}-{case.name}")
        for op in cases.operators()
        for case in cases.cases(op)
        if follows(op) == following
    ]


def runs():
    for param in calls(True):
        for name in available_backends(param.values[0], "cpu"):
            yield pytest.param(param.values[1], name, id=f"{param.id}-{name}")


def function_of(case):
    return lambda *inputs: case.function(IDS, SIZES.E, *inputs)


def inputs(case, x_dtype=torch.float32):
    first, *others = (torch.randn(shape) for shape in case.shapes(SIZES))
    return [value.requires_grad_() for value in (first.to(x_dtype), *others)]


@pytest.mark.parametrize(("case", "name"), list(runs()))
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_run_in_the_dtype_of_autocast(case, name, x_dtype):
    function, given = function_of(case), inputs(case, x_dtype)
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


@pytest.mark.parametrize(("op", "case"), calls(True))
def test_float64_is_left_alone_and_not_mixed(op, case):
    function = function_of(case)
    given = [value.detach().double() for value in inputs(case)]
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*given).dtype == torch.float64
        given[1] = given[1].float()
        with pytest.raises(TypeError, match="must have the dtype of x"):
            function(*given)


@pytest.mark.parametrize(("op", "case"), calls(False))
def test_what_does_not_multiply_keeps_its_dtype(op, case):
    function, given = function_of(case), inputs(case) if case.shapes(SIZES) else []
    with torch.autocast("cpu", torch.bfloat16):
        result = function(*given)
    results = result if isinstance(result, tuple) else (result,)
    assert {value.dtype for value in results} <= {torch.float32, torch.int32}


@pytest.mark.parametrize(("op", "case"), calls(True))
def test_transforms_follow_autocast_too(op, case):
    function = function_of(case)
    given = tuple(value.detach() for value in inputs(case))
    with torch.autocast("cpu", torch.bfloat16):
        expected, (actual, _) = function(*given), torch.func.jvp(function, given, given)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected.double()) < 3e-2


@pytest.mark.parametrize(("op", "case"), calls(True))
def test_compiled_operators_follow_autocast(op, case):
    function = function_of(case)
    given = tuple(value.detach() for value in inputs(case))
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(*given).equal(function(*given))
    torch._dynamo.reset()
