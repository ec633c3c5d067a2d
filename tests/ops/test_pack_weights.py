import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unimoe_kernels import GroupedExperts, moe_mlp, pack_weights, unpack_weights, use_backend
from unimoe_kernels.ops.moe_mlp import packed
from unimoe_kernels.testing import relative_error

pytest.importorskip("unimoe_kernels._C")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def nothing_packed():
    packed._packed.clear()
    yield
    packed._packed.clear()


def sample(num_tokens=40, d=33, f=50, num_experts=4, top_k=2, dtype=torch.float32, **options):
    """Experts whose outputs are of order one, and what they are called with."""
    torch.manual_seed(0)
    experts = GroupedExperts(num_experts, d, f, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    ids = torch.randint(0, num_experts + 1, (num_tokens, top_k), dtype=torch.int32)
    return experts, (torch.randn(num_tokens, d).to(dtype), ids, torch.rand(num_tokens, top_k))


def of_float64(experts, x, ids, scores):
    weights = (experts.gate_up_proj.double(), experts.down_proj.double())
    with torch.no_grad(), use_backend("reference"):
        return moe_mlp(x.double(), *weights, ids, scores.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20, deadline=None)
@given(
    num_tokens=st.integers(0, 90),
    d=st.integers(1, 70),
    f=st.integers(1, 70),
    num_experts=st.integers(1, 5),
    bias=st.booleans(),
)
def test_answers_are_the_same_to_the_last_bit(dtype, num_tokens, d, f, num_experts, bias):
    top_k = min(2, num_experts)
    experts, call = sample(num_tokens, d, f, num_experts, top_k, dtype, bias=bias)
    with torch.no_grad():
        expected = experts(*call)
        assert pack_weights(experts) > 0
        assert torch.equal(experts(*call), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_panels_are_what_is_multiplied(dtype):
    experts, call = sample(dtype=dtype)
    pack_weights(experts)
    limit = 3e-6 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        assert relative_error(experts(*call), of_float64(experts, *call)) < limit
        for panels in packed.panels_of(experts.gate_up_proj, experts.down_proj):
            panels.zero_()
        assert not experts(*call).any()
        with use_backend("reference"):
            assert experts(*call).any()


def test_weights_without_columns():
    weights = torch.ones(9, 10, 0), torch.ones(9, 0, 5)
    experts = nn.Module()
    experts.gate_up_proj, experts.down_proj = weights
    ids = torch.arange(9).repeat_interleave(20)[:, None]
    call = torch.ones(180, 0), *weights, ids, torch.ones(180, 1)
    with torch.no_grad():
        expected = moe_mlp(*call)
        pack_weights(experts)
        assert moe_mlp(*call).shape == expected.shape == (180, 0)


def test_few_rows_read_the_weights_themselves():
    experts, (x, ids, scores) = sample()
    call = x[:3], ids[:3].clamp(max=3), scores[:3]
    with torch.no_grad():
        expected = experts(*call)
        pack_weights(experts)
        for panels in packed.panels_of(experts.gate_up_proj, experts.down_proj):
            panels.zero_()
        assert torch.equal(experts(*call), expected)


def add(experts):
    with torch.no_grad():
        experts.gate_up_proj.add_(0.5)


def step(experts):
    (experts.down_proj.sum() * experts.gate_up_proj.sum()).backward()
    torch.optim.SGD(experts.parameters(), lr=1e-3).step()


def load(experts):
    experts.load_state_dict({name: -2 * w for name, w in experts.state_dict().items()})


def replace(experts):
    experts.down_proj = nn.Parameter(2 * experts.down_proj.detach())


def point_elsewhere(experts):
    experts.gate_up_proj.data = experts.gate_up_proj.data * 2


@pytest.mark.parametrize("change", [add, step, load, replace, point_elsewhere])
def test_changed_weights_are_packed_anew(change):
    experts, call = sample()
    pack_weights(experts)
    with torch.no_grad():
        before = experts(*call)
    change(experts)
    with torch.no_grad():
        after = experts(*call)
        assert not torch.equal(after, before)
        assert relative_error(after, of_float64(experts, *call)) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_converted_weights_are_not_mistaken(dtype):
    experts, (x, ids, scores) = sample()
    pack_weights(experts)
    experts.to(dtype)
    with torch.no_grad():
        y = experts(x.to(dtype), ids, scores.to(torch.promote_types(dtype, torch.float32)))
    assert relative_error(y, of_float64(experts, x, ids, scores)) < 2e-2
    assert bool(packed._packed) == (dtype == torch.bfloat16)


def test_gradients_do_not_come_from_the_panels():
    experts, (x, ids, scores) = sample()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(experts(x, ids, scores).sum(), x)
    pack_weights(experts)
    for panels in packed.panels_of(experts.gate_up_proj, experts.down_proj):
        panels.zero_()
    y = experts(x, ids, scores)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.any()
    assert torch.equal(grad, expected)


def test_inference_mode_and_compilation():
    experts, call = sample()
    pack_weights(experts)
    with torch.no_grad():
        expected = experts(*call)
        assert torch.equal(torch.compile(experts, backend="eager", fullgraph=True)(*call), expected)
    with torch.inference_mode():
        assert torch.equal(experts(*call), expected)
        other, call = sample()
        pack_weights(other)
        assert torch.equal(other(*call), expected)


def test_copies_go_with_their_weights_or_when_asked():
    experts, _ = sample()
    layers = nn.ModuleList([experts, sample(dtype=torch.bfloat16)[0]])
    weights = sum(parameter.nbytes for parameter in layers.parameters())
    assert pack_weights(layers) >= weights
    assert len(packed._packed) == 4
    unpack_weights(experts)
    assert len(packed._packed) == 2
    del layers
    gc.collect()
    assert not packed._packed


def test_what_cannot_be_packed_is_refused():
    experts, _ = sample()
    with pytest.raises(ValueError, match=r"module \(Linear\) must have experts with gate_up_proj"):
        pack_weights(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0.gate_up_proj \(on meta\) must be on the CPU"):
        pack_weights(nn.ModuleList([experts.to("meta")]))
    with pytest.raises(TypeError, match=r"gate_up_proj \(torch.float64\) must be float32"):
        pack_weights(sample(dtype=torch.float64)[0])
    assert not packed._packed


def test_panels_of_another_shape_are_refused():
    experts, (x, ids, scores) = sample()
    weights = experts.gate_up_proj.detach(), experts.down_proj.detach()
    up, down = (torch.ops.unimoe.pack_weight(w, s) for w, s in zip(weights, (2, 1), strict=True))
    rest = ids, scores, None, None, "silu", 7.0, 1.702
    for wrong in ((down, down), (up[:, 1:], down), (up, down[:1]), (up.float(), down)):
        with pytest.raises(RuntimeError, match=r"packed_\w+ \(shape .*\) must be int32 \[4, "):
            torch.ops.unimoe.moe_mlp_inference(x, *weights, *wrong, *rest)
