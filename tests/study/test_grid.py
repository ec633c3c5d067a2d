"""`unimoe study` on a tiny recipe: the whole grid, stopped and continued, changed, and refused."""

import json
import shutil
from importlib.metadata import version

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[eval]")
import yaml
from recipe_case import write_case

from unimoe_model.cli import main
from unimoe_model.study import runs
from unimoe_model.study.reading import load_study
from unimoe_model.study.record import MOST_BYTES, read_record, write_record

STUDY = {
    "title": "A small study",
    "recipe": "recipe.yaml",
    "seeds": 2,
    "routed": 2,
    "page": "docs/study.md",
    "introduction": "First words.",
    "limits": "Last words.",
    "arms": {
        "mixed": {"title": "mixed experts", "stage": "tune"},
        "same": {
            "title": "same experts",
            "stage": "tune",
            "changes": {
                "tune": {"assemble": {"experts": ["align", "align"], "router_strength": None}}
            },
        },
        "eyes": {"stage": "eyes", "seeds": 1},
    },
    "claims": [
        {
            "name": "loss",
            "claim": "Mixed experts end with a lower loss.",
            "paper": "figure 3",
            "measure": {"kind": "final_loss", "window": 3},
            "arms": ["mixed", "same"],
            "expect": "less",
            "least": 0.0,
        },
        {
            "name": "routing",
            "claim": "Mixed experts specialise more.",
            "measure": {"kind": "routing_information"},
            "arms": ["mixed", "same"],
            "expect": "greater",
            "least": 0.01,
        },
    ],
    "tables": [{"title": "All arms", "arms": ["mixed", "same", "eyes"]}],
    "curves": ["mixed", "same"],
    "maps": ["mixed"],
}
RUNS = ["mixed-0", "same-0", "eyes-0", "mixed-1", "same-1"]


