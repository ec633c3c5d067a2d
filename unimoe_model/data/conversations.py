r"""Training data of a user's own: conversations about media, in the formats that such data have.

What a file holds says which it is:

1. JSON lines of `unimoe eval` (`evaluation/samples.py`), a question each. What is learned is
   `answer`, or the first of `answers`. A line with `options` is asked as the metric `choice` asks
   it, for a letter, and so the right option's letter is learned.
2. JSON lines, a conversation each:
   `{"id": 7, "image": "dog.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"},
   {"from": "gpt", "value": "a dog"}]}`. `image`, `video`, `speech` and `audio` are a path or a list
   of paths; `user` and `assistant` are other names of `human` and `gpt`; `id` may be left out, and
   need not be unique.
3. One JSON array of such conversations, as LLaVA publishes them.

Media go where the placeholders `<image>`, `<video>`, `<speech>` and `<audio>` stand in the
questions, the first file of a kind at its first placeholder. They stay where they are, at the end
of a question too, as in the published Uni-MoE code; LLaVA's own moves `<image>` to the front. A
kind without any placeholder comes at the start of the first question, an item a line. In a line of
`unimoe eval` a placeholder of one kind stands for all: then none is added, as when it is asked.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.evaluation.files import file_digest, sizes_digest
from unimoe_model.evaluation.metrics.choice import check_options, right_option, with_options
from unimoe_model.evaluation.samples import (
    Sample,
    data_file,
    filled_lines,
    line_object,
    media_of,
    name_of,
    named,
    require_files,
    require_unique,
    sample_of,
    shown,
)
from unimoe_model.prompt import PLACEHOLDERS

_KEYS = ("id", *MEDIA_KINDS, "conversations")
# Of llava_v1_5_mix665k (model), LLaVA-Video-178K (data_source) and Uni_MoE_Speech_v2_with_token
# (tokens, multi_info): they say nothing that is learned.
_PASSED_OVER = ("model", "data_source", "tokens", "multi_info")
# ShareGPT's turns within llava_v1_5_mix665k have markdown and text beside their value.
_TURN_KEYS = ("from", "value", "markdown", "text")
_ROLES = (("human", "user"), ("gpt", "assistant"))
_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS.values()))
_KINDS = {placeholder: kind for kind, placeholder in PLACEHOLDERS.items()}


@dataclass(frozen=True)
class Conversation:
    """What is learned from a line or an item of a data file.

    Attributes:
        id: its name; its number in the file if that gives none.
        where: file and line or item, such as `data.json item 17`, for errors.
        turns: what the user says, with a placeholder for each item of media, and the answer.
        media: kind and file of each item, in the order of the placeholders.
    """

    id: str | int
    where: str
    turns: tuple[tuple[str, str], ...]
    media: tuple[tuple[str, Path], ...] = ()


def read_conversations(path: Path, media_folder: Path | None = None) -> list[Conversation]:
    """Reads and checks a file of training data, all of it, before anything is done with it.

    Args:
        path: file of UTF-8, with a byte order mark or without, in a format of this module.
        media_folder: what paths of media are relative to; None for the file's own folder.

    Returns:
        The conversations in their order, at least one.

    Raises:
        ValueError: Naming file, line or item, and key, for the first that is not as described
            above; or naming the media files that are missing.
    """
    path = Path(path)
    if media_folder is not None and not Path(media_folder).is_dir():
        raise ValueError(f"media_folder ({media_folder}) must be a folder; there is no such folder")
    folder = path.parent if media_folder is None else Path(media_folder)
    conversations: list[Conversation] = []
    lines: dict[str, int] = {}
    for unit, number, value in _entries(path):
        where = f"{path} {unit} {number}"
        with named(where):
            fields = line_object(value) if unit == "line" else value
            if unit == "line" and "conversations" not in fields:
                sample = sample_of(fields, number, folder)
                require_unique(sample, lines)
                conversation = _of_sample(sample, where)
            else:
                conversation = _of_object(fields, number, folder, where)
        conversations.append(conversation)
    if not conversations:
        raise ValueError(f"data ({path}) must hold at least one conversation")
    require_files(
        path,
        (
            (item.where.removeprefix(f"{path} "), kind, file)
            for item in conversations
            for kind, file in item.media
        ),
    )
    return conversations


def data_digest(path: Path, conversations: Sequence[Conversation]) -> str:
    """Name of a file's bytes and of the sizes of its media, 16 hexadecimal digits."""
    media = sizes_digest(file for item in conversations for _, file in item.media)
    return hashlib.sha256(f"{file_digest(Path(path))} {media}".encode()).hexdigest()[:16]


def _entries(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Texts of lines, or values of the items of an array, with their numbers."""
    with data_file(path, "JSON lines, or of one JSON array") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        if first != "[":
            for number, text in filled_lines(file):
                yield "line", number, text
            return
        items = _array(path, file.read())
    for number, item in enumerate(items, start=1):
        yield "item", number, item


def _array(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data ({path}) must be one whole JSON array: {error}") from error


def _of_sample(sample: Sample, where: str) -> Conversation:
    if not sample.answers:
        raise ValueError("answer or answers is missing; training needs what is right")
    question, answer = sample.question, sample.answers[0]
    if sample.options:
        check_options(sample.options)
        answer = ascii_uppercase[right_option(answer, sample.options)]
        question = with_options(question, sample.options)
    added = () if _PLACEHOLDER.search(question) else MEDIA_KINDS
    texts = [("question", question), ("answer", answer)]
    return _conversation(sample.id, where, texts, sample.media, added)


def _of_object(fields: Any, number: int, folder: Path, where: str) -> Conversation:
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
    media = media_of(fields, folder)
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
    """What errors call the text of a turn, and the text."""
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
    media: dict[str, tuple[Path, ...]],
    added: Sequence[str],
) -> Conversation:
    """Checks texts, questions and answers by turns, and puts media of kinds `added` in front."""
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
