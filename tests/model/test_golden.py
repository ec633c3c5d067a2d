"""Numbers of the published code, at tiny sizes: `UNIMOE_GOLDEN` or else what tests/golden keeps.

Each case is a folder with a `case.json`; sizes, names and numbers all come from there, so that
another set of the same form is checked without a change here.
"""

import json

import pytest
import torch
from in_memory import from_published, to_published
from published import (
    Case,
    below,
    clip_config,
    clip_encoder,
    encoded_media,
    expanded_rows,
    language_model_config,
    moe_layers_of,
    padded_batch,
    published_chunks,
    published_model,
    whisper_config,
)
from published_adapter import base_of_adapter, copy_adapter, write_router_adapter
from published_checks import (
    GRADIENT,
    LOGITS,
    OUTPUT,
    check_forward,
    check_gradients,
    check_norms,
    generate_row,
    gradients_of,
    spliced,
)
from published_eight import (
    NAMED,
    as_published_padding,
    eight_expert_names,
    gate_of_logits,
    gradients_with_lora,
    losses_of_layer,
    modality_ids_of_spans,
    published_experts,
    record_routers,
    scores_by_expert,
)
from published_prompts import PUBLISHED_IDS, prompts_of, spoken, turns_of
from transformers import LlamaTokenizer
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unimoe_kernels import LoopedMoE, MoE, topk_router, unstack_experts
from unimoe_kernels.testing import relative_error
from unimoe_model.checkpoints.convert import convert_from_published
from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.connectors import AudioConnector, ImageConnector, SpeechConnector
from unimoe_model.encoders.beats import BeatsConfig, BeatsEncoder, clip_chunks, coarsened, own_names
from unimoe_model.encoders.clip import LAYER
from unimoe_model.encoders.fbank import beats_fbank
from unimoe_model.encoders.whisper import WhisperWindowEncoder
from unimoe_model.modality import modality_expert_loss, modality_kl_loss
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import VICUNA_SYSTEM, conversation_text
from unimoe_model.tokenization import (
    IGNORED,
    load_llama_tokenizer,
    tokenize_conversation,
    tokenize_text,
    truncated,
)


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
        check_gradients(found, grads)
        check_gradients(own, grads)


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
    x = logits.clone().requires_grad_()
    routed = gate_of_logits(num_experts, top_k, facts)(x)
    # Slots of an expert's buffer are theirs alone: they follow from who was dispatched.
    weights, slots = io["out.combine_weights"], io["out.dispatch_mask"].int().argmax(2)
    dense = scores_by_expert(routed, num_experts)
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
    config = language_model_config(fields, moe_layers)
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
    own = to_published(gradients_of(model))
    assert own.keys() == back.keys()
    check_norms(own, case.checks["grad_norms"])
    check_gradients(own, grads)


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
    config = clip_config(case)
    encoder = clip_encoder(config, case.tensors("weights"))
    connector = ImageConnector(config.hidden_size, case.config["hidden_size"])
    connector.projector.load_state_dict(case.below("weights", "model.mm_projector."))
    io = case.tensors("io")
    with torch.no_grad():
        features = encoder(io["in.pixel_values"])
        video = connector(encoder(io["in.video_frames"]))
        assert relative_error(features, io["out.tower_features"]) < OUTPUT
        assert relative_error(connector(features), io["out.image_tokens"]) < OUTPUT
        assert relative_error(video[0], io["out.video_tokens"]) < OUTPUT


def test_pictures_for_clip():
    pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
    case = Case("image_projector")
    encoder = clip_encoder(clip_config(case), case.tensors("weights"))
    given = case.tensors("processor")
    names = sorted(k.removesuffix(".uint8_hwc") for k in given if k.endswith(".uint8_hwc"))
    assert names
    for name in names:
        picture = given[f"{name}.uint8_hwc"]
        for padded, key in ((False, "pixel_values"), (True, "pixel_values_pad")):
            pixels = encoder.pixel_values([picture], pad_to_square=padded)[0]
            assert relative_error(pixels, given[f"{name}.{key}"]) < OUTPUT, (name, padded)


def test_whisper_and_the_speech_connector():
    case = Case("speech_connector")
    whisper = case.config["whisper"]
    encoder = WhisperEncoder(whisper_config(case)).eval()
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


