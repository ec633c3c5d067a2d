"""What layers return is a tensor of its own, as that of a linear layer, also for FSDP."""

import pytest
import torch

from unimoe_kernels import MoE

OPTIONS = [
    {},
    {"aux_loss": "inject", "load_balancing_coef": 0.5},
    {"num_shared_experts": 1, "shared_scores": "softmax"},
]


@pytest.mark.parametrize("shape", [(5, 3), (2, 2, 3), (3,), (0, 3)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_are_no_views_and_may_be_changed_in_place(options, shape):
    moe = MoE(3, 4, 4, 2, dtype=torch.float64, initializer_range=0.7, **options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = moe(x)
    assert y.shape == x.shape
    assert not y._is_view()
    (expected,) = torch.autograd.grad((moe(x) + x).sum(), x)
    y += x
    (actual,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(actual, expected)


def test_the_looped_layer_returns_no_view(make_looped, randn):
    for shape in ((5, 12), (2, 2, 12)):
        assert not make_looped()(randn(*shape))._is_view()
