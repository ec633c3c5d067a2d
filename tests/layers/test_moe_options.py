"""Options of MoE and its router beside a plain loop over tokens, choices and experts."""

import copy
import dataclasses
import io
import math
from collections import Counter

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_kernels import MoE, TopKRouter
from unimoe_kernels.layers.selection import expert_capacity, within_capacity
from unimoe_kernels.testing import relative_error

D, F, E, K = 6, 10, 4, 2
DCMOE = {
    "mode": "sparsemixer_renorm",
    "top_p": 0.7,
    "num_null_experts": 1,
    "num_shared_experts": 2,
    "shared_intermediate_size": 3,
    "shared_scores": "softmax",
}
OPTIONS = {
    "null experts": {"num_null_experts": 2, "top_k": 3},
    "top p": {"top_p": 0.6, "top_k": 4},
    "top p, softmax of all": {"top_p": 0.6, "top_k": 3, "mode": "softmax_topk", "scale": 2.5},
    "top p, first choices balanced": {"top_p": 0.6, "top_k": 3, "balance": "first"},
    "sparsemixer": {"mode": "sparsemixer_renorm", "sparsemixer_eps": 0.15},
    "sparsemixer of close logits": {"mode": "sparsemixer", "sparsemixer_eps": 0.3, "top_k": 3},
    "capacity": {"capacity_factor": 0.7, "min_capacity": 1},
    "capacity, renormalised": {"capacity_factor": 0.7, "min_capacity": 1, "capacity_renorm": True},
    "capacity of null experts": {
        "capacity_factor": 0.5,
        "min_capacity": 2,
        "num_null_experts": 1,
        "mode": "softmax_topk",
    },
    "sigmoid, capacity": {"mode": "sigmoid", "capacity_factor": 0.8, "min_capacity": 1},
    "shared": {"num_shared_experts": 1},
    "shared, sigmoid gate": {
        "num_shared_experts": 2,
        "shared_intermediate_size": 5,
        "shared_scores": "sigmoid",
    },
    "shared, one softmax": {"num_shared_experts": 2, "shared_scores": "softmax"},
    "DCMoE": {**DCMOE, "top_k": 5},
    "DCMoE with a capacity": {
        **DCMOE,
        "top_k": 5,
        "capacity_factor": 0.4,
        "min_capacity": 1,
        "capacity_renorm": True,
    },
}
every_option = pytest.mark.parametrize("name", OPTIONS)


def make(name, **more):
    options = {"top_k": K, "dtype": torch.float64, **OPTIONS[name], **more}
    torch.manual_seed(3)
    moe = MoE(D, F, E, options.pop("top_k"), **options)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    return moe


def ffn(experts, e, x_D):
    gate, up = (experts.gate_up_proj[e] @ x_D).chunk(2)
    return experts.down_proj[e] @ (gate.sigmoid() * gate * up)


def chosen(router, logits, top_k):
    """The experts of one token, and their scores, by the definitions."""
    left = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))[:top_k]
    probability = logits.softmax(0)
    if router.config.top_p is not None:
        needed = 1
        while needed < top_k and sum(probability[e] for e in left[:needed]) < router.config.top_p:
            needed += 1
        left = left[:needed]
    if router.config.mode.startswith("sparsemixer"):
        scores = []
        for k, e in enumerate(left):
            rivals = [
                logits[j].exp()
                for j in range(len(logits))
                if j not in left[:k]
                and (logits[e] - logits[j]) / max(abs(logits[e]), abs(logits[j]))
                <= 2 * router.config.sparsemixer_eps
            ]
            scores.append(logits[e].exp() / sum(rivals))
    elif router.config.mode == "sigmoid":
        scores = [logits[e].sigmoid() for e in left]
    else:
        scores = [probability[e] for e in left]
    if router.config.mode in ("topk_softmax", "sparsemixer_renorm"):
        scores = [score / sum(scores) for score in scores]
    return {e: router.config.scale * score for e, score in zip(left, scores, strict=True)}


def served(router, choices):
    """What is left of all tokens' choices when experts have a capacity."""
    room = math.ceil(len(choices) * router.top_k / E * router.config.capacity_factor)
    room = max(room, router.config.min_capacity)
    taken, kept = Counter(), [{} for _ in choices]
    for k in range(router.top_k):
        for choice, keeps in zip(choices, kept, strict=True):
            if k < len(choice):
                e = list(choice)[k]
                if e >= E or taken[e] < room:
                    keeps[e] = choice[e]
                    taken[e] += 1
    if router.config.capacity_renorm:
        for choice, keeps in zip(choices, kept, strict=True):
            factor = sum(choice.values()) / sum(keeps.values()) if keeps else 1
            keeps.update({e: score * factor for e, score in keeps.items()})
    return kept