@pytest.fixture(params=["legacy_false", "legacy_true"])
def published_text(request):
    """What the published code says of texts, our tokenizer, and the ids of placeholders."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    case = Case("prompt_labels")
    tokenizer = LlamaTokenizer.from_pretrained(case.folder, legacy=request.param == "legacy_true")
    return case, prompts_of(case)[request.param], tokenizer


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
            supervised = [label for label in own.labels if label != IGNORED]
            said = tokenizer.decode(supervised, skip_special_tokens=False)
            assert said.replace(" ", "") == spoken(answer for _, answer in turns), name
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


def test_prompts_of_a_saved_processor(tmp_path):
    """The tokenizer of a converted checkpoint, saved and loaded, gives the published ids."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    case = Case("prompt_labels")
    texts = prompts_of(case)
    tokenizer = load_llama_tokenizer(case.folder)
    soft = dict.fromkeys(MEDIA_KINDS, 1)
    UniMoEProcessor(tokenizer, num_soft_tokens=soft).save_pretrained(tmp_path)
    loaded = UniMoEProcessor.from_pretrained(tmp_path).tokenizer
    own = {kind: loaded.convert_tokens_to_ids(f"<{kind}>") for kind in MEDIA_KINDS}
    assert sorted(own.values()) == list(range(case.config["spm"]["vocab"], len(loaded)))
    published = {own[kind]: PUBLISHED_IDS[kind] for kind in own}
    for name, sample in texts["legacy_false"]["inference"].items():
        ids = tokenize_text(sample["prompt"], loaded, own).ids
        assert [published.get(token, token) for token in ids] == sample["input_ids"], name


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
    soundfile = pytest.importorskip(
        "soundfile", reason="soundfile is not installed: pip install .[media]"
    )
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


def test_speech_features():
    soundfile = pytest.importorskip(
        "soundfile", reason="soundfile is not installed: pip install .[media]"
    )
    case, waves = Case("speech_features"), Case("audio_features")
    expected = case.tensors("features")
    index = expected["frame_index"]
    encoder = WhisperWindowEncoder()
    stats = case.checks["stats_per_slot"][1]
    number = 0
    for clip in ("clip35", "clip12"):
        samples, _ = soundfile.read(waves.folder / f"{clip}.wav", dtype="float32")
        assert len(samples) == case.checks["samples"][clip]
        own = encoder.log_mel(samples)
        theirs = published_chunks(samples, encoder.window_samples)
        assert len(own) == len(theirs)
        for window, chunk in zip(own, theirs, strict=True):
            mel = encoder.log_mel(chunk)[0]
            frames = expected[f"sample1.chunk{number}.frames"]
            assert (mel[:, index] - frames).abs().max() < 1e-4
            square = mel.double().square().sum()
            assert abs(square / stats[number]["sq_sum"] - 1) < 1e-4
            # Ours loses no sample: all windows but the first begin one sample earlier.
            first = torch.equal(torch.from_numpy(chunk), torch.from_numpy(samples[: len(chunk)]))
            assert torch.equal(window, mel) == first
            number += 1
    assert number == sum(mask > 0 for mask in case.checks["features_mask"][1])


@pytest.mark.parametrize("hears", ["speech", "audio"])
def test_splice(hears):
    case, end_to_end = Case(f"splice_{hears}"), Case(f"end_to_end_{hears}")
    layers = moe_layers_of(end_to_end.tensors("weights"))
    model = published_model(end_to_end, hears, moe_layers=layers)
    batches = {path.stem: case.tensors(path.stem) for path in case.folder.glob("*.safetensors")}
    whole = next(io for io in batches.values() if "in.embed_tokens" in io)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(whole["in.embed_tokens"])
    for name, io in batches.items():
        if io is whole:
            rows = list(range(len(io["in.input_ids"])))
        else:
            # A row of the batch by itself, with labels and without.
            alone = io["in.input_ids"][0]
            rows = [row for row, ids in enumerate(whole["in.input_ids"]) if ids.equal(alone)]
            assert len(rows) == 1, name
            assert torch.equal(io["out.inputs_embeds"], io["out.inputs_embeds_nolabels"])
        own, embeddings = spliced(model, whole, rows, hears, io["out.labels"].shape[1])
        real = io["out.attention_mask"]
        assert torch.equal(own["attention_mask"].bool(), real), name
        assert torch.equal(own["labels"], io["out.labels"]), name
        assert torch.equal(embeddings[real], io["out.inputs_embeds"][real]), name


