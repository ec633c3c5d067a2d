"""Muon against torch's own, which multiplies in bfloat16, and against the definition."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unimoe_kernels.testing import relative_error
from unimoe_model.training.muon import Muon, orthogonalize

SHAPES = [(8, 8), (8, 8), (12, 5), (5, 12), (1, 7)]


class Dtypes(TorchDispatchMode):
    """Records the dtypes that matrix multiplications run in."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__:
            self.seen |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [matrix.to(dtype).requires_grad_() for matrix in drawn]


def take_steps(optimizer, params, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 9, 4), (2, 4, 9), (1, 1, 5)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    x = torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x, torch.float64)
    assert y.shape == x.shape
    values = torch.einsum("nri,nrc,nic->ni", u, y, v)  # the same singular vectors
    assert relative_error(u @ torch.diag_embed(values) @ v, y) < 1e-10
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_matrices_do_not_mix():
    x = torch.randn(3, 6, 4)
    each = [orthogonalize(m[None], torch.float32)[0] for m in x]
    assert relative_error(orthogonalize(x, torch.float32), torch.stack(each)) < 1e-5


def test_steps_are_those_of_torch_within_bfloat16():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    take_steps(Muon(ours, lr=0.1, weight_decay=0.2, dtype=torch.bfloat16), ours)
    take_steps(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.95), theirs)
    for a, b, start in zip(ours, theirs, parameters(torch.float32), strict=True):
        assert relative_error(a - start, b - start) < 2e-2


def test_multiplies_in_the_dtype_it_is_given():
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(torch.float32)
        with Dtypes() as dtypes:
            take_steps(Muon(params, lr=0.1, dtype=dtype), params, steps=1)
        assert dtypes.seen == {dtype}


def test_float32_is_close_to_float64():
    exact, rounded = parameters(), parameters(torch.float32)
    take_steps(Muon(exact, lr=0.1, dtype=torch.float64), exact)
    take_steps(Muon(rounded, lr=0.1), rounded)
    for a, b, start in zip(exact, rounded, parameters(), strict=True):
        assert relative_error(b - start, a - start) < 1e-4


def test_a_parameter_without_gradient_stays():
    params = parameters()
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    for p, start in zip(params[1:], parameters()[1:], strict=True):
        assert torch.equal(p, start)
    assert not torch.equal(params[0], parameters()[0])


def test_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"params \(shape \[3\]\) must be matrices"):
        Muon([torch.zeros(3, requires_grad=True)], lr=0.1)
