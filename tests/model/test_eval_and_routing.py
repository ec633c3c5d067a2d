"""The commands on files of one's own, from a data file to what they write and print."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[eval]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[eval]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[eval]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[eval]")
from matplotlib.axes import Axes
from PIL import Image

from unimoe_model import cli
from unimoe_model.cli import main
from unimoe_model.data.audio_io import save_wav
from unimoe_model.data.media_io import load_image
from unimoe_model.evaluation.metrics import METRICS
from unimoe_model.evaluation.metrics.choice import with_options
from unimoe_model.evaluation.routing import recorded_routing
from unimoe_model.evaluation.scoring import MAX_NEW_TOKENS
from unimoe_model.generation import Answerer
from unimoe_model.processing import UniMoEProcessor


@pytest.fixture
def checkpoint(tiny_model, tokenizer, tmp_path, encoders):
    """Saves a model and gives its folder; a model that samples unless it is told not to."""

    def save(name="model", **fields):
        model = tiny_model(**fields)
        model.generation_config.do_sample = True
        model.save_pretrained(tmp_path / name)
        UniMoEProcessor.from_config(model.config, tokenizer).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def lines(tmp_path):
    """Media of all kinds, and the lines of a data file about them."""
    for i, color in enumerate(("red", "blue", "white")):
        Image.new("RGB", (20, 30), color).save(tmp_path / f"{color}.png")
        times = np.arange(16, dtype=np.float32) / 16000
        save_wav(tmp_path / f"{i}.wav", 0.3 * (i + 1) * np.sin(2000 * times), 16000)
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:])
    asked = {"question": "what shape is it?", "answer": "a red circle"}
    return [
        {"id": "p", "image": "red.png", **asked},
        {"id": "pp", "image": ["blue.png", "white.png"], **asked},
        {"id": 3, "speech": "0.wav", "image": "white.png", "answer": "yes no"},
        {"id": 4, "audio": ["1.wav", "2.wav"], **asked},
        {"id": 5, "video": "video.gif", "question": "which word?", "answer": "yes"},
        {"id": 6, "question": "what? yes", "answer": "no"},
    ]


@pytest.fixture
def data(tmp_path):
    """Writes the lines of a data file."""

    def write(lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def run(capsys):
    """Runs a command; gives exit code, stdout and the line of the error, if there was one."""

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        errors = [line for line in shown.err.splitlines() if line.startswith("unimoe ")]
        assert len(errors) == (code == 1)
        return code, shown.out, "".join(errors)

    return call


def evaluate(model, data, metric, output, *more):
    chosen = ("--model", model, "--data", data, "--metric", metric, "--output", output)
    return ("eval", *chosen, "--max-new-tokens", 4, *more)


def answers_in(output):
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def test_the_command_knows_metrics_and_defaults():
    assert tuple(METRICS) == cli.METRIC_NAMES
    asked = ["eval", "--model", "m", "--data", "d", "--metric", "vqa"]
    assert cli._parser().parse_args(asked).max_new_tokens == MAX_NEW_TOKENS


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "score a trained model" in shown
    assert "which expert takes which modality" in shown


def test_eval_without_output_writes_under_runs(checkpoint, lines, data, run, tmp_path, monkeypatch):
    model = checkpoint()
    data(lines[:1])
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("eval", "--model", model, "--data", "data.jsonl", "--metric", "exact")
    assert code == 0
    assert out.endswith("on 1 items; runs/eval/data-exact/score.json\n")
    assert (tmp_path / "runs/eval/data-exact/answers.jsonl").exists()


def test_eval_answers_greedily_and_scores(checkpoint, lines, data, run, tmp_path):
    model, output = checkpoint(), tmp_path / "out"
    expected = [a["answer"] for a in answers_of(run, model, data(lines), tmp_path / "first")]
    # The first and third lines' answers become right.
    lines[0]["answer"], lines[2]["answer"] = expected[0], expected[2].upper()
    code, out, _ = run(*evaluate(model, data(lines), "exact", output))
    assert code == 0
    assert out == f"exact match 33.33 % on 6 items; {output / 'score.json'}\n"
    assert answers_in(output) == [
        {"id": line["id"], "answer": answer} for line, answer in zip(lines, expected, strict=True)
    ]
    assert len(set(expected)) > 2
    score = json.loads((output / "score.json").read_text())
    assert (score["metric"], score["items"]) == ("exact", 6)
    assert score["value"] == pytest.approx(2 / 6)
    assert [item["id"] for item in score["per_item"]] == [line["id"] for line in lines]
    assert [item["value"] for item in score["per_item"]] == [1, 0, 1, 0, 0, 0]


def answers_of(run, model, data, output):
    code, _, error = run(*evaluate(model, data, "exact", output))
    assert (code, error) == (0, "")
    return answers_in(output)


def test_eval_asks_what_generate_asks(checkpoint, lines, data, run, tmp_path):
    model = checkpoint()
    answers = answers_of(run, model, data(lines), tmp_path / "out")
    images = [load_image(tmp_path / f"{name}.png") for name in ("blue", "white")]
    answerer = Answerer.from_pretrained(model)
    answer = answerer.answer(lines[1]["question"], max_new_tokens=4, images=images)
    assert answers[1]["answer"] == answer


def test_eval_goes_on_where_it_was_stopped(checkpoint, lines, data, run, tmp_path, monkeypatch):
    model, path = checkpoint(), data(lines)
    whole = answers_of(run, model, path, tmp_path / "whole")
    asked, answer = [], Answerer.answer

    def stopping(self, question="", **options):
        asked.append(question)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(self, question, **options)

    monkeypatch.setattr(Answerer, "answer", stopping)
    output = tmp_path / "stopped"
    assert run(*evaluate(model, path, "exact", output))[0] == 130
    assert answers_in(output) == whole[:2]
    assert not (output / "score.json").exists()
    with (output / "answers.jsonl").open("a") as file:
        file.write('{"id": 3, "ans')
    assert run(*evaluate(model, path, "exact", output))[0] == 0
    assert answers_in(output) == whole
    assert len(asked) == 3 + 4
    scores = [(tmp_path / name / "score.json").read_text() for name in ("whole", "stopped")]
    assert scores[0] == scores[1]


def test_eval_of_a_finished_run_loads_no_model(checkpoint, lines, data, run, tmp_path, monkeypatch):
    model, path = checkpoint(), data(lines)
    answers_of(run, model, path, tmp_path / "out")
    (tmp_path / "out/score.json").unlink()
    monkeypatch.setattr(Answerer, "from_pretrained", None)
    answers_of(run, model, path, tmp_path / "out")
    assert (tmp_path / "out/score.json").exists()


def test_eval_with_a_limit_and_then_without(checkpoint, lines, data, run, tmp_path):
    model, path, output = checkpoint(), data(lines), tmp_path / "out"
    code, out, _ = run(*evaluate(model, path, "exact", output, "--limit", 2))
    assert code == 0
    assert "on 2 items" in out
    first = answers_in(output)
    assert len(first) == 2
    assert "on 6 items" in run(*evaluate(model, path, "exact", output))[1]
    assert answers_in(output)[:2] == first
    assert "on 2 items" in run(*evaluate(model, path, "exact", output, "--limit", 2))[1]
    assert len(answers_in(output)) == 6


@pytest.mark.parametrize("changed", ["data", "media_sizes", "model", "metric", "max_new_tokens"])
def test_eval_refuses_answers_of_another_run(checkpoint, lines, data, run, tmp_path, changed):
    model, path, output = checkpoint(), data(lines), tmp_path / "out"
    assert run(*evaluate(model, path, "exact", output))[0] == 0
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    metric, more = "exact", ()
    if changed == "data":
        lines[5]["answer"] = "another"
        data(lines)
    elif changed == "media_sizes":
        Image.new("RGB", (90, 90), "red").save(tmp_path / "red.png")
    elif changed == "model":
        model = checkpoint("model", text_config={"initializer_range": 0.3})
    elif changed == "metric":
        metric = "wer"
        pytest.importorskip("jiwer", reason="jiwer is not installed: pip install .[eval]")
    else:
        more = ("--max-new-tokens", 5)
    code, _, error = run(*evaluate(model, path, metric, output, *more))
    assert code == 1
    assert f"holds answers of another run, which differs in {changed} (" in error
    assert error.count(" there, ") == 1
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


def test_eval_by_every_metric(checkpoint, lines, data, run, tmp_path):
    pytest.importorskip("jiwer", reason="jiwer is not installed: pip install .[eval]")
    model = checkpoint()
    lines = [{key: value for key, value in line.items() if key != "answer"} for line in lines]
    right = {
        "vqa": {"answers": ["circle"] * 10},
        "exact": {"answers": ["circle", "red"]},
        "choice": {"answer": "B", "options": ["a square", "a circle"]},
        "wer": {"answer": "a red circle"},
        "cider": {"answers": ["a red circle", "one circle"]},
    }
    for metric, more in right.items():
        path = data([line | more for line in lines], f"{metric}.jsonl")
        code, out, error = run(*evaluate(model, path, metric, tmp_path / metric))
        assert (code, error) == (0, "")
        assert out.startswith(f"{METRICS[metric].title} ")
        score = json.loads((tmp_path / metric / "score.json").read_text())
        assert len(score["per_item"]) == 6
        assert ("without_choice" in score) == (metric == "choice")
        assert ("reference_words" in score) == (metric == "wer")


def test_choices_are_asked_with_their_options(checkpoint, data, run, tmp_path, monkeypatch):
    line = {"id": 1, "question": "what?", "options": ["x", "red"], "answer": "red"}
    monkeypatch.setattr(Answerer, "answer", lambda self, question, **_: question[-300:])
    output = tmp_path / "out"
    assert run(*evaluate(checkpoint(), data([line]), "choice", output))[0] == 0
    assert answers_in(output)[0]["answer"] == with_options("what?", ["x", "red"])


@pytest.mark.parametrize(
    ("metric", "fields", "error"),
    [
        ("vqa", {"answers": ["a", "b"]}, r"answers (2) must be those of at least 4 people"),
        ("exact", {}, "answer or answers is missing"),
        ("exact", {"answer": "The."}, "answer ('The.') must hold more than articles"),
        ("choice", {"answer": "A"}, "options is missing"),
        ("choice", {"answer": "A", "options": ["x"]}, "options (1) must be 2 to 26"),
        ("choice", {"answer": "C", "options": ["x", "y"]}, "answer ('C') must be the letter"),
        ("wer", {"answers": ["a", "b"]}, "answers (2) must be one for this metric"),
        ("wer", {"answer": "(um)"}, "answer ('(um)') must hold a spoken word"),
        ("cider", {"answers": ["."]}, "answer ('.') must be a caption with a word in it"),
    ],
)
def test_eval_checks_lines_for_the_metric(data, run, tmp_path, metric, fields, error):
    if metric == "wer":
        pytest.importorskip("jiwer", reason="jiwer is not installed: pip install .[eval]")
    path = data([{"id": 1, "question": "what?", **fields}])
    code, _, line = run(*evaluate(tmp_path / "none", path, metric, tmp_path / "out"))
    assert code == 1
    assert f"{path} line 1: {error}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--limit", 0), "limit (0) must be at least 1"),
        (("--max-new-tokens", -1), "max_new_tokens (-1) must be at least 1"),
        ((), "must be a folder with a config.json"),
    ],
)
def test_eval_with_wrong_arguments(lines, data, run, tmp_path, more, error):
    call = evaluate(tmp_path / "none", data(lines), "exact", tmp_path / "out", *more)
    code, _, line = run(*call)
    assert code == 1
    assert error in line
    assert not (tmp_path / "out").exists()


def test_cider_of_one_line_is_refused(checkpoint, lines, data, run, tmp_path):
    call = evaluate(checkpoint(), data(lines), "cider", tmp_path / "out", "--limit", 1)
    code, _, line = run(*call)
    assert code == 1
    assert "has 1 lines within the limit; metric cider needs at least 2" in line


def test_eval_names_the_line_of_damaged_media(checkpoint, lines, data, run, tmp_path):
    model, path, output = checkpoint(), data(lines), tmp_path / "out"
    (tmp_path / "white.png").write_bytes(b"no picture")
    code, _, line = run(*evaluate(model, path, "exact", output))
    assert code == 1
    assert f"{path} line 2 (id 'pp'): image file {tmp_path / 'white.png'} must be a whole" in line
    assert len(answers_in(output)) == 1


def test_wer_without_its_package(lines, data, run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    code, _, line = run(*evaluate(tmp_path / "none", data(lines), "wer", tmp_path / "out"))
    assert code == 1
    assert "metric wer needs the package jiwer: pip install 'unimoe[eval]'" in line


def route(model, data, output):
    return ("routing", "--model", model, "--data", data, "--output", output)


def test_routing_writes_shares_and_their_picture(checkpoint, lines, data, run, tmp_path):
    model, path, output = checkpoint(), data(lines), tmp_path / "new/out"
    code, out, _ = run(*route(model, path, output))
    assert code == 0
    written = json.loads((output / "routing.json").read_text())
    # 4 images and 1 video of 3 soft tokens, 1 clip of 4, 2 sounds of 2.
    media = {"image": 12, "video": 3, "speech": 4, "audio": 4}
    assert written["tokens"] == {"text": written["tokens"]["text"], **media}
    assert f"{written['tokens']['text']} text, 12 image, 3 video, 4 speech, 4 audio" in out
    assert written["layers"] == [0, 1]
    assert written["items"] == 6
    for share in written["shares"].values():
        assert np.shape(share) == (2, 4)
        assert np.sum(share, 1) == pytest.approx(1)
    answerer = Answerer.from_pretrained(model)
    images = [load_image(tmp_path / f"{name}.png") for name in ("red", "blue", "white", "white")]
    speech = [np.asarray(clip) for clip in [wav(tmp_path / "0.wav")]]
    counts = torch.zeros(4, dtype=torch.float64)
    for line, media in (
        (lines[0], {"images": images[:1]}),
        (lines[1], {"images": images[1:3]}),
        (lines[2], {"images": images[3:], "speech": speech}),
    ):
        inputs = answerer.processor.ask(line.get("question", ""), **media)
        with recorded_routing(answerer.model) as chosen, torch.no_grad():
            answerer.model.hidden_states(**inputs)
        is_image = inputs["input_ids"][0] == answerer.model.config.media_token_ids["image"]
        counts += torch.bincount(chosen[1][0][is_image].flatten(), minlength=4)
    assert written["shares"]["image"][1] == pytest.approx((counts / 24).tolist())
    with Image.open(output / "routing.png") as picture:
        assert picture.width > 500
    assert sorted(file.name for file in output.iterdir()) == ["routing.json", "routing.png"]


def wav(path):
    from unimoe_model.data.audio_io import load_wav

    return load_wav(path, 16000)


def test_routing_names_the_layers_that_have_experts(
    checkpoint, lines, data, run, tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(Axes, "set_yticks", lambda self, at, names, **_: shown.append(names))
    fields = {"text_config": {"num_hidden_layers": 3}, "moe_layers": "even"}
    assert run(*route(checkpoint(**fields), data(lines[:1]), tmp_path / "out"))[0] == 0
    written = json.loads((tmp_path / "out/routing.json").read_text())
    assert written["layers"] == [0, 2]
    assert list(written["shares"]) == ["text", "image"]
    assert shown == [["0", "2"]] * 2


def test_routing_of_a_dense_model_is_refused(checkpoint, lines, data, run, tmp_path):
    code, _, line = run(*route(checkpoint(num_experts=0), data(lines), tmp_path / "out"))
    assert code == 1
    assert "model must have MoE layers; this one is dense" in line
    assert not (tmp_path / "out").exists()


def test_routing_names_the_line_of_damaged_media(checkpoint, lines, data, run, tmp_path):
    (tmp_path / "0.wav").write_bytes(b"no recording")
    path = data(lines)
    code, _, line = run(*route(checkpoint(), path, tmp_path / "out"))
    assert code == 1
    assert f"{path} line 3 (id 3): {tmp_path / '0.wav'}: expected a readable recording" in line
    assert not (tmp_path / "out").exists()


def test_routing_without_matplotlib(lines, data, run, tmp_path, monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.delitem(modules, "unimoe_model.evaluation.plots", raising=False)
    for name in [name for name in modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(modules, name)
    monkeypatch.setitem(modules, "matplotlib", None)
    code, _, line = run(*route(tmp_path / "none", data(lines), tmp_path / "out"))
    assert code == 1
    assert "routing needs the package matplotlib: pip install 'unimoe[eval]'" in line
