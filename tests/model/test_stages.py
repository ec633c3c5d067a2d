"""Both arms through all stages, with random features in the shapes of the demo's encoders."""

import dataclasses
import functools

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from unimoe_kernels.testing import relative_error
from unimoe_model.data.collate import Collator
from unimoe_model.data.examples import Example, MediaBank, MediaRef
from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.training import stages
from unimoe_model.training.assemble import ffn_state
from unimoe_model.training.base import widen_ffns
from unimoe_model.training.language_model import read_sizes, save_language_model
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.query_states import query_state_bank
from unimoe_model.training.settings import ModelSettings, RunSettings, StageSettings
from unimoe_model.training.stages import Trainer

STAGES = ["pretrain", "align", "experts/image", "experts/audio", "tune"]
SHAPES = {"image": (9, 1280), "video": (8, 9, 1280), "speech": (6, 16), "audio": (5, 512)}


def stage(learning_rate=0.01, steps=2, **tasks):
    return StageSettings(Optimization(steps, 2, learning_rate), tasks)


def settings(**changes):
    fields = {
        "seed": 0,
        "precision": "fp32",
        "model": ModelSettings(
            text={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 128,
            },
            vocab_size=300,
            top_k=2,
            speech_max_frames=6,
            speech_num_queries=4,
            audio_num_queries=2,
            # Its default dropout stays on: a stage must resume exactly all the same.
            audio_connector={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 24,
            },
            load_balancing_coef=0.1,
        ),
        "pretrain": stage(text=1),
        "align": stage(image=1, speech=1, audio=1, video=1),
        "experts": {"image": stage(image=1, speech=1), "audio": stage(audio=1)},
        "tune": stage(steps=3, image=1, audio=1, text=1),
        "expert_lora_rank": 3,
        "expert_lora_alpha": 6,
        "lora_rank": 2,
        "lora_alpha": 4,
    }
    return RunSettings(**(fields | changes))


class Reporter:
    """Keeps which stages were begun; may raise when a stage reports a step."""

    def __init__(self, kill=None):
        self.begun, self._kill, self._stage, self._step = [], kill, None, 0

    def start(self, stage, total, done):
        self.begun.append((stage, done))
        self._stage, self._step = stage, done

    def advance(self, steps, **figures):
        self._step += steps
        if (self._stage, self._step) == self._kill:
            raise KeyboardInterrupt

    def finish(self):
        pass


@pytest.fixture(scope="module")
def tasks_and_bank():
    generator = torch.Generator().manual_seed(0)
    bank, tasks = MediaBank(), {"text": [Example("text", "a circle is red?", "yes")]}
    for kind, shape in SHAPES.items():
        bank.add(f"{kind}s", kind, torch.randn(4, *shape, generator=generator).half())
        tasks[kind] = [
            Example(kind, f"what shape {i}?", str(i), (MediaRef(kind, f"{kind}s", i),))
            for i in range(4)
        ]
    return tasks, bank


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(5)
    return WhisperDecoder(
        WhisperConfig(
            d_model=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=24,
            max_target_positions=8,
            vocab_size=20,
            pad_token_id=0,
        )
    )


@pytest.fixture
def trainer(tasks_and_bank, decoder, tokenizer, tmp_path, monkeypatch):
    """Makes a trainer that writes a checkpoint after every step."""
    often = functools.partial(stages.train_stage, checkpoint_seconds=-1.0)
    monkeypatch.setattr(stages, "train_stage", often)

    def build(arm="moe", folder="run", reporter=None, given=None, tasks=None):
        return Trainer(
            given or settings(),
            arm,
            tmp_path / folder,
            tmp_path / "base",
            tasks or tasks_and_bank[0],
            tasks_and_bank[1],
            tokenizer,
            decoder,
            reporter or Reporter(),
            torch.device("cpu"),
        )

    return build


def same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("arm", ["moe", "dense"])
def test_all_stages_run_and_are_not_run_again(trainer, tmp_path, arm):
    first, again = Reporter(), Reporter()
    model = trainer(arm, reporter=first).run()
    for path in (tmp_path / "run").rglob("trained.safetensors"):
        assert path.stat().st_mode == path.with_name("metrics.json").stat().st_mode
    names = STAGES if arm == "moe" else ["pretrain", "align", "experts", "tune"]
    assert [name for name, _ in first.begun] == names
    assert same(model, trainer(arm, reporter=again).run())
    assert again.begun == []
    for name in names:
        folder = tmp_path / "run" / name
        files = sorted(path.name for path in folder.iterdir() if path.is_file())
        assert files == ["metrics.json", "trained.safetensors"]
        assert not (folder / "checkpoint").exists()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_arms_have_the_same_active_width(trainer):
    moe, dense = trainer("moe", "a").run(), trainer("dense", "b").run()
    assert [m.experts.num_experts for _, m in moe.moe_layers()] == [2, 2]
    assert dense.model.language_model.layers[0].mlp.gate_proj.out_features == 2 * 48
    assert not list(dense.moe_layers())


