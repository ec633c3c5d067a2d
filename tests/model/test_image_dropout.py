"""Dropout of channels of pictures' features, as a setting of a stage."""

from dataclasses import replace

import pytest
import torch

from unimoe_model.training.gradients import Objective
from unimoe_model.training.image_dropout import drop_image_channels
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.recipe import LanguageModel, Recipe, Stage, TrainedPart
from unimoe_model.training.recipe.schema import DataFile
from unimoe_model.training.stage_ids import stage_ids


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"image_features": (40, 3, 64), "video_features": (20, 2, 3, 64)}
    features = {k: 1 + torch.rand(v, generator=generator).to(dtype) for k, v in shapes.items()}
    return features | {"speech_features": torch.ones(2, 5, 8), "input_ids": torch.ones(1, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_share_of_channels_is_zero_everywhere_and_the_rest_is_scaled(dtype):
    given = inputs(dtype)
    torch.manual_seed(0)
    found = drop_image_channels(given, 0.25)
    assert found.keys() == given.keys()
    for key in ("image_features", "video_features"):
        assert found[key].dtype == dtype
        dropped = (found[key] == 0).flatten(1, -2)
        assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
        assert 0.2 < dropped.double().mean() < 0.3
        assert not torch.equal(dropped[0], dropped[1])
        scale = (found[key].double() / given[key].double())[found[key] != 0]
        assert (scale - 4 / 3).abs().max() < 2 * torch.finfo(dtype).eps
    for key in ("speech_features", "input_ids"):
        assert found[key] is given[key]


def test_without_a_probability_or_pictures_nothing_is_drawn():
    state = torch.get_rng_state()
    given = inputs()
    assert drop_image_channels(given, 0.0) is given
    spoken = {"speech_features": given["speech_features"]}
    assert drop_image_channels(spoken, 0.5) == spoken
    assert torch.equal(torch.get_rng_state(), state)


def test_the_objective_drops_channels_in_training(tiny_model):
    model = tiny_model(num_experts=0)
    image = model.config.media_token_ids["image"]
    ids = torch.tensor([[41, image, image, image, 42, 60, 61]])
    part = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(ids >= 60, ids, -100).masked_fill(ids == image, -100),
        "image_features": torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0)),
    }
    values = {}
    for p in (0.0, 0.5):
        objective = Objective(image_dropout=p)
        torch.manual_seed(1)
        values[p] = [objective.loss(model, part, None).item() for _ in range(2)]
    assert values[0.0][0] == values[0.0][1]
    assert values[0.5][0] != values[0.5][1]
    assert part["image_features"].abs().min() > 0


def stage(**options):
    settings = Optimization(steps=1, batch_size=1, learning_rate=1e-3)
    trained = (TrainedPart("attention"),)
    return Stage("start", "model", trained, ({"own": 1.0},), settings, **options)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_an_impossible_probability_is_refused(p):
    message = r"image_dropout \(.*\) must be at least 0 and less than 1"
    with pytest.raises(ValueError, match=message):
        stage(image_dropout=p)


def test_it_names_a_stage_only_where_it_is_set():
    def own(stage):
        recipe = Recipe("r.yaml", LanguageModel(llm="m"), {"own": DataFile("f")}, (stage,))
        return stage_ids(recipe, "fp32", {"own": "d"})["start"]

    usual = stage()
    assert own(replace(usual, image_dropout=0.5)) != own(usual)
    assert own(replace(usual, image_dropout=0.0)) == own(usual)
