"""Data files of questions: one JSON object per line, with media and reference answers.

    {"id": 7, "question": "what is it?", "image": "dog.png", "answers": ["dog", "a dog"]}

`id` must be unique. `image`, `video`, `speech` and `audio` are a path or a list of paths, relative
to the data file; `question` is optional if there are media. The reference is `answer`, or a list
`answers`; `options` are the texts of a multiple choice.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, TextIO

from unimoe_model.configuration import MEDIA_KINDS

_KEYS = ("id", "question", *MEDIA_KINDS, "answer", "answers", "options")
_SHOWN_MISSING = 10
_SHOWN_CHARACTERS = 60
_SHOWN_OF_PATH = 200


@dataclass(frozen=True)
class Sample:
    """A line of a data file.

    Attributes:
        id: id of the question, unique in the file.
        line: line number in the file, from 1.
        question: text of the question; may be empty if there are media.
        media: files by media kind.
        answers: reference answers; empty if the line has none.
        options: texts of a multiple choice; empty for other questions.
    """

    id: str | int
    line: int
    question: str = ""
    media: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def read_samples(path: Path, check: Callable[[Sample], None] = lambda sample: None) -> list[Sample]:
    """Reads a data file and checks all of it.

    Args:
        path: UTF-8 JSON lines file, with or without a byte order mark; empty lines are skipped.
        check: raises ValueError for samples to reject.

    Returns:
        The samples in order, at least one.

    Raises:
        ValueError: For the first line that is invalid or rejected by `check`, naming file, line
            and key; or if media files are missing.
    """
    path = Path(path)
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    place = partial(located, path.parent)
    with data_file(path, "JSON lines") as file:
        for number, text in filled_lines(file):
            with named(f"{path} line {number}"):
                sample = sample_of(line_object(text), number, place)
                check(sample)
                require_unique(sample, lines)
            samples.append(sample)
    if not samples:
        raise ValueError(f"data ({path}) must hold at least one line")
    require_files(
        path,
        (
            (f"line {sample.line}", kind, file)
            for sample in samples
            for kind, files in sample.media.items()
            for file in files
        ),
    )
    return samples


@contextmanager
def data_file(path: Path, expected: str) -> Iterator[TextIO]:
    """Opens a UTF-8 text file; raises ValueError, with `expected` in its message, if it cannot."""
    if not path.is_file():
        raise ValueError(f"data ({path}) must be a file of {expected}; there is no such file")
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"data ({path}) must be UTF-8 text: {error}") from error


def filled_lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """Yields numbers, from 1, and texts of non-empty lines."""
    return ((number, text) for number, text in enumerate(file, start=1) if text.strip())


def line_object(text: str) -> dict[str, Any]:
    """Parses the JSON object of a line; raises ValueError if it is not one."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be a JSON object: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError('must be a JSON object such as {"id": 1, "question": "what?"}')
    return fields


def sample_of(fields: dict[str, Any], number: int, place: Callable[[str], Any]) -> Sample:
    """Builds the sample of a line's JSON object; `place` returns the file of a media name.

    Raises:
        ValueError: For the first invalid key, naming it.
    """
    unknown = [key for key in fields if key not in _KEYS]
    if unknown:
        raise ValueError(f"unknown keys {shown(unknown)}; there are {', '.join(_KEYS)}")
    name = name_of(fields.get("id"))
    question = fields.get("question", "")
    if not isinstance(question, str):
        raise ValueError(f"question ({shown(question)}) must be a text")
    media = media_of(fields, place)
    if not question.strip() and not media:
        raise ValueError(f"question ({shown(question)}) must ask something where there is no media")
    if "answer" in fields and "answers" in fields:
        raise ValueError("answer and answers exclude each other")
    answers = ()
    if "answer" in fields:
        if not isinstance(fields["answer"], str) or not fields["answer"].strip():
            raise ValueError(f"answer ({shown(fields['answer'])}) must be a text")
        answers = (fields["answer"],)
    elif "answers" in fields:
        answers = _texts(fields["answers"], "answers", "text", single=False)
    options = ()
    if "options" in fields:
        options = _texts(fields["options"], "options", "text", single=False)
    return Sample(name, number, question.strip(), media, answers, options)


