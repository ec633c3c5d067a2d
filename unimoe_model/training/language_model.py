"""A pretrained LLM in a folder: a LLaMA in the layout of transformers, with its tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unimoe_model.checkpoints.writing import whole_folder
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.tensor_files import permit_as_usual

WEIGHTS = "model.safetensors"
_SIZE_FIELDS = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
)


def save_language_model(
    model: UniMoEForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Writes the LLM of a dense model in float16, with its tokenizer.

    Args:
        model: dense model with tied embeddings; its connectors are left out.
        tokenizer: the LLM's.
        folder: must not exist yet.

    Raises:
        ValueError: If the folder exists.
    """
    text = model.config.text_config.to_dict()
    sizes = {name: text[name] for name in (*_SIZE_FIELDS, "vocab_size") if name in text}
    ids = {name: text[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **ids, tie_word_embeddings=True))
    llama.model.load_state_dict(model.model.language_model.state_dict())
    with whole_folder(folder) as partial:
        llama.half().save_pretrained(partial)
        permit_as_usual(partial / WEIGHTS)
        tokenizer.save_pretrained(partial)


def load_language_model(model: UniMoEForConditionalGeneration, folder: Path) -> None:
    """Puts the weights of a LLaMA into a dense model's LLM.

    Args:
        model: dense model of the same sizes, with tied embeddings.
        folder: what `save_language_model` wrote.

    Raises:
        ValueError: If the folder cannot be read or its weights do not fit.
    """
    try:
        llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.model.language_model.load_state_dict(llama.model.state_dict())
    except (OSError, RuntimeError) as error:
        raise ValueError(f"language_model ({folder}) cannot be read: {error}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer of language_model ({folder}) cannot be read: {error}"
        ) from error


def read_sizes(folder: Path) -> tuple[dict[str, Any], int]:
    """Sizes of the LLaMA in a folder.

    Returns:
        Fields of `LlamaConfig` other than vocabulary and token ids, and the size of the vocabulary.

    Raises:
        ValueError: If there is no readable `config.json` of a LLaMA.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if fields["model_type"] != "llama":
            raise ValueError(f"model_type ({fields['model_type']!r}) must be 'llama'")
        sizes = {name: fields[name] for name in _SIZE_FIELDS if name in fields}
        return sizes, int(fields["vocab_size"])
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"language_model ({folder}) must be a LLaMA: {error}") from error
    except KeyError as error:
        raise ValueError(f"language_model ({folder}): config.json lacks {error}") from error


def digest(folder: Path) -> str:
    """Short hash of the weights and the tokenizer in a folder.

    Raises:
        ValueError: If a file is missing.
    """
    hashed = hashlib.sha256()
    try:
        for name in (WEIGHTS, "tokenizer.json"):
            hashed.update((folder / name).read_bytes())
    except OSError as error:
        raise ValueError(f"language_model ({folder}) cannot be read: {error}") from error
    return hashed.hexdigest()[:16]
