"""Golden cases of the published code, and models and batches built from them."""

import json
import os
from pathlib import Path

import pytest
import torch
from in_memory import from_published
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unimoe_model.configuration import MEDIA_KINDS, UniMoEConfig
from unimoe_model.encoders.beats import BeatsConfig, BeatsEncoder, own_names
from unimoe_model.encoders.clip import ClipImageEncoder
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.tokenization import IGNORED, TokenizedText

GOLDEN = Path(os.environ.get("UNIMOE_GOLDEN") or Path(__file__).parents[1] / "golden")
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


def below(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def text_config(fields):
    return LlamaConfig(**{k: v for k, v in fields.items() if k in LLAMA_FIELDS})


def language_model_config(fields, moe_layers):
    """Configuration of a language model with the smallest possible connectors."""
    return UniMoEConfig(
        text_config=text_config(fields),
        num_experts=fields["num_experts"],
        num_experts_per_tok=fields["num_experts_per_tok"],
        moe_layers=moe_layers,
        media_token_ids={kind: fields["vocab_size"] + i for i, kind in enumerate(MEDIA_KINDS)},
        speech_connector={"decoder_layers": 1},
        audio_connector={"num_hidden_layers": 1},
    )


def clip_encoder(config, weights):
    """CLIP with the weights of a checkpoint's vision tower."""
    encoder = ClipImageEncoder(config)
    names = encoder.vision_tower.state_dict()
    tower = below(weights, "model.vision_tower.vision_tower.")
    encoder.vision_tower.load_state_dict(
        {k if k in names else k.removeprefix("vision_model."): v for k, v in tower.items()}
    )
    return encoder


def clip_config(case):
    return CLIPVisionConfig(**case.config["clip"], hidden_act=case.config["hidden_act"])


def whisper_config(case):
    return WhisperConfig(
        **case.config["whisper"], pad_token_id=0, bos_token_id=None, eos_token_id=None
    )


def sound_encoder(hears, weights):
    """Maps what the published code gives its sound encoder to features of one chunk."""
    tower = below(weights, "model.audio_tower.audio_tower.")
    if hears == "speech":
        encoder = WhisperEncoder(whisper_config(Case("speech_connector"))).eval()
        encoder.load_state_dict(tower)
        return lambda mel, _: encoder(mel[None]).last_hidden_state
    case = Case("audio_connector")
    encoder = BeatsEncoder(BeatsConfig.from_checkpoint(case.config["beats"]))
    encoder.load_state_dict(own_names(tower))

    def encode(fbank, valid):
        padded = torch.arange(case.config["wav_len"]) >= valid
        return encoder.encode_fbank(fbank, padded[None])

    return encode


def connector_fields(hears):
    if hears == "speech":
        case = Case("speech_connector")
        return {"speech_connector": case.config["whisper"]}
    case = Case("audio_connector")
    sizes = {**case.config["qformer"], "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    return {"audio_connector": sizes}


def published_model(case, hears, published=None, **moe_fields):
    """The model of a case with its weights, and those that the other connector has."""
    fields = case.config
    published = published or case.tensors("weights")
    image = clip_config(Case("image_projector"))
    other = {
        "speech": {"audio_connector": {"num_hidden_layers": 1}},
        "audio": {"speech_connector": {"decoder_layers": 1}},
    }
    defaults = {
        "num_experts": fields["num_experts"],
        "num_experts_per_tok": fields["num_experts_per_tok"],
        "vision_feature_size": fields["mm_hidden_size"],
        "vision_num_tokens": (image.image_size // image.patch_size) ** 2,
        f"{hears}_feature_size": fields["mm_audio_hidden_size"],
        f"{hears}_num_queries": fields["query_tokens_size"],
    }
    config = UniMoEConfig(
        text_config=text_config(fields),
        **(defaults | connector_fields(hears) | other[hears] | moe_fields),
    )
    model = UniMoEForConditionalGeneration(config).eval()
    scale = fields["lora_alpha"] / fields["lora_r"] if "lora_r" in fields else None
    state = from_published(published, hears, scale)
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    # The decoder of the speech connector is never given tokens.
    unused = {"model.speech_connector.decoder.embed_tokens.weight"}
    other_connector = {"speech": "audio_connector", "audio": "speech_connector"}[hears]
    assert all(k in unused or other_connector in k for k in left.missing_keys), left.missing_keys
    return model


def placeholders(config, hears):
    """Published placeholder ids, and what they are here."""
    tokens = config.media_token_ids
    return {-200: tokens["image"], -300: tokens[hears], -400: tokens["video"]}


PUBLISHED_KINDS = {-200: "image", -300: "sound", -400: "video"}


def expanded_rows(io, config, hears):
    """Each row's ids, labels and files of sound: placeholders expanded, padding left out."""
    own = placeholders(config, hears)
    ids_of_kind = {kind: token for token, kind in PUBLISHED_KINDS.items()}
    rows = []
    for number, ids in enumerate(io["in.input_ids"]):
        real = io["in.attention_mask"][number].bool() if "in.attention_mask" in io else ids == ids
        labels = io["in.labels"][number] if "in.labels" in io else ids.new_full(ids.shape, IGNORED)
        files = io["in.features_mask"][number].tolist()
        chunks = iter([files.count(file) for file in sorted(set(files) - {0})])
        text = TokenizedText(ids[real].tolist(), labels[real].tolist())
        soft = [
            next(chunks) * config.num_soft_tokens(hears)
            if kind == "sound"
            else config.num_soft_tokens(kind)
            for kind in text.items(ids_of_kind)
        ]
        text = text.expanded(ids_of_kind, soft)
        rows.append(TokenizedText([own.get(token, token) for token in text.ids], text.labels))
    return rows


def padded_batch(rows, width=None):
    """Rows padded on the right with token 0."""
    width = width or max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        length = len(row.ids)
        ids[number, :length] = torch.tensor(row.ids)
        labels[number, :length] = torch.tensor(row.labels)
        mask[number, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def encoded_media(io, weights, hears, rows=None):
    """Features of the media in some rows, encoded as the published code encodes them."""
    rows = range(len(io["in.features_mask"])) if rows is None else rows
    vision = clip_encoder(clip_config(Case("image_projector")), weights)
    hear = sound_encoder(hears, weights)
    features = {}
    images = [row for row in rows if io["in.image_mask"][row]]
    if images:
        features["image_features"] = vision(io["in.images"][images])
    videos = [row for row in rows if io["in.video_mask"][row]]
    if videos:
        frames = [
            io["in.videos"][row] if "in.videos" in io else io[f"in.video_row{row}"]
            for row in videos
        ]
        features["video_features"] = torch.stack([vision(clip) for clip in frames])
    chunks = []
    for row in rows:
        for number, file in enumerate(io["in.features_mask"][row].tolist()):
            if file:
                valid = io.get("in.padding_masks_valid_samples")
                valid = None if valid is None else valid[row, number]
                chunks.append(hear(io["in.input_features"][row, number], valid)[0])
    if chunks:
        features[f"{hears}_features"] = torch.stack(chunks)
    return features


def published_chunks(samples, length):
    """The published code cuts windows one sample too long, which its extractor then drops."""
    return [samples[start : start + length] for start in range(0, len(samples), length + 1)]


def moe_layers_of(weights):
    """Layers that hold a router."""
    marks = (".mlp.gate.weight", ".gate.wg.weight")
    return sorted({int(k.split(".")[2]) for k in weights if k.endswith(marks)})
