"""Calibration inputs for experts, from a file of texts or of training data."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from unimoe_model.checkpoints.files import read_config
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.data.conversations import read_conversations

TOKENS = 8192
"""Number of tokens after which no further lines are read."""
ROW_TOKENS = 512
"""Maximum tokens of a text. Rows with media are as long as the model permits."""
_ARGUMENTS = {"image": "images", "video": "videos", "speech": "speech", "audio": "audio"}


def calibration_inputs(model: Path, file: Path) -> list[dict]:
    """Reads keyword arguments for a model's forward, about 8192 tokens in all.

    Args:
        model: model folder with a tokenizer; that of a Uni-MoE must also have its processor.
        file: JSON lines of `{"text": ...}`, or Uni-MoE training data with media
            (docs/training.md). Other models accept training data without media, as plain text.

    Returns:
        At least one mapping of keyword arguments; each has a batch size of 1.

    Raises:
        ValueError: If the file is missing, empty or in another format.
    """
    is_ours = read_config(model).get("model_type") == UniMoEConfig.model_type
    if is_ours:
        from unimoe_model.processing import UniMoEProcessor

        processor = UniMoEProcessor.from_pretrained(model)
        tokenizer = processor.tokenizer
        context = UniMoEConfig.from_pretrained(model).text_config.max_position_embeddings
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
    texts, inputs, tokens = _texts(file), [], 0
    for item in read_conversations(file) if texts is None else texts:
        if isinstance(item, str):
            row = tokenizer(item, max_length=ROW_TOKENS, truncation=True, return_tensors="pt")
            row = {"input_ids": row["input_ids"]}
        elif is_ours:
            media = {name: [] for name in _ARGUMENTS.values()}
            for kind, path in item.media:
                media[_ARGUMENTS[kind]].append(path)
            longest = context if item.media else ROW_TOKENS
            row = dict(processor.training_inputs([item.turns], **media, max_length=longest))
            del row["labels"]
        elif item.media:
            raise ValueError(f"{item.where} has media, which model ({model}) does not take")
        else:
            text = "\n".join(part for turn in item.turns for part in turn)
            row = tokenizer(text, max_length=ROW_TOKENS, truncation=True, return_tensors="pt")
            row = {"input_ids": row["input_ids"]}
        if row["input_ids"].shape[1]:
            inputs.append(row)
            tokens += row["input_ids"].shape[1]
        if tokens >= TOKENS:
            break
    if not inputs:
        raise ValueError(f"calibrate ({file}) must hold at least one text that is not empty")
    return inputs


def _texts(file: Path) -> list[str] | None:
    """Returns the texts of a file, or None if its first line is not a text."""
    if not file.is_file():
        raise ValueError(f"calibrate ({file}) must be a file of JSON lines; there is no such file")
    texts: list[str] = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line).get("text")
            except (ValueError, AttributeError):
                text = None
            if isinstance(text, str):
                texts.append(text)
            elif texts:
                raise ValueError(
                    f'{file} line {number} must be {{"text": ...}} as the lines before'
                )
            else:
                return None
    return texts
