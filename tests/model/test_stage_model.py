"""The starting model of a stage: its parent, the FFNs of experts, and their connectors."""

import pytest
import torch

from unimoe_model.training.assemble import ffn_state
from unimoe_model.training.recipe import load_recipe
from unimoe_model.training.stage_model import kept_parts, stage_model

RECIPE = """
model: llama
data: {some: some.jsonl}
stages:
  - {name: base, train: connectors, data: [some], steps: 1, batch_size: 1, learning_rate: 1}
  - {name: eyes, from: base, train: {ffn: {lora: 2}, projectors.image: whole}, data: [some],
     steps: 1, batch_size: 1, learning_rate: 1}
  - {name: ears, from: base, train: [ffn, EARS], data: [some],
     steps: 1, batch_size: 1, learning_rate: 1}
  - {name: tune, assemble: {experts: [ears, model, eyes, ears], top_k: 2, layers: even
     CONNECTORS},
     train: router, data: [some], steps: 1, batch_size: 1, learning_rate: 1}
"""
CPU = torch.device("cpu")
LAYER = "model.language_model.layers.0"


@pytest.fixture
def models(tiny_model, tmp_path):
    """A dense model for each stage and the start, all weights different, and their folders."""
    models, folders = {}, {}
    for number, name in enumerate(("model", "base", "eyes", "ears")):
        models[name] = tiny_model(num_experts=0)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in models[name].parameters():
                parameter.normal_(generator=generator)
        if name != "model":
            folders[name] = tmp_path / name
            models[name].save_pretrained(folders[name])
    return models, folders


@pytest.fixture
def tuned(models, tmp_path):
    """The model that the stage `tune` starts from."""

    def build(ears="connectors.audio", connectors=""):
        path = tmp_path / "recipe.yaml"
        text = RECIPE.replace("EARS", ears).replace("CONNECTORS", connectors)
        path.write_text(text)
        recipe = load_recipe(path)
        start = lambda: models[0]["model"]  # noqa: E731
        return stage_model(recipe, recipe.stage("tune"), start, models[1], None, CPU)

    return build


def test_experts_are_the_ffns_of_their_stages_in_order(models, tuned):
    model = tuned()
    assert [layer for layer, _ in model.moe_layers()] == [0]
    assert model.config.expert_origins == ["ears", "model", "eyes", "ears"]
    ((_, moe),) = model.moe_layers()
    for slot, origin in enumerate(model.config.expert_origins):
        expected = ffn_state(models[0][origin])
        gate, up = moe.experts.gate_up_proj[slot].chunk(2)
        assert torch.equal(gate, expected["0.gate_proj.weight"])
        assert torch.equal(up, expected["0.up_proj.weight"])
        assert torch.equal(moe.experts.down_proj[slot], expected["0.down_proj.weight"])


def test_all_else_is_of_the_stage_that_trained_it_or_of_the_parent(models, tuned):
    for name, parameter in tuned().named_parameters():
        if ".layers.0.mlp." in name:
            continue
        origin = "base"
        if ".image_connector.projector." in name:
            origin = "eyes"
        elif ".audio_connector." in name:
            origin = "ears"
        assert torch.equal(parameter, models[0][origin].get_parameter(name)), name


def test_a_part_that_two_experts_trained_needs_a_choice(models, tuned):
    with pytest.raises(
        ValueError, match=r"stages\.tune\.assemble: stages ears and eyes both train"
    ):
        tuned(ears="connectors")
    model = tuned(ears="connectors", connectors=", connectors: {image: eyes}")
    for kind, origin in (("image", "eyes"), ("speech", "ears"), ("audio", "ears")):
        projector = model.model.connector(kind).projector
        expected = models[0][origin].model.connector(kind).projector
        for one, other in zip(projector.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)