def write_study(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Models, media, data, the recipe and the study; nothing in it is changed."""
    folder = tmp_path_factory.mktemp("case") / "files"
    write_case(folder)
    write_study(folder)
    return folder


def run_study(folder, output, *options):
    return main(["study", str(folder / "study.yaml"), "--output", str(output), *options])


@pytest.fixture(scope="module")
def finished(case, tmp_path_factory):
    """The whole study, uninterrupted: its folder and its output."""
    folder = tmp_path_factory.mktemp("finished") / "files"
    shutil.copytree(case, folder)
    assert run_study(folder, folder / "out") == 0
    return folder


def metrics(folder):
    files = sorted((folder / "out" / "metrics").iterdir())
    return {path.stem: json.loads(path.read_text()) for path in files}


def test_every_run_leaves_a_small_file(finished):
    found = metrics(finished)
    assert sorted(found) == sorted(RUNS)
    for name, own in found.items():
        assert len(json.dumps(own)) < MOST_BYTES
        steps = 5 if name.startswith("eyes") else 6
        assert len(own["losses"]) == steps
        assert set(own["accuracy"]) == {"colors"}
        assert (own["routing"] is None) == name.startswith("eyes")
    assert found["mixed-0"]["losses"] != found["mixed-1"]["losses"]
    assert found["mixed-0"]["losses"] != found["same-0"]["losses"]
    assert found["mixed-0"]["routing"]["experts"] == ["eyes", "ears"]
    assert found["same-0"]["routing"]["experts"] == ["align", "align"]


def test_shared_stages_are_trained_once(finished):
    """Both arms start from one `align`; models of last stages are removed."""
    for seed in (0, 1):
        stages = [
            path.name.split("-")[0] for path in (finished / f"out/seed-{seed}/stages").iterdir()
        ]
        assert sorted(stages) == ["align", "ears", "eyes"]


def test_report_and_page(finished):
    page = (finished / "docs/study.md").read_text()
    for text in ("# A small study", "First words.", "Last words.", "figure 3", "mixed experts"):
        assert text in page
    assert page.count("| not decided |") == 2
    commit = metrics(finished)["mixed-0"]["commit"]
    assert f"unimoe {version('unimoe')}{commit and f' at {commit}'}" in page
    for picture in ("study-loss.png", "study-routing-mixed.png"):
        assert f"](images/{picture})" in page
        assert (finished / "docs/images" / picture).stat().st_size > 1000
    html = (finished / "out/report.html").read_text()
    assert html.count("<table>") == 2
    assert html.count('src="data:image/png;base64,') == 2


def test_the_page_is_recomputed_from_metrics_alone(finished, tmp_path):
    """Without data and models, as in another clone."""
    folder = tmp_path / "clone"
    (folder / "out").mkdir(parents=True)
    for name in ("study.yaml", "recipe.yaml"):
        shutil.copy(finished / name, folder)
    shutil.copytree(finished / "out/metrics", folder / "out/metrics")
    assert run_study(folder, folder / "out", "--report") == 0
    assert (folder / "docs/study.md").read_text() == (finished / "docs/study.md").read_text()


class CutError(Exception):
    """Ends a run like a kill, between two stages or runs."""


@pytest.mark.parametrize("after", [3])
def test_killed_and_continued_the_table_is_the_same(case, finished, tmp_path, monkeypatch, after):
    folder = tmp_path / "files"
    shutil.copytree(case, folder)
    kept = []

    def write_and_cut(*arguments):
        if len(kept) == after:
            raise CutError
        kept.append(write_record(*arguments))
        return kept[-1]

    monkeypatch.setattr(runs, "write_record", write_and_cut)
    with pytest.raises(CutError):
        run_study(folder, folder / "out")
    assert len(metrics(folder)) == after
    monkeypatch.setattr(runs, "write_record", write_record)
    assert run_study(folder, folder / "out") == 0
    assert claims_of(folder) == claims_of(finished)


def claims_of(folder):
    """The page without times."""
    page = (folder / "docs/study.md").read_text()
    return page[: page.index("## Runs")]


@pytest.mark.slow
def test_seeds_at_several_sittings(case, finished, tmp_path):
    folder = tmp_path / "files"
    shutil.copytree(case, folder)
    assert run_study(folder, folder / "out", "--seeds", "1") == 0
    assert sorted(metrics(folder)) == ["mixed-1", "same-1"]
    assert run_study(folder, folder / "out") == 0
    assert claims_of(folder) == claims_of(finished)


def test_only_what_a_change_concerns_is_trained_again(finished, tmp_path, capsys):
    folder = tmp_path / "files"
    shutil.copytree(finished, folder)
    before = metrics(folder)
    arms = STUDY["arms"] | {
        "same": STUDY["arms"]["same"]
        | {"changes": {"tune": {"assemble": {"experts": ["align", "align", "align"]}}}}
    }
    write_study(folder, arms=arms)
    assert run_study(folder, folder / "out", "--report") == 0
    assert capsys.readouterr().out.count("left out: ") == 2
    assert run_study(folder, folder / "out", "--check") == 0
    listed = capsys.readouterr().out
    assert listed.count("to be trained") == 2
    assert listed.count(": done") == 3
    assert metrics(folder) == before
    assert run_study(folder, folder / "out") == 0
    after = metrics(folder)
    assert [name for name in RUNS if after[name] != before[name]] == ["same-0", "same-1"]
    assert len(after["same-0"]["routing"]["experts"]) == 3


def test_records_of_other_data_are_left_out(finished, tmp_path, capsys):
    folder = tmp_path / "files"
    shutil.copytree(finished, folder)
    questions = folder / "held_out.jsonl"
    questions.write_text(questions.read_text() + "\n")
    assert run_study(folder, folder / "out", "--report") == 0
    assert "left out" not in capsys.readouterr().out  # reads no data
    assert run_study(folder, folder / "out", "--seeds", "1") == 0
    shown = capsys.readouterr().out
    assert shown.count("left out: ") == sum(name.endswith("-0") for name in RUNS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, "unknown key 'speed'; there are title, recipe, seeds"),
        ({"seeds": 0}, r"seeds \(0\) must be at least 1"),
        ({"seeds": "x"}, r"seeds \('x'\) must be of type int"),
        ({"alpha": 2.0}, r"alpha \(2\.0\) must be between 0 and 1"),
        ({"arms": {}}, "arms is missing"),
        ({"arms": {"a b": {"stage": "tune"}}}, r"arms \('a b'\) must be named by letters"),
        ({"arms": {"a": {"stage": "x"}}, "claims": []}, r"arms\.a \(x\) must name a stage of"),
        ({"recipe": "none.yaml"}, r"recipe \(.*none\.yaml\) must be a readable YAML file"),
        ({"maps": ["b"]}, r"maps \('b'\) must be among the arms: mixed, same, eyes"),
        ({"claims": [{"name": "x"}]}, r"claims\[0\]\.measure \(None\) must be a mapping"),
        ({"claims": [STUDY["claims"][0]] * 2}, "claims must have different names"),
        (
            {"claims": [STUDY["claims"][0] | {"expect": "more"}]},
            r"expect \('more'\) must be one of",
        ),
        (
            {"claims": [STUDY["claims"][0] | {"arms": ["same", "same"]}]},
            "must be two different arms",
        ),
        ({"claims": [STUDY["claims"][0] | {"least": -1}]}, r"least \(-1\) must be at least 0"),
    ],
)
def test_refusals(case, tmp_path, changes, message):
    shutil.copy(case / "recipe.yaml", tmp_path)
    if "arms" in changes:
        changes |= {"claims": [], "tables": [], "curves": [], "maps": []}
    with pytest.raises(ValueError, match=message) as raised:
        load_study(write_study(tmp_path, **changes))
    assert str(tmp_path) in str(raised.value)


def test_bad_changes_of_an_arm_are_refused(case, tmp_path):
    shutil.copy(case / "recipe.yaml", tmp_path)
    arms = {"a": {"stage": "tune", "changes": {"tune": {"speed": 1}}}}
    path = write_study(tmp_path, arms=arms, claims=[], tables=[], curves=[], maps=[])
    with pytest.raises(ValueError, match=r"arms\.a: .*stages\.tune has an unknown key 'speed'"):
        load_study(path)
    arms = {"a": {"stage": "tune", "evaluate": ["sounds"]}}
    path = write_study(tmp_path, arms=arms, claims=[], tables=[], curves=[], maps=[])
    with pytest.raises(ValueError, match=r"arms\.a\.evaluate \(sounds\) must be among colors"):
        load_study(path)


def test_refusals_of_the_command(case, finished, tmp_path, capsys):
    assert run_study(case, tmp_path / "out", "--seeds", "7") == 1
    assert "seeds (7) must be among 0 to 1" in capsys.readouterr().err
    assert run_study(case, tmp_path / "out", "--report") == 1
    assert "has no finished runs to report" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    damaged = tmp_path / "files"
    shutil.copytree(finished, damaged)
    (damaged / "out/metrics/mixed-0.json").write_text('{"arm": "mixed"}')
    assert run_study(damaged, damaged / "out") == 1
    assert "mixed-0.json) must have the keys of a run of a study" in capsys.readouterr().err


def test_too_many_steps_are_refused(finished, tmp_path):
    record = read_record(finished / "out/metrics/mixed-0.json")
    object.__setattr__(record, "losses", [1.2345] * 20_000)
    with pytest.raises(ValueError, match=r"metrics of mixed, seed 0 \(\d+ bytes\) must be at most"):
        write_record(tmp_path, record)
    assert not list(tmp_path.iterdir())