def plain(moe, x):
    """Output of the layer, and the choices of its router, in a loop."""
    router, shared = moe.router, moe.shared_experts
    num_choices = E + router.config.num_null_experts
    logits = x @ router.weight.T
    choices = [chosen(router, row[:num_choices], router.top_k) for row in logits]
    if router.config.capacity_factor is not None:
        choices = served(router, choices)
    y = []
    for x_D, row, choice in zip(x, logits, choices, strict=True):
        weights = [x_D.new_ones(())] * (0 if shared is None else shared.num_experts)
        factor = 1
        if moe.shared_gate is not None:
            weights = (moe.shared_gate.weight @ x_D).sigmoid()
        if moe.shared_scores == "softmax":
            union = [row[e].exp() for e in choice]
            weights = [logit.exp() for logit in row[num_choices:]]
            total = sum(union) + sum(weights)
            factor, weights = sum(union) / total, [weight / total for weight in weights]
        y_D = sum(
            (factor * score * ffn(moe.experts, e, x_D) for e, score in choice.items() if e < E),
            torch.zeros_like(x_D),
        )
        y.append(y_D + sum(w * ffn(shared, s, x_D) for s, w in enumerate(weights)))
    return torch.stack(y), choices


@every_option
def test_output_and_gradients_equal_a_plain_loop(name, randn):
    moe = make(name)
    x, grad = randn(13, D, dtype=torch.float64), randn(13, D, dtype=torch.float64)
    results = []
    for forward in (moe, lambda x: plain(moe, x)[0]):
        moe.zero_grad()
        own = x.clone().requires_grad_()
        y = forward(own)
        y.backward(grad)
        grads = {key: parameter.grad for key, parameter in moe.named_parameters()}
        results.append({"y": y, "x": own.grad} | copy.deepcopy(grads))
    actual, expected = results
    assert 0.1 < expected["y"].std() < 30
    for key, value in expected.items():
        assert value.abs().max() > 1e-3, key
        assert relative_error(actual[key], value) < 1e-11, key


@every_option
def test_router_output_names_the_experts(name, randn):
    moe = make(name)
    x = randn(13, D, dtype=torch.float64)
    _, routed = moe(x, return_router=True)
    _, choices = plain(moe, x)
    router = moe.router
    num_choices = router.num_choices
    assert routed.ids.shape == routed.scores.shape == (13, router.top_k)
    assert routed.ids.dtype == torch.int32
    if router.num_weighed_experts:
        assert routed.shared_scores.shape == (13, router.num_weighed_experts)
    else:
        assert routed.shared_scores is None
    count = Counter(e for choice in choices for e in choice)
    assert routed.tokens_per_expert.tolist() == [count[e] for e in range(num_choices)]
    for ids, scores, choice in zip(routed.ids.tolist(), routed.scores, choices, strict=True):
        assert [e for e in ids if e != num_choices] == list(choice)
        assert not any(score for e, score in zip(ids, scores, strict=True) if e == num_choices)
    assert routed.num_experts == E
    assert torch.equal(routed.is_dropped, routed.ids == num_choices)
    assert torch.equal(routed.is_null, (routed.ids >= E) & (routed.ids < num_choices))
    dropped = any(len(choice) < router.top_k for choice in choices)
    assert dropped == ("top p" in name or "capacity" in name or "DCMoE" in name)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_load_balancing_loss_counts_the_choices_that_top_p_keeps(masked, randn):
    router = make("top p").router
    x = randn(13, D, dtype=torch.float64)
    mask = torch.arange(13) % 3 != 1 if masked else torch.ones(13, dtype=torch.bool)
    loss = router(x, mask if masked else None).load_balancing_loss
    logits = (x @ router.weight.T)[mask]
    count = Counter(e for row in logits for e in chosen(router, row, router.top_k))
    fraction = torch.tensor([count[e] / count.total() for e in range(E)])
    assert relative_error(loss, E * (fraction * logits.softmax(1).mean(0)).sum()) < 1e-6
    loss.backward()
    assert router.weight.grad.abs().max() > 1e-3


@every_option
def test_no_tokens(name):
    y, routed = make(name)(torch.empty(2, 0, D, dtype=torch.float64), return_router=True)
    assert y.shape == (2, 0, D)
    assert not routed.tokens_per_expert.any()
    assert routed.load_balancing_loss == 0


@every_option
def test_one_graph_serves_all_numbers_of_tokens(name, randn):
    moe = make(name)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(moe, fullgraph=True, backend=counter)
    for tokens in (13, 7, 29):
        x = randn(tokens, D, dtype=torch.float64)
        assert relative_error(compiled(x), moe(x)) < 1e-12
    assert counter.frame_count <= 2


