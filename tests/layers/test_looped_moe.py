from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unimoe_kernels import LoopedMoE, MoE
from unimoe_kernels.testing import relative_error

PUBLISHED = Path(__file__).parents[1] / "data" / "moe_layer_top2of4.safetensors"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def published():
    """What the official MoeLayer answered; the metadata of the file says how it was made."""
    return load_file(PUBLISHED)


@pytest.fixture
def looped(published):
    layer = LoopedMoE(32, 56, num_experts=4, top_k=2)
    prefix = "state."
    layer.load_state_dict(
        {k.removeprefix(prefix): v for k, v in published.items() if k.startswith(prefix)}
    )
    return layer


def test_looped_answers_as_the_published_layer(published, looped):
    x = published["in.hidden_states"].clone().requires_grad_()
    y = looped(x)
    assert relative_error(y, published["out.hidden_states"]) < 1e-6
    y.backward(published["in.grad_output"])
    assert relative_error(x.grad, published["grad.in.hidden_states"]) < 1e-6
    assert relative_error(looped.gate.weight.grad, published["grad.state.gate.weight"]) < 1e-6
    norms = torch.tensor(
        [
            [getattr(e, name).weight.grad.double().norm() for name in PROJECTIONS]
            for e in looped.experts
        ]
    )
    assert relative_error(norms, published["grad_norm.experts"]) < 1e-6


def test_moe_answers_as_the_published_layer(published, looped):
    moe = MoE.from_looped(looped)
    x = published["in.hidden_states"].clone().requires_grad_()
    y, routed = moe(x, return_router=True)
    assert torch.equal(routed.ids.long(), published["out.selected_experts"])
    assert relative_error(routed.scores, published["out.routing_weights"]) < 1e-6
    assert relative_error(y, published["out.hidden_states"]) < 1e-6
    y.backward(published["in.grad_output"])
    assert relative_error(x.grad, published["grad.in.hidden_states"]) < 1e-6
    assert relative_error(moe.router.weight.grad, published["grad.state.gate.weight"]) < 1e-6
    gate_up, down = moe.experts.gate_up_proj.grad.double(), moe.experts.down_proj.grad.double()
    grads = (gate_up[:, :56], gate_up[:, 56:], down)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads], dim=1)
    assert relative_error(norms, published["grad_norm.experts"]) < 1e-6


def test_an_expert_without_tokens_gets_zero_gradients(make_looped, randn):
    looped = make_looped(top_k=1)
    with torch.no_grad():
        looped.gate.weight[2] = 0
        looped.gate.weight[2, 0] = -100
    moe = MoE.from_looped(looped)
    x = randn(30, 12)
    x[:, 0] = 1
    for layer in (looped, moe):
        layer(x).square().sum().backward()
    assert not looped.experts[2].down_proj.weight.grad.any()
    assert not moe.experts.down_proj.grad[2].any()
    assert moe.experts.down_proj.grad[1].any()
