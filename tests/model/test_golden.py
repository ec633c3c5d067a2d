"""Numbers of the published code, at tiny sizes: `UNIMOE_GOLDEN` or else what tests/golden keeps.

Each case is a folder with a `case.json`; sizes, names and numbers all come from there, so that
another set of the same form is checked without a change here.
"""

import json
import os
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlamaTokenizer, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unimoe_kernels import LoopedMoE, MoE, TopKRouter, topk_router, unstack_experts
from unimoe_kernels.testing import relative_error
from unimoe_model.checkpoints import from_published, to_published
from unimoe_model.configuration import MEDIA_KINDS, UniMoEConfig
from unimoe_model.connectors import AudioConnector, ImageConnector, SpeechConnector
from unimoe_model.encoders.beats import BeatsConfig, BeatsEncoder, clip_chunks, coarsened, own_names
from unimoe_model.encoders.clip import LAYER, ClipImageEncoder
from unimoe_model.encoders.fbank import beats_fbank
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.prompt import VICUNA_SYSTEM, conversation_text
from unimoe_model.tokenization import IGNORED, tokenize_conversation, tokenize_text, truncated

GOLDEN = Path(os.environ.get("UNIMOE_GOLDEN") or Path(__file__).parents[1] / "golden")
OUTPUT, GRADIENT = 1e-5, 1e-4
LLAMA_FIELDS = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
)


class Case:
    """The files of one case."""

    def __init__(self, name):
        self.folder = GOLDEN / name
        if not self.folder.is_dir():
            pytest.skip(f"{GOLDEN} has no {name}")
        text = (self.folder / "case.json").read_text(encoding="utf-8")
        self.config, self.checks = (json.loads(text).get(key) for key in ("config", "checks"))

    def tensors(self, name):
        return load_file(self.folder / f"{name}.safetensors")

    def below(self, name, prefix):
        """Tensors whose names begin with the prefix, without it."""
        found = self.tensors(name).items()
        return {k.removeprefix(prefix): v for k, v in found if k.startswith(prefix)}


