import copy

import pytest
import torch

from unimoe_kernels import GroupedExperts, MoE
from unimoe_kernels.testing import relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)],
    ids=["fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_moe_on_a_gpu_matches_float64_experts(make_looped, randn, dtype, limit, tokens):
    moe = MoE.from_looped(make_looped(64, 96, num_experts=8, dtype=dtype)).cuda()
    # The choice of experts is part of the input: float64 logits could choose others.
    exact = GroupedExperts(8, 64, 96, dtype=torch.float64)
    exact.load_state_dict(moe.experts.state_dict())
    x, grad = randn(tokens, 64, dtype=dtype), randn(tokens, 64, dtype=dtype)
    x_gpu = x.cuda()
    routed = moe.router(x_gpu)
    y = moe.experts(x_gpu.requires_grad_(), routed.ids, routed.scores.detach())
    y.backward(grad.cuda())
    x_exact = x.double().requires_grad_()
    y_exact = exact(x_exact, routed.ids.cpu(), routed.scores.detach().cpu().double())
    y_exact.backward(grad.double())
    assert relative_error(y.cpu(), y_exact) < limit
    assert relative_error(x_gpu.grad.cpu(), x_exact.grad) < limit
    for name, parameter in moe.experts.named_parameters():
        expected = getattr(exact, name).grad
        assert relative_error(parameter.grad.cpu(), expected) < limit, name


def test_forward_and_backward_do_not_wait_for_the_gpu(make_looped, randn):
    moe = MoE.from_looped(make_looped(64, 96), load_balancing_coef=0.1, aux_loss="inject").cuda()
    x = randn(50, 64).cuda()
    moe(x).sum().backward()  # libraries may synchronise the first time they are used
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_runs_on_a_gpu_are_bit_identical(make_looped, randn):
    moe = MoE.from_looped(make_looped(64, 96, dtype=torch.bfloat16)).cuda()
    x = randn(300, 64, dtype=torch.bfloat16).cuda()
    runs = []
    for _ in range(2):
        layer = copy.deepcopy(moe)
        y = layer(x)
        y.square().sum().backward()
        runs.append([y, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
