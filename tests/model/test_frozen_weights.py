"""Frozen weights are converted once instead of in every forward, with the same result."""

from contextlib import nullcontext

import pytest
import torch

from unimoe_model.training import loop
from unimoe_model.training.frozen_weights import frozen_weights
from unimoe_model.training.gradients import Objective
from unimoe_model.training.loop import train_stage
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.recipe.parts import TrainedPart
from unimoe_model.training.trained import select_trained


class Silent:
    def start(self, *_): ...
    def advance(self, *_, **__): ...
    def finish(self): ...


@pytest.fixture
def batch(media_prompt, features):
    ids = media_prompt("image", "speech")
    labels = ids.clone()
    labels[:, :-4] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "image_features": features("image"),
        "speech_features": features("speech"),
    }


def trained(model, batch, folder):
    torch.manual_seed(0)
    parameters = select_trained(model, [TrainedPart(p, 2, 4) for p in ("attention", "experts")])
    settings = Optimization(steps=4, batch_size=1, learning_rate=1e-2)
    given = (lambda step: batch, settings, folder, "run", "stage", Silent())
    return train_stage(model, parameters, *given, Objective(precision="bf16")).losses


def test_training_is_the_same_bit_by_bit(tiny_model, batch, tmp_path, monkeypatch):
    """And the frozen weights are what they were, in their dtype."""
    models = [tiny_model(), tiny_model()]
    models[1].load_state_dict(models[0].state_dict())
    before = {name: own.clone() for name, own in models[0].state_dict().items()}
    losses = [trained(models[0], batch, tmp_path / "converted")]
    monkeypatch.setattr(loop, "frozen_weights", lambda *_: nullcontext())
    losses.append(trained(models[1], batch, tmp_path / "cast"))
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.9 * losses[0][0]
    after, expected = (model.state_dict() for model in models)
    for name, own in after.items():
        assert torch.equal(own, expected[name])
        kept = name.replace(".base_layer", "")
        if kept in before:
            assert own.dtype == before[kept].dtype
            assert torch.equal(own, before[kept])


def test_only_frozen_weights_of_matmuls_are_converted(tiny_model):
    model = tiny_model()
    model.requires_grad_(False)
    layer = model.model.language_model.layers[0]
    attention, experts = layer.self_attn, layer.mlp.experts
    attention.k_proj.weight.requires_grad_(True)
    model.lm_head.weight = model.get_input_embeddings().weight
    with frozen_weights(model, torch.bfloat16):
        assert attention.q_proj.weight.dtype == experts.down_proj.dtype == torch.bfloat16
        others = (attention.k_proj, layer.input_layernorm, layer.mlp.router, model.lm_head)
        assert all(own.weight.dtype == torch.float32 for own in others)
    assert {own.dtype for own in model.parameters()} == {torch.float32}
    with pytest.raises(ZeroDivisionError), frozen_weights(model, torch.bfloat16):
        1 / 0  # noqa: B018
    assert {own.dtype for own in model.parameters()} == {torch.float32}
