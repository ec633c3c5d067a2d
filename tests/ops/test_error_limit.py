import pytest
import torch
from error_limit import error_limit

from unimoe_kernels.testing import relative_error


def one_after_the_other(x, weight):
    """A float32 product whose sums are in order of the depth."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    for k in range(x.shape[1]):
        total += x[:, k : k + 1] * weight[:, k]
    return total


@pytest.mark.parametrize("depth", [256, 1024, 4096])
def test_sums_in_order_are_right_and_planted_faults_are_not(depth):
    x, weight = torch.randn(64, depth), torch.randn(48, depth) / depth**0.5
    exact = x.double() @ weight.double().T
    limit = error_limit(relative_error(x @ weight.T, exact), torch.float32, depth)
    assert relative_error(one_after_the_other(x, weight), exact) < limit
    # One number of the sum is left out; operands are rounded to the 10 bits of TF32.
    assert relative_error(x[:, 1:] @ weight[:, 1:].T, exact) > 10 * limit
    rounded = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert relative_error(rounded @ weight.T, exact) > 10 * limit
    assert relative_error(torch.zeros_like(exact), exact) > 10 * limit
