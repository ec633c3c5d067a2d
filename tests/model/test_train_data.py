"""`unimoe train` on shards, shuffled windows and packed rows, against the plain data."""

import io
import json
import shutil
import tarfile

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import torch
import yaml
from recipe_case import write_case
from safetensors.torch import load_file

from unimoe_model.data.packing import packed
from unimoe_model.training.batches import sample_order
from unimoe_model.training.recipe import load_recipe
from unimoe_model.training.recipe_data import RecipeData
from unimoe_model.training.stage_ids import stage_ids


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The recipe of `recipe_case`, and its pictures in three shards; nothing in it is changed."""
    path = write_case(tmp_path_factory.mktemp("case") / "files")
    folder = path.parent
    items = json.loads((folder / "pictures.json").read_text())
    for number in range(3):
        with tarfile.open(folder / f"pics-0{number}.tar", "w") as tar:
            for item in items[number * 20 : (number + 1) * 20]:
                name, image = f"{int(item['id']):04}", item.pop("image")
                for member, content in (
                    (f"{name}.json", json.dumps(item).encode()),
                    (f"{name}.png", (folder / "media" / image).read_bytes()),
                ):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def recipe(case, tmp_path):
    """Writes a copy of the recipe, without evaluations, that a function of its YAML edits."""

    def write(edit=lambda raw: None, name="recipe"):
        raw = yaml.safe_load(case.read_text())
        del raw["evaluate"]
        edit(raw)
        path = case.parent / f"{tmp_path.name}-{name}.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        return path

    return write


def in_shards(raw, **fields):
    raw["data"]["pictures"] = {"shards": "pics-{00..02}.tar", **fields}


def trained(output, stage):
    (folder,) = (output / "stages").glob(f"{stage}-*")
    weights = load_file(folder / "model" / "model.safetensors")
    return weights, json.loads((folder / "metrics.json").read_text())["losses"]


def test_shards_are_learned_as_the_file_and_share_its_features(recipe, run, tmp_path):
    features = tmp_path / "features"
    found = []
    for name, edit in (("file", lambda raw: None), ("shards", in_shards)):
        output = tmp_path / name
        path = recipe(edit, name)
        code, _, error = run(
            "train", path, "--output", output, "--features", features, "--stage", "align"
        )
        assert (code, error) == (0, "")
        indices = sorted(features.glob("image-*/index.jsonl"))
        found.append((trained(output, "align"), [file.read_text() for file in indices]))
    ((file, losses), stored), ((shards, other), stored_after) = found
    assert stored == stored_after != []
    assert losses == other
    assert all(torch.equal(file[name], shards[name]) for name in file)


def test_packed_rows_are_learned_as_the_samples_apart(recipe, run, tmp_path, monkeypatch):
    rows = []

    def counted(samples, *arguments):
        rows.append((len(samples), len(made := packed(samples, *arguments))))
        return made

    monkeypatch.setattr("unimoe_model.training.batches.packed", counted)
    losses = []
    for pack in (False, True):

        def edit(raw, pack=pack):
            raw["stages"][0] |= {"pack": pack, "max_length": 100}

        output = tmp_path / f"pack-{pack}"
        path = recipe(edit, str(pack))
        assert run("train", path, "--output", output, "--stage", "align")[0] == 0
        losses.append(trained(output, "align")[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(rows) == 6
    assert all(fewer < samples == 6 for samples, fewer in rows)


@pytest.mark.slow
def test_all_stages_train_on_packed_rows_of_shuffled_shards(recipe, run, tmp_path):
    def edit(raw):
        in_shards(raw, shuffle=7)
        raw["data"]["words"] = {"file": "words.jsonl", "shuffle": 4}
        for stage in raw["stages"]:
            stage |= {"pack": True, "max_length": 90}

    path = recipe(edit)
    code, _, error = run("train", path, "--output", tmp_path / "run")
    assert (code, error) == (0, "")
    assert len(trained(tmp_path / "run", "tune")[1]) == 6


def test_shuffled_shards_come_in_windows(recipe):
    loaded = load_recipe(recipe(lambda raw: in_shards(raw, shuffle=10)))
    data = RecipeData(loaded)
    assert data.shuffles["pictures"].parts == (20, 20, 20)
    stage = loaded.stage("eyes")
    order = sample_order(stage, data.samples, loaded.seed, data.shuffles)
    assert stage.optimization_for(data.counts()).steps == 5
    seen = [order.batch(step, 10) for step in range(6)]
    tars = [{sample.where.split(" ")[0] for sample in batch} for batch in seen]
    assert all(len(names) == 1 for names in tars)
    assert [names for at, names in enumerate(tars) if at % 2] == tars[::2]
    assert len({sample.id for batch in seen for sample in batch}) == 60


def test_what_shuffles_is_part_of_a_stage(recipe):
    ids = []
    for name, fields in (("all", {}), ("ten", {"shuffle": 10}), ("twenty", {"shuffle": 20})):
        loaded = load_recipe(recipe(lambda raw, own=fields: in_shards(raw, **own), name))
        ids.append(stage_ids(loaded, "fp32", RecipeData(loaded).digests))
    assert len({own["align"] for own in ids}) == len({own["eyes"] for own in ids}) == 3


def test_check_lists_shards(recipe, run, tmp_path):
    code, shown, error = run("train", recipe(in_shards), "--output", tmp_path / "run", "--check")
    assert (code, error) == (0, "")
    assert "data pictures: 60 samples, 60 image (3 shards)" in shown


def test_a_folder_of_any_name_and_lists_of_patterns(case, tmp_path):
    folder = tmp_path / "a[b]{1..2}*"
    shutil.copytree(case.parent, folder)
    raw = yaml.safe_load(case.read_text())
    raw["data"]["pictures"] = {"shards": ["pics-{02..02}.tar", "*-0[01].tar"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    samples = RecipeData(load_recipe(folder / "recipe.yaml")).samples["pictures"]
    assert [sample.id for sample in samples][::20] == ["40", "0", "20"]


def test_check_lists_missing_shards(recipe, run, tmp_path):
    path = recipe(lambda raw: raw["data"].update(pictures={"shards": "pics-{01..04}.tar"}))
    code, shown, _ = run("train", path, "--output", tmp_path / "run", "--check")
    assert code == 0
    missing = [line for line in shown.splitlines() if "missing: " in line]
    assert len(missing) == 2
    assert "data.pictures.shards (" in missing[0]
    assert missing[0].endswith("pics-03.tar) must be a file; there is none")
    code, _, error = run("train", path, "--output", tmp_path / "run")
    assert code == 1
    assert "pics-03.tar) must be a file; there is none" in error


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        ({"data": {"shards": []}}, "data.pictures.shards ([]) must name at least one tar"),
        ({"data": {"shards": 3}}, "data.pictures.shards (3) must be a name of tars or a list"),
        ({"data": {"shards": "x-{3..1}.tar"}}, "data.pictures.shards (x-{3..1}.tar) must have"),
        ({"data": {"shards": ["pics-00.tar", "*.tar"]}}, "pics-00.tar) must be named once"),
        ({"data": {"shards": "words.jsonl"}}, "words.jsonl) must be a whole, uncompressed tar"),
        ({"data": {"file": "x", "shards": "y"}}, "data.pictures: either file or shards must be"),
        ({"data": {}}, "data.pictures: either file or shards must be given"),
        ({"data": {"shards": "*.tar", "media": "media"}}, "shards and media exclude each other"),
        ({"data": {"shards": "*.tar", "shuffle": 0}}, "shuffle (0) must be at least 1"),
        ({"data": {"shards": "*.tar", "shuffle": "x"}}, "data.pictures.shuffle ('x') must be of"),
        ({"align": {"pack": True}}, "stages.align: pack requires max_length, the maximum tokens"),
        ({"align": {"pack": 2, "max_length": 9}}, "stages.align.pack (2) must be of type bool"),
        (
            {"tune": {"pack": True, "max_length": 9}, "options": {"modality_kl_coef": 0.1}},
            "stages.tune: pack requires modality_kl_coef (0.1) to be 0; its loss is a mean of each",
        ),
        (
            {
                "tune": {"pack": True, "max_length": 9},
                "options": {"modality_expert_coef": 1, "modality_experts": {"image": [0]}},
            },
            "stages.tune: pack requires modality_expert_coef (1) to be 0",
        ),
    ],
)
def test_what_is_refused(recipe, run, tmp_path, edit, error):
    def apply(raw):
        raw["data"]["pictures"] = edit.get("data", raw["data"]["pictures"])
        for stage in raw["stages"]:
            stage |= edit.get(stage["name"], {})
        raw["stages"][3]["assemble"]["options"] |= edit.get("options", {})

    code, _, shown = run("train", recipe(apply), "--output", tmp_path / "run")
    assert code == 1
    assert error in shown
    assert not (tmp_path / "run").exists()
