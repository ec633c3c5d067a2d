"""Experts that are quantised by what they see, beside the same rounded to nearest."""

import copy
import warnings
import weakref

import pytest
import torch
from families import FAMILIES, tiny_model
from test_quantize import IDS, WIDTHS, logits_of, mixtral, upcycled

from unimoe_kernels import MoE, add_expert_lora, quantize_experts
from unimoe_kernels.integrations import calibration as calibration_module
from unimoe_kernels.layers.quantized_projection import QuantizedProjection

D, F, E, K = 64, 128, 4, 2
LAYOUTS = {
    "int8": ("int8", None, False),
    "int8-32": ("int8", 32, False),
    "int4": ("int4", 64, False),
    "int4-zeros": ("int4", 32, True),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def layer(**options):
    torch.manual_seed(0)
    return MoE(D, F, E, K, initializer_range=0.15, **options)


def correlated(tokens, seed):
    """Inputs that vary in few directions, as activations do."""
    mix = torch.randn(16, D, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens, D, generator=generator)
    return torch.randn(tokens, 16, generator=generator) @ mix / 4 + 0.1 * noise


def error(moe, exact, x):
    expected = exact(x).double()
    return ((moe(x).double() - expected).norm() / expected.norm()).item()


def quantized(moe, layout, **options):
    format, group_size, zero_points = layout
    moe = copy.deepcopy(moe)
    return quantize_experts(moe, format, group_size, zero_points=zero_points, **options)


@torch.no_grad()
@layouts
def test_outputs_on_other_inputs_change_less_than_by_rounding(layout):
    exact, held_out = layer(), correlated(500, 2)
    nearest = error(quantized(exact, layout), exact, held_out)
    inputs = [correlated(300, 0), {"x": correlated(200, 1)}, (correlated(100, 3),)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe = quantized(exact, layout, calibration=inputs)
    assert error(moe, exact, held_out) < 0.7 * nearest
    # Inputs without correlation say nothing about these.
    white = quantized(exact, layout, calibration=[torch.randn(600, D)])
    assert error(white, exact, held_out) > error(moe, exact, held_out)
    for name in ("gate_up_proj", "down_proj"):
        ours = getattr(moe.experts, name)
        other = getattr(quantized(exact, layout).experts, name)
        assert [(one.shape, one.dtype) for one in ours.buffers()] == [
            (one.shape, one.dtype) for one in other.buffers()
        ]
        if layout[0] == "int8":
            assert ours.values.abs().max() <= 127
        assert not torch.equal(ours.values, other.values)


@layouts
def test_the_result_is_the_same_every_time(layout):
    inputs = [correlated(200, 0)]
    one, other = (quantized(layer(), layout, calibration=inputs) for _ in range(2))
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_experts_that_see_too_little_are_rounded_and_named():
    moe = layer(num_shared_experts=1)
    with torch.no_grad():
        # No token takes expert 2.
        moe.router.weight[2] = 0
        x = correlated(200, 0)
        x[:, 0], moe.router.weight[:, 0] = 20, torch.tensor([1.0, 1.0, -9.0, 1.0])
    message = r"fewer than 16 rows .* nearest: experts: \[2\]$"
    with pytest.warns(UserWarning, match=message):
        calibrated = quantized(moe, ("int4", 64, False), calibration=[x])
    nearest = quantized(moe, ("int4", 64, False))
    for name in ("gate_up_proj", "down_proj"):
        ours = getattr(calibrated.experts, name).weight
        other = getattr(nearest.experts, name).weight
        same = [torch.equal(ours.values[e], other.values[e]) for e in range(E)]
        assert same == [False, False, True, False]
    assert not torch.equal(
        calibrated.shared_experts.down_proj.values, nearest.shared_experts.down_proj.values
    )


def test_a_layer_that_is_never_reached_is_rounded_and_named():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = layer(), layer()

        def forward(self, x):
            return self.used(x)

    model = Two()
    with pytest.warns(UserWarning, match=r"nearest: idle.experts: all$"):
        calibrated = quantized(model, ("int4", 64, False), calibration=[correlated(200, 0)])
    nearest = quantized(model, ("int4", 64, False)).idle.experts.down_proj.values
    assert torch.equal(calibrated.idle.experts.down_proj.values, nearest)


def test_bad_inputs_leave_the_model_as_it_is():
    model = mixtral().train()
    model.set_experts_implementation("eager")
    before = copy.deepcopy(model.state_dict())
    embedding = model.model.embed_tokens.weight
    cases = [
        ([], ValueError, "calibration must hold at least one input"),
        ("text", TypeError, r"calibration \(str\) must be an iterable of inputs"),
        (IDS, TypeError, r"calibration \(Tensor\) must be an iterable of inputs"),
        ({"input_ids": IDS}, TypeError, r"calibration \(dict\) must be an iterable of inputs"),
        ([{"input_ids": IDS}, {"nothing": IDS}], (TypeError, ValueError), "nothing|input_ids"),
        (
            [{"input_ids": IDS}, {"inputs_embeds": embedding[IDS] * torch.nan}],
            ValueError,
            r"calibration\[1\] gives NaN in the inputs of model.layers.0.mlp.experts",
        ),
    ]
    for inputs, kind, message in cases:
        with pytest.raises(kind, match=message):
            quantize_experts(model, "int4", 32, calibration=inputs)
        assert not any(isinstance(m, QuantizedProjection) for m in model.modules())
        assert not any("expert_lora" in m._modules for m in model.modules())
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert all(module.training for module in model.modules())
        assert model.config._experts_implementation == "eager"
        state = model.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        assert not hasattr(model.config, "quantization_config")
    moe = layer()
    with torch.no_grad():
        moe.experts.down_proj.mul_(3e38)
    with pytest.raises(ValueError, match=r"calibration\[0\] gives .* in the outputs of experts"):
        quantize_experts(moe, calibration=[correlated(50, 0)])
    assert isinstance(moe.experts.down_proj, torch.nn.Parameter)


@pytest.mark.parametrize("make", [mixtral, upcycled])
def test_each_layer_sees_what_the_quantized_ones_before_it_give(make, monkeypatch):
    """And at any time, rows of one layer alone are held."""
    model = make()
    inputs = [{"input_ids": torch.randint(3, 60, (4, 32))} for _ in range(3)]
    held, seen, recorders = [], [], []
    original = calibration_module.Calibration.rows_of

    def rows_of(self, experts, pending):
        is_quantized = [
            isinstance(one.down_proj, QuantizedProjection)
            for one in model.modules()
            if hasattr(one, "gate_up_proj") and hasattr(one, "down_proj")
        ]
        held.append(sum(is_quantized))
        assert not any(one() is not None for one in recorders)
        recorder = original(self, experts, pending)
        recorders.append(weakref.ref(recorder))
        seen.append([len(recorder.first), len(recorder.down)])
        return recorder

    monkeypatch.setattr(calibration_module.Calibration, "rows_of", rows_of)
    with torch.no_grad():
        exact = logits_of(model)
    quantize_experts(model, "int4", 32, calibration=inputs)
    assert held == [0, 1]
    assert seen == [[3, 3], [3, 3]]
    assert not any("expert_lora" in m._modules and m.expert_lora for m in model.modules())
    assert (logits_of(model) - exact).norm() < 0.5 * exact.norm()


def test_lora_stays_and_counts():
    model = add_expert_lora(mixtral(), 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    loras = [m.expert_lora for m in model.modules() if getattr(m, "expert_lora", None) is not None]
    exact = logits_of(model)
    quantize_experts(model, "int8", calibration=[{"input_ids": torch.randint(3, 60, (8, 32))}])
    found = [m.expert_lora for m in model.modules() if getattr(m, "expert_lora", None) is not None]
    assert [id(one) for one in found] == [id(one) for one in loras]
    assert (logits_of(model) - exact).norm() < 0.05 * exact.norm()


QUICK = ("mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize(
    "family",
    [
        family if str(family) in QUICK else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
    ],
    ids=str,
)
def test_experts_of_every_family_are_calibrated(family):
    model = tiny_model(family, **WIDTHS)
    experts = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "down_proj")]
    if any(m.down_proj.shape[1 if m.is_transposed else 2] % 32 for m in experts):
        pytest.skip(f"experts of {family} are no multiple of 32 wide")
    ids = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    codec = getattr(model, "codec_embedding", None)
    inputs = {"input_ids": ids} if codec is None else {"inputs_embeds": codec(ids).detach()}
    nearest = quantize_experts(copy.deepcopy(model), "int4", 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_experts(model, "int4", 32, calibration=[inputs])
    ours, other = (
        [m for m in one.modules() if isinstance(m, QuantizedProjection)] for one in (model, nearest)
    )
    assert len(ours) == len(other) > 0
    assert any(not torch.equal(a.values, b.values) for a, b in zip(ours, other, strict=True))
    assert logits_of(model).isfinite().all()
