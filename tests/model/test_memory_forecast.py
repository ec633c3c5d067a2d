"""Memory of a training step: the simulation on fake tensors against torch's allocator.

The measured peak is that of the CPU allocator's own events, which `torch.profiler` records: every
allocation and release from the construction of the model to the end of the second step, summed in
order. It is independent of operators, tensors and their use.
"""

import gc
import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import torch
import yaml
from recipe_case import write_case
from torch.profiler import ProfilerActivity, profile

from unimoe_model.data.encoded_media import EncodedMedia
from unimoe_model.encoders.outside import permit_encoder
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.batches import Batches, sample_order
from unimoe_model.training.forecast.devices import Layout, most_rows, peak
from unimoe_model.training.forecast.samples import (
    batch_shape,
    measure,
    packed_rows,
    tokens_of,
)
from unimoe_model.training.forecast.step import BatchShape, simulate_step
from unimoe_model.training.gradients import Objective
from unimoe_model.training.loop import train_stage
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.progress import SilentReporter
from unimoe_model.training.recipe import TrainedPart, load_recipe
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.starting_model import describe_start
from unimoe_model.training.trained import select_trained


def measured_peak(config, train, settings, batch, precision, folder):
    """Peak of the bytes that torch's allocator has given out, over two steps of a stage."""
    gc.collect()  # what earlier tests left would be freed, and counted, in the steps
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.manual_seed(0)
        model = UniMoEForConditionalGeneration(config)
        parameters = select_trained(model, train)
        model.set_attn_implementation("eager")
        steps = lambda step: batch()  # noqa: E731
        train_stage(
            model, parameters, steps, replace(settings, steps=2), folder, "run", "stage",
            SilentReporter(), Objective(precision=precision), checkpoint_seconds=1e9,
        )  # fmt: skip
        del model, parameters
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def text_config(**fields):
    return {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 500,
        "max_position_embeddings": 2048,
    } | fields


@pytest.fixture
def config(tiny_config):
    def build(text, **fields):
        defaults = {
            "vision_feature_size": 96,
            "vision_num_tokens": 20,
            "media_token_ids": {"image": 490, "video": 491, "speech": 492, "audio": 493},
        }
        return tiny_config(text_config=text_config(**text), **(defaults | fields))

    return build