def test_moe_layer():
    case = Case("moe_layer")
    sizes = case.config["hidden_size"], case.config["intermediate_size"]
    for name, facts in case.checks.items():
        looped = LoopedMoE(*sizes, facts["num_experts"], facts["top_k"])
        looped.load_state_dict(case.below(name, "state."))
        io, grads = case.tensors(name), case.below(name, "grad.state.")
        moe = MoE.from_looped(looped)
        for layer in (looped, moe):
            x = io["in.hidden_states"].requires_grad_()
            x.grad = None
            y = layer(x)
            y.backward(io["in.grad_output"])
            assert relative_error(y, io["out.hidden_states"]) < OUTPUT, name
            assert relative_error(x.grad, io["grad.in.hidden_states"]) < GRADIENT, name
        routed = moe.router(io["in.hidden_states"])
        assert torch.equal(routed.ids.long(), io["out.selected_experts"]), name
        assert relative_error(routed.scores, io["out.routing_weights"]) < OUTPUT, name
        assert routed.tokens_per_expert.tolist() == facts["tokens_per_expert"]
        gradients = [moe.experts.gate_up_proj.grad, moe.experts.down_proj.grad]
        found = {"gate.weight": moe.router.weight.grad}
        for expert, state in enumerate(unstack_experts(*gradients)):
            found |= {f"experts.{expert}.{key}": value for key, value in state.items()}
        own = {key: p.grad for key, p in looped.named_parameters()}
        assert found.keys() == own.keys() == grads.keys()
        for key, expected in grads.items():
            for actual in (found[key], own[key]):
                if actual is None or not expected.any():
                    # An expert without tokens, or a router of one choice.
                    assert actual is None or not actual.any(), key
                else:
                    assert relative_error(actual, expected) < GRADIENT, key


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("top2_nodrop", "nodrop"),
        ("top2_nodrop_small", "nodrop_small"),
        ("top2_drop_cf1", "drop_cf1"),
        ("top1_nodrop", None),
    ],
)
def test_gates_of_the_eight_expert_code(name, check):
    case = Case("gate_8e")
    io, facts = case.tensors(name), case.checks.get(check, {})
    logits = io["in.logits"]
    num_experts = case.config["num_experts"]
    top_k = 2 if name.startswith("top2") else 1
    dropping = {
        "capacity_factor": facts.get("capacity_factor"),
        "min_capacity": facts.get("min_capacity"),
        "capacity_renorm": True,
    }
    router = TopKRouter(
        num_experts,
        num_experts,
        top_k,
        mode="softmax_topk_renorm" if top_k == 2 else "softmax_topk",
        balance="first",
        **(dropping if facts.get("drop_tokens") else {}),
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    x = logits.clone().requires_grad_()
    routed = router(x)
    # Slots of an expert's buffer are theirs alone: they follow from who was dispatched.
    weights, slots = io["out.combine_weights"], io["out.dispatch_mask"].int().argmax(2)
    kept = routed.ids < num_experts
    ids = routed.ids.long().masked_fill(~kept, 0)
    dense = torch.zeros_like(logits).scatter_add(1, ids, routed.scores.masked_fill(~kept, 0))
    assert relative_error(dense, weights.sum(2)) < OUTPUT
    assert torch.equal(dense > 0, io["out.dispatch_mask"].any(2))
    assert relative_error(routed.load_balancing_loss, io["out.l_aux"]) < OUTPUT
    assert x.grad is None
    assert torch.equal(x.detach(), logits)
    upstream = io["in.upstream_on_combine"].gather(2, slots.unsqueeze(2))[..., 0]
    (routed.load_balancing_loss + (upstream * dense).sum()).backward()
    assert relative_error(x.grad, io["grad.logits(l_aux + sum(R*combine))"]) < GRADIENT


def test_noise_for_the_second_choice_stays_in_the_published_logits():
    io = Case("gate_8e").tensors("top2_given_noise")
    logits, noise = io["in.logits"], io["in.gumbel_noise"]
    # The published gate adds it in place, so that the other losses see noisy logits.
    assert relative_error(io["out.logits_after_call"], logits + noise) < OUTPUT
    before = logits.clone()
    routed = topk_router(logits, 2, mode="softmax_topk_renorm", balance="first")
    assert torch.equal(logits, before)
    assert relative_error(routed.load_balancing_loss, io["out.l_aux"]) < OUTPUT
    first = io["out.dispatch_mask"].any(2).gather(1, routed.ids[:, :1].long())
    assert first.all()


@pytest.mark.parametrize("name", ["llama_moe_all", "llama_moe_interval"])
def test_language_model(name):
    case = Case(name)
    fields = dict(case.config)
    moe_layers = case.checks.get("moe_layers", list(range(fields["num_hidden_layers"])))
    config = UniMoEConfig(
        text_config=LlamaConfig(**{k: v for k, v in fields.items() if k in LLAMA_FIELDS}),
        num_experts=fields["num_experts"],
        num_experts_per_tok=fields["num_experts_per_tok"],
        moe_layers=moe_layers,
        media_token_ids={kind: fields["vocab_size"] + i for i, kind in enumerate(MEDIA_KINDS)},
        speech_connector={"decoder_layers": 1},
        audio_connector={"num_hidden_layers": 1},
    )
    assert [i for i in range(fields["num_hidden_layers"]) if config.is_moe_layer(i)] == moe_layers
    model = UniMoEForConditionalGeneration(config).eval()
    published = case.tensors("weights")
    state = from_published(published)
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all("_connector." in key for key in left.missing_keys)
    back = to_published(state)
    assert back.keys() == {key for key in published if not key.endswith("inv_freq")}
    assert all(torch.equal(back[key], published[key]) for key in back)

    io, grads = case.tensors("io"), case.tensors("grads")
    mask = io["attention_mask"].bool()
    out = model(
        input_ids=io["input_ids"],
        attention_mask=io["attention_mask"],
        labels=io["labels"],
        output_hidden_states=True,
    )
    assert relative_error(out.logits[mask], io["logits"][mask]) < OUTPUT
    assert relative_error(out.loss, io["loss"]) < OUTPUT
    out.loss.backward()
    own = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    own = to_published(own)
    assert own.keys() == back.keys()
    for key, norm in case.checks["grad_norms"].items():
        assert abs(own[key].norm().item() / norm - 1) < GRADIENT, key
    for key, expected in grads.items():
        assert relative_error(own[key], expected) < GRADIENT, key


def test_beats_and_the_audio_connector():
    case = Case("audio_connector")
    encoder = BeatsEncoder.from_checkpoint(case.folder / "beats_checkpoint.pt")
    assert encoder.config == BeatsConfig.from_checkpoint(case.config["beats"])
    in_model = own_names(case.below("weights", "model.audio_tower.audio_tower."))
    assert in_model.keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        assert torch.equal(in_model[name], value), name

    connector = AudioConnector(
        case.config["beats"]["encoder_embed_dim"],
        case.config["hidden_size"],
        case.config["query_tokens_size"],
        {**case.config["qformer"], "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    ).eval()
    weights = case.below("weights", "model.mm_audio_aligner.")
    connector.load_state_dict(
        {name.replace("qformer.qformer.", "qformer."): value for name, value in weights.items()}
    )
    io = case.tensors("io")
    for name, facts in case.checks.items():
        part = {k.removeprefix(f"{name}."): v for k, v in io.items() if k.startswith(f"{name}.")}
        fbank, mask = part["in.fbank"], part["in.padding_mask"]
        frames = coarsened(mask, fbank.shape[1])
        assert torch.equal(frames, part["mid.frame_mask"])
        tokens = coarsened(frames, facts["tokens"])
        assert torch.equal(tokens, part["mid.token_mask"])
        assert tokens.sum() == facts["masked_tokens"]
        assert encoder.num_tokens(mask.shape[1]) == facts["tokens"]
        with torch.no_grad():
            features = encoder.encode_fbank(fbank, mask)
            without = encoder.encode_fbank(fbank)
            hidden = connector.hidden_states(features)
            soft = connector(features)
        assert relative_error(features, part["out.encoder"]) < OUTPUT, name
        assert relative_error(without, part["out.encoder_no_mask"]) < OUTPUT, name
        assert relative_error(hidden, part["mid.qformer_last_hidden"]) < OUTPUT, name
        assert relative_error(soft, part["out.tokens"]) < OUTPUT, name


def test_clip_and_the_image_connector():
    case = Case("image_projector")
    assert case.config["mm_vision_select_layer"] == LAYER
    config = CLIPVisionConfig(**case.config["clip"], hidden_act=case.config["hidden_act"])
    encoder = ClipImageEncoder(config)
    weights = case.below("weights", "model.vision_tower.vision_tower.")
    names = encoder.vision_tower.state_dict()
    encoder.vision_tower.load_state_dict(
        {k if k in names else k.removeprefix("vision_model."): v for k, v in weights.items()}
    )
    connector = ImageConnector(config.hidden_size, case.config["hidden_size"])
    connector.projector.load_state_dict(case.below("weights", "model.mm_projector."))
    io = case.tensors("io")
    with torch.no_grad():
        features = encoder(io["in.pixel_values"])
        video = connector(encoder(io["in.video_frames"]))
        assert relative_error(features, io["out.tower_features"]) < OUTPUT
        assert relative_error(connector(features), io["out.image_tokens"]) < OUTPUT
        assert relative_error(video[0], io["out.video_tokens"]) < OUTPUT


def test_whisper_and_the_speech_connector():
    case = Case("speech_connector")
    whisper = case.config["whisper"]
    config = WhisperConfig(**whisper, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    encoder = WhisperEncoder(config).eval()
    encoder.load_state_dict(case.below("weights", "model.audio_tower.audio_tower."))
    connector = SpeechConnector(
        whisper["d_model"],
        case.config["hidden_size"],
        case.config["query_tokens_size"],
        whisper,
    ).eval()
    connector.load_decoder(case.below("weights", "model.mm_audio_aligner.decoder.audio_decoder."))
    connector.projector.load_state_dict(case.below("weights", "model.mm_audio_aligner.projector."))
    io = case.tensors("io")
    with torch.no_grad():
        connector.query_tokens.copy_(case.tensors("weights")["model.query_tokens"])
        chunks = []
        for number, chunk in enumerate(io["in.input_features"][0]):
            if io["in.features_mask"][0, number] == 0:
                break
            features = encoder(chunk[None]).last_hidden_state
            chunks.append(connector(features)[0])
            assert relative_error(features, io[f"out.encoder.chunk{number}"]) < OUTPUT
            assert relative_error(chunks[-1][None], io[f"out.tokens.chunk{number}"]) < OUTPUT
    # Chunks of one file carry its number and follow each other.
    files = io["in.features_mask"][0, : len(chunks)].tolist()
    for file in set(files):
        own = [chunk for chunk, of in zip(chunks, files, strict=True) if of == file]
        assert relative_error(torch.cat(own), io[f"out.audio_file{file}"]) < OUTPUT


def turns_of(conversation):
    """Pairs of question and answer; the published code drops an answer that comes first."""
    values = [turn["value"] for turn in conversation]
    if conversation[0]["from"] == "gpt":
        values = values[1:]
    return list(zip(values[::2], values[1::2], strict=True))


@pytest.fixture(params=["legacy_false", "legacy_true"])
def published_text(request):
    """What the published code says of texts, our tokenizer, and the ids of placeholders."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    case = Case("prompt_labels")
    text = json.loads((case.folder / "prompts.json").read_text(encoding="utf-8"))
    tokenizer = LlamaTokenizer.from_pretrained(case.folder, legacy=request.param == "legacy_true")
    return case, text[request.param], tokenizer


PUBLISHED_IDS = {"image": -200, "speech": -999, "audio": -300, "video": -400}


def test_prompts_and_labels(published_text):
    case, texts, tokenizer = published_text
    given_up = set(case.checks["mismatch_warnings"])
    for name, sample in texts["training"].items():
        turns = turns_of(sample["conversation"])
        assert conversation_text(turns, VICUNA_SYSTEM)[0] == sample["prompt"], name
        own = tokenize_conversation(turns, tokenizer, PUBLISHED_IDS, VICUNA_SYSTEM)
        assert own.ids == sample["input_ids"], name
        if name in given_up:
            # The published code loses count here and learns nothing of the sample.
            assert set(sample["labels"]) == {IGNORED}, name
            learned = [answer.strip() + "</s>" for _, answer in turns if answer]
            supervised = [label for label in own.labels if label != IGNORED]
            said = tokenizer.decode(supervised, skip_special_tokens=False)
            assert said.replace(" ", "") == "".join(learned).replace(" ", ""), name
        else:
            # A placeholder in an answer stays a label there, and fails in the loss.
            expected = [label if label >= 0 else IGNORED for label in sample["labels"]]
            assert own.labels == expected, name
        dropped = sample.get("speech_package_preprocess")
        if dropped:
            # One of the published packages reads a video's placeholder as text.
            assert PUBLISHED_IDS["video"] not in dropped["input_ids"]
            assert PUBLISHED_IDS["video"] in own.ids
    assert given_up < set(texts["training"])


def test_prompts_of_inference(published_text):
    _, texts, tokenizer = published_text
    for name, sample in texts["inference"].items():
        prompt, _ = conversation_text([(sample["user"], None)], VICUNA_SYSTEM)
        assert prompt == sample["prompt"], name
        assert tokenize_text(prompt, tokenizer, PUBLISHED_IDS).ids == sample["input_ids"], name
    for text, sample in texts["plain"].items():
        assert tokenize_text(text, tokenizer, PUBLISHED_IDS).ids == sample["ids"], text
    for ids, expected in texts["decode"].items():
        assert tokenizer.decode(json.loads(ids), skip_special_tokens=True) == expected


@pytest.mark.parametrize("name", ["truncated_text_only", "truncated_with_media"])
def test_truncation(published_text, name):
    _, texts, tokenizer = published_text
    sample = texts[name]
    turns = turns_of(sample["conversation"])
    own = tokenize_conversation(turns, tokenizer, PUBLISHED_IDS, VICUNA_SYSTEM)
    cut, _ = truncated(
        own, PUBLISHED_IDS, [1] * len(own.items(PUBLISHED_IDS)), len(sample["input_ids"])
    )
    assert cut.ids == sample["input_ids"]
    assert cut.labels == sample["labels"]
    if "with_media" in name:
        # Published samples are cut later, placeholders and all; the item then goes to another one.
        at = own.ids.index(PUBLISHED_IDS["image"])
        for most in (at, at + 1, at + 575, at + 576):
            cut, items = truncated(own, PUBLISHED_IDS, [576], most)
            assert items == (most == at + 576)
            assert len(cut.expanded(PUBLISHED_IDS, [576] * items).ids) == at + 576 * items


def test_audio_features():
    case = Case("audio_features")
    expected = case.tensors("features")
    index = expected["frame_index"]
    # The sample's clips, one after the other.
    chunks = []
    for clip in ("clip35.wav", "clip12.wav"):
        samples, rate = soundfile.read(case.folder / clip, dtype="float32")
        assert rate == case.config["fbank"]["sample_frequency"]
        chunks += zip(*clip_chunks(torch.from_numpy(samples)), strict=True)
    stats = case.checks["stats_per_slot"][1]
    for number, (samples, mask) in enumerate(chunks):
        fbank = beats_fbank(samples[None])
        assert list(fbank.shape) == stats[number]["shape"]
        frames = expected[f"sample1.chunk{number}.frames"]
        assert (fbank[0, index] - frames).abs().max() < 1e-3
        assert abs(fbank.double().square().sum() / stats[number]["sq_sum"] - 1) < 1e-4
        padded = mask.nonzero()[:1].flatten().tolist() or [len(mask)]
        assert padded == expected[f"sample1.chunk{number}.first_padded"].tolist()
