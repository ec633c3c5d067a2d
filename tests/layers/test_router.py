import pytest
import torch

from unimoe_kernels import TopKRouter, topk_router
from unimoe_kernels.testing import relative_error


def test_router_is_a_projection_and_topk_router(randn):
    router = TopKRouter(8, 5, 2, mode="softmax_topk", scale=1.5, balance="first")
    with torch.no_grad():
        router.weight.copy_(randn(5, 8))
    x = randn(2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    routed = router(x, mask)
    expected = topk_router(
        x.reshape(6, 8) @ router.weight.T,
        2,
        mode="softmax_topk",
        scale=1.5,
        balance="first",
        token_mask=mask.reshape(6),
    )
    assert routed.scores.shape == (6, 2)
    assert torch.equal(routed.ids, expected.ids)
    for name in ("scores", "load_balancing_loss", "router_z_loss"):
        assert relative_error(getattr(routed, name), getattr(expected, name)) < 1e-6, name


def test_topk_softmax_by_hand():
    router = TopKRouter(2, 3, 2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    routed = router(torch.tensor([[2.0, 1.0]]))  # logits 2, 1, 3
    assert routed.ids.tolist() == [[2, 0]]
    assert relative_error(routed.scores, torch.softmax(torch.tensor([[3.0, 2.0]]), -1)) < 1e-6


def test_correction_bias_chooses_but_does_not_score(randn):
    router = TopKRouter(8, 4, 1, mode="sigmoid", correction_bias=True)
    assert "correction_bias" in router.state_dict()
    router.correction_bias[3] = 100.0
    x = randn(6, 8)
    routed = router(x)
    assert routed.ids.eq(3).all()
    assert relative_error(routed.scores, torch.sigmoid(x @ router.weight[3:].T)) < 1e-5
    router.reset_parameters()
    assert not router.correction_bias.any()


def test_router_gradient_reaches_weight_and_input(randn):
    router = TopKRouter(6, 4, 2, dtype=torch.float64, initializer_range=1.0)
    x = randn(7, 6, dtype=torch.float64)

    def outputs(x, weight):
        router_out = torch.func.functional_call(router, {"weight": weight}, (x,))
        return router_out.scores, router_out.load_balancing_loss, router_out.router_z_loss

    inputs = (x.requires_grad_(), router.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(outputs, inputs)


def test_router_rejects():
    with pytest.raises(ValueError, match=r"top_k \(4\) must be at most num_experts \(3\)"):
        TopKRouter(8, 3, 4)
    with pytest.raises(ValueError, match=r"num_experts \(0\) must be at least 1"):
        TopKRouter(8, 0, 1)
    with pytest.raises(ValueError, match=r"x \(shape \(2, 7\)\)"):
        TopKRouter(8, 3, 1)(torch.zeros(2, 7))
