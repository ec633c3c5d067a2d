"""The forecast of a run's duration: remaining work, and the few steps that are timed."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import soundfile
from PIL import Image

from examples.demo import forecast as module
from examples.demo.forecast import Forecast, forecast
from examples.demo.machine import Machine
from unimoe_model import processing
from unimoe_model.encoders import outside

MACHINE = Machine("CPU", 2, "AVX2", False, "fp32", processes=2, threads=1)
SECONDS = {
    "encode image": 0.5,
    "encode speech": 2.0,
    "connector speech": 1.0,
    "align": 0.25,
    "image": 1.0,
    "tune": 2.0,
    "eval": 0.125,
}
SENSES = """
import torch
from unimoe_model.encoders import FrozenEncoder


class Eyes(FrozenEncoder):
    def __init__(self):
        super().__init__("eyes", 3, picture_tokens=1)
        self.register_buffer("scale", torch.ones(1))
        self.freeze()

    @classmethod
    def pretrained(cls):
        return cls()

    def encode_pictures(self, pictures):
        return torch.stack([p.float().mean((0, 1))[None] for p in pictures]) * self.scale


class Ears(FrozenEncoder):
    sample_rate = 16000

    def __init__(self):
        super().__init__("ears", 16)
        self.register_buffer("scale", torch.ones(1))
        self.freeze()

    @classmethod
    def pretrained(cls):
        return cls()

    def encode_recording(self, samples, max_rows):
        return [samples.std() * self.scale.expand(max_rows, 16)]
"""
RECIPE = """
precision: fp32
model:
  vocab_size: 300
  sizes: &small {hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
                 num_attention_heads: 2}
encoders: {vision: "own_senses:Eyes", speech: "own_senses:Ears", audio: "own_senses:Ears"}
connectors:
  speech: {queries: 1, max_frames: 4, sizes: {d_model: 16, decoder_layers: 1,
           decoder_attention_heads: 2, decoder_ffn_dim: 16, max_target_positions: 4}}
  audio: {queries: 1, sizes: {<<: *small, cross_attention_frequency: 1}}
data: {picture: data/train/picture.jsonl, word: data/train/word.jsonl}
stages:
  - &stage {name: align, train: connectors, data: [picture, word], steps: 100, batch_size: 4,
            learning_rate: 1.0e-3}
  - {<<: *stage, name: image, train: {ffn: {lora: 2}}, steps: 30}
  - {<<: *stage, name: tune, assemble: {experts: [image, image], top_k: 1},
     train: {router: whole}, steps: 40}
evaluate:
  picture: {data: data/test/picture.jsonl, metric: exact, max_new_tokens: 9}
"""


@pytest.fixture(autouse=True)
def threads():
    """A forecast sets the threads of torch."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def line(kind, number):
    suffix = {"image": "png", "speech": "wav"}[kind]
    media = f"../media/{number}.{suffix}"
    return json.dumps({"id": number, kind: media, "question": "which?", "answer": "red"})


@pytest.fixture
def output(tmp_path):
    """The output of a run with its recipe and data: 70 pictures, 6 recordings, 8 questions."""
    for name in ("media", "train", "test"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "moe.yaml").write_text(RECIPE)
    for name, kind, numbers in (
        ("train/picture", "image", range(70)),
        ("train/word", "speech", range(6)),
        ("test/picture", "image", range(62, 70)),
    ):
        text = "".join(f"{line(kind, number)}\n" for number in numbers)
        (tmp_path / "data" / f"{name}.jsonl").write_text(text)
    return tmp_path


