import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_kernels import _checks, available_backends, topk_router, use_backend
from unimoe_kernels.ops.topk_router.op import BALANCES, MODES
from unimoe_kernels.testing import assert_close_to_float64

OP = "topk_router"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOAT_OUTPUTS = ("scores", "load_balancing_loss", "router_z_loss")


def choose_by_hand(choice_E, top_k, num_groups, top_groups, best):
    """The chosen ids of one token from the values that are compared, with lists."""
    size = len(choice_E) // num_groups
    groups = [choice_E[g * size : (g + 1) * size] for g in range(num_groups)]
    rank = [sum(sorted(group, reverse=True)[:best]) for group in groups]
    used = sorted(range(num_groups), key=lambda g: (-rank[g], g))[:top_groups]
    candidates = [e for e in range(len(choice_E)) if e // size in used]
    return sorted(candidates, key=lambda e: (-choice_E[e], e))[:top_k]


def router_by_hand(
    logits,
    top_k,
    mode="topk_softmax",
    correction_bias=None,
    num_groups=1,
    top_groups=1,
    scale=1.0,
    token_mask=None,
    balance="all",
):
    """The formulas, differentiable, in the dtype of the logits."""
    num_tokens, num_experts = logits.shape
    sigmoid = mode.startswith("sigmoid")
    probability = logits.sigmoid() if sigmoid else logits.softmax(1)
    # Logits and their softmax have the same order.
    choice = probability if sigmoid or correction_bias is not None else logits
    choice = choice if correction_bias is None else choice + correction_bias
    best = 1 if correction_bias is None else 2
    ids = torch.tensor(
        [choose_by_hand(row, top_k, num_groups, top_groups, best) for row in choice.tolist()],
        device=logits.device,
        dtype=torch.long,
    ).view(num_tokens, top_k)
    if mode == "topk_softmax":
        scores = logits.gather(1, ids).softmax(1)
    else:
        scores = probability.gather(1, ids)
        scores = scores / scores.sum(1, keepdim=True) if mode.endswith("renorm") else scores
    mask = torch.ones(num_tokens, dtype=torch.bool) if token_mask is None else token_mask
    counted = [t for t in range(num_tokens) if mask[t]]
    choices = ids if balance == "all" else ids[:, :1]
    fraction = logits.new_zeros(num_experts)
    for t in counted:
        for e in choices[t].tolist():
            fraction[e] += 1 / (len(counted) * choices.shape[1])
    probability = probability / probability.sum(1, keepdim=True)
    if not counted:
        return scores * scale, ids, 0 * logits.sum(), 0 * logits.sum()
    balancing = num_experts * (fraction * probability[counted].mean(0)).sum()
    return scores * scale, ids, balancing, logits[counted].logsumexp(1).square().mean()


def test_topk_router_example(backend):
    logits = torch.tensor([[2.0, 1.0, 2.0], [0.0, 5.0, 5.0 - math.log(3)]], device=backend.device)
    out = topk_router(logits, 2)
    assert out.ids.tolist() == [[0, 2], [1, 2]]
    assert out.ids.dtype == torch.int32
    assert torch.allclose(out.scores.cpu(), torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
    assert out.tokens_per_expert.tolist() == [1, 1, 2]


def test_topk_router_losses_example(backend):
    # Uniform probabilities, but both tokens take expert 0 first: f = [1, 0], P = [1/2, 1/2].
    logits = torch.zeros(2, 2, device=backend.device)
    out = topk_router(logits, 1)
    assert out.load_balancing_loss.item() == pytest.approx(2 * (1 * 0.5))
    assert out.router_z_loss.item() == pytest.approx(math.log(2) ** 2)
    # A collapsed router costs E.
    logits = torch.tensor([[50.0, 0, 0, 0]], device=backend.device).expand(3, 4)
    assert topk_router(logits, 1).load_balancing_loss.item() == pytest.approx(4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_router_matches_float64(backend, mode, balance, dtype):
    # Multiples of 1/4 have many ties and are exact in every dtype.
    logits = (torch.randn(11, 6, device=backend.device) * 8).round().div(4).to(dtype)
    mask = torch.arange(11, device=backend.device) % 3 > 0
    options = {"mode": mode, "balance": balance, "scale": 2.5, "token_mask": mask}
    given = logits.detach().clone().requires_grad_()
    weight = torch.randn(11, 3, device=backend.device)

    def run():
        out = topk_router(given, 3, **options)
        loss = (out.scores * weight).sum() + out.load_balancing_loss + out.router_z_loss
        floats = [getattr(out, name) for name in FLOAT_OUTPUTS]
        return out.ids, *floats, *torch.autograd.grad(loss, given)

    actual = run()
    with use_backend("reference"):
        baseline = run()
    exact = logits.double().requires_grad_()
    scores, ids, balancing, z = router_by_hand(exact, 3, **options)
    (grad,) = torch.autograd.grad((scores * weight).sum() + balancing + z, exact)
    assert actual[0].tolist() == ids.tolist()
    assert actual[1].dtype == _checks.accumulation_dtype(dtype)
    names = (*FLOAT_OUTPUTS, "grad of logits")
    expected = (scores, balancing, z, grad)
    for name, *values in zip(names, actual[1:], expected, baseline[1:], strict=True):
        assert_close_to_float64(*values, name)


def test_topk_router_takes_any_layout(backend, layout):
    logits = torch.randn(11, 6, device=backend.device)
    for actual, expected in zip(
        topk_router(layout(logits), 3), topk_router(logits, 3), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["softmax_topk", "softmax_topk_renorm", "sigmoid_renorm"])
@pytest.mark.parametrize("biased", [False, True])
def test_topk_router_groups_and_bias(backend, mode, biased):
    logits = torch.randn(40, 12, dtype=torch.float64, device=backend.device)
    bias = torch.randn(12, dtype=torch.float64, device=backend.device) if biased else None
    options = {"mode": mode, "correction_bias": bias, "num_groups": 4, "top_groups": 2}
    out = topk_router(logits, 4, **options)
    scores, ids, balancing, z = router_by_hand(logits, 4, **options)
    assert out.ids.tolist() == ids.tolist()
    assert_close_to_float64(out.scores, scores)
    assert_close_to_float64(out.load_balancing_loss, balancing)
    assert_close_to_float64(out.router_z_loss, z)
    assert (out.ids // 3).unique(dim=1).shape[1] <= 4
    assert all(len(set(row)) <= 2 for row in (out.ids // 3).tolist())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("balance", BALANCES)
def test_topk_router_gradcheck(backend, mode, balance):
    logits = torch.randn(5, 4, dtype=torch.float64, device=backend.device, requires_grad=True)
    mask = torch.tensor([True, False, True, True, False], device=backend.device)
    bias = None if mode == "topk_softmax" else torch.randn(4, device=backend.device)

    def run(logits):
        out = topk_router(
            logits, 2, mode=mode, balance=balance, scale=1.5, token_mask=mask, correction_bias=bias
        )
        return tuple(getattr(out, name) for name in FLOAT_OUTPUTS)

    assert torch.autograd.gradcheck(run, logits, fast_mode=backend.interpreted)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_topk_router_opcheck(overload, requires_grad):
    op = getattr(torch.ops.unimoe.topk_router, overload)
    logits = torch.randn(5, 6, requires_grad=requires_grad)
    mask, bias = torch.arange(5) < 3, torch.randn(6)
    torch.library.opcheck(op, (logits, bias, mask, 2, "sigmoid_renorm", 3, 2, 2.0, "all"))
    if requires_grad:
        return
    out = op(logits, None, None, 2, "topk_softmax", 1, 1, 1.0, "first")
    backward = getattr(torch.ops.unimoe.topk_router_backward, overload)
    grads = (torch.randn(5, 2), torch.tensor(1.0), torch.tensor(1.0))
    torch.library.opcheck(backward, (*grads, logits, out[1], mask, "topk_softmax", 1.0, "first"))


def test_topk_router_opcheck_layouts(layout):
    op = torch.ops.unimoe.topk_router.reference
    logits = layout(torch.randn(5, 6)).requires_grad_()
    torch.library.opcheck(op, (logits, None, None, 2, "topk_softmax", 1, 1, 1.0, "all"))


@settings(max_examples=40)
@given(
    num_tokens=st.integers(0, 33),
    num_experts=st.integers(1, 12),
    mode=st.sampled_from(MODES),
    balance=st.sampled_from(BALANCES),
    masked=st.booleans(),
    data=st.data(),
)
def test_topk_router_any_shape(num_tokens, num_experts, mode, balance, masked, data):
    top_k = data.draw(st.integers(1, num_experts))
    logits = torch.randn(num_experts, num_tokens, dtype=torch.float64).t()
    mask = torch.rand(num_tokens) < 0.5 if masked else None
    options = {"mode": mode, "balance": balance, "token_mask": mask}
    scores, ids, balancing, z = router_by_hand(logits, top_k, **options)
    for name in available_backends(OP, "cpu"):
        with use_backend(name):
            out = topk_router(logits, top_k, **options)
        assert out.ids.tolist() == ids.tolist()
        assert out.tokens_per_expert.tolist() == [(ids == e).sum() for e in range(num_experts)]
        assert_close_to_float64(out.scores, scores, name="scores") if num_tokens else None
        counted = num_tokens if mask is None else int(mask.sum())
        if counted:
            assert_close_to_float64(out.load_balancing_loss, balancing)
            assert_close_to_float64(out.router_z_loss, z)
        else:
            assert out.load_balancing_loss == 0
            assert out.router_z_loss == 0


def test_topk_router_ties_go_to_the_lower_id(backend):
    logits = torch.zeros(3, 130, device=backend.device)
    logits[:, 100:] = 1
    for mode in MODES:
        assert topk_router(logits, 4, mode=mode).ids.tolist() == [[100, 101, 102, 103]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [(1, 1), (3, 2)])
def test_topk_router_orders_every_float(backend, dtype, groups):
    # A NaN is larger than everything, as in torch's sort, and -0 equals 0.
    values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-40])
    logits = values[torch.randint(0, 9, (40, 6))].to(backend.device, dtype)
    options = {"num_groups": groups[0], "top_groups": groups[1]}
    actual = topk_router(logits, 3, **options)
    with use_backend("reference"):
        # On the CPU: on a GPU torch's sort puts a NaN with a sign bit below everything.
        expected = topk_router(logits.cpu(), 3, **options)
    assert torch.equal(actual.ids.cpu(), expected.ids)
    assert torch.equal(actual.tokens_per_expert.cpu(), expected.tokens_per_expert)


@pytest.mark.parametrize("num_experts", [1, 100, 384])
def test_topk_router_many_tokens_and_experts(backend, num_experts):
    num_tokens, top_k = (150, min(8, num_experts))
    logits = torch.randn(num_tokens, num_experts, device=backend.device, requires_grad=True)
    mask = torch.arange(num_tokens, device=backend.device) % 5 > 0

    def run(logits):
        out = topk_router(logits, top_k, mode="sigmoid_renorm", token_mask=mask, scale=2.5)
        loss = out.scores.square().sum() + out.load_balancing_loss + out.router_z_loss
        return out, *torch.autograd.grad(loss, logits)

    out, grad = run(logits)
    with use_backend("reference"):
        expected, expected_grad = run(logits.detach().double().requires_grad_())
    assert torch.equal(out.ids, expected.ids)
    assert torch.equal(out.tokens_per_expert, expected.tokens_per_expert)
    for name in FLOAT_OUTPUTS:
        assert_close_to_float64(getattr(out, name), getattr(expected, name), name=name)
    if num_experts > 1:
        assert_close_to_float64(grad, expected_grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "groups"),
    [
        # Around what a warp, and what the registers of a warp, hold.
        *((5, 1, 1, (1, 1)), (3, 2, 2, (1, 1)), (9, 31, 31, (1, 1)), (1, 32, 5, (1, 1))),
        *((9, 33, 33, (1, 1)), (70, 128, 8, (1, 1)), (4, 257, 40, (1, 1)), (3, 512, 9, (1, 1))),
        *((3, 513, 7, (1, 1)), (3, 1000, 3, (1, 1)), (0, 128, 8, (1, 1))),
        *((9, 64, 6, (8, 3)), (9, 64, 20, (32, 12)), (9, 128, 50, (64, 40))),
    ],
)
def test_topk_router_sizes(backend, num_tokens, num_experts, top_k, groups, mode):
    check(backend, num_tokens, num_experts, top_k, groups, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_topk_router_more_tokens_than_warps(backend, dtype):
    check(backend, 4200, 4, 1, (1, 1), "softmax_topk", dtype)


def check(backend, num_tokens, num_experts, top_k, groups, mode, dtype=torch.float32):
    """Compares outputs and gradients with the reference in float64."""
    # Apart from each other by more than rounding.
    value_E = torch.arange(num_experts, dtype=dtype) * (8 / num_experts) - 4
    logits = torch.stack([value_E[torch.randperm(num_experts)] for _ in range(num_tokens + 1)])
    logits = logits[1:].to(backend.device).requires_grad_()
    mask = torch.arange(num_tokens, device=backend.device) % 3 != 1
    weight = torch.randn(num_tokens, top_k, device=backend.device)
    bias = torch.randn(num_experts, device=backend.device) if groups[0] > 1 else None
    bias = None if mode == "topk_softmax" else bias
    options = {"mode": mode, "token_mask": mask, "scale": 2.5, "correction_bias": bias}
    options |= {"num_groups": groups[0], "top_groups": groups[1]}

    def run(logits):
        out = topk_router(logits, top_k, **options)
        loss = (out.scores * weight).sum() + out.load_balancing_loss + out.router_z_loss
        return out, *torch.autograd.grad(loss, logits)

    out, grad = run(logits)
    with use_backend("reference"):
        expected, expected_grad = run(logits.detach().double().requires_grad_())
    assert torch.equal(out.ids, expected.ids)
    assert torch.equal(out.tokens_per_expert, expected.tokens_per_expert)
    if num_tokens:
        for name in FLOAT_OUTPUTS:
            assert_close_to_float64(getattr(out, name), getattr(expected, name), name=name)
    if num_tokens and num_experts > 1:
        assert_close_to_float64(grad, expected_grad, name="grad of logits")


def test_topk_router_masked_tokens_change_no_loss(backend):
    logits = torch.randn(6, 4, device=backend.device)
    mask = torch.tensor([1, 1, 0, 1, 0, 0], device=backend.device).bool()
    poisoned = logits.masked_fill(~mask[:, None], float("nan")).requires_grad_()
    for mode in MODES:
        kept = topk_router(logits[mask], 2, mode=mode)
        out = topk_router(poisoned, 2, mode=mode, token_mask=mask)
        assert torch.allclose(out.load_balancing_loss, kept.load_balancing_loss)
        assert torch.allclose(out.router_z_loss, kept.router_z_loss)
        (grad,) = torch.autograd.grad(out.load_balancing_loss + out.router_z_loss, poisoned)
        assert grad[mask].isfinite().all()
        assert grad[mask].any()


def test_topk_router_masked_tokens_get_no_gradient_of_the_losses(backend):
    logits = torch.randn(6, 4, device=backend.device, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0, 0], device=backend.device).bool()
    for mode in MODES:
        out = topk_router(logits, 2, mode=mode, token_mask=mask)
        (grad,) = torch.autograd.grad(out.load_balancing_loss + out.router_z_loss, logits)
        assert not grad[~mask].any()


@pytest.mark.parametrize("mode", MODES)
def test_topk_router_extreme_logits(backend, mode):
    logits = torch.tensor([[-300.0, -400.0, -500.0], [300.0, 0.0, -300.0]], device=backend.device)
    logits.requires_grad_()
    out = topk_router(logits, 2, mode=mode)
    assert out.ids[1].tolist() == [0, 1]
    (out.scores.sum() + out.load_balancing_loss + out.router_z_loss).backward()
    assert out.scores.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(0, 4, 2), (1, 4, 2), (3, 1, 1), (3, 4, 4)],
    ids=["T=0", "T=1", "E=1", "K=E"],
)
def test_topk_router_edge(backend, num_tokens, num_experts, top_k):
    logits = torch.randn(num_tokens, num_experts, device=backend.device, requires_grad=True)
    out = topk_router(logits, top_k)
    assert out.scores.shape == (num_tokens, top_k)
    assert torch.allclose(out.scores.sum(1), torch.ones(num_tokens, device=backend.device))
    (out.scores.sum() + out.load_balancing_loss + out.router_z_loss).backward()
    assert logits.grad.shape == logits.shape


def test_topk_router_rejects_bad_arguments(monkeypatch):
    logits = torch.randn(3, 4)
    for message, options in {
        r"top_k \(5\) must be at most num_experts \(4\)": {"top_k": 5},
        r"top_k \(0\) must be at least 1": {"top_k": 0},
        r"mode \('best'\) must be one of topk_softmax": {"mode": "best"},
        r"balance \('none'\) must be one of all, first": {"balance": "none"},
        r"num_groups \(3\) must divide num_experts \(4\)": {"num_groups": 3},
        r"num_groups \(0\) must be at least 1": {"num_groups": 0},
        r"top_groups \(3\) must be at most num_groups \(2\)": {"num_groups": 2, "top_groups": 3},
        r"top_k \(2\) must be at most the experts of top_groups \(1\)": {"num_groups": 4},
        "correction_bias is not supported with mode='topk_softmax'": {
            "correction_bias": torch.zeros(4)
        },
        r"correction_bias \(shape \(3,\)\) must have size 4": {
            "mode": "sigmoid",
            "correction_bias": torch.zeros(3),
        },
        r"token_mask \(shape \(4,\)\) must have size 3": {"token_mask": torch.ones(4).bool()},
        r"token_mask \(on meta\) must be on the device": {
            "token_mask": torch.ones(3, device="meta").bool()
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            topk_router(logits, **{"top_k": 2, **options})
    with pytest.raises(ValueError, match=r"logits \(shape \(4,\)\) must have shape \[T, E\]"):
        topk_router(logits[0], 2)
    with pytest.raises(TypeError, match=r"token_mask \(torch.int64\) must have dtype bool"):
        topk_router(logits, 2, token_mask=torch.ones(3).long())
    monkeypatch.setattr(_checks, "VALUE_CHECKS", True)
    logits[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"logits \(1 NaN\) must not be NaN"):
        topk_router(logits, 2)
