"""Experts with quantised weights beside the same numbers as floats."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimoe_kernels import (
    GroupedExperts,
    MoE,
    QuantizedExperts,
    dequantize_weight,
    quantize_experts,
    quantize_weight,
)
from unimoe_kernels.testing import assert_close_to_float64, sample_routing

E, D, F, K, T = 4, 64, 96, 2, 11
FORMATS = {
    "int8": {"format": "int8"},
    "int8-32": {"format": "int8", "group_size": 32},
    "int4": {"format": "int4", "group_size": 32},
    "int4-zeros": {"format": "int4", "group_size": 32, "zero_points": True},
}
formats = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


def float_experts(dtype=torch.float32, **options):
    experts = GroupedExperts(E, D, F, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return experts


def dequantized(quantized, dtype=torch.float64):
    """`GroupedExperts` of the numbers that quantised experts stand for, with their LoRA."""
    bias = quantized.gate_up_bias is not None
    experts = GroupedExperts(E, D, F, bias=bias, activation=quantized.activation, dtype=dtype)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            weight = dequantize_weight(getattr(quantized, name).weight, dtype)
            getattr(experts, name).copy_(weight)
        if bias:
            experts.gate_up_bias.copy_(quantized.gate_up_bias)
            experts.down_bias.copy_(quantized.down_bias)
    if quantized.expert_lora is not None:
        experts.expert_lora = copy.deepcopy(quantized.expert_lora).to(dtype)
        experts.requires_grad_(False)
        experts.expert_lora.requires_grad_(True)
    return experts


def routed(dtype=torch.float32):
    ids, scores = sample_routing("uniform", T, K, E)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(T, D).to(dtype), ids, scores.to(wide)


def output_and_grads(experts, x, ids, scores):
    """Output, and gradients of x, scores and all parameters that train."""
    inputs = [x.detach().requires_grad_(), scores.detach().requires_grad_()]
    trained = {name: p for name, p in experts.named_parameters() if p.requires_grad}
    y = experts(inputs[0], ids, inputs[1])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    return y, *torch.autograd.grad(y, [*inputs, *trained.values()], grad)


@formats
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_same_as_the_dequantized_experts(options, bias, dtype):
    experts = float_experts(dtype, bias=bias, activation="gelu")
    before = copy.deepcopy(experts)
    assert quantize_experts(experts, **options) is experts
    assert type(experts) is QuantizedExperts
    x, ids, scores = routed(dtype)
    actual = output_and_grads(experts, x, ids, scores)
    expected = output_and_grads(dequantized(experts), x.double(), ids, scores.double())
    # Stacked weights are not trained.
    for ours, other in zip(actual, expected[:3] if not bias else (*expected[:2],), strict=False):
        assert_close_to_float64(ours, other, dtype=dtype)
    for name in ("gate_up_proj", "down_proj"):
        alone = quantize_weight(getattr(before, name), **options)
        for one, other in zip(getattr(experts, name).weight[:3], alone[:3], strict=True):
            assert one is other is None or torch.equal(one, other)


@formats
def test_state_dict_has_clean_names_and_comes_back(options, tmp_path):
    experts = quantize_experts(float_experts(bias=True), **options)
    state = experts.state_dict()
    parts = ["values", "scales", *(["zeros"] if "zero_points" in options else [])]
    names = [f"{name}.{part}" for name in ("gate_up_proj", "down_proj") for part in parts]
    assert sorted(state) == sorted([*names, "gate_up_bias", "down_bias"])
    save_file(state, tmp_path / "experts.safetensors")
    loaded = QuantizedExperts(E, D, F, bias=True, **options)
    x, ids, scores = routed()
    assert not loaded(x, ids, scores).any()
    loaded.load_state_dict(load_file(tmp_path / "experts.safetensors"))
    expected = experts(x, ids, scores)
    assert expected.abs().max() > 0.1
    assert torch.equal(loaded(x, ids, scores), expected)
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(other(x, ids, scores), expected)
    empty = QuantizedExperts(E, D, F, bias=True, device="meta", **options)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x, ids, scores), expected)
    empty = QuantizedExperts(E, D, F, bias=True, device="meta", **options).to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(x, ids, scores), expected)


def test_state_of_another_format_does_not_load():
    state = quantize_experts(float_experts(), "int4", 32).state_dict()
    for other in (
        {"format": "int8"},
        {"format": "int8", "group_size": 32},
        {"format": "int4", "group_size": 32, "zero_points": True},
    ):
        with pytest.raises(RuntimeError, match="loading state_dict"):
            QuantizedExperts(E, D, F, **other).load_state_dict(state)
    with pytest.raises(RuntimeError, match="loading state_dict"):
        QuantizedExperts(E, D, 64, format="int4").load_state_dict(state)
    with pytest.raises(RuntimeError, match="loading state_dict"):
        GroupedExperts(E, D, F).load_state_dict(state)
    with pytest.raises(RuntimeError, match="loading state_dict"):
        QuantizedExperts(E, D, F, group_size=32).load_state_dict(float_experts().state_dict())


@formats
def test_conversions_move_the_scales_alone(options):
    experts = quantize_experts(float_experts(bias=True), **options)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    for dtype, scales in [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ]:
        experts.to(dtype)
        assert experts.gate_up_bias.dtype == dtype
        for name, tensor in experts.state_dict().items():
            if name.endswith("scales"):
                assert tensor.dtype == scales
                # Rounded once, to bfloat16.
                torch.testing.assert_close(tensor.float(), before[name], rtol=2**-8, atol=0)
            elif not name.endswith("bias"):
                assert torch.equal(tensor, before[name])
        x, ids, scores = routed(dtype)
        expected = dequantized(experts)(x.double(), ids, scores.double())
        assert_close_to_float64(experts(x, ids, scores), expected)
    assert quantize_experts(float_experts(), **options).half().gate_up_proj.dtype == torch.float32


@formats
@pytest.mark.parametrize("split", [False, True])
def test_lora_on_top_trains(options, split):
    experts = quantize_experts(float_experts(bias=True), **options)
    experts.add_lora(3, split_gate_up=split)
    trained = [name for name, p in experts.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    x, ids, scores = routed()
    actual = output_and_grads(experts, x, ids, scores)
    expected = output_and_grads(dequantized(experts), x.double(), ids, scores.double())
    assert len(actual) == len(expected) == 3 + len(trained)
    for ours, other in zip(actual, expected, strict=True):
        assert_close_to_float64(ours, other)
    # A step of training changes the output and nothing that is quantised.
    values = experts.gate_up_proj.values.clone()
    optimizer = torch.optim.SGD([p for p in experts.parameters() if p.requires_grad], 0.1)
    experts(x, ids, scores).square().mean().backward()
    optimizer.step()
    assert not torch.equal(experts(x, ids, scores), actual[0])
    assert torch.equal(experts.gate_up_proj.values, values)
    with pytest.raises(RuntimeError, match=r"gate\w*_proj .*is quantised \(int.\): LoRA cannot be"):
        experts.merge_and_unload_lora()


def test_float_experts_with_lora_keep_it():
    experts = float_experts()
    experts.add_lora(2)
    with torch.no_grad():
        experts.expert_lora["down_proj"].lora_B.normal_()
    quantize_experts(experts, "int8")
    x, ids, scores = routed()
    expected = dequantized(experts)(x.double(), ids, scores.double())
    assert_close_to_float64(experts(x, ids, scores), expected)


def test_a_layer_with_shared_experts_under_compile():
    torch._dynamo.reset()
    moe = MoE(D, F, E, K, num_shared_experts=1, initializer_range=0.1)
    exact = copy.deepcopy(moe)
    quantize_experts(moe, "int4", 32)
    assert [type(part) for part in (moe.experts, moe.shared_experts)] == [QuantizedExperts] * 2
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5, 2):
        x = torch.randn(tokens, D)
        torch.testing.assert_close(compiled(x), moe(x))
    difference = (moe(x) - exact(x)).norm() / exact(x).norm()
    assert 0.01 < difference < 0.3
    with pytest.raises(ValueError, match=r"shared_experts.num_shared|num_shared_experts"):
        moe.to_looped()
    torch._dynamo.reset()


def test_quantized_layers_are_refused_by_name():
    moe = quantize_experts(MoE(D, F, E, K), "int4", 32)
    with pytest.raises(ValueError, match=r"experts.format \('int4'\) must be None to convert"):
        moe.to_looped()
    with pytest.raises(RuntimeError, match=r"experts are quantised \(int4\), they cannot be drawn"):
        moe.reset_parameters()
    with pytest.raises(ValueError, match=r"freeze_base \(False\) must be True"):
        moe.experts.add_lora(2, freeze_base=False)
    with pytest.raises(ValueError, match=r"format \('int2'\) must be one of"):
        QuantizedExperts(E, D, F, format="int2")
    with pytest.raises(ValueError, match=r"down_proj has rows of 96 .*group_size \(64\)"):
        QuantizedExperts(E, D, F)
    x, ids, scores = routed()
    with pytest.raises(ValueError, match=r"must have hidden_size \(64\) as last dimension"):
        moe.experts(x[:, 1:], ids, scores)
    assert "format='int4'" in repr(moe)
