"""Published names of the LLM: round trips, and what is refused."""

import pytest
import torch
from in_memory import from_published, to_published

OURS = "model.language_model.layers.0.mlp"


def published(num_experts=3):
    shapes = {"gate_proj": (5, 4), "up_proj": (5, 4), "down_proj": (4, 5)}
    state = {
        "model.embed_tokens.weight": torch.randn(7, 4),
        "model.norm.weight": torch.randn(4),
        "lm_head.weight": torch.randn(7, 4),
        "model.layers.0.mlp.gate.weight": torch.randn(num_experts, 4),
        "model.layers.1.mlp.gate_proj.weight": torch.randn(5, 4),
        "model.layers.1.input_layernorm.weight": torch.randn(4),
        "model.layers.1.self_attn.q_proj.weight": torch.randn(4, 4),
    }
    for expert in range(num_experts):
        for key, shape in shapes.items():
            name = f"model.layers.0.mlp.experts.{expert}.{key}.weight"
            state[name] = torch.randn(shape)
    return {name: value.bfloat16() for name, value in state.items()}


# Twelve, so that expert 10 does not come before expert 2.
@pytest.mark.parametrize("num_experts", [1, 4, 12])
def test_there_and_back(num_experts):
    before = published(num_experts)
    state = from_published(before | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert state[f"{OURS}.experts.gate_up_proj"].shape == (num_experts, 10, 4)
    assert state[f"{OURS}.router.weight"].shape == (num_experts, 4)
    assert "model.language_model.layers.1.mlp.gate_proj.weight" in state
    assert "lm_head.weight" in state
    after = to_published(state)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"model.layers.0.mlp.fc.weight": torch.ones(1)}),
            r"model\.layers\.0\.mlp\.fc\.weight is not a weight",
        ),
        (
            lambda s: s.pop("model.layers.0.mlp.experts.1.up_proj.weight"),
            r"model\.layers\.0\.mlp\.experts\.1\.up_proj\.weight is missing",
        ),
        (
            lambda s: s.update({"model.layers.0.mlp.experts.2.down_proj.weight": torch.ones(4, 6)}),
            r"experts\.2\.down_proj\.weight \(shape \[4, 6\], .* must have the shape .* \[4, 5\]",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if ".experts.1." in name],
            r"experts\.1\.gate_proj\.weight is missing",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = published()
    change(state)
    with pytest.raises(ValueError, match=message):
        from_published(state)


def test_unknown_names_do_not_go_out():
    with pytest.raises(ValueError, match=r"audio_connector.projector.weight has no name in the"):
        to_published({"model.audio_connector.projector.weight": torch.ones(1)}, hears="speech")