@pytest.mark.parametrize("hears", ["speech", "audio"])
def test_end_to_end(hears):
    case = Case(f"end_to_end_{hears}")
    weights = case.tensors("weights")
    model = published_model(case, hears, moe_layers=moe_layers_of(weights))
    io = case.tensors("forward")
    check_forward(case, model, io, weights, hears, io["out.loss"], io["out.logits_at_positions"])
    # 12 greedy tokens with the cache, which the published code could not use, for each row alone.
    generated = case.tensors("generate")
    for facts in case.checks["generation"]:
        row, length = facts["index"], len(facts["new_ids"])
        new, logits = generate_row(model, io, generated, row, weights, hears, length)
        assert new == facts["new_ids"], row
        assert generated[f"{row}.out.sequences"][0, -length:].tolist() == facts["new_ids"]
        assert relative_error(logits, generated[f"{row}.out.last_logits_per_step"]) < LOGITS, row


def test_layer_of_the_eight_expert_code():
    case = Case("moe_layer_8e")
    sizes, io = case.config, case.tensors("io")
    moe = MoE(
        sizes["hidden_size"],
        sizes["intermediate_size"],
        sizes["num_experts"],
        sizes["k"],
        balance="first",
    )
    moe.experts.add_lora(
        sizes["lora_r"], sizes["lora_alpha"], freeze_base=False, split_gate_up=True
    )
    weights = case.tensors("weights")
    left = dict(weights)
    with torch.no_grad():
        for name, (parameter, index) in eight_expert_names(moe).items():
            parameter[index].copy_(left.pop(name))
    assert not left
    x = io["in.hidden_states"].requires_grad_()
    y, routed = moe(x, return_router=True)
    assert relative_error(y, io["out.hidden_states"]) < OUTPUT
    assert relative_error(routed.load_balancing_loss, io["out.l_aux"]) < OUTPUT
    assert torch.equal(routed.tokens_per_expert.long(), io["out.exp_counts"])
    logits = io["in.hidden_states"].flatten(0, 1) @ moe.router.weight.T
    assert relative_error(logits, io["out.router_logits"]) < OUTPUT
    ((y * io["in.grad_output"]).sum() + 0.5 * routed.load_balancing_loss).backward()
    found = {name: p.grad[index] for name, (p, index) in eight_expert_names(moe).items()}
    check_norms(found, case.checks["grad_norms"])
    stored = case.below("io", "grad.")
    assert relative_error(x.grad, stored.pop("in.hidden_states")) < GRADIENT
    assert stored
    check_gradients(found, stored)


def test_losses_of_the_eight_expert_code():
    case = Case("aux_losses_8e")
    sizes, io = case.config, case.tensors("io")
    batch, tokens = sizes["batch"], sizes["tokens"]
    logits = io["in.hidden_states"] @ io["in.lm_head.weight"].T
    labels = io["in.labels"][:, 1:].flatten()
    ce = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED
    )
    assert relative_error(ce, io["out.ce"]) < OUTPUT
    ids = modality_ids_of_spans(sizes["spans"], (batch, tokens), NAMED)
    layers = [
        io[f"in.gate_logits.layer{n}"].view(batch, tokens, -1).requires_grad_()
        for n in range(sizes["layers"])
    ]
    balance = io["in.l_aux_per_layer"].sum()
    losses = {
        "aux_balance_loss": balance,
        "aux_multimodal_loss": sum(
            modality_expert_loss(layer, ids, published_experts(sizes)) for layer in layers
        ),
        "aux_kl_loss": sum(modality_kl_loss(layer, ids, as_released=True) for layer in layers),
    }
    for name, loss in losses.items():
        # Stored terms are differences of totals.
        assert abs(loss - io[f"out.{name}"]) < 2e-6, name
        total = ce + sizes["coef"] * loss
        assert relative_error(total, io[f"out.total_with_{name}"]) < OUTPUT, name
        if name != "aux_balance_loss":
            gradients = torch.autograd.grad(loss, layers)
            for number, gradient in enumerate(gradients):
                expected = io[f"grad.{name}.gate_logits.layer{number}"].view_as(gradient)
                assert relative_error(gradient, expected) < GRADIENT, name
    total = ce + sizes["coef"] * sum(losses.values())
    assert relative_error(total, io["out.total_all"]) < OUTPUT
    # Ours has one softmax, the whole divergence, and the pair of image and video.
    own = sum(modality_kl_loss(layer, ids) for layer in layers)
    assert relative_error(own, losses["aux_kl_loss"]) > 1e-3


