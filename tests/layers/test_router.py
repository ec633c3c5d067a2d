import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_correction_bias_stays_float32(dtype):
    """Of bfloat16 the steps are too small from 0.5 on."""
    router = nn.Sequential(TopKRouter(2, 2, 1, mode="sigmoid", correction_bias=True)).to(dtype)[0]
    assert router.weight.dtype == dtype
    assert router.correction_bias.dtype == torch.float32
    for _ in range(1000):
        router.update_correction_bias(torch.tensor([0, 2]))
    assert relative_error(router.correction_bias, torch.tensor([1.0, -1.0])) < 1e-4
    before = router.correction_bias.clone()
    assert router.to(torch.float16).to(dtype).correction_bias.equal(before)
    assert router.to("meta").correction_bias.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_correction_bias_of_a_sixteen_bit_checkpoint_is_float32(assign):
    router = TopKRouter(2, 2, 1, mode="sigmoid", correction_bias=True)
    state = {name: value.bfloat16() for name, value in router.state_dict().items()}
    router.load_state_dict(state, assign=assign)
    assert router.correction_bias.dtype == torch.float32
    assert "correction_bias" in router.state_dict()


def test_correction_bias_is_float32_under_a_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = TopKRouter(2, 2, 1, mode="sigmoid", correction_bias=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert router.weight.dtype == torch.bfloat16
    assert router.correction_bias.dtype == torch.float32
