import copy
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_kernels import GroupedExperts, LoopedMoE, MoE, SwiGLUFFN
from unimoe_kernels.testing import relative_error

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def as_published(moe):
    """Values of a MoE, or their gradients, under the names of LoopedMoE."""
    F = moe.experts.intermediate_size
    weights = {"gate.weight": moe.router.weight}
    grads = {"gate.weight": moe.router.weight.grad}
    for e in range(moe.experts.num_experts):
        for key, name, rows in (
            ("gate_proj", "gate_up_proj", slice(None, F)),
            ("up_proj", "gate_up_proj", slice(F, None)),
            ("down_proj", "down_proj", slice(None)),
        ):
            parameter = getattr(moe.experts, name)
            weights[f"experts.{e}.{key}.weight"] = parameter.detach()[e, rows]
            if parameter.grad is not None:
                grads[f"experts.{e}.{key}.weight"] = parameter.grad[e, rows]
    return weights, grads


@both_dtypes
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_moe_equals_looped_with_all_gradients(make_looped, randn, dtype, top_k):
    looped = make_looped(top_k=top_k, dtype=dtype)
    moe = MoE.from_looped(looped)
    x = randn(3, 7, 12, dtype=dtype)
    grad = randn(3, 7, 12, dtype=dtype)
    x_looped, x_moe = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_looped, y_moe = looped(x_looped), moe(x_moe)
    y_looped.backward(grad)
    y_moe.backward(grad)
    assert 0.3 < y_looped.std() < 30
    assert relative_error(y_moe, y_looped) < TOLERANCE[dtype]
    assert relative_error(x_moe.grad, x_looped.grad) < TOLERANCE[dtype]
    _, grads = as_published(moe)
    for name, parameter in looped.named_parameters():
        if top_k == 1 and name == "gate.weight":
            # With one choice its score is exactly 1 whatever the logits are.
            assert not grads[name].any()
            assert not parameter.grad.any()
        else:
            assert relative_error(grads[name], parameter.grad) < TOLERANCE[dtype], name


@both_dtypes
def test_moe_and_looped_stay_together_under_an_optimiser(make_looped, randn, dtype):
    looped = make_looped(dtype=dtype)
    moe = MoE.from_looped(looped)
    start = copy.deepcopy(looped)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (looped, moe)]
    for _ in range(5):
        x, target = randn(16, 12, dtype=dtype), randn(16, 12, dtype=dtype)
        for layer, optimiser in zip((looped, moe), optimisers, strict=True):
            optimiser.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimiser.step()
    weights, _ = as_published(moe)
    for (name, parameter), old in zip(looped.named_parameters(), start.parameters(), strict=True):
        assert relative_error(parameter, old) > 1e-3, f"{name} did not move"
        assert relative_error(weights[name], parameter) < 20 * TOLERANCE[dtype], name


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 6),
    data=st.data(),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(["contiguous", "sliced", "expanded"]),
)
def test_moe_equals_looped_on_any_shape(tokens, experts, data, sizes, layout):
    top_k = data.draw(st.integers(1, experts))
    torch.manual_seed(tokens)
    looped = LoopedMoE(*sizes, experts, top_k, initializer_range=1.0, dtype=torch.float64)
    x = torch.randn(2 * tokens, sizes[0], dtype=torch.float64)
    x = x[::2]
    if layout == "contiguous":
        x = x.contiguous()
    elif layout == "expanded":
        x = x[:1].expand(tokens, -1)
    y = MoE.from_looped(looped)(x)
    assert y.shape == x.shape
    if tokens:
        assert relative_error(y, looped(x)) < 1e-12


def test_empty_input_gives_empty_output_and_zero_gradients(make_looped):
    moe = MoE.from_looped(make_looped())
    y, routed = moe(torch.empty(2, 0, 12), return_router=True)
    assert y.shape == (2, 0, 12)
    assert routed.ids.shape == (0, 2)
    (y.sum() + routed.load_balancing_loss + routed.router_z_loss).backward()
    assert all(not p.grad.any() for p in moe.parameters() if p.grad is not None)


def test_bfloat16_is_as_accurate_as_the_looped_layer(make_looped, randn):
    looped = make_looped(64, 96, dtype=torch.bfloat16)
    moe = MoE.from_looped(looped)
    x = randn(50, 64, dtype=torch.bfloat16)
    y, routed = moe(x, return_router=True)
    # The choice of experts is part of the input here: float64 logits could choose others.
    experts = GroupedExperts(4, 64, 96, dtype=torch.float64)
    experts.load_state_dict(moe.experts.state_dict())
    exact = experts(x.double(), routed.ids, routed.scores.double())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact) < 2 * relative_error(looped(x), exact) + 1e-3


