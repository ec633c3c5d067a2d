"""The model that a recipe starts from: configuration, weights and processor."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from unimoe_model.config_fields import refuse_unknown_fields
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.data.tokenizer import train_tokenizer
from unimoe_model.encoders import empty_encoder
from unimoe_model.llm_families import llm_config
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import PLACEHOLDERS
from unimoe_model.tokenization import load_llama_tokenizer
from unimoe_model.training.connector_start import connector_sizes, load_connector_bodies
from unimoe_model.training.recipe import Recipe

# Fields that describe the file, or that the tokenizer overrides.
_LEFT_OUT = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
)
_UNFIT = ("unexpected_keys", "missing_keys", "mismatched_keys")
_DETERMINED = {
    "image": ("intermediate_size", "pooled_tokens"),
    "speech": ("queries", "max_frames", "sizes"),
    "audio": ("queries", "sizes"),
}
"""Keys of connectors that a folder of a Uni-MoE determines."""
_DEFAULT_ENCODERS = {
    "vision": "clip-vit-large-patch14-336",
    "speech": "whisper-small",
    "audio": "beats-iter3-plus-as2m",
}


@dataclass(frozen=True)
class Start:
    """The starting model without weights.

    Attributes:
        config: configuration of the model.
        processor: processor of the model; None if its tokenizer is missing.
    """

    config: UniMoEConfig
    processor: UniMoEProcessor | None


def describe_start(recipe: Recipe, texts: Iterable[str], missing: list[str] | None = None) -> Start:
    """Builds configuration and processor of the model that a recipe starts from, without weights.

    Args:
        recipe: the recipe.
        texts: texts to train a tokenizer on, if the recipe trains one.
        missing: list that a missing LLM or tokenizer is appended to, if the recipe has `sizes`;
            otherwise, or if it is None, missing ones raise an error.

    Raises:
        ValueError: If a folder cannot be read, the width of an encoder differs from that of the
            model's connector, or sizes are inconsistent; the message names the key.
        OSError: If the hub has no model with that name.
    """
    with _named(recipe, "model"):
        if recipe.model.folder is not None:
            return _own_folder(recipe)
        absent = [f"model.{key} ({p}) must be a folder" for key, p in _absent(recipe)]
        if absent and (missing is None or recipe.model.sizes is None):
            raise ValueError(f"{absent[0]} or a hub name; there is no such folder")
        text = _text_fields(recipe, bool(absent))
        tokenizer = None if absent else _tokenizer(recipe, texts)
    fields = _encoder_fields(recipe, _DEFAULT_ENCODERS) | _connector_fields(recipe)
    if tokenizer is None:
        missing += absent
        tied = text["tie_word_embeddings"]
        config = UniMoEConfig(text_config=text, tie_word_embeddings=tied, num_experts=0, **fields)
        return Start(config, None)
    ids = {kind: tokenizer.convert_tokens_to_ids(token) for kind, token in PLACEHOLDERS.items()}
    if recipe.model.vocab_size is not None:
        text["vocab_size"] = len(tokenizer)
    with _named(recipe, "model"):
        config = UniMoEConfig(
            text_config=text,
            tie_word_embeddings=text["tie_word_embeddings"],
            num_experts=0,
            media_token_ids=ids,
            **fields,
        )
        chosen = recipe.model.prompt_format or ("chat" if tokenizer.chat_template else "vicuna")
        processor = UniMoEProcessor.from_config(config, tokenizer, prompt_format=chosen)
        stops = processor.stop_token_ids
    config.text_config.update(
        {
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": stops if len(stops) > 1 else stops[0],
        }
    )
    return Start(config, processor)


def build_start(recipe: Recipe, start: Start) -> UniMoEForConditionalGeneration:
    """Builds the model that a recipe starts from, in float32, after seeding torch's generator.

    Raises:
        ValueError: If weights cannot be read or have wrong shapes.
        OSError: If the hub has no model with that name.
    """
    torch.manual_seed(recipe.seed)
    if recipe.model.folder is not None:
        model = load_whole(Path(recipe.model.folder))
        for name in (*(f"{sense}_encoder" for sense in _DEFAULT_ENCODERS), "video_num_frames"):
            setattr(model.config, name, getattr(start.config, name))
    else:
        model = UniMoEForConditionalGeneration(start.config)
    load_connector_bodies(model, recipe)
    if recipe.model.llm is not None:
        with _named(recipe, "model"):
            # Checkpoints may have further weights, such as heads for multi-token prediction.
            llm = _complete(AutoModelForCausalLM, recipe.model.llm, _UNFIT[1:])
            model.model.language_model.load_state_dict(llm.model.state_dict())
            model.lm_head.load_state_dict(llm.lm_head.state_dict())
    return model


def load_whole(folder: Path) -> UniMoEForConditionalGeneration:
    """Loads a model from a folder in float32, and checks that its weights are complete.

    Raises:
        ValueError: If weights are missing, unexpected or of a wrong shape.
    """
    return _complete(UniMoEForConditionalGeneration, folder, _UNFIT)


def _complete(family: type, source: str | Path, unfit: Sequence[str]):
    """Loads a model in float32; raises ValueError if there are keys of the kinds in `unfit`."""
    model, found = family.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    for kind in unfit:
        if found[kind]:
            raise ValueError(f"model ({source}) has {kind.replace('_', ' ')}: {min(found[kind])}")
    return model


def _own_folder(recipe: Recipe) -> Start:
    folder = Path(recipe.model.folder)
    config = UniMoEConfig.from_pretrained(folder)
    processor = UniMoEProcessor.from_pretrained(folder)
    given = {
        f"connectors.{kind}.{name}"
        for kind, names in _DETERMINED.items()
        for name in names
        if getattr(getattr(recipe, kind), name) is not None
    }
    if recipe.vocabulary_sharpness is not None:
        given.add("connectors.vocabulary_sharpness")
    if given:
        raise ValueError(f"{min(given)} is not supported with a model folder, which determines it")
    own = {sense: getattr(processor, f"{sense}_encoder") for sense in _DEFAULT_ENCODERS}
    fields = _encoder_fields(recipe, own)
    for name, value in fields.items():
        expected = getattr(config, name)
        if not name.endswith("_encoder") and value != expected and value is not None:
            sense = name.split("_")[0]
            raise ValueError(
                f"encoders.{sense} ({fields[f'{sense}_encoder']}) has {name} {value}, but the"
                f" connector of the model has {expected}"
            )
    for sense in _DEFAULT_ENCODERS:
        setattr(processor, f"{sense}_encoder", fields[f"{sense}_encoder"])
        setattr(config, f"{sense}_encoder", fields[f"{sense}_encoder"])
    if recipe.model.prompt_format not in (None, processor.prompt_format):
        raise ValueError(
            f"prompt_format ({recipe.model.prompt_format}) must be that of the folder's model"
            f" ({processor.prompt_format}), or left out"
        )
    if recipe.video_frames is not None:
        config.video_num_frames = processor.video_num_frames = recipe.video_frames
    return Start(config, processor)


def _absent(recipe: Recipe) -> list[tuple[str, str]]:
    """Keys and absolute paths of folders that do not exist."""
    named = {"llm": recipe.model.llm, "tokenizer": recipe.model.tokenizer}
    return [
        (key, path)
        for key, path in named.items()
        if path and Path(path).is_absolute() and not Path(path).exists()
    ]


def _text_fields(recipe: Recipe, is_absent: bool) -> dict[str, Any]:
    if recipe.model.llm is None or is_absent:
        config = llm_config(recipe.model.sizes)
        refuse_unknown_fields(recipe.model.sizes, type(config), "sizes")
        tied = recipe.model.sizes.get("tie_word_embeddings", recipe.model.llm is None)
    else:
        config = llm_config(AutoConfig.from_pretrained(recipe.model.llm))
        tied = config.tie_word_embeddings
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"llm ({recipe.model.llm}) must not be quantised")
        for name, expected in (recipe.model.sizes or {}).items():
            found = getattr(config, name, None)
            if found != expected:
                raise ValueError(
                    f"model.sizes.{name} ({expected}) must be that of the LLM ({found})"
                )
    fields = config.to_dict() | {"tie_word_embeddings": tied}
    return {name: value for name, value in fields.items() if name not in _LEFT_OUT}


def _tokenizer(recipe: Recipe, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    model = recipe.model
    if model.vocab_size is not None:
        return train_tokenizer(texts, model.vocab_size)
    source = model.tokenizer or model.llm
    if _is_llama_tokenizer(Path(source)):
        tokenizer = load_llama_tokenizer(source)
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer ({source}) must be a fast one")
    if tokenizer.eos_token is None:
        raise ValueError(f"tokenizer ({source}) must have an eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    known = tokenizer.get_vocab()
    new = [token for token in PLACEHOLDERS.values() if token not in known]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": list(PLACEHOLDERS.values())})
    return tokenizer


def _is_llama_tokenizer(folder: Path) -> bool:
    """Whether a folder has the sentencepiece model of a LLaMA rather than of another family."""
    if not (folder / "tokenizer.model").is_file():
        return False
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return True
    kind = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
    return kind in (None, "LlamaTokenizer", "LlamaTokenizerFast")


def _encoder_fields(recipe: Recipe, defaults: dict[str, str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for sense, default in defaults.items():
        name = getattr(recipe.encoders, sense) or default
        with _named(recipe, f"encoders.{sense}"):
            encoder = empty_encoder(name, sense)
        fields |= {f"{sense}_encoder": name, f"{sense}_feature_size": encoder.feature_size}
        if sense == "vision":
            fields["vision_num_tokens"] = encoder.picture_tokens
    return fields


def _connector_fields(recipe: Recipe) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vision_intermediate_size": recipe.image.intermediate_size,
        "vision_pooled_tokens": recipe.image.pooled_tokens,
        "vocabulary_sharpness": recipe.vocabulary_sharpness,
        "speech_num_queries": recipe.speech.queries,
        "speech_max_frames": recipe.speech.max_frames,
        "audio_num_queries": recipe.audio.queries,
        "video_num_frames": recipe.video_frames,
        "speech_connector": connector_sizes(recipe, "speech"),
        "audio_connector": connector_sizes(recipe, "audio"),
    }
    return {name: value for name, value in fields.items() if value is not None}


@contextmanager
def _named(recipe: Recipe, key: str) -> Iterator[None]:
    """Prefixes errors with the recipe's path and key."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{recipe.path}: {key}: {text}") from error
