"""`unimoe eval`, from a data file to its files and printed output."""

import json

import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install .[eval]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[eval]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[eval]")

from unimoe_model import cli_options
from unimoe_model.cli import main
from unimoe_model.data.media_io import load_image
from unimoe_model.encoders import FrozenEncoder
from unimoe_model.evaluation.metrics import METRICS
from unimoe_model.evaluation.metrics.choice import with_options
from unimoe_model.evaluation.scoring import MAX_NEW_TOKENS
from unimoe_model.generation import Answerer


def evaluate(model, data, metric, output, *more):
    chosen = ("--model", model, "--data", data, "--metric", metric, "--output", output)
    return ("eval", *chosen, "--max-new-tokens", 4, *more)


def answers_in(output):
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def test_the_command_knows_metrics_and_defaults():
    assert tuple(METRICS) == cli_options.METRIC_NAMES
    asked = ["eval", "--model", "m", "--data", "d", "--metric", "vqa"]
    assert cli_options.command_parser().parse_args(asked).max_new_tokens == MAX_NEW_TOKENS


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "score a trained model" in shown
    assert "count tokens per expert and modality" in shown


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
    asked, row = [], Answerer.row

    def stopping(self, question="", **options):
        asked.append(question)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return row(self, question, **options)

    monkeypatch.setattr(Answerer, "row", stopping)
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


@pytest.mark.parametrize(
    "changed", ["data", "media_and_encoders", "model", "metric", "max_new_tokens"]
)
def test_eval_refuses_answers_of_another_run(checkpoint, lines, data, run, tmp_path, changed):
    model, path, output = checkpoint(), data(lines), tmp_path / "out"
    assert run(*evaluate(model, path, "exact", output))[0] == 0
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    metric, more = "exact", ()
    if changed == "data":
        lines[5]["answer"] = "another"
        data(lines)
    elif changed == "media_and_encoders":
        content = bytearray((tmp_path / "red.png").read_bytes())
        content[-1] ^= 1  # as many bytes
        (tmp_path / "red.png").write_bytes(content)
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


def test_eval_refuses_answers_with_other_encoders(
    checkpoint, lines, data, run, tmp_path, monkeypatch
):
    model, path, output = checkpoint(), data(lines), tmp_path / "out"
    assert run(*evaluate(model, path, "exact", output))[0] == 0
    monkeypatch.setattr(FrozenEncoder, "fingerprint", lambda own: "other")
    code, _, error = run(*evaluate(model, path, "exact", output))
    assert code == 1
    assert "another run, which differs in media_and_encoders (" in error


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
    monkeypatch.setattr(Answerer, "row", lambda self, question, **_: question[-300:])
    monkeypatch.setattr(Answerer, "answer_rows", lambda self, rows, *_: rows)
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