def test_conversion_round_trip_changes_no_bit(make_looped):
    looped = make_looped(num_experts=3, dtype=torch.bfloat16)
    moe = MoE.from_looped(looped.eval())
    assert set(moe.state_dict()) == {
        "router.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    back = moe.to_looped()
    assert not moe.training
    assert not back.training
    assert list(back.state_dict()) == list(looped.state_dict())
    for name, value in looped.state_dict().items():
        assert value.dtype == back.state_dict()[name].dtype
        assert torch.equal(value, back.state_dict()[name]), name
    again = MoE.from_looped(back)
    for name, value in moe.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_old_name_of_the_conversion_warns(make_looped):
    moe = MoE.from_looped(make_looped())
    with pytest.warns(DeprecationWarning, match=r"use moe.to_looped\(\)") as warned:
        looped = LoopedMoE.from_moe(moe)
    assert warned[0].filename == __file__
    assert torch.equal(looped.gate.weight, moe.router.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shared_experts": 1}, r"num_shared_experts \(1\) must be 0"),
        ({"num_null_experts": 1}, r"router.config.num_null_experts \(1\) must be 0"),
        ({"top_p": 0.5}, r"router.config.top_p \(0.5\) must be None"),
        ({"capacity_factor": 1.0}, r"router.config.capacity_factor \(1.0\) must be None"),
        ({"jitter": 0.1}, r"router.config.jitter \(0.1\) must be 0.0"),
        ({"router_dtype": torch.float32}, r"router.config.router_dtype \(.*\) must be None"),
    ],
)
def test_options_that_the_published_layer_lacks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(8, 8, 4, 2, **options).to_looped()


def test_converted_layers_share_no_memory(make_looped):
    looped = make_looped()
    moe = MoE.from_looped(looped)
    before = {name: value.clone() for name, value in looped.state_dict().items()}
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in looped.state_dict().items())


def test_from_ffns_answers_as_the_chosen_ffn(randn):
    ffns = [SwiGLUFFN(8, 12, initializer_range=0.5, dtype=torch.float64) for _ in range(3)]
    moe = MoE.from_ffns([ffns[0], ffns[1].state_dict(), ffns[2]], top_k=1)
    x = randn(20, 8, dtype=torch.float64)
    y, routed = moe(x, return_router=True)
    assert routed.ids.unique().numel() > 1
    for token, expert in enumerate(routed.ids[:, 0].tolist()):
        assert relative_error(y[token], ffns[expert](x[token])) < 1e-12


def test_upcycled_copies_answer_as_the_dense_ffn(randn):
    ffn = SwiGLUFFN(8, 12, initializer_range=0.5, dtype=torch.float64)
    moe = MoE.from_ffns([ffn] * 4, top_k=2)
    x = randn(5, 8, dtype=torch.float64)
    assert relative_error(moe(x), ffn(x)) < 1e-12


@pytest.mark.parametrize("aux_loss", ["return", "inject"])
def test_compiles_as_one_graph_with_few_recompilations(make_looped, randn, aux_loss):
    moe = MoE.from_looped(make_looped(), load_balancing_coef=0.1, aux_loss=aux_loss)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(moe, fullgraph=True, backend=count)
    for tokens in (5, 9, 2, 17):
        x = randn(tokens, 12)
        assert relative_error(compiled(x), moe(x)) < 1e-6
    assert len(graphs) <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_compiles_with_inductor(make_looped, randn):
    moe = MoE.from_looped(
        make_looped(), load_balancing_coef=0.1, router_z_coef=0.1, aux_loss="inject"
    )
    compiled = torch.compile(copy.deepcopy(moe), fullgraph=True)
    for tokens in (5, 9):
        x = randn(tokens, 12)
        grads = []
        for layer in (moe, compiled):
            layer.zero_grad()
            layer(x).square().sum().backward()
            grads.append([p.grad for p in layer.parameters()])
        for expected, actual in zip(*grads, strict=True):
            assert relative_error(actual, expected) < 1e-5


def test_deepcopy_state_dict_and_dtype(make_looped, randn):
    moe = MoE.from_looped(make_looped())
    x = randn(6, 12)
    y = moe(x)
    assert torch.equal(copy.deepcopy(moe)(x), y)
    other = MoE(12, 20, 4, 2)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), y)
    assert relative_error(other.to(torch.float64)(x.double()), y.double()) < 1e-5


def test_built_on_the_meta_device_then_loaded(make_looped, randn):
    moe = MoE.from_looped(make_looped())
    with torch.device("meta"):
        empty = MoE(12, 20, 4, 2)
    assert all(p.is_meta for p in empty.parameters())
    assert empty(torch.empty(3, 12, device="meta")).shape == (3, 12)
    empty.load_state_dict(moe.state_dict(), assign=True)
    x = randn(4, 12)
    assert torch.equal(empty(x), moe(x))


def test_initial_weights_are_normal_with_the_given_deviation():
    torch.manual_seed(0)
    moe = MoE(64, 128, 4, 2)
    for name, parameter in moe.named_parameters():
        assert abs(parameter.std().item() / 0.02 - 1) < 0.1, name
        assert abs(parameter.mean().item()) < 0.004, name


