"""Layers in every mode of differentiation, against a layer of torch's own operations."""

import pytest
import torch
from torch.func import functional_call

from unimoe_kernels import GroupedExperts, MoE, available_backends, use_backend

OPTIONS = {
    "plain": {},
    "injected": {"aux_loss": "inject", "load_balancing_coef": 0.5, "router_z_coef": 0.1},
    "shared": {"num_shared_experts": 1, "shared_scores": "sigmoid", "bias": True},
    "limited": {"mode": "softmax_topk", "top_p": 0.6, "capacity_factor": 1.0},
}


@pytest.fixture(params=OPTIONS)
def moe(request):
    return MoE(3, 4, 4, 2, dtype=torch.float64, initializer_range=0.7, **OPTIONS[request.param])


def penalty_gradients(layer, x):
    """Gradients of a gradient penalty, as WGAN-GP has it."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("name", available_backends("moe_mlp", "cpu"))
def test_a_gradient_penalty_equals_that_of_the_looped_layer(make_looped, randn, name):
    looped = make_looped(4, 3, 3, 2, dtype=torch.float64)
    x = randn(5, 4, dtype=torch.float64)
    with use_backend(name):
        x_grad, router, gate_up, down = penalty_gradients(MoE.from_looped(looped), x)
    expected = dict(
        zip(
            ["x", *(key for key, _ in looped.named_parameters())],
            penalty_gradients(looped, x),
            strict=True,
        )
    )
    torch.testing.assert_close(x_grad, expected["x"])
    torch.testing.assert_close(router, expected["gate.weight"])
    for e in range(3):
        both = [expected[f"experts.{e}.{key}_proj.weight"] for key in ("gate", "up")]
        torch.testing.assert_close(gate_up[e], torch.cat(both))
        torch.testing.assert_close(down[e], expected[f"experts.{e}.down_proj.weight"])


def test_lora_has_second_derivatives():
    experts = GroupedExperts(2, 2, 2, lora_rank=1, initializer_range=0.7, dtype=torch.float64)
    torch.nn.init.normal_(experts.expert_lora["down_proj"].lora_B)
    ids = torch.tensor([[0], [1], [1]])
    scores = torch.rand(3, 1, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: experts(x, ids, scores), x)


def test_torch_func_equals_autograd(moe):
    x, v = (torch.randn(5, 3, dtype=torch.float64) for _ in range(2))
    weights = {name: weight.detach() for name, weight in moe.named_parameters()}

    def loss(weights, x):
        return functional_call(moe, weights, x).square().sum()

    given = x.clone().requires_grad_()
    expected = torch.autograd.grad(moe(given).square().sum(), [given, *moe.parameters()])
    grads, grad_x = torch.func.grad(loss, (0, 1))(weights, x)
    for ours, others in zip((grad_x, *grads.values()), expected, strict=True):
        torch.testing.assert_close(ours, others)
    if moe.aux_loss != "inject":  # no derivative of the output has the loss in it
        _, tangent = torch.func.jvp(lambda x: loss(weights, x), (x,), (v,))
        torch.testing.assert_close(tangent, (grad_x * v).sum())


def test_vmap_runs_an_ensemble(moe):
    stacked = {
        name: torch.stack([weight.detach(), 1.5 * weight.detach()])
        for name, weight in moe.named_parameters()
    }
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    y = torch.vmap(lambda weights, x: functional_call(moe, weights, x))(stacked, x)
    for index in range(2):
        weights = {name: weight[index] for name, weight in stacked.items()}
        torch.testing.assert_close(y[index], functional_call(moe, weights, x[index]))