LINEAGE = """
model: llama
data: {some: some.jsonl}
stages:
  - &one {name: base, train: connectors.image, data: [some], steps: 1, batch_size: 1,
     learning_rate: 1}
  - {<<: *one, name: eyes, from: base, train: ffn}
  - {<<: *one, name: hearing, from: base, train: [connectors.audio, attention]}
  - {<<: *one, name: ears, from: hearing, train: ffn}
  - {<<: *one, name: tune, from: PARENT, train: router,
     assemble: {experts: [eyes, ears] CONNECTORS}}
"""


@pytest.fixture
def kept(tmp_path):
    """The origins of weights that are not the parent's, by prefix of three names."""

    def found(text):
        (tmp_path / "recipe.yaml").write_text(text)
        recipe = load_recipe(tmp_path / "recipe.yaml")
        names = ["model.image_connector.a", "model.audio_connector.a", f"{LAYER}.self_attn.a"]
        return kept_parts(recipe, recipe.stage("tune"), names)

    return found


def test_an_expert_keeps_what_the_stages_before_it_trained(kept):
    text = LINEAGE.replace("CONNECTORS", "")
    audio, attention = "model.audio_connector.a", f"{LAYER}.self_attn.a"
    assert kept(text.replace("PARENT", "base")) == {audio: "ears", attention: "ears"}
    assert kept(text.replace("PARENT", "hearing")) == {}
    # Also of several experts that start from the same stage.
    both = text.replace("name: eyes, from: base", "name: eyes, from: hearing")
    both = both.replace("data: {some", "data:  {some")
    stages = both.split("  - ")
    stages[2], stages[3] = stages[3], stages[2]
    both = "  - ".join(stages).replace("PARENT", "base")
    assert kept(both) == {audio: "eyes", attention: "eyes"}


def test_what_two_branches_trained_needs_a_choice(kept):
    text = LINEAGE.replace(
        "name: eyes, from: base, train: ffn", "name: eyes, train: [ffn, attention]"
    )
    message = r"tune\.assemble: stages eyes and ears both train .*self_attn"
    with pytest.raises(ValueError, match=message):
        kept(text.replace("CONNECTORS", "").replace("PARENT", "base"))
    # The parent counts, too.
    text = LINEAGE.replace(
        "name: eyes, from: base, train: ffn", "name: eyes, train: connectors.audio"
    )
    with pytest.raises(ValueError, match=r"stages ears and eyes both train .*audio"):
        kept(text.replace("CONNECTORS", "").replace("PARENT", "eyes"))
    found = kept(
        text.replace("CONNECTORS", ", connectors: {audio: ears}").replace("PARENT", "eyes")
    )
    assert found == {"model.audio_connector.a": "ears", f"{LAYER}.self_attn.a": "ears"}


def test_the_router_is_drawn_from_the_seed(tuned):
    weights = [next(iter(tuned().moe_layers()))[1].router.weight for _ in range(2)]
    assert torch.equal(*weights)
    assert 0.1 < weights[0].std() < 0.3


def test_a_started_router_scores_null_and_shared_experts_zero(models, tmp_path, monkeypatch):
    weights = torch.randn(2, 2, 32)
    monkeypatch.setattr("unimoe_model.training.stage_model.router_weights", lambda *_: weights)
    monkeypatch.setattr(
        "unimoe_model.training.stage_model.mean_ffn_inputs", lambda *_: torch.zeros(2, 32)
    )
    options = "{moe_options: {num_null_experts: 1, num_shared_experts: 1, shared_scores: softmax}}"
    assembly = f"experts: [ears, eyes], top_k: 2, router_strength: 2, options: {options}"
    text = RECIPE.replace("EARS", "connectors.audio")
    text = text.replace(
        "experts: [ears, model, eyes, ears], top_k: 2, layers: even\n     CONNECTORS", assembly
    )
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    model = stage_model(recipe, recipe.stage("tune"), None, models[1], None, CPU)
    for index, layer in model.moe_layers():
        assert torch.equal(layer.router.weight[:2], weights[index])
        assert layer.router.weight.shape[0] == 4
        assert not layer.router.weight[2:].any()
