"""How long a run will take: what is left to do, and the steps that were timed."""

import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[demo]")
from unimoe_model.training import forecast as module
from unimoe_model.training.forecast import Forecast, forecast

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Forecasts a run whose rehearsal would take known times."""
    counts = {"easy_vqa-train": 100, "sprites-train": 10, "sprites-test": 4}
    per_item = {"easy_vqa": 0.5, "sprites": 2.0}
    stages = {"stage 1": 60.0, "stages 2 and 3": 300.0, "evaluation": 30.0}
    monkeypatch.setattr(module, "media_counts", lambda limits: counts)
    monkeypatch.setattr(module, "_encode_few", lambda *_: ({}, None, per_item))
    monkeypatch.setattr(module, "_rehearse_stages", lambda *_: dict(stages))

    class Settings:
        data, language_model = None, "folder"

    return lambda: forecast(Settings(), tmp_path, tmp_path / "features", CPU, 1)


def finish(folder, stage, file="metrics.json"):
    (folder / stage).mkdir(parents=True, exist_ok=True)
    (folder / stage / file).write_text("{}")


def test_what_is_done_needs_no_time(run, tmp_path):
    assert run().seconds == {
        "features": 78.0,
        "stage 1": 60.0,
        "stages 2 and 3": 300.0,
        "evaluation": 30.0,
    }
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "easy_vqa-train-0123.safetensors").touch()
    finish(tmp_path, "base/align")
    finish(tmp_path, "moe/tune")
    assert run().seconds == {"features": 28.0, "stages 2 and 3": 300.0, "evaluation": 30.0}


def test_a_finished_run_is_not_rehearsed(run, tmp_path, monkeypatch):
    (tmp_path / "features").mkdir()
    for name in ("easy_vqa-train", "sprites-train", "sprites-test"):
        (tmp_path / "features" / f"{name}-0123.safetensors").touch()
    for arm in ("moe", "dense"):
        finish(tmp_path, arm, "evaluation.json")
    monkeypatch.setattr(module, "_encode_few", lambda *_: pytest.fail("rehearsed"))
    assert run() == Forecast({})


def test_forecast_in_words():
    told = str(Forecast({"features": 199.2, "evaluation": 34.6}))
    assert told == "about 3:54 in all: features 3:19, evaluation 0:35"


def test_the_first_step_of_a_stage_warms_up(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 13.0, 15.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    times = module._StepTimes()
    times.start("tune", 4, 0)
    for _ in range(4):
        times.advance(1, loss="0.5")
    assert times.of("tune") == 2.0
