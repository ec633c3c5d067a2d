"""The demo's report: accuracy, speed, worked examples, and the HTML page."""

import json
import shutil
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[eval]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import soundfile
from PIL import Image

from examples.demo import showcase
from examples.demo.baseline import blind_accuracy, exact_accuracy
from examples.demo.example import Example
from examples.demo.report import TASK_NAMES, Results, print_results, write_report
from examples.demo.settings import TASKS
from examples.demo.showcase import WorkedExample, show_examples
from examples.demo.throughput import layer_throughput
from unimoe_model.data.audio_io import load_wav
from unimoe_model.data.media_io import load_image, load_video


def example(answer, key=""):
    return Example("task", "what?", answer, blind_key=key)


def answered(folder, answers):
    text = "".join(json.dumps({"id": i, "answer": own}) + "\n" for i, own in enumerate(answers))
    (folder / "answers.jsonl").write_text(text)
    return folder


def test_accuracy_is_the_share_of_exact_answers(tmp_path):
    examples = [example("red"), example("a red circle"), example("no"), example("yes")]
    answered(tmp_path, ["red", "a red  circle", "No", "yes"])
    assert exact_accuracy(tmp_path, examples) == 0.5


def test_accuracy_needs_an_answer_an_example(tmp_path):
    with pytest.raises(ValueError, match=r"answers in .* \(0\) must be as many as examples \(0\)"):
        exact_accuracy(answered(tmp_path, []), [])
    with pytest.raises(ValueError, match=r"answers in .* \(1\) must be as many as examples \(2\)"):
        exact_accuracy(answered(tmp_path, ["a"]), [example("a"), example("b")])


def test_blind_answers_are_the_most_frequent_of_a_key():
    train = [
        *[example("yes", "k1")] * 2,
        example("no", "k1"),
        example("b", "k2"),
        example("a", "k2"),
        *[example("zebra", "k3")] * 4,
    ]
    for key, answer in (("k1", "yes"), ("k2", "a"), ("k3", "zebra"), ("unknown", "zebra")):
        assert blind_accuracy(train, [example(answer, key)]) == 1
        assert blind_accuracy(train, [example(answer, key), example("other", key)]) == 0.5


def test_throughput_times_three_layers():
    figures = layer_throughput(16, 24, 4, 2, 32, torch.device("cpu"), torch.float32, rounds=1)
    assert set(figures) == {"moe", "looped", "dense"}
    for layer in figures.values():
        assert set(layer) == {"forward_ms", "step_ms", "tokens_per_s"}
        assert all(value > 0 for value in layer.values())


@pytest.fixture
def results():
    values = {task: 0.5 + 0.05 * i for i, task in enumerate(TASKS)}
    speed = {"forward_ms": 1.0, "step_ms": 3.0, "tokens_per_s": 99.0}
    return Results(
        machine={"precision": "fp32", "threads": 1},
        forecast={"features": 12.5},
        accuracy=values,
        blind=dict.fromkeys(TASKS, 0.25),
        dense={task: value - 0.1 for task, value in values.items()},
        items=dict.fromkeys(TASKS, 500),
        seconds={"features": 1.5, "moe/tune": 20.0},
        throughput=dict.fromkeys(("moe", "looped", "dense"), speed),
        throughput_layer={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_experts": 4,
            "top_k": 2,
            "tokens": 32,
        },
        losses={
            "moe": {"align": [2.0, 1.0], "experts/image": [1.0]},
            "dense": {"align": [2.0, 1.5]},
        },
        routing={"text": torch.full((2, 4), 0.25), "image": torch.eye(4)[:2]},
        routed_tokens={"text": 40, "image": 12},
        top_k=2,
        experts=["image", "video", "speech", "audio"],
        seed=3,
    )


EXAMPLES = [
    WorkedExample("A picture", ("examples/p.png",), "is 1 < 2 & 3?", "yes", "<b>no</b>"),
    WorkedExample("A sound", ("examples/s.wav",), "which?", "piano", "piano"),
]