@settings(deadline=None, max_examples=50)
@given(
    ids=st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), max_size=12),
    capacity=st.integers(0, 4),
    data=st.data(),
)
def test_capacity_serves_first_choices_first(ids, capacity, data):
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    taken, expected = Counter(), [[False, False] for _ in ids]
    for k in range(2):
        for t, choice in enumerate(ids):
            fits = choice[k] >= 3 or taken[choice[k]] < capacity
            expected[t][k] = mask[t] and fits
            taken[choice[k]] += expected[t][k]
    tensor = torch.tensor(ids, dtype=torch.int32).reshape(-1, 2)
    keep = within_capacity(tensor, 3, capacity, torch.tensor(mask, dtype=torch.bool))
    assert keep.tolist() == expected


def test_capacity_is_rounded_up_and_has_a_minimum():
    assert expert_capacity(26, 4, 1.0, 1) == 7
    assert expert_capacity(24, 4, 1.0, 1) == 6
    assert expert_capacity(24, 4, 1.25, 1) == 8
    assert expert_capacity(24, 4, 1.0, 9) == 9


def test_tokens_of_the_mask_take_no_room(randn):
    moe = make("capacity")
    x = randn(12, D, dtype=torch.float64)
    mask = torch.arange(12) % 2 == 0
    y = moe(x, token_mask=mask)
    assert not y[~mask].any()
    # Same room for fewer tokens.
    config = moe.router.config
    moe.router.config = dataclasses.replace(config, capacity_factor=2 * config.capacity_factor)
    assert relative_error(y[mask], moe(x[mask])) < 1e-12


def test_jitter_is_for_the_router_in_training(randn):
    moe = make("null experts", jitter=0.3)
    x = randn(13, D, dtype=torch.float64)
    moe.eval()
    assert torch.equal(moe(x), make("null experts").eval()(x))
    moe.train()
    before = x.clone()
    y, routed = moe(x, return_router=True)
    assert torch.equal(x, before)
    assert relative_error(routed.scores, moe.eval().router(x).scores) > 1e-3
    assert torch.equal(y, moe.experts(x, routed.ids, routed.scores))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("given", [torch.float32, "float32"])
def test_router_dtype_is_that_of_the_projection(autocast, given, randn):
    dtype = torch.float32 if autocast else torch.bfloat16
    router = TopKRouter(64, 8, 2, mode="softmax_topk", router_dtype=given, dtype=dtype)
    coarse = TopKRouter(64, 8, 2, mode="softmax_topk", dtype=dtype)
    with torch.no_grad():
        router.weight.copy_(randn(8, 64) / 4)
        coarse.weight.copy_(router.weight)
    x = randn(50, 64, dtype=dtype)
    logits = x.double() @ router.weight.double().T
    expected = logits.softmax(1).topk(2).values
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routed, rounded = router(x), coarse(x)
    assert routed.scores.dtype == torch.float32
    assert relative_error(routed.scores, expected) < 1e-5
    assert relative_error(rounded.scores, expected) > 1e-4


def test_wider_router_in_a_narrow_layer(randn):
    moe = MoE(D, F, E, K, router_dtype=torch.float64)
    assert moe(randn(5, D)).dtype == torch.float32


def test_correction_bias_is_moved_towards_even_load(randn):
    router = TopKRouter(D, E, 1, mode="sigmoid", correction_bias=True, initializer_range=1.0)
    router.update_correction_bias(torch.tensor([4, 0, 2, 2]), rate=0.5)
    assert router.correction_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    router.reset_parameters()
    x = randn(400, D) + 1
    before = router(x).tokens_per_expert
    for _ in range(300):
        router.update_correction_bias(router(x).tokens_per_expert, rate=0.01)
    after = router(x).tokens_per_expert
    assert before.max() > 150
    assert after.max() < 115
    with pytest.raises(RuntimeError, match="no correction_bias"):
        TopKRouter(D, E, 1).update_correction_bias(before)
    with pytest.raises(ValueError, match=r"tokens_per_expert \(shape \(3,\)\)"):
        router.update_correction_bias(before[:3])


@every_option
def test_built_on_meta_and_pickled(name, randn):
    moe = make(name)
    empty = make(name, device="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.to_empty(device="cpu").reset_parameters()
    for key, value in empty.named_parameters():
        assert 0.01 < value.std() < 0.04, key
    empty.load_state_dict(moe.state_dict())
    x = randn(5, D, dtype=torch.float64)
    assert torch.equal(empty(x), moe(x))
    file = io.BytesIO()
    torch.save(moe, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), moe(x))
    assert torch.equal(copy.deepcopy(moe)(x), moe(x))


def test_names_of_weights():
    assert set(make("DCMoE").state_dict()) == {
        "router.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_experts.gate_up_proj",
        "shared_experts.down_proj",
    }
    assert make("DCMoE").router.weight.shape == (7, D)
    assert "shared_gate.weight" in make("shared, sigmoid gate").state_dict()


def test_repr_shows_what_is_unusual():
    shown = repr(make("DCMoE").router)
    assert "mode='sparsemixer_renorm'" in shown
    assert "num_null_experts=1" in shown
    assert "top_p=0.7" in shown
    assert "capacity" not in shown
