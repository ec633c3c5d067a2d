import pytest
import torch
import torch.nn.functional as F

from unimoe_kernels import GroupedExperts, merge_lora_weight
from unimoe_kernels.testing import relative_error

TARGETS = ("gate_up_proj", "down_proj")
LORA_NAMES = tuple(f"expert_lora.{target}.lora_{one}" for target in TARGETS for one in "AB")


def make_experts(randn, **options):
    """Float64 experts (4, D 6, F 10) whose every parameter, LoRA B too, is of order one."""
    experts = GroupedExperts(4, 6, 10, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(randn(*parameter.shape, dtype=torch.float64) / 2)
    return experts


def routing(randn, tokens=9, num_experts=4, top_k=2):
    scores, ids = randn(tokens, num_experts, dtype=torch.float64).sigmoid().topk(top_k)
    return ids.int(), scores


def by_hand(experts, x, ids, scores):
    """Each row on its own, with W + alpha/r * B @ A built where there is LoRA."""
    gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
    if experts.lora_rank:
        first, down = (experts.expert_lora[target] for target in TARGETS)
        gate_up_proj = gate_up_proj + 2 * first.lora_B @ first.lora_A
        down_proj = down_proj + 2 * down.lora_B @ down.lora_A
    y = []
    for x_D, ids_K, scores_K in zip(x, ids.tolist(), scores, strict=True):
        y_D = torch.zeros_like(x_D)
        for e, score in zip(ids_K, scores_K, strict=True):
            if e >= experts.num_experts:
                continue
            gate_up = gate_up_proj[e] @ x_D
            if experts.gate_up_bias is not None:
                gate_up = gate_up + experts.gate_up_bias[e]
            gate, up = gate_up.chunk(2)
            out = down_proj[e] @ (getattr(F, experts.activation)(gate) * up)
            if experts.down_bias is not None:
                out = out + experts.down_bias[e]
            y_D = y_D + score * out
        y.append(y_D)
    return torch.stack(y)


@pytest.mark.parametrize("lora_rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_experts_match_a_row_by_row_formula(randn, lora_rank, bias, activation):
    experts = make_experts(
        randn, lora_rank=lora_rank, lora_alpha=6, bias=bias, activation=activation
    )
    experts.requires_grad_(True)
    ids, scores = routing(randn)
    ids[4, 1] = ids[7, 0] = 4  # another rank's
    x = randn(9, 6, dtype=torch.float64)
    grad = randn(9, 6, dtype=torch.float64)
    results = []
    for forward in (experts, lambda *args: by_hand(experts, *args)):
        inputs = (x.clone().requires_grad_(), scores.clone().requires_grad_())
        experts.zero_grad()
        y = forward(inputs[0], ids, inputs[1])
        y.backward(grad)
        grads = {name: p.grad.clone() for name, p in experts.named_parameters()}
        results.append({"y": y, "x": inputs[0].grad, "scores": inputs[1].grad} | grads)
    actual, expected = results
    assert actual.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 0.05, name
        assert relative_error(actual[name], expected[name]) < 1e-12, name


def test_add_lora_starts_as_no_change_and_freezes_the_base(randn):
    experts = make_experts(randn)
    ids, scores = routing(randn)
    x = randn(9, 6, dtype=torch.float64)
    before = experts(x, ids, scores)
    experts.add_lora(3, alpha=6)
    assert relative_error(experts(x, ids, scores), before) < 1e-13
    trainable = {name for name, p in experts.named_parameters() if p.requires_grad}
    assert trainable == set(LORA_NAMES)
    for target in TARGETS:
        lora_A = experts.expert_lora[target].lora_A
        bound = lora_A.shape[-1] ** -0.5
        assert 0.8 * bound < lora_A.abs().max() <= bound


def test_add_lora_can_leave_the_base_trainable():
    experts = GroupedExperts(2, 4, 4)
    experts.add_lora(2, freeze_base=False)
    assert all(p.requires_grad for p in experts.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_merging_folds_the_products_into_the_weights(randn, dtype):
    experts = make_experts(randn, lora_rank=3, lora_alpha=6).to(dtype)
    ids, scores = routing(randn)
    scores = scores if dtype == torch.float64 else scores.float()
    x = randn(9, 6, dtype=dtype)
    before = experts(x, ids, scores)
    down = experts.expert_lora["down_proj"]
    merged_weight = experts.down_proj + 2 * down.lora_B @ down.lora_A
    experts.merge_and_unload_lora()
    assert experts.lora_rank == 0
    assert set(experts.state_dict()) == {"gate_up_proj", "down_proj"}
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(experts.down_proj, merged_weight) < tolerance
    assert relative_error(experts(x, ids, scores), before) < tolerance


def test_lora_state_dict_round_trip(randn):
    experts = make_experts(randn, lora_rank=3, lora_alpha=6)
    names = {"gate_up_proj", "down_proj", "expert_lora.merged", *LORA_NAMES}
    assert set(experts.state_dict()) == names
    other = GroupedExperts(4, 6, 10, lora_rank=3, lora_alpha=6, dtype=torch.float64)
    other.load_state_dict(experts.state_dict())
    ids, scores = routing(randn)
    x = randn(9, 6, dtype=torch.float64)
    assert torch.equal(other(x, ids, scores), experts(x, ids, scores))


def test_reset_parameters_leaves_a_zero_lora_product():
    experts = GroupedExperts(2, 4, 6, bias=True, lora_rank=2)
    down = experts.expert_lora["down_proj"]
    torch.nn.init.ones_(down.lora_B)
    torch.nn.init.ones_(experts.down_bias)
    experts.reset_parameters()
    assert not down.lora_B.any()
    assert not experts.down_bias.any()
    assert experts.down_proj.any()


def test_lora_compiles_as_one_graph(randn):
    experts = make_experts(randn, lora_rank=2)
    ids, scores = routing(randn)
    x = randn(9, 6, dtype=torch.float64)
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    assert relative_error(compiled(x, ids, scores), experts(x, ids, scores)) < 1e-13


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_no_tokens(lora_rank):
    experts = GroupedExperts(2, 4, 6, lora_rank=lora_rank)
    empty_ids = torch.empty(0, 2, dtype=torch.int32)
    assert experts(torch.empty(0, 4), empty_ids, torch.empty(0, 2)).shape == (0, 4)


def test_experts_reject():
    with pytest.raises(ValueError, match=r"num_experts \(0\) must be at least 1"):
        GroupedExperts(0, 4, 6)
    with pytest.raises(ValueError, match=r"lora_rank \(-1\) must be at least 0"):
        GroupedExperts(2, 4, 6, lora_rank=-1)
    with pytest.raises(ValueError, match=r"activation \('swish'\) must be one of"):
        GroupedExperts(2, 4, 6, activation="swish")
    experts = GroupedExperts(2, 4, 6)
    with pytest.raises(ValueError, match=r"rank \(0\) must be at least 1"):
        experts.add_lora(0)
    with pytest.raises(RuntimeError, match="no LoRA to merge"):
        experts.merge_and_unload_lora()
    ids, scores = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"x \(shape \(3, 5\)\)"):
        experts(torch.zeros(3, 5), ids, scores)
    with pytest.raises(ValueError, match=r"x \(shape \(1, 3, 4\)\) must be \[T, D\]"):
        experts(torch.zeros(1, 3, 4), ids, scores)
    with pytest.raises(ValueError, match=r"ids \(shape \(3, 1\)\) must be \[T, K\] with T = 4"):
        experts(torch.zeros(4, 4), ids, scores)
    with pytest.raises(ValueError, match=r"scores \(shape \(3, 2\)\).*\(3, 1\)"):
        experts(torch.zeros(3, 4), ids, torch.ones(3, 2))
    experts.add_lora(2)
    with pytest.raises(RuntimeError, match="LoRA of rank 2"):
        experts.add_lora(2)


def test_old_name_of_merging_warns(randn):
    experts = make_experts(randn, lora_rank=3)
    with pytest.warns(
        DeprecationWarning, match="use GroupedExperts.merge_and_unload_lora"
    ) as warned:
        experts.merge_lora()
    assert warned[0].filename == __file__
    assert experts.lora_rank == 0


def test_merge_lora_weight_rounds_once(randn):
    weight, lora_A, lora_B = randn(3, 5, 4), randn(3, 2, 4), randn(3, 5, 2)
    exact = weight.double() + 0.5 * lora_B.double() @ lora_A.double()
    assert relative_error(merge_lora_weight(weight, lora_A, lora_B, 0.5), exact) < 1e-6
    parts = [part.bfloat16() for part in (weight, lora_A, lora_B)]
    weight, lora_A, lora_B = (part.double() for part in parts)
    merged = merge_lora_weight(*parts, 0.5)
    assert torch.equal(merged, (weight + 0.5 * lora_B @ lora_A).bfloat16())
