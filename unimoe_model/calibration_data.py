"""Inputs that experts are calibrated on, from a file of texts or of training data."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from unimoe_model.checkpoints.files import read_config
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.data.conversations import read_conversations

TOKENS = 8192
"""Lines are read until there are so many."""
ROW_TOKENS = 512
_ARGUMENTS = {"image": "images", "video": "videos", "speech": "speech", "audio": "audio"}


def calibration_inputs(model: Path, file: Path) -> list[dict]:
    """Keyword arguments of a model's forward, one row each, about 8192 tokens in all.

    Args:
        model: folder with tokenizer, of a Uni-MoE with its processor.
        file: JSON lines, `{"text": ...}` each; or training data of a Uni-MoE (docs/training.md),
            with its media. Another model takes training data without media, as plain text.

    Returns:
        At least one.

    Raises:
        ValueError: If the file is missing, empty, or holds something else.
    """
    is_ours = read_config(model).get("model_type") == UniMoEConfig.model_type
    if is_ours:
        from unimoe_model.processing import UniMoEProcessor

        processor = UniMoEProcessor.from_pretrained(model)
        tokenizer = processor.tokenizer
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
            row = dict(processor.training_inputs([item.turns], **media, max_length=ROW_TOKENS))
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
    """The texts of a file of them, None if its first line is no text."""
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
