"""The objective `words`: soft tokens come near the embeddings of the answer's words."""

from dataclasses import replace

import pytest
import torch

from unimoe_kernels.testing import relative_error
from unimoe_model.training.gradients import Objective, add_gradients
from unimoe_model.training.loop import train_stage
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.recipe import LanguageModel, Parallel, Recipe, Stage, TrainedPart
from unimoe_model.training.recipe.schema import DataFile
from unimoe_model.training.stage_ids import stage_ids
from unimoe_model.training.word_loss import (
    BAG_SHARPNESS,
    LENGTH_WEIGHT,
    SHARPNESS,
    Vocabulary,
    word_loss,
)


@pytest.fixture
def model(tiny_model):
    return tiny_model(num_experts=0)


@pytest.fixture
def batch(model):
    """Two samples: a picture with an answer of two tokens, a picture and a sound with one of one.

    Both answers end with the token that ends a turn.
    """
    generator = torch.Generator().manual_seed(0)
    image, audio = (model.config.media_token_ids[kind] for kind in ("image", "audio"))
    end = model.config.text_config.eos_token_id
    ids = torch.tensor(
        [
            [41, image, image, image, 42, 60, 61, end, 0],
            [image, image, image, audio, audio, 43, 62, end, 0],
        ]
    )
    labels = torch.full_like(ids, -100)
    labels[0, 5:8], labels[1, 6:8] = ids[0, 5:8], ids[1, 6:8]
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
        "image_features": torch.randn(2, 3, 12, generator=generator),
        "audio_features": torch.randn(1, 5, 10, generator=generator),
        "audio_features_mask": torch.ones(1, 5, dtype=torch.bool),
    }


def reference(model, batch):
    """The loss by loops in float64."""
    table = model.get_input_embeddings().weight.double()
    mean = table.mean(0)
    images = model.model.image_connector(batch["image_features"].double())
    sounds = model.model.audio_connector(
        batch["audio_features"].double(), batch["audio_features_mask"]
    )
    end = model.config.text_config.eos_token_id

    def log_shares(soft, sharpness):
        logits = []
        for embedding in table:
            cosines = [torch.cosine_similarity(t - mean, embedding - mean, dim=0) for t in soft]
            logits.append(sharpness * torch.stack(cosines).mean())
        return torch.stack(logits).log_softmax(0)

    total = torch.zeros((), dtype=torch.float64)
    for soft, answer in zip(images, ([60, 61], [62]), strict=True):
        share = log_shares(soft, BAG_SHARPNESS)
        total = total - sum(share[token] for token in answer)
    for token, wanted in zip(sounds[0], (62, end), strict=True):
        total = total - log_shares([token], SHARPNESS)[wanted]
    lengths = (table - mean).norm(dim=1).mean()
    away = (torch.cat([*images, sounds[0]]) - mean).norm(dim=1) / lengths - 1
    return total / 5 + LENGTH_WEIGHT * away.square().mean()


def test_loss_and_gradients_are_those_of_loops_in_float64(model, batch):
    connectors = [p for n, p in model.named_parameters() if "_connector" in n]
    loss = word_loss(model, batch)
    found = torch.autograd.grad(loss, connectors, allow_unused=True)
    model.double()
    doubles = [p for n, p in model.named_parameters() if "_connector" in n]
    expected = reference(model, batch)
    wanted = torch.autograd.grad(expected, doubles, allow_unused=True)
    assert expected > 1
    assert relative_error(loss, expected) < 1e-5
    compared = 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs.abs().max() > 1e-9:
            assert relative_error(ours, theirs) < 1e-4
            compared += 1
    assert compared > 5


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 0.02)])
def test_a_vocabulary_built_once_gives_the_same_loss_and_gradients(model, batch, precision, bound):
    connectors = [p for n, p in model.named_parameters() if "image_connector" in n]
    dtype = torch.bfloat16 if precision == "bf16" else None
    found = []
    for vocabulary in (None, Vocabulary.of(model, dtype)):
        loss = Objective("words", precision, vocabulary=vocabulary).loss(model, batch, None)
        found.append((loss, *torch.autograd.grad(loss, connectors)))
    for whole, kept in zip(*found, strict=True):
        assert whole.abs().max() > 1e-6
        assert relative_error(kept, whole) < bound
    other = Vocabulary.of(model)
    other.units.copy_(other.units.flip(0))
    loss = Objective("words", vocabulary=other).loss(model, batch, None)
    assert relative_error(loss, found[0][0]) > 0.01