@pytest.mark.parametrize("kill", [("align", 2), ("experts/audio", 1), ("tune", 2)])
def test_killed_run_ends_where_the_uninterrupted_one_does(trainer, kill):
    expected = trainer(folder="whole").run()
    with pytest.raises(KeyboardInterrupt):
        trainer(reporter=Reporter(kill)).run()
    torch.manual_seed(1234)
    resumed = Reporter()
    assert same(trainer(reporter=resumed).run(), expected)
    assert resumed.begun[0] == (kill[0], kill[1] - 1)


def test_killed_dense_run_ends_where_the_uninterrupted_one_does(trainer):
    expected = trainer("dense", "whole").run()
    with pytest.raises(KeyboardInterrupt):
        trainer("dense", reporter=Reporter(("experts", 3))).run()
    assert same(trainer("dense").run(), expected)


def test_stages_of_other_data_are_not_taken_for_this_run(trainer, tasks_and_bank):
    trainer().run()
    tasks = tasks_and_bank[0]
    changed = [dataclasses.replace(e, answer="9") for e in tasks["audio"]]
    with pytest.raises(ValueError, match=r"run/align holds .* other data"):
        trainer(tasks=tasks | {"audio": changed}).run()


def test_seeds_give_different_models(trainer):
    assert not same(trainer(folder="a").run(), trainer(folder="b", given=settings(seed=1)).run())


def test_stages_train_only_what_is_theirs(trainer, tmp_path):
    trainer().run()
    names = {
        name: set(load_file(tmp_path / "run" / name / "trained.safetensors")) for name in STAGES
    }
    assert not any("connector" in key for key in names["pretrain"])
    assert all("_connector." in key for key in names["align"])
    assert names["experts/image"]
    assert all(".mlp." in key and "lora_" in key for key in names["experts/image"])
    audio = {key for key in names["experts/audio"] if ".mlp." not in key}
    assert audio
    assert all(".audio_connector." in key for key in audio)
    for key in names["tune"]:
        assert "lora_" in key or ".router." in key or "_connector.projector." in key


def test_stage_3_starts_from_the_experts_and_their_connectors(trainer, tmp_path):
    """The audio expert is hardly trained, so it must be the dense FFN, not the image expert."""
    still = stage(learning_rate=1e-12, audio=1)
    made = trainer(given=settings(experts={"image": stage(image=1), "audio": still}))
    model = made.align()
    dense = ffn_state(model)
    collator = Collator(made.tokenizer, model.config, made._bank)
    moe = made._experts(model, collator)
    image, audio = (
        load_file(tmp_path / "run" / "experts" / kind / "trained.safetensors")
        for kind in ("image", "audio")
    )
    for layer, mlp in moe.moe_layers():
        down_DF = dense[f"{layer}.down_proj.weight"]
        name = f"model.language_model.layers.{layer}.mlp.down_proj.lora_{{}}.default.weight"
        update_DF = 6 / 3 * image[name.format("B")] @ image[name.format("A")]
        assert relative_error(mlp.experts.down_proj[0], down_DF + update_DF) < 1e-6
        assert relative_error(mlp.experts.down_proj[0], down_DF) > 1e-3
        assert relative_error(mlp.experts.down_proj[1], down_DF) < 1e-6
    state = moe.state_dict()
    connectors = {k: v for k, v in audio.items() if "_connector" in k}
    assert connectors.keys() == {k for k in state if ".audio_connector." in k}
    assert all(torch.equal(state[name], value) for name, value in connectors.items())


def test_run_of_other_settings_is_refused_and_kept(trainer, tmp_path):
    trainer().run()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"tune holds a stage of another configuration"):
        trainer(given=settings(lora_rank=3)).run()
    with pytest.raises(ValueError, match=r"pretrain holds a stage of another configuration"):
        trainer(given=settings(pretrain=stage(text=1, learning_rate=0.02))).run()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_cut_result_of_a_stage_is_refused(trainer, tmp_path):
    trainer().run()
    path = tmp_path / "run" / "align" / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"align.* cannot be read .* delete its folder"):
        trainer().run()


def test_tasks_of_all_stages_are_checked_before_anything_is_trained(
    trainer, tasks_and_bank, tmp_path
):
    tasks = {k: v for k, v in tasks_and_bank[0].items() if k != "audio"}
    with pytest.raises(ValueError, match=r"task \(audio\) must be one with examples"):
        trainer(tasks=tasks)
    with pytest.raises(ValueError, match=r"arm \('sparse'\) must be one of"):
        trainer("sparse")
    assert not (tmp_path / "run").exists()


def test_query_states_stand_for_features(trainer, tasks_and_bank, tmp_path):
    model = trainer().align().train()
    cache = FeatureCache(tmp_path / "states")
    bank = query_state_bank(model, tasks_and_bank[1], cache, "run", batch_size=3)
    assert bank.kinds == tasks_and_bank[1].kinds
    for unchanged in ("images", "audios"):
        assert torch.equal(bank.sets[unchanged], tasks_and_bank[1].sets[unchanged])
    states = bank.sets["speechs"]
    assert states.shape == (4, 4, 16)
    features = tasks_and_bank[1].sets["speechs"].float()
    expected = model.model.speech_connector.hidden_states(features)
    assert relative_error(states.float(), expected) < 1e-3  # float16
    only = query_state_bank(model, tasks_and_bank[1], cache, "run", {"speechs"})
    assert list(only.sets) == ["speechs"]
    assert torch.equal(only.sets["speechs"], states)