class Page(HTMLParser):
    """Collects text, and the src of everything the page shows, of a well-formed page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name == "src"]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_page_with_pictures_and_metrics(results, tmp_path):
    write_report(results, EXAMPLES, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("accuracy", "blind", "dense"):
        assert list(metrics[name]) == list(TASKS)
        assert metrics[name] == getattr(results, name)
    assert metrics["seconds"] == {"features": 1.5, "moe/tune": 20.0}
    assert metrics["mean"]["moe"] == pytest.approx(0.625)
    assert metrics["routing"]["text"] == [[0.25] * 4] * 2
    assert metrics["routed_tokens"] == {"text": 40, "image": 12}
    assert metrics["examples"] == [asdict(e) | {"files": list(e.files)} for e in EXAMPLES]
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    assert page.sources == [
        "accuracy.png",
        "examples/p.png",
        "examples/s.wav",
        "loss.png",
        "routing.png",
    ]
    for name in ("accuracy.png", "loss.png", "routing.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for shown in (*TASK_NAMES.values(), "<b>no</b>", "is 1 < 2 & 3?", "62.5", "stands in for CLIP"):
        assert shown in page.text
    assert not list(tmp_path.glob(".*"))


def test_table_and_examples_are_printed(results, tmp_path, capsys):
    print_results(results, EXAMPLES, tmp_path)
    shown = capsys.readouterr().out
    rows = {
        line.strip().rsplit(maxsplit=4)[0]: line.split()[-4:]
        for line in shown.splitlines()
        if line.endswith("     500")
    }
    assert list(rows) == list(TASK_NAMES.values())
    assert rows["spoken word"] == ["55.0", "45.0", "25.0", "500"]
    assert "answered: piano    (right: piano)" in shown
    assert str(tmp_path / "report.html") in shown


def test_every_evaluated_task_has_a_name():
    assert tuple(TASK_NAMES) == TASKS


class Answers:
    """Records the questions it is asked."""

    def __init__(self):
        self.asked = []

    def answer(self, question, **media):
        self.asked.append((question, media))
        return f"answer {len(self.asked)}"


@pytest.fixture
def held_out(tmp_path):
    """One item of each task that is shown, and one that is not."""
    folder = tmp_path / "media"
    folder.mkdir()
    Image.new("RGB", (9, 7), "red").save(folder / "a.png")
    for name, rate in (("speech", 16_000), ("audio", 44_100)):
        soundfile.write(folder / f"{name}.wav", np.linspace(-0.5, 0.5, 400), rate)
    frames = [Image.new("RGB", (6, 6), (30 * number, 0, 0)) for number in range(8)]
    frames[0].save(folder / "v.png", save_all=True, append_images=frames[1:])
    picture, speech = ("image", folder / "a.png"), ("speech", folder / "speech.wav")
    audio, video = ("audio", folder / "audio.wav"), ("video", folder / "v.png")
    first = {
        "image_qa": Example("image_qa", "what shape?", "circle", (picture,)),
        "spoken_question": Example("spoken_question", "", "red", (picture, speech), "what color?"),
        "sound": Example("sound", "which family?", "piano", (audio,)),
        "video": Example("video", "how?", "still", (video,)),
    }
    other = example("other")
    return {task: [own, other] for task, own in first.items()} | {"text": [other]}


def test_worked_examples_are_files_that_the_saved_model_was_asked_about(
    held_out, tmp_path, monkeypatch
):
    answers, folder = Answers(), tmp_path / "report" / "examples"
    models = []
    monkeypatch.setattr(
        showcase.Answerer, "from_pretrained", lambda path: models.append(path) or answers
    )
    shown = show_examples(tmp_path / "model", folder, held_out)
    assert models == [tmp_path / "model"]
    assert [(one.question, one.expected, one.answer) for one in shown] == [
        ("what shape?", "circle", "answer 1"),
        ("what color?", "red", "answer 2"),
        ("which family?", "piano", "answer 3"),
        ("how?", "still", "answer 4"),
    ]
    assert [question for question, _ in answers.asked] == [
        "what shape?",
        "",
        "which family?",
        "how?",
    ]
    asked = [path for _, media in answers.asked for own in media.values() for path in own]
    assert asked == [folder.parent / file for one in shown for file in one.files]

    # The files are copies: the report can be moved without the data.
    shutil.rmtree(tmp_path / "media")
    picture, again, question, sound, video = asked
    assert load_image(picture).shape == load_image(again).shape == (7, 9, 3)
    assert len(load_wav(question, 16_000)) == len(load_wav(sound, 44_100)) == 400
    assert load_video(video)[:, 0, 0, 0].tolist() == list(range(0, 240, 30))
