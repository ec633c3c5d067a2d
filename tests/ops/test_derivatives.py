"""Every declared operator: derivatives of first and second order, in every mode that torch has.

Nothing here names an operator: they and their calls come from `cases`.
"""

from typing import NamedTuple

import cases
import pytest
import registry
import torch
from torch.autograd import forward_ad

from unimoe_kernels import available_backends, use_backend

SIZES = cases.Sizes(T=3, D=2, F=2, E=3, K=2, R=2)
# One choice is another rank's.
IDS = torch.tensor([[0, 2], [2, SIZES.E], [0, 2]], dtype=torch.int32)
# Backward operators that are differentiated in plain torch, above them, and what has no gradient.
REFUSING = [op for op in registry.declared() if not registry.differentiable(op)]


class Call(NamedTuple):
    """A call of an operator on small inputs of float64."""

    op: str
    case: cases.Case

    def function(self, *inputs):
        return self.case.function(IDS, SIZES.E, *inputs)

    def inputs(self):
        """Draws the inputs."""
        return tuple(torch.randn(shape, dtype=torch.float64) for shape in self.case.shapes(SIZES))


def runs(interpreter=()):
    """Every case with every backend of the CPU; in Triton's interpreter the first one alone.

    Args:
        interpreter: marks of the runs in Triton's interpreter.
    """
    for op in filter(registry.differentiable, cases.operators()):
        for index, case in enumerate(cases.cases(op)):
            for name in available_backends(op, "cpu"):
                if name != "triton" or index == 0:
                    marks = interpreter if name == "triton" else ()
                    own = f"{op}-{case.name}-{name}"
                    yield pytest.param(Call(op, case), name, id=own, marks=marks)


case_and_backend = pytest.mark.parametrize(("case", "name"), list(runs()))


def with_grad(inputs):
    return tuple(value.clone().requires_grad_() for value in inputs)


def first(result):
    """A scalar of all outputs, each of its own weight."""
    results = result if isinstance(result, tuple) else (result,)
    return sum((index + 1) * value.pow(2).sum() for index, value in enumerate(results))


@case_and_backend
def test_first_derivatives_in_every_mode(case, name):
    with use_backend(name):
        assert torch.autograd.gradcheck(
            case.function,
            with_grad(case.inputs()),
            fast_mode=True,
            # What is not asked of the kernels is the same for all backends.
            check_forward_ad=name != "triton",
            check_batched_grad=name != "triton",
            check_batched_forward_grad=name != "triton",
        )


@pytest.mark.parametrize(("case", "name"), list(runs(interpreter=pytest.mark.slow)))
def test_second_derivatives(case, name):
    with use_backend(name):
        assert torch.autograd.gradgradcheck(
            case.function,
            with_grad(case.inputs()),
            fast_mode=True,
            check_fwd_over_rev=name != "triton",
        )


@case_and_backend
def test_torch_func(case, name):
    inputs = case.inputs()
    tangents = case.inputs()
    argnums = tuple(range(len(inputs)))

    def loss(*values):
        return first(case.function(*values))

    with use_backend(name):
        expected = torch.autograd.grad(loss(*(given := with_grad(inputs))), given)
        # Second derivatives along the tangents, by differentiating twice backwards.
        once = torch.autograd.grad(loss(*given), given, create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(once, tangents, strict=True))
        curvature = torch.autograd.grad(slope, given, allow_unused=True, materialize_grads=True)
        assert any(grad.any() for grad in expected)

        assert_all_close(torch.func.grad(loss, argnums)(*inputs), expected)
        assert_all_close(torch.func.jacrev(loss, argnums)(*inputs), expected)
        assert_all_close(torch.func.jacfwd(loss, argnums)(*inputs), expected)
        _, actual = torch.func.jvp(loss, inputs, tangents)
        assert_all_close((actual,), (slope.detach(),))
        _, actual = torch.func.jvp(torch.func.grad(loss, argnums), inputs, tangents)
        assert_all_close(actual, curvature)
        _, pull = torch.func.vjp(torch.func.grad(loss, argnums), *inputs)
        assert_all_close(pull(tangents), curvature)


@case_and_backend
def test_vmap(case, name):
    batch = [case.inputs() for _ in range(2)]
    stacked = tuple(torch.stack(values) for values in zip(*batch, strict=True))

    def flat(result):
        return result if isinstance(result, tuple) else (result,)

    with use_backend(name):
        actual = flat(torch.vmap(case.function)(*stacked))
        expected = [flat(case.function(*inputs)) for inputs in batch]
        assert_all_close(actual, map(torch.stack, zip(*expected, strict=True)))
        # Gradients of each, as for a batch of models.
        argnums = tuple(range(len(stacked)))
        slopes = torch.func.grad(lambda *values: first(case.function(*values)), argnums)
        expected = [slopes(*inputs) for inputs in batch]
        assert_all_close(
            torch.vmap(slopes)(*stacked), map(torch.stack, zip(*expected, strict=True))
        )


@case_and_backend
def test_a_dual_level_is_seen_before_autograd_is_stepped_over(case, name):
    inputs, tangents = case.inputs(), case.inputs()
    expected = torch.func.jvp(lambda *values: first(case.function(*values)), inputs, tangents)
    with use_backend(name), torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        result = forward_ad.unpack_dual(first(case.function(*duals)))
    assert_all_close(result, expected)


@pytest.mark.parametrize("op", REFUSING)
def test_operators_without_a_formula_refuse(op):
    """A gradient through an operator itself is an error, never zeros."""
    with pytest.raises(NotImplementedError, match=f"unimoe::{op} is not differentiable"):
        registry.refuse(op)


def test_backward_operators_refuse_when_called_directly():
    gate_up = torch.randn(2, 4, requires_grad=True)
    for overload in registry.overloads("swiglu_backward").values():
        y = overload(torch.randn(2, 2), gate_up, "silu", 7.0, 1.702)
        with pytest.raises(NotImplementedError, match="unimoe::swiglu_backward is not different"):
            y.sum().backward()


def assert_all_close(actual, expected):
    for ours, others in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, others)