def name_of(value: Any) -> str | int:
    """Returns the value of `id`; raises ValueError if it is neither a string nor an integer."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"id ({shown(value)}) must be a text or a whole number")
    return value


def require_unique(sample: Sample, lines: dict[str, int]) -> None:
    """Raises ValueError if an earlier line has the same id; `lines` maps ids to line numbers."""
    earlier = lines.setdefault(str(sample.id), sample.line)
    if earlier != sample.line:
        raise ValueError(f"id ({shown(sample.id)}) must be unique; line {earlier} has it too")


def media_of(fields: dict[str, Any], place: Callable[[str], Any]) -> dict[str, tuple[Any, ...]]:
    """Files of an object by media kind; raises ValueError if a value is not a path."""
    return {
        kind: tuple(place(name) for name in _texts(fields[kind], kind, "path"))
        for kind in MEDIA_KINDS
        if kind in fields
    }


@lru_cache(maxsize=1 << 16)
def located(folder: Path, name: str) -> Path:
    """A file of a folder, cached because creating a Path takes longer than parsing a line."""
    return folder / name


def shown(value: Any) -> str:
    """Formats a value for error messages: on one line, truncated if long."""
    return _cut(repr(value), _SHOWN_CHARACTERS)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _texts(value: Any, key: str, noun: str, single: bool = True) -> tuple[str, ...]:
    items = [value] if single and isinstance(value, str) else value
    if (
        not isinstance(items, list)
        or not items
        or not all(isinstance(item, str) and item.strip() for item in items)
    ):
        expected = f"a {noun} or a list of {noun}s" if single else f"a list of {noun}s"
        raise ValueError(f"{key} ({shown(value)}) must be {expected}, none of them empty")
    return tuple(items)


def require_files(path: Path, files: Iterable[tuple[str, str, Path]]) -> None:
    """Checks that all media of a data file exist.

    Args:
        path: the data file.
        files: place in the data file, such as `line 3`, kind, and path of each media file.

    Raises:
        ValueError: If files are missing; the message has their number and names the first ones.
    """

    @cache
    def is_there(kind: str, file: Path) -> bool:
        # A video may be a folder of pictures. Unlike stat, these return False for too long names.
        return os.path.exists(file) if kind == "video" else os.path.isfile(file)

    missing = [
        f"{where} {kind} ({_cut(str(file), _SHOWN_OF_PATH)})"
        for where, kind, file in files
        if not is_there(kind, file)
    ]
    if missing:
        more = len(missing) - _SHOWN_MISSING
        raise ValueError(
            f"{path}: {len(missing)} media files are missing: {'; '.join(missing[:_SHOWN_MISSING])}"
            + (f"; and {more} more" if more > 0 else "")
        )


@contextmanager
def named(where: str) -> Iterator[None]:
    """Prefixes ValueErrors raised inside with `where`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def line_named(path: Path, sample: Sample) -> AbstractContextManager[None]:
    """Prefixes ValueErrors raised inside with the file, line and id of a sample."""
    return named(f"{path} line {sample.line} (id {sample.id!r})")


def asked_media(sample: Sample) -> list[tuple[str, Path]]:
    """Kind and path of each media item of a sample."""
    return [(kind, file) for kind, files in sample.media.items() for file in files]


def media_arguments(media: Mapping[str, Sequence]) -> dict[str, list]:
    """Converts media by kind to keyword arguments of `Answerer.answer`."""
    names = {"image": "images", "video": "videos", "speech": "speech", "audio": "audio"}
    return {names[kind]: list(items) for kind, items in media.items()}