def test_query_states_are_of_one_stage_1_and_of_one_set_of_features(
    trainer, tasks_and_bank, tmp_path
):
    model = trainer().align()
    cache = FeatureCache(tmp_path / "states")
    first = query_state_bank(model, tasks_and_bank[1], cache, "run").sets["speechs"]
    with torch.no_grad():
        model.model.speech_connector.query_tokens.normal_()
    again = query_state_bank(model, tasks_and_bank[1], cache, "run").sets["speechs"]
    assert torch.equal(again, first)  # read, not computed
    other = query_state_bank(model, tasks_and_bank[1], cache, "other run").sets["speechs"]
    assert relative_error(other.float(), first.float()) > 1e-2
    changed = MediaBank()
    changed.add("speechs", "speech", -3 * tasks_and_bank[1].sets["speechs"])
    of_changed = query_state_bank(model, changed, cache, "run").sets["speechs"]
    assert relative_error(of_changed.float(), first.float()) > 1e-2


@pytest.fixture
def language_model(trainer, tokenizer, tmp_path):
    """Settings that start from a pretrained LLM, and the model that it was taken from."""
    model = trainer(folder="pretrained").align()
    save_language_model(model, tokenizer, tmp_path / "llm")
    sizes, vocab_size = read_sizes(tmp_path / "llm")
    sized = dataclasses.replace(settings().model, text=sizes, vocab_size=vocab_size)
    given = settings(model=sized, pretrain=None, language_model=str(tmp_path / "llm"))
    return given, model


def test_language_model_is_kept_in_float16(language_model, tmp_path):
    given, model = language_model
    expected = model.model.language_model.state_dict()
    stored = load_file(tmp_path / "llm" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert stored.keys() == {f"model.{name}" for name in expected}
    for name, tensor in expected.items():
        assert relative_error(stored[f"model.{name}"].float(), tensor) < 1e-3
    assert given.model.text["intermediate_size"] == 48


def test_arms_share_stage_1_and_start_as_one_function(language_model, trainer, tasks_and_bank):
    given, pretrained = language_model
    begun = []
    models = {}
    for arm in ("moe", "dense"):
        reporter = Reporter()
        models[arm] = trainer(arm, folder=f"lm-{arm}", reporter=reporter, given=given).align()
        begun += reporter.begun
    assert begun == [("align", 0)]
    assert same(models["moe"], models["dense"])
    words = models["moe"].get_input_embeddings().weight
    assert relative_error(words, pretrained.get_input_embeddings().weight) < 1e-3

    wide = widen_ffns(models["dense"], 2)
    assert wide.config.text_config.intermediate_size == 96
    assert models["dense"].config.text_config.intermediate_size == 48
    collator = Collator(trainer().tokenizer, wide.config, tasks_and_bank[1])
    batch = collator.training([own[0] for own in tasks_and_bank[0].values()])
    del batch["labels"]
    with torch.no_grad():
        outputs = [m.eval().hidden_states(**batch) for m in (wide, models["dense"])]
    assert outputs[1].abs().mean() > 0.1
    assert relative_error(*outputs) < 1e-5


def test_widening_is_refused_where_it_has_no_meaning(language_model, trainer):
    given, model = language_model
    with pytest.raises(ValueError, match=r"times \(0\) must be at least 1"):
        widen_ffns(model, 0)
    moe = trainer("moe", given=given).run()
    with pytest.raises(ValueError, match=r"model has num_experts \(2\), expected 0"):
        widen_ffns(moe, 2)


class Multiplications(TorchDispatchMode):
    """Records the dtypes of everything that multiplies matrices or convolves."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if any(part in name for part in ("mm", "linear", "conv", "attention", "moe_mlp", "lora")):
            tensors = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
            self.seen.setdefault(name, set()).update(t.dtype for t in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arm", ["moe", "dense"])
@pytest.mark.parametrize("has_llm", [False, True])
def test_nothing_multiplies_in_bfloat16_without_instructions(
    language_model, trainer, monkeypatch, arm, has_llm
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    muon = StageSettings(Optimization(2, 2, 0.01, muon_learning_rate=0.01), {"text": 1})
    given = language_model[0] if has_llm else settings(pretrain=muon)
    given = dataclasses.replace(given, precision="auto")
    with Multiplications() as multiplications:
        trainer(arm, folder="without", given=given).run()
    assert {"mm.default", "addmm.default"} <= multiplications.seen.keys()
    for name, dtypes in multiplications.seen.items():
        assert torch.bfloat16 not in dtypes, name
    assert ("grouped_mm.default" in multiplications.seen) == (arm == "moe")