def test_model_of_the_eight_expert_code():
    case = Case("llama_moe_8e")
    fields, weights = case.config, case.tensors("weights")
    model = published_model(
        case, "speech", moe_layers=moe_layers_of(weights), moe_options={"balance": "first"}
    )
    io = case.tensors("io")
    rows = expanded_rows(io, model.config, "speech")
    batch = padded_batch(rows, io["out.logits"].shape[1])
    mask = batch["attention_mask"].bool()
    features = encoded_media(io, weights, "speech")
    seen = record_routers(model)
    embeddings = as_published_padding(model, io, batch, features)
    out = model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert relative_error(out.logits[mask], io["out.logits"][mask]) < LOGITS
    assert relative_error(out.loss, io["out.loss_ce"]) < OUTPUT

    # Published losses count padding as text.
    spans = {kind: case.checks["spans"][kind] for kind in NAMED}
    ids = modality_ids_of_spans(spans, mask.shape, NAMED)
    total = balance_only = out.loss
    for number, (logits, _) in enumerate(seen):
        gates = io[f"out.gate_logits.layer{number}"].view_as(logits)
        assert relative_error(logits[mask], gates[mask]) < LOGITS
        losses = losses_of_layer(logits, ids, fields)
        assert relative_error(losses["aux_balance_loss"], io[f"out.l_aux.layer{number}"]) < OUTPUT
        weighted = {name: fields[f"{name}_coef"] * loss for name, loss in losses.items()}
        balance_only = balance_only + weighted["aux_balance_loss"]
        total = total + sum(weighted.values())
    assert relative_error(balance_only, io["out.loss_balance_only"]) < OUTPUT
    assert relative_error(total, io["out.loss_all_aux"]) < OUTPUT
    total.backward()
    scale = fields["lora_alpha"] / fields["lora_r"]
    found = gradients_with_lora(model, weights, scale)
    assert case.checks["grad_norms"].keys() <= found.keys() | set(weights)
    assert len(case.checks["grad_norms"].keys() & found.keys()) > 100
    norms = case.checks["grad_norms"].items()
    check_norms(found, {name: norm for name, norm in norms if name in found and norm > 1e-6})

    # Ours leave it out: a wider batch changes none of them.
    seen.clear()
    wider = padded_batch(rows, mask.shape[1] + 5)
    model(**batch, **features)
    model(**wider, **features)
    half = len(seen) // 2
    for (_, narrow), (_, wide) in zip(seen[:half], seen[half:], strict=True):
        assert relative_error(wide.load_balancing_loss, narrow.load_balancing_loss) < OUTPUT


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_adapter_is_merged(tmp_path, suffix):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    case, whole = Case("lora_merge"), Case("end_to_end_speech")
    base, tokenizer, known = base_of_adapter(tmp_path / "base")
    adapter = copy_adapter(case, tmp_path / "adapter", suffix)
    convert_from_published(adapter, tmp_path / "ours", base, tokenizer, overrides=known)
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    merged = to_published({k: v for k, v in model.state_dict().items() if "language" in k})
    expected = case.tensors("merged")
    assert expected.keys() - merged.keys() <= {k for k in expected if "mm_" in k or "query" in k}
    compared = [key for key in expected if key in merged]
    assert len(compared) > 10
    for key in compared:
        assert (merged[key] - expected[key]).abs().max() < 1e-6, key
    for key, stats in case.checks["merged_stats_of_other_layer_tensors"].items():
        assert abs(merged[key].double().square().sum() / stats["sq_sum"] - 1) < 1e-5, key
    io, merged_io = whole.tensors("forward"), case.tensors("io")
    io["logit_positions"] = merged_io["logit_positions"]
    loss, logits = merged_io["out.loss_merged"], merged_io["out.logits_merged_at_positions"]
    weights = whole.tensors("weights")
    check_forward(case, model, io, weights, "speech", loss, logits)
    expected = case.checks["generate_row0_new_ids"]
    generated = whole.tensors("generate")
    new, _ = generate_row(model, io, generated, 0, weights, "speech", len(expected))
    assert new == expected


def test_router_lora_is_not_lost(tmp_path):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    case = Case("lora_merge")
    base, tokenizer, known = base_of_adapter(tmp_path / "base")
    adapter, variant = write_router_adapter(case, tmp_path / "adapter", base)
    convert_from_published(adapter, tmp_path / "ours", base, tokenizer, overrides=known)
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "ours")
    whole = below(variant, "loaded_without_gates_file.")
    lost = below(variant, "loaded_with_gates_file.")
    assert whole
    for index, moe in model.moe_layers():
        name = f"model.layers.{index}.mlp.gate.weight"
        # The published loader lets the file of gates overwrite the merged router.
        assert torch.equal(lost[name], variant[f"base.{name}"])
        assert relative_error(moe.router.weight, whole[name]) < OUTPUT
        assert relative_error(moe.router.weight, lost[name]) > 0.1