def batch_of(config, shape, rows, parts=1):
    """Makes a batch of rows that are all as long as the shape says, but one."""

    def make():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 400, (rows, shape.length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["labels"] = torch.full_like(ids, -100)
        batch["labels"][:, -shape.answers :] = ids[:, -shape.answers :]
        batch["attention_mask"][-1, -1] = 0
        sizes = {
            "image": (config.vision_num_tokens, config.vision_feature_size),
            "speech": (config.speech_max_frames, config.speech_feature_size),
        }
        turns = len(shape.media)
        for turn, media in enumerate(shape.media):
            end = 1
            for kind, pieces in media.items():
                start, end = end, end + pieces * config.num_soft_tokens(kind)
                ids[turn::turns, start:end] = config.media_token_ids[kind]
                batch[f"{kind}_features"] = torch.randn(rows * pieces // turns, *sizes[kind])
        return [{k: v.clone() for k, v in batch.items()} for _ in range(parts)]

    return make


def whole(*parts):
    return tuple(TrainedPart(part) for part in parts)


LORA = (TrainedPart("experts", 8, 16.0), TrainedPart("attention", 8, 16.0), *whole("router"))
CASES = {
    "connectors of a dense model": (
        {}, {"num_experts": 0}, whole("connectors"),
        BatchShape(60, 20, ({"image": 2, "speech": 1},)), 6, "fp32", {},
    ),
    "LoRA on experts and attention": (
        {"hidden_size": 96, "intermediate_size": 320}, {"num_experts": 4}, LORA,
        BatchShape(100, 40, ({"image": 1}, {})), 4, "fp32", {"part": 2},
    ),
    "bf16, recomputed": (
        {"num_hidden_layers": 6}, {"num_experts": 0}, whole("language_model"),
        BatchShape(64, 10), 3, "bf16", {"gradient_checkpointing": True},
    ),
    "bf16 copies of frozen weights": (
        {"intermediate_size": 640}, {"num_experts": 4}, whole("embeddings"),
        BatchShape(10, 4), 2, "bf16", {},
    ),
    "long rows, large vocabulary": (
        {"vocab_size": 9000, "num_hidden_layers": 2}, {"num_experts": 0},
        (TrainedPart("ffn", 4, 8.0), *whole("projectors.image")),
        BatchShape(400, 250), 2, "fp32", {},
    ),
    "Muon, experts whole": (
        {"intermediate_size": 224}, {"num_experts": 2, "moe_layers": "even"},
        whole("language_model"), BatchShape(70, 20), 2, "fp32", {"muon_learning_rate": 1e-3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_simulated_peak_is_the_measured_one(case, config, tmp_path):
    text, fields, train, shape, rows, precision, options = CASES[case]
    options = dict(options)
    parts = options.pop("part", 1)
    own = config(text, **fields)
    settings = Optimization(steps=1, batch_size=rows, learning_rate=1e-3, **options)
    batch = batch_of(own, shape, rows, parts)
    measured = measured_peak(own, train, settings, batch, precision, tmp_path)
    step = simulate_step(own, train, settings, shape, precision, "eager")
    forecast = peak(step, rows, Layout(), parts > 1)
    # Batches are made before the step that uses them, and all parts of one at a time.
    assert sum(forecast.values()) == pytest.approx(measured, rel=0.05)
    weights = 4 * sum(p.numel() for p in _model(own, train).parameters())
    assert forecast["weights"] == weights


def _model(config, train):
    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
        select_trained(model, train)
    return model


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    "train", [pytest.param(whole("language_model", "connectors"), marks=pytest.mark.slow), LORA]
)
def test_layers_that_are_alike_are_simulated_once(recomputes, train, config):
    own = config({"num_hidden_layers": 9}, num_experts=4, moe_layers="even")
    settings = Optimization(1, 4, 1e-3, gradient_checkpointing=recomputes)
    shape = BatchShape(40, 10, ({"image": 1},))
    few, all_layers = (
        simulate_step(own, train, settings, shape, "bf16", "sdpa", every_layer=every)
        for every in (False, True)
    )
    for rows in (1, 7):
        live, expected = few.live(rows), all_layers.live(rows)
        assert live.sum((1, 2)).max() == expected.sum((1, 2)).max()
        assert live.max(0) == pytest.approx(expected.max(0), rel=1e-3)
        assert live[-1] == pytest.approx(expected[-1])


def test_checkpointing_and_fewer_rows_need_less(config):
    own = config({"num_hidden_layers": 6}, num_experts=0)
    shape = BatchShape(64, 10)
    peaks = [
        sum(peak(_step(own, whole("ffn"), shape, again), rows, Layout(), False).values())
        for again, rows in ((False, 8), (False, 2), (True, 8))
    ]
    assert peaks[0] > 2 * peaks[2]
    assert peaks[0] > 2 * peaks[1]


def _step(config, train, shape, recomputes=False, dispatched=False):
    settings = Optimization(1, 4, 1e-3, gradient_checkpointing=recomputes)
    return simulate_step(config, train, settings, shape, "fp32", "sdpa", dispatched)


def test_devices_divide_what_they_share(config):
    own = config({"intermediate_size": 640}, num_experts=4)
    step = _step(own, whole("language_model"), BatchShape(8, 4))
    one, data, expert, sharded, both = (
        peak(step, 1, layout, False)
        for layout in (
            Layout(), Layout(4), Layout(4, 4), Layout(4, 1, True), Layout(4, 4, True)
        )
    )  # fmt: skip
    model = _model(own, whole("language_model"))
    experts = 4 * sum(p.numel() for _, moe in model.moe_layers() for p in moe.experts.parameters())
    total = 4 * sum(p.numel() for p in model.parameters())
    assert one["weights"] == data["weights"] == total
    assert data["gradients"] == pytest.approx(3 * step.trained)
    assert expert["weights"] == pytest.approx(total - experts * 3 / 4)
    assert expert["optimizer"] < one["optimizer"] / 2
    layer, gathered = step.layer[0].sum(), step.outside
    assert sharded["weights"] == pytest.approx(total / 4 + gathered + 2 * layer)
    assert sharded["optimizer"] == pytest.approx(one["optimizer"] / 4)
    assert both["weights"] < sharded["weights"]


def test_rows_that_travel_to_experts_take_memory(config):
    own = config({}, num_experts=4)
    shape = BatchShape(64, 4)
    here, away = (_step(own, LORA, shape, dispatched=away) for away in (False, True))
    rows_bytes = 64 * 2 * 64 * 4
    more = (away.live(1).sum((1, 2)).max() - here.live(1).sum((1, 2)).max()) / rows_bytes
    assert 2 * 3 / 2 < more < 6 * 3


def test_most_rows_is_the_largest_that_fits(config):
    own = config({}, num_experts=0)
    step = _step(own, whole("ffn"), BatchShape(64, 10))

    def needed(rows):
        return sum(peak(step, rows, Layout(), rows < 32).values())

    found = most_rows(step, Layout(), needed(9), 32)
    assert found == 9
    assert most_rows(step, Layout(), needed(1) - 1, 32) == 0
    assert most_rows(step, Layout(), 1e15, 32) == 32


def test_check_says_what_a_recipe_needs(run, tmp_path):
    case = write_case(tmp_path / "case")
    output = tmp_path / "run"
    folder = output / "stages" / "ears-01234567"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"tokens": 3600, "seconds": 2}))
    code, shown, _ = run("train", case, "--check", "--output", output)
    assert code == 0
    stages = dict(re.findall(r"    stage (\w+): ([\d.]+) GiB: weights", shown))
    assert list(stages) == ["align", "eyes", "ears", "tune"]
    assert len(re.findall(r"  stage \w+: [\d,]+ tokens", shown)) == 4
    assert re.findall(r"stage (\w+): .* minutes at ([\d,]+) tokens/s", shown) == [("ears", "1,800")]
    # 60 pictures of 4 rows of 16 numbers, 2 bytes each.
    assert re.search(r"  disk: models [.\d]+ MB, checkpoint .* image features 0.0 MB", shown)
    assert "devices of" not in shown
    assert sorted(p.name for p in output.rglob("*")) == ["ears-01234567", "metrics.json", "stages"]


def test_check_says_on_which_devices_a_stage_fits(run, tmp_path):
    case = write_case(tmp_path / "case")
    raw = yaml.safe_load(case.read_text())
    raw["stages"], raw["evaluate"] = raw["stages"][:1], {}
    case.write_text(yaml.safe_dump(raw))
    options = ("--devices", "1,2", "--device-memory", "0.0004", "--tokens-per-second", "50")
    code, shown, _ = run("train", case, "--check", *options)
    assert code == 0
    cells = re.findall(r"      (data .*): without checkpointing .*?, (.*?); with .*?, (.*)", shown)
    assert [name for name, *_ in cells] == ["data 1", "data 2", "data 2, sharded"]
    assert [cell for _, *both in cells for cell in both] == ["does not fit"] * 6
    assert "minutes at 50 tokens/s" in shown
    _, shown, _ = run("train", case, "--check", "--devices", "2")
    assert shown.count("(whole batch)") == 4


def test_tokens_of_a_stage_are_those_that_training_counts(tmp_path, run):
    case = write_case(tmp_path / "case")
    recipe = load_recipe(case)
    permit_encoder("ears:Ears", case.parent)
    data = RecipeData(recipe)
    start = describe_start(recipe, data.texts())
    stage = recipe.stage("eyes")
    found = {"pictures": measure(data.samples["pictures"], start.processor, start.config, 128)}
    expected = 0
    for sample in data.samples["pictures"]:
        expected += len(start.processor.tokenize(sample.turns).ids) + 4 - 1
    assert tokens_of(stage, found, data.counts()) == expected
    shape = batch_shape(stage, found, data.counts(), start.config)
    assert shape.media == ({"image": 1},)


def test_packed_rows_are_those_of_training(tmp_path):
    case = write_case(tmp_path / "case")
    raw = yaml.safe_load(case.read_text())
    raw["stages"][1] |= {"pack": True, "max_length": 96}
    case.write_text(yaml.safe_dump(raw))
    recipe = load_recipe(case)
    permit_encoder("ears:Ears", case.parent)
    data = RecipeData(recipe)
    start = describe_start(recipe, data.texts())
    stage = recipe.stage("eyes")
    found = {"pictures": measure(data.samples["pictures"], start.processor, start.config, 96)}
    shape = batch_shape(stage, found, data.counts(), start.config)
    assert shape.length == 96
    picture = EncodedMedia((torch.zeros(4, 16),))
    batches = Batches(
        start.processor, sample_order(stage, data.samples, 0), stage,
        stage.optimization_for(data.counts()), lambda kind, path: picture,
    )  # fmt: skip
    (batch,) = batches(0)
    rows = packed_rows(stage, found, data.counts())
    assert rows < 12
    assert abs(rows - len(batch["input_ids"])) <= 1
    assert shape.media[0]["image"] * rows >= len(batch["image_features"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--devices", "4"), "devices, device_memory and tokens_per_second require check"),
        (("--check", "--devices", "0"), r"devices (0) must be 1 or more each"),
        (("--check", "--device-memory", "-1"), "device_memory (-1.0) must be above 0 GiB"),
        (("--check", "--tokens-per-second", "0"), "tokens_per_second (0.0) must be above 0"),
    ],
)
def test_bad_options_are_refused(options, message, run, tmp_path):
    code, _, error = run("train", tmp_path / "recipe.yaml", *options)
    assert code == 1
    assert message in error
