import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from unimoe_kernels import MoE, inject_aux_loss
from unimoe_kernels.testing import relative_error

# Large, so that they show beside the loss of the host.
COEFS = {"load_balancing_coef": 700.0, "router_z_coef": 30.0}


@pytest.fixture
def pair(make_looped):
    """The same float64 layer twice: one returns its losses, one injects them."""
    looped = make_looped(dtype=torch.float64)
    returning = MoE.from_looped(looped, **COEFS, aux_loss="return")
    return returning, MoE.from_looped(looped, **COEFS, aux_loss="inject")


def gradients(layer, x, run, scale=1.0):
    """Gradients of scale * sum(y^2), plus what run(layer, x) adds, for x and all parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, extra = run(layer, x)
    (scale * y.square().sum() + extra).backward()
    return {"x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}


def returned(layer, x, mask=None):
    y, routed = layer(x, token_mask=mask, return_router=True)
    return y, layer.aux_loss_of(routed)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-12, name


def test_the_losses_matter(pair, randn):
    x = randn(11, 12, dtype=torch.float64)
    with_loss = gradients(pair[0], x, returned)
    without = gradients(pair[0], x, lambda layer, x: (layer(x), 0.0))
    assert relative_error(with_loss["router.weight"], without["router.weight"]) > 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_injected_gradients_equal_added_losses(pair, randn, masked):
    x = randn(2, 8, 12, dtype=torch.float64)
    mask = torch.arange(16).reshape(2, 8) % 3 > 0 if masked else None
    expected = gradients(pair[0], x, lambda layer, x: returned(layer, x, mask))
    actual = gradients(pair[1], x, lambda layer, x: (layer(x, token_mask=mask), 0.0))
    assert_same(actual, expected)


def test_injecting_changes_no_output_bit_and_returns_detached_losses(pair, randn):
    x = randn(11, 12, dtype=torch.float64)
    y, routed = pair[0](x, return_router=True)
    y_injected, routed_injected = pair[1](x, return_router=True)
    assert torch.equal(y, y_injected)
    assert routed.load_balancing_loss.requires_grad
    for name in ("load_balancing_loss", "router_z_loss"):
        assert not getattr(routed_injected, name).requires_grad
        assert torch.equal(getattr(routed, name), getattr(routed_injected, name))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["return", "inject"])
def test_losses_count_once_under_activation_checkpointing(pair, randn, use_reentrant, mode):
    x = randn(11, 12, dtype=torch.float64)
    expected = gradients(pair[0], x, returned)

    def run(layer, x):
        if mode == "inject":
            return checkpoint(layer, x, use_reentrant=use_reentrant), 0.0
        return checkpoint(lambda x: returned(layer, x), x, use_reentrant=use_reentrant)

    assert_same(gradients(pair[mode == "inject"], x, run), expected)


def test_losses_count_once_under_accumulation(pair, randn):
    steps = 3
    batches = [randn(7, 12, dtype=torch.float64) for _ in range(steps)]
    returning, injecting = pair
    for x in batches:
        y, aux_loss = returned(returning, x)
        ((y.square().sum() + aux_loss) / steps).backward()
    injecting.aux_loss_scale = 1 / steps
    for x in batches:
        (injecting(x).square().sum() / steps).backward()
    for expected, actual in zip(returning.parameters(), injecting.parameters(), strict=True):
        assert relative_error(actual.grad, expected.grad) < 1e-12


def test_no_grad_forwards_leave_nothing_behind(pair, randn):
    x = randn(11, 12, dtype=torch.float64)
    expected = gradients(pair[0], x, returned)
    with torch.no_grad():
        assert not pair[1](x).requires_grad
    with torch.inference_mode():
        pair[1](x)
    assert_same(gradients(pair[1], x, lambda layer, x: (layer(x), 0.0)), expected)


def test_nothing_is_stored_on_the_layer(pair, randn):
    x = randn(11, 12, dtype=torch.float64)
    for layer in pair:
        before = {name: dict(vars(module)) for name, module in layer.named_modules()}
        kept = layer(x, return_router=True)
        after = {name: dict(vars(module)) for name, module in layer.named_modules()}
        assert before == after
        copy.deepcopy(layer)
        del kept


@pytest.mark.parametrize("mode", [0, 1], ids=["return", "inject"])
def test_masked_tokens_change_no_loss_and_no_gradient_of_one(pair, randn, mode):
    layer = pair[mode]
    mask = torch.arange(11) % 3 > 0
    x = randn(11, 12, dtype=torch.float64)
    other = torch.where(mask[:, None], x, 50 * randn(11, 12, dtype=torch.float64))

    def losses_and_grads(x):
        layer.zero_grad()
        x = x.clone().requires_grad_()
        y, routed = layer(x, token_mask=mask, return_router=True)
        # Multiplying y by zero leaves the auxiliary losses as the only source of gradients.
        extra = layer.aux_loss_of(routed) if mode == 0 else 0.0
        ((0 * y).sum() + extra).backward()
        return routed, x.grad, layer.router.weight.grad.clone()

    routed, x_grad, weight_grad = losses_and_grads(x)
    routed_other, x_grad_other, weight_grad_other = losses_and_grads(other)
    kept, kept_grad = layer(x[mask], return_router=True)[1], weight_grad
    for name in ("load_balancing_loss", "router_z_loss"):
        assert torch.equal(getattr(routed, name), getattr(routed_other, name)), name
        assert relative_error(getattr(routed, name), getattr(kept, name)) < 1e-12, name
    assert kept_grad.abs().max() > 1e-3
    assert relative_error(weight_grad_other, weight_grad) < 1e-12
    assert relative_error(x_grad_other, x_grad) < 1e-12
    assert not x_grad[~mask].any()
    assert x_grad[mask].any()


def test_masked_tokens_are_answered_like_others(pair, randn):
    x = randn(11, 12, dtype=torch.float64)
    mask = torch.arange(11) % 3 > 0
    assert torch.equal(pair[0](x, token_mask=mask), pair[0](x))


def test_all_tokens_masked_gives_zero_losses_and_finite_gradients(pair, randn):
    x = randn(11, 12, dtype=torch.float64)
    mask = torch.zeros(11, dtype=torch.bool)
    _, routed = pair[0](x, token_mask=mask, return_router=True)
    assert routed.load_balancing_loss == 0
    assert routed.router_z_loss == 0
    masked = gradients(pair[1], x, lambda layer, x: (layer(x, token_mask=mask), 0.0))
    assert_same(masked, gradients(pair[0], x, lambda layer, x: (layer(x), 0.0)))


def test_frozen_layer_still_differentiates_its_input(pair, randn):
    layer = pair[1].requires_grad_(False)
    x = randn(11, 12, dtype=torch.float64).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.any()
    assert not layer(x.detach()).requires_grad


def test_inject_aux_loss_on_its_own():
    y = torch.randn(3, 2, requires_grad=True)
    parameter = torch.tensor(2.0, requires_grad=True)
    out = inject_aux_loss(y, parameter.square())
    assert torch.equal(out, y)
    (5 * out.sum()).backward()
    assert parameter.grad == 4.0
    assert torch.equal(y.grad, torch.full((3, 2), 5.0))
    with pytest.raises(ValueError, match=r"loss \(shape \(1,\)\) must be a scalar"):
        inject_aux_loss(y, torch.ones(1))
