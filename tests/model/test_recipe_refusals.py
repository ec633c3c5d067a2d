"""Recipes that `unimoe train` refuses, each in a line that names the key."""

import re

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
from recipe_case import changed_case, write_case


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Models, media, data and the recipe; nothing in it is changed."""
    return write_case(tmp_path_factory.mktemp("case") / "files")


def edits():
    def edit(change, message):
        return pytest.param(change, message, id=message)

    def stage(number, **fields):
        return lambda raw: raw["stages"][number].update(fields)

    def without(number, key):
        return lambda raw: raw["stages"][number].pop(key)

    return [
        edit(lambda raw: raw.update(sead=1), r"unknown key 'sead'"),
        edit(stage(0, lerning_rate=1), r"stages.align has an unknown key 'lerning_rate'"),
        edit(stage(1, **{"from": "aling"}), r"stages.eyes.from \('aling'\) must be an earlier"),
        edit(stage(1, train=[]), r"stages.eyes.train \(\{\}\) must name the parts"),
        edit(stage(0, train="router"), r"train \(router\) has no parameter in this model"),
        edit(stage(0, train={"router": {"lora": 2}}), r"lora is not supported for router"),
        edit(
            stage(0, train={"ffn": {"lora": 2, "layers": 1}}),
            r"stages.align.train.ffn.layers \(1\) must be a list of layers",
        ),
        edit(
            stage(0, train={"ffn": {"lora": 2, "layers": [0, 0]}}),
            r"layers \(\[0, 0\]\) must be different numbers",
        ),
        edit(
            stage(0, train={"ffn": {"lora": 2, "layers": [9]}}),
            r"train \(ffn\): layers \(9\) must be below 2",
        ),
        edit(
            stage(3, train={"experts": {"lora": 2, "layers": [0]}}),
            r"layers is for ffn and attention, not experts",
        ),
        edit(
            lambda raw: raw["connectors"].update(image={"queries": 4}),
            r"connectors.image has an unknown key 'queries'; there are intermediate_size",
        ),
        edit(
            lambda raw: raw["connectors"].update(image={"intermediate_size": 0}),
            r"connectors.image: intermediate_size \(0\) must be at least 1",
        ),
        edit(
            lambda raw: raw["connectors"].update(image={"pooled_tokens": 0}),
            r"connectors.image: pooled_tokens \(0\) must be at least 1",
        ),
        edit(
            lambda raw: raw["connectors"].update(vocabulary_sharpness=0),
            r"connectors.vocabulary_sharpness \(0\) must be above 0",
        ),
        edit(
            lambda raw: raw.update(vocabulary_sharpness=20),
            r"unknown key 'vocabulary_sharpness'",
        ),
        edit(stage(0, data=["picture"]), r"stages.align.data \('picture'\) must be among data"),
        edit(stage(0, steps=0), r"stages.align: steps \(0\) must be at least 1"),
        edit(stage(0, widen=0.5), r"stages.align: widen \(0.5\) must be at least 1"),
        edit(stage(0, widen=float("inf")), r"stages.align: widen \(inf\) must be finite"),
        edit(
            lambda raw: raw["stages"][3]["assemble"].update(options={"top_p": 0.5}),
            r"stages.tune.assemble: options has an unknown key 'top_p'; there are load_balancing",
        ),
        edit(
            lambda raw: raw["stages"][3]["assemble"].update(
                options={"moe_options": {"mode": "sigmoid", "correction_bias": True}}
            ),
            r"options.moe_options.correction_bias is not supported",
        ),
        edit(
            lambda raw: raw["connectors"]["audio"]["sizes"].update(num_layers=3),
            r"connectors.audio.sizes has an unknown key 'num_layers': no field of Blip2QFormer",
        ),
        edit(
            lambda raw: raw["connectors"].update(speech={"sizes": {"layers": 3}}),
            r"connectors.speech.sizes has an unknown key 'layers': no field of WhisperConfig",
        ),
        edit(
            lambda raw: raw.update(model={"sizes": {"hidden_sise": 32}, "vocab_size": 300}),
            r"model: sizes has an unknown key 'hidden_sise': no field of LlamaConfig",
        ),
        edit(
            stage(0, objective="words", train="connectors", accumulation=2),
            r"stages.align: objective: words and accumulation \(2\) exclude each other",
        ),
        edit(
            stage(0, objective="words", train="connectors", part_tokens=99),
            r"stages.align: objective: words and part_tokens \(99\) exclude each other",
        ),
        edit(stage(0, epochs=1), r"stages.align must have either steps or epochs"),
        edit(without(0, "learning_rate"), r"stages.align.learning_rate is missing"),
        edit(stage(0, learning_rate="fast"), r"learning_rate \('fast'\) must be of type"),
        edit(
            lambda raw: raw["stages"][3]["assemble"].update(experts=["eyes", "nose"]),
            r"stages.tune.assemble.experts \('nose'\) must be an earlier stage",
        ),
        edit(
            lambda raw: raw["stages"][3]["assemble"].update(top_k=3),
            r"stages.tune.assemble: top_k \(3\) must be at least 1 and at most",
        ),
        edit(
            lambda raw: raw["data"].update(words="word.jsonl"),
            r"data.words.file \(.*word.jsonl\) must be a file",
        ),
        edit(
            lambda raw: raw["data"].update(pictures={"file": "pictures.json"}),
            r"60 media files are missing",
        ),
        edit(lambda raw: raw["encoders"].update(speech="clip"), r"encoders.speech: .*model_type"),
        edit(lambda raw: raw["encoders"].update(audio="ears:Nose"), r"cannot be imported"),
        edit(lambda raw: raw.update(model="./lama"), r"model.llm \(.*lama\) must be a folder"),
        edit(
            lambda raw: raw["evaluate"]["colors"].update(metric="exactly"),
            r"evaluate.colors.metric \('exactly'\) must be one of",
        ),
        edit(
            lambda raw: raw["evaluate"]["colors"].update(metric="vqa"),
            r"evaluate.colors: .*held_out.jsonl line 1.*answers \(1\) must be those of at least 4",
        ),
        edit(
            stage(0, train=["connectors.image"], data=["words"]),
            r"stages.align.train \(connectors.image\) requires image in the data .* hold speech",
        ),
        edit(
            lambda raw: (
                raw["stages"][3]["assemble"].update(experts=["eyes", "ears", "eyes"])
                or raw.update(parallel={"expert": 2})
            ),
            r"stages.tune: experts \(3\) must be a multiple of parallel.expert \(2\)",
        ),
        edit(lambda raw: raw.update(parallel={"data": 2}), r"requires 2 processes, and there is 1"),
    ]


@pytest.mark.parametrize(("change", "message"), edits())
def test_bad_recipes_are_refused_in_a_line_before_anything_is_written(
    case, run, tmp_path, change, message
):
    output = tmp_path / "run"
    path = changed_case(case, tmp_path / "changed", change)
    code, _, error = run("train", path, "--output", output)
    assert code == 1
    assert re.search(message, error), error
    assert not output.exists()