def test_the_count_divides_the_sum(model, batch):
    batch["image_features"] = batch["image_features"].double()
    batch["audio_features"] = batch["audio_features"].double()
    model.double()
    whole = word_loss(model, batch)
    halved = word_loss(model, batch, torch.tensor(10))
    rest = 2 * halved - whole
    assert 0 < rest < whole  # the part about lengths, which no count divides


def test_the_embeddings_and_the_llm_get_no_gradient(model, batch):
    model.requires_grad_(True)
    add_gradients(model, batch, Objective("words"), Ranks(), "stage")
    for name, parameter in model.named_parameters():
        trained = name.startswith(("model.image_connector", "model.audio_connector"))
        assert trained or parameter.grad is None or not parameter.grad.any(), name
    assert model.model.image_connector.projector[0].weight.grad.any()


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match=r"name \('word'\) must be one of answers, words"):
        Objective("word")


def test_a_sample_without_media_is_refused(model, batch):
    ids = batch["input_ids"]
    ids[0, 1:4] = 40
    batch["image_features"] = batch["image_features"][1:]
    with pytest.raises(ValueError, match=r"objective \(words\) requires media .* row 0 has none"):
        word_loss(model, batch)


class Silent:
    """A reporter that shows nothing."""

    def start(self, *_): ...
    def advance(self, *_, **__): ...
    def finish(self): ...


def trained(model, batch, folder):
    """Trains the connectors on a batch; returns the losses."""
    parameters = {n: p for n, p in model.named_parameters() if "_connector" in n}
    settings = Optimization(steps=150, batch_size=2, learning_rate=1e-2)
    options = (lambda step: batch, settings, folder, "r", "words", Silent())
    return train_stage(model, parameters, *options, Objective("words")).losses


def nearest(model, soft):
    """The tokens whose embeddings are nearest in direction to soft tokens `[n, D]`."""
    table = model.get_input_embeddings().weight
    units = torch.nn.functional.normalize(table - table.mean(0), dim=1)
    return ((soft - table.mean(0)) @ units.T).argmax(1).tolist()


def test_trained_soft_tokens_point_at_the_words(model, batch, tmp_path):
    """And are as long as embeddings: the LLM has met such inputs."""
    losses = trained(model, batch, tmp_path)
    assert losses[-1] < 0.2 * losses[0]
    table = model.get_input_embeddings().weight
    soft = model.model.image_connector(batch["image_features"][:1])[0] - table.mean(0)
    likeliest = (soft.mean(0) @ (table - table.mean(0)).T).topk(2).indices
    assert set(likeliest.tolist()) == {60, 61}
    lengths = (table - table.mean(0)).norm(dim=1).mean().item()
    assert soft.norm(dim=1).mean().item() == pytest.approx(lengths, rel=0.3)


def test_pooled_tokens_of_pictures_are_in_order(tiny_model, batch):
    """And `vocabulary_sharpness` does not change the loss, which is about outputs of connectors."""
    model = tiny_model(num_experts=0, vision_pooled_tokens=3).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    soft = model.model.image_connector(batch["image_features"])
    sounds = model.model.audio_connector(batch["audio_features"], batch["audio_features_mask"])
    table = model.get_input_embeddings().weight
    mean = table.mean(0)
    end = model.config.text_config.eos_token_id

    def share(own, token):
        cosines = torch.cosine_similarity((own - mean)[None], table - mean, dim=1)
        return (SHARPNESS * cosines).log_softmax(0)[token]

    first = share(soft[0, 0], 60) + share(soft[0, 1], 61) + share(soft[0, 2], end)
    # The other row has the sound after its picture: five places for a word and the end.
    places = [*soft[1], *sounds[0]]
    second = share(places[0], 62) + sum(share(own, end) for own in places[1:]) / 4
    away = torch.cat([*soft, sounds[0]]) - mean
    lengths = away.norm(dim=1) / (table - mean).norm(dim=1).mean() - 1
    expected = LENGTH_WEIGHT * lengths.square().mean() - (first + second) / 5
    assert relative_error(word_loss(model, batch), expected) < 1e-9
    model.config.vocabulary_sharpness = 30.0
    assert relative_error(word_loss(model, batch), expected) < 1e-9