@pytest.fixture
def senses(output, monkeypatch):
    """Media, and encoders that take no time."""
    media = output / "data" / "media"
    for number in range(70):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(media / f"{number}.png")
    for number in range(6):
        soundfile.write(media / f"{number}.wav", np.linspace(-1, number / 9, 800), 16000)
    (output / "own_senses.py").write_text(SENSES)
    monkeypatch.setattr(outside, "_PERMITTED", set())
    monkeypatch.setattr(processing, "_BUILT", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_senses", None)


@pytest.fixture
def told(monkeypatch, output):
    """Forecasts the run; a rehearsal would take known times."""

    class Times:
        @staticmethod
        def of(title):
            return SECONDS.get(title, 0)

    monkeypatch.setattr(module, "_rehearse", lambda *_: Times)
    return lambda: forecast(output / "moe.yaml", 0, output, MACHINE)


def finish(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def test_what_is_done_needs_no_time(told, output):
    whole = {
        "features": 70 * 0.5 + 6 * 2.0,
        "stage 1": 100 * 0.25,
        "stages 2 and 3": 30 * 1.0 + 40 * 2.0 + 6 * 1.0,
        "evaluation": 8 * 0.125,
    }
    assert told().seconds == whole
    for file, part in (
        ("features.json", "features"),
        ("stages/align-0123/metrics.json", "stage 1"),
        ("stages/tune-4567/metrics.json", "stages 2 and 3"),
        ("evaluation.json", "evaluation"),
    ):
        finish(output / "moe" / file)
        del whole[part]
        assert told().seconds == whole


def test_a_language_model_of_its_own_takes_its_time(told, output, monkeypatch):
    raw = yaml.safe_load(RECIPE)
    raw["stages"].insert(0, raw["stages"][0] | {"name": "pretrain", "steps": 60})
    (output / "moe.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setitem(SECONDS, "pretrain", 3.0)
    seconds = told().seconds
    assert list(seconds)[:3] == ["features", "pretraining", "stage 1"]
    assert seconds["pretraining"] == 180
    assert seconds["stages 2 and 3"] == 116


def test_a_finished_run_is_not_rehearsed(told, output, monkeypatch):
    finish(output / "moe" / "evaluation.json")
    monkeypatch.setattr(module, "_rehearse", lambda *_: pytest.fail("rehearsed"))
    assert told() == Forecast({})


def below(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_rehearsal_times_all_parts_and_leaves_nothing(output, senses, monkeypatch, capfd):
    kept, rehearse = [], module._rehearse
    monkeypatch.setattr(module, "_rehearse", lambda *a: kept.append(rehearse(*a)) or kept[0])
    before = below(output)
    seconds = forecast(output / "moe.yaml", 0, output, MACHINE).seconds
    assert torch.get_num_threads() == MACHINE.cores
    assert list(seconds) == ["features", "stage 1", "stages 2 and 3", "evaluation"]
    assert all(kept[0].of(title) > 0 for title in SECONDS)
    assert below(output) == before
    assert not (output / "data" / "rehearsal").exists()
    assert capfd.readouterr() == ("", "")


def test_a_rehearsal_that_fails_leaves_nothing(output, senses):
    (output / "data" / "media" / "3.png").write_bytes(b"no picture")
    before = below(output)
    with pytest.raises(ValueError, match=r"3\.png must be a whole picture"):
        forecast(output / "moe.yaml", 0, output, MACHINE)
    assert torch.get_num_threads() == MACHINE.cores
    assert below(output) == before


@pytest.mark.parametrize(
    ("lines", "most", "count"),
    [
        ([line("image", i) for i in range(99)], None, 64),
        ([line("image", i // 3) for i in range(300)], None, 190),
        ([line("image", i) for i in range(9)], None, 9),
        (['{"question": "why?", "answer": "so"}'] * 9, None, 4),
        ([line("image", i) for i in range(99)], 5, 5),
    ],
)
def test_a_rehearsal_has_two_batches_of_an_encoder(tmp_path, lines, most, count):
    (tmp_path / "data" / "rehearsal").mkdir(parents=True)
    source, target = tmp_path / "own.jsonl", tmp_path / "data" / "rehearsal" / "few.jsonl"
    source.write_text("".join(f"{line}\n" for line in lines))
    assert module._few(source, target, most) == "data/rehearsal/few.jsonl"
    assert target.read_text().splitlines() == lines[:count]


def test_forecast_in_words():
    told = Forecast({"features": 199.2, "evaluation": 34.6})
    assert told.total == pytest.approx(233.8)
    assert str(told) == "about 3:54 in all: features 3:19, evaluation 0:35"


def test_the_first_advance_of_a_title_warms_up(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 13.0, 15.0, 20.0, 24.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    times = module._Times()
    times.start("tune", 4, 0)
    for _ in range(4):
        times.advance(1, loss="0.5")
    times.start("eval", 8, 0)
    times.advance(8)
    assert times.of("tune") == 2.0
    assert times.of("eval") == 0.5
    assert times.of("align") == 0
