"""Parsing and validation of one conversation of a data file."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.data.indexed_files import Media
from unimoe_model.evaluation.metrics.choice import check_options, right_option, with_options
from unimoe_model.evaluation.samples import Sample, media_of, name_of, sample_of, shown
from unimoe_model.prompt import PLACEHOLDERS

_KEYS = ("id", *MEDIA_KINDS, "conversations")
# Of llava_v1_5_mix665k (model), LLaVA-Video-178K (data_source) and Uni_MoE_Speech_v2_with_token
# (tokens, multi_info): metadata without effect on training.
_PASSED_OVER = ("model", "data_source", "tokens", "multi_info")
# ShareGPT's turns within llava_v1_5_mix665k have markdown and text beside their value.
_TURN_KEYS = ("from", "value", "markdown", "text")
_ROLES = (("human", "user"), ("gpt", "assistant"))
_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS.values()))
_KINDS = {placeholder: kind for kind, placeholder in PLACEHOLDERS.items()}


@dataclass(frozen=True)
class Conversation:
    """A training sample: one line or item of a data file.

    Attributes:
        id: the sample's `id`; its number in the file by default.
        where: file and line or item, such as `data.json item 17`, for error messages.
        turns: pairs of the user's message, with a placeholder for each media item, and the answer.
        media: kind and file of each media item, in the order of the placeholders.
    """

    id: str | int
    where: str
    turns: tuple[tuple[str, str], ...]
    media: tuple[tuple[str, Media], ...] = ()


def conversation_of(
    fields: Any,
    number: int,
    place: Callable[[str], Media],
    where: str,
    may_ask: bool = True,
) -> Conversation:
    """Parses a JSON value in one of the formats of `data/conversations.py`.

    Args:
        fields: the JSON value.
        number: number of the sample in its file, which is its default id.
        place: returns the file of a media name.
        where: file and line or item, for error messages.
        may_ask: whether to accept questions in the format of `unimoe eval`.

    Raises:
        ValueError: If the value is not in such a format; the message names the key.
    """
    if may_ask and isinstance(fields, dict) and "conversations" not in fields:
        return _of_sample(sample_of(fields, number, place), where)
    return _of_object(fields, number, place, where)


def _of_sample(sample: Sample, where: str) -> Conversation:
    if not sample.answers:
        raise ValueError("answer or answers is missing; training requires a reference answer")
    question, answer = sample.question, sample.answers[0]
    if sample.options:
        check_options(sample.options)
        answer = ascii_uppercase[right_option(answer, sample.options)]
        question = with_options(question, sample.options)
    added = () if _PLACEHOLDER.search(question) else MEDIA_KINDS
    texts = [("question", question), ("answer", answer)]
    return _conversation(sample.id, where, texts, sample.media, added)


def _of_object(fields: Any, number: int, place: Callable[[str], Media], where: str) -> Conversation:
    if not isinstance(fields, dict):
        raise ValueError(f"value ({shown(fields)}) must be an object with conversations")
    if "voice" in fields:
        raise ValueError(
            f"voice ({shown(fields['voice'])}) may be speech or any sound; it must be named speech,"
            " with <speech>, or audio, with <audio>"
        )
    unknown = [key for key in fields if key not in (*_KEYS, *_PASSED_OVER)]
    if unknown:
        raise ValueError(f"unknown keys {shown(unknown)}; there are {', '.join(_KEYS)}")
    name = name_of(fields.get("id", number))
    media = media_of(fields, place)
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations ({shown(turns)}) must be a list of turns, human first")
    texts = [_text(turn, count) for count, turn in enumerate(turns)]
    if len(texts) % 2:
        key, last = texts[-1]
        raise ValueError(f"{key} ({shown(last)}) must be followed by an answer; it is the last")
    questions = "\n".join(text for _, text in texts[::2])
    added = [kind for kind in media if PLACEHOLDERS[kind] not in questions]
    return _conversation(name, where, texts, media, added)


def _text(turn: Any, count: int) -> tuple[str, str]:
    """Returns the name of a turn's text in error messages, and the text."""
    key = f"conversations turn {count + 1}"
    if not isinstance(turn, dict):
        raise ValueError(f"{key} ({shown(turn)}) must be an object of from and value")
    unknown = [name for name in turn if name not in _TURN_KEYS]
    if unknown:
        raise ValueError(f"{key} has unknown keys {shown(unknown)}; there are from, value")
    role, text = turn.get("from"), turn.get("value")
    if role not in _ROLES[count % 2]:
        expected = " or ".join(_ROLES[count % 2])
        why = "the model's own system prompt" if role == "system" else "turns alternate, human"
        raise ValueError(f"{key} from ({shown(role)}) must be {expected}; {why} comes first")
    if not isinstance(text, str):
        raise ValueError(f"{key} value ({shown(text)}) must be a text")
    return f"{key} value", text


def _conversation(
    name: str | int,
    where: str,
    texts: Sequence[tuple[str, str]],
    media: dict[str, tuple[Media, ...]],
    added: Sequence[str],
) -> Conversation:
    """Checks alternating questions and answers, and puts placeholders of kinds `added` first."""
    front = [PLACEHOLDERS[kind] for kind in media if kind in added for _ in media[kind]]
    (key, first), *others = texts
    texts = [(key, "\n".join([*front, first] if first.strip() else front)), *others]
    for number, (key, text) in enumerate(texts):
        if not text.strip():
            raise ValueError(f"{key} ({shown(text)}) must not be empty")
        if number % 2 and _PLACEHOLDER.search(text):
            raise ValueError(f"{key} ({shown(text)}) must hold no placeholder; it is an answer")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{key} ({shown(text)}) must be Unicode text: {error}") from error
    questions = [text for _, text in texts[::2]]
    order = [_KINDS[found] for text in questions for found in _PLACEHOLDER.findall(text)]
    for kind in MEDIA_KINDS:
        files, places = len(media.get(kind, ())), order.count(kind)
        if files != places:
            hint = "; frames of one video must be in a folder" if kind == "video" else ""
            raise ValueError(
                f"{kind} ({files} files) must be one file for each {PLACEHOLDERS[kind]} in the"
                f" questions, which hold {places}{hint}"
            )
    remaining = {kind: iter(files) for kind, files in media.items()}
    return Conversation(
        name,
        where,
        tuple(zip(questions, (text for _, text in texts[1::2]), strict=True)),
        tuple((kind, next(remaining[kind])) for kind in order),
    )