@pytest.fixture
def spoken(model):
    """Three sounds of two queries, with answers of one, two and three tokens."""
    audio, end = model.config.media_token_ids["audio"], model.config.text_config.eos_token_id
    ids = torch.tensor(
        [
            [audio, audio, 43, 60, end, 0, 0],
            [audio, audio, 43, 61, 60, end, 0],
            [audio, audio, 43, 62, 60, 61, end],
        ]
    )
    labels = torch.where((torch.arange(7) > 2) & (ids != 0), ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
        "audio_features": torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(1)),
        "audio_features_mask": torch.ones(3, 5, dtype=torch.bool),
    }


def test_queries_learn_the_order_and_where_an_answer_ends(model, spoken, tmp_path):
    trained(model, spoken, tmp_path)
    sounds = model.model.audio_connector(spoken["audio_features"], spoken["audio_features_mask"])
    end = model.config.text_config.eos_token_id
    assert [nearest(model, soft) for soft in sounds] == [[60, end], [61, 60], [62, 60]]


@pytest.mark.parametrize("said", ["word and end", "end", "word"])
def test_tokens_after_an_answer_count_as_one_end_token(model, spoken, said):
    """Two of them share the weight of one, and an answer without an end has none."""
    batch = {key: rows[:1] for key, rows in spoken.items()}
    end = model.config.text_config.eos_token_id
    missing = {"word and end": -1, "end": 60, "word": end}[said]
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == missing, -100)
    with torch.no_grad():
        soft = model.connector_outputs(batch["input_ids"], audio_features=batch["audio_features"])
        table = model.get_input_embeddings().weight
        units = torch.nn.functional.normalize(table - table.mean(0), dim=1)
        soft = soft[0, :2] - table.mean(0)
        shares = (SHARPNESS * torch.nn.functional.normalize(soft, dim=1) @ units.T).log_softmax(1)
        away = soft.norm(dim=1) / (table - table.mean(0)).norm(dim=1).mean() - 1
        expected = {
            "word and end": (shares[0, 60] + shares[1, end]) / 2,
            "end": shares[:, end].mean(),
            "word": shares[0, 60],
        }[said]
        found = word_loss(model, batch)
    assert relative_error(found, LENGTH_WEIGHT * away.square().mean() - expected) < 1e-5


def stage(parts=("connectors",), **options):
    trained = tuple(TrainedPart(part) for part in parts)
    settings = Optimization(steps=1, batch_size=1, learning_rate=1e-3)
    return Stage("start", "model", trained, ({"own": 1.0},), settings, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "sounds"}, r"objective \('sounds'\) must be one of answers, words"),
        ({"pack": True, "max_length": 9}, "objective: words and pack exclude each other"),
        ({"parts": ("projectors", "ffn")}, "words trains connectors and projectors; train has ffn"),
    ],
)
def test_what_does_not_go_with_the_objective_is_refused(options, message):
    stage(("projectors.image",), objective="words")
    with pytest.raises(ValueError, match=message):
        stage(**{"objective": "words", **options})


def recipe(own, **options):
    return Recipe("r.yaml", LanguageModel(llm="m"), {"own": DataFile("f")}, (own,), **options)


def test_several_processes_are_refused():
    recipe(stage(), parallel=Parallel(data=2))
    recipe(stage(objective="words"), parallel=Parallel(data=1))
    message = r"stages\.start\.objective \(words\) requires a run of one process; .* has 2"
    with pytest.raises(ValueError, match=message):
        recipe(stage(objective="words"), parallel=Parallel(data=2))


def test_the_objective_names_a_stage_only_where_it_is_not_the_usual_one():
    usual, words = stage(), stage(objective="words")
    ids = [stage_ids(recipe(own), "fp32", {"own": "d"})["start"] for own in (usual, words)]
    assert ids[0] != ids[1]
    again = stage_ids(recipe(replace(words, objective="answers")), "fp32", {"own": "d"})
    assert again["start"] == ids[0]


@pytest.mark.parametrize(
    ("version", "options"),
    [("_WORDS", {"objective": "words"}), ("_DISTILL", {"distill": ("own",)})],
)
def test_stages_of_an_earlier_loss_are_not_reused(version, options, monkeypatch):
    def ids():
        return [stage_ids(recipe(own), "fp32", {"own": "d"})["start"] for own in (usual, changed)]

    usual, changed = stage(), stage(**options)
    before = ids()
    monkeypatch.setattr(f"unimoe_model.training.stage_ids.{version}", 1)
    after = ids()
    assert after[0] == before[0]
    assert after[1] != before[1]