def test_autocast_runs_in_its_dtype(make_looped, randn):
    moe = MoE.from_looped(make_looped())
    x = randn(9, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)
        y_from_bf16 = moe(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_from_bf16)
    y.float().square().mean().backward()
    assert moe.router.weight.grad.dtype == torch.float32
    exact = copy.deepcopy(moe).to(torch.bfloat16)(x.bfloat16())
    assert relative_error(y, exact) < 1e-2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": 5}, ValueError, r"top_k \(5\) must be at most num_experts \(4\)"),
        ({"top_k": 0}, ValueError, r"top_k \(0\) must be at least 1"),
        ({"num_experts": 0}, ValueError, r"num_experts \(0\) must be at least 1"),
        ({"hidden_size": 0}, ValueError, r"hidden_size \(0\) must be at least 1"),
        ({"intermediate_size": -3}, ValueError, r"intermediate_size \(-3\) must be at least 1"),
        ({"aux_loss": "add"}, ValueError, r"aux_loss \('add'\) must be one of"),
        ({"load_balancing_coef": -0.1}, ValueError, r"load_balancing_coef \(-0.1\)"),
        ({"router_z_coef": -0.1}, ValueError, r"router_z_coef \(-0.1\)"),
        ({"activation": "tanh"}, ValueError, r"activation \('tanh'\) must be one of"),
    ],
)
def test_constructor_rejects(change, error, message):
    options = {"hidden_size": 8, "intermediate_size": 16, "num_experts": 4, "top_k": 2} | change
    with pytest.raises(error, match=message):
        MoE(**options)


def test_forward_rejects(make_looped):
    for layer in (looped := make_looped(), MoE.from_looped(looped)):
        with pytest.raises(ValueError, match=r"x \(shape \(3, 11\)\).*hidden_size \(12\)"):
            layer(torch.zeros(3, 11))
        with pytest.raises(TypeError, match=r"x \(torch.float64\).*\(torch.float32\)"):
            layer(torch.zeros(3, 12, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"x \(on meta\).*\(cpu\)"):
            layer(torch.zeros(3, 12, device="meta"))
    with pytest.raises(ValueError, match=r"token_mask \(shape \(3, 1\)\).*\(3,\)"):
        layer(torch.zeros(3, 12), token_mask=torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"token_mask \(torch.float32\).*torch.bool"):
        layer(torch.zeros(3, 12), token_mask=torch.ones(3))


def test_conversions_reject(make_looped):
    with pytest.raises(
        ValueError, match=r"router.config.mode \('sigmoid'\) must be 'topk_softmax'"
    ):
        MoE(8, 8, 2, 1, mode="sigmoid").to_looped()
    with pytest.raises(ValueError, match=r"experts.activation \('gelu'\) must be 'silu'"):
        MoE(8, 8, 2, 1, activation="gelu").to_looped()
    with pytest.raises(ValueError, match=r"router.config.top_groups \(1\) must be 2"):
        MoE(8, 8, 4, 1, num_groups=2, top_groups=1).to_looped()
    with pytest.raises(ValueError, match=r"router.config.scale \(2.5\) must be 1.0"):
        MoE(8, 8, 4, 1, scale=2.5).to_looped()
    with pytest.raises(ValueError, match=r"experts.bias \(True\) must be False"):
        MoE(8, 8, 4, 1, bias=True).to_looped()
    moe = MoE(8, 8, 2, 1)
    moe.experts.add_lora(2)
    with pytest.raises(ValueError, match=r"experts.lora_rank \(2\) must be 0"):
        moe.to_looped()
    with pytest.raises(ValueError, match="ffns is empty"):
        MoE.from_ffns([], top_k=1)
    with pytest.raises(ValueError, match=r"ffns\[1\] has the keys \['weight'\]"):
        MoE.from_ffns([SwiGLUFFN(8, 12), torch.nn.Linear(8, 12, bias=False)], top_k=1)
    with pytest.raises(ValueError, match=r"ffns\[1\] gate_proj.weight is \(13, 8\)"):
        MoE.from_ffns([SwiGLUFFN(8, 12), SwiGLUFFN(8, 13)], top_k=1)
    with pytest.raises(ValueError, match=r"top_k \(3\) must be at most num_experts \(1\)"):
        MoE.from_ffns([SwiGLUFFN(8, 12)], top_k=3)


def test_router_may_read_something_else():
    torch.manual_seed(0)
    moe = MoE(8, 12, 4, 2, initializer_range=0.5, dtype=torch.float64)
    x, other = torch.randn(2, 5, 8, dtype=torch.float64).requires_grad_(), torch.randn(2, 5, 8)
    other = other.double().requires_grad_()
    y, routed = moe(x, return_router=True, router_input=other)
    expected = moe.router(other)
    assert torch.equal(routed.ids, expected.ids)
    direct = moe.experts(x.flatten(0, 1), expected.ids, expected.scores).view_as(y)
    assert relative_error(y, direct) < 1e-12
    grads = torch.autograd.grad(y.square().sum(), [x, other])
    assert all(grad.abs().sum() > 0 for grad in grads)
    with pytest.raises(ValueError, match=r"router_input \(shape \(2, 4, 8\)\) must have the shape"):
        moe(x, router_input=other[:, :4])
