"""Data files of a user's own: a line of JSON a question, with its media and right answers.

    {"id": 7, "question": "what is it?", "image": "dog.png", "answers": ["dog", "a dog"]}

`id` is unique. `image`, `video`, `speech` and `audio` are a path or a list of paths, relative to
the data file; `question` may be left out where there is media. What is right is `answer` or a list
`answers`; `options` are the texts of a multiple choice.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimoe_model.configuration import MEDIA_KINDS

_KEYS = ("id", "question", *MEDIA_KINDS, "answer", "answers", "options")
_SHOWN_MISSING = 10


@dataclass(frozen=True)
class Sample:
    """A line of a data file.

    Attributes:
        id: its name, unique in the file.
        line: its number in the file, from 1.
        question: what is asked; may be empty where there is media.
        media: files of each kind that occurs.
        answers: what is right; empty if the line does not say.
        options: texts of a multiple choice.
    """

    id: str | int
    line: int
    question: str = ""
    media: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def read_samples(path: Path, check: Callable[[Sample], None] = lambda sample: None) -> list[Sample]:
    """Reads and checks a data file, all of it, before anything is done with it.

    Args:
        path: file of UTF-8 JSON lines, with a byte order mark or without; empty lines are passed
            over.
        check: raises ValueError for a sample that it refuses.

    Returns:
        The samples in their order, at least one.

    Raises:
        ValueError: Naming file, line and key, for the first line that is not as described above or
            that `check` refuses; or naming the media files that are missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data ({path}) must be a file of JSON lines; there is no such file")
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                sample = _parse(text, number, path.parent, check, where=f"{path} line {number}")
                earlier = lines.setdefault(str(sample.id), number)
                if earlier != number:
                    raise ValueError(
                        f"{path} line {number}: id ({sample.id!r}) must be unique; line {earlier}"
                        " has it too"
                    )
                samples.append(sample)
    except UnicodeDecodeError as error:
        raise ValueError(f"data ({path}) must be UTF-8 text: {error}") from error
    if not samples:
        raise ValueError(f"data ({path}) must hold at least one line")
    _require_files(path, samples)
    return samples


def _parse(
    text: str, number: int, folder: Path, check: Callable[[Sample], None], where: str
) -> Sample:
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError('must be a JSON object such as {"id": 1, "question": "what?"}')
        sample = _sample(fields, number, folder)
        check(sample)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: must be a JSON object: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return sample


def _sample(fields: dict[str, Any], number: int, folder: Path) -> Sample:
    unknown = [key for key in fields if key not in _KEYS]
    if unknown:
        raise ValueError(f"unknown keys {unknown}; there are {', '.join(_KEYS)}")
    name = fields.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise ValueError(f"id ({name!r}) must be a text or a whole number")
    question = fields.get("question", "")
    if not isinstance(question, str):
        raise ValueError(f"question ({question!r}) must be a text")
    media = {
        kind: tuple(folder / name for name in _texts(fields[kind], kind, "path"))
        for kind in MEDIA_KINDS
        if kind in fields
    }
    if not question.strip() and not media:
        raise ValueError(f"question ({question!r}) must ask something where there is no media")
    if "answer" in fields and "answers" in fields:
        raise ValueError("answer and answers must not both be there")
    answers = ()
    if "answer" in fields:
        if not isinstance(fields["answer"], str) or not fields["answer"].strip():
            raise ValueError(f"answer ({fields['answer']!r}) must be a text")
        answers = (fields["answer"],)
    elif "answers" in fields:
        answers = _texts(fields["answers"], "answers", "text", single=False)
    options = ()
    if "options" in fields:
        options = _texts(fields["options"], "options", "text", single=False)
    return Sample(name, number, question.strip(), media, answers, options)


def _texts(value: Any, key: str, noun: str, single: bool = True) -> tuple[str, ...]:
    items = [value] if single and isinstance(value, str) else value
    if (
        not isinstance(items, list)
        or not items
        or not all(isinstance(item, str) and item.strip() for item in items)
    ):
        expected = f"a {noun} or a list of {noun}s" if single else f"a list of {noun}s"
        raise ValueError(f"{key} ({value!r}) must be {expected}, none of them empty")
    return tuple(items)


def _require_files(path: Path, samples: Sequence[Sample]) -> None:
    missing = [
        f"line {sample.line} {kind} ({file})"
        for sample in samples
        for kind, files in sample.media.items()
        for file in files
        # A video may be a folder of pictures.
        if not (file.exists() if kind == "video" else file.is_file())
    ]
    if missing:
        more = len(missing) - _SHOWN_MISSING
        raise ValueError(
            f"{path}: {len(missing)} media files are missing: {'; '.join(missing[:_SHOWN_MISSING])}"
            + (f"; and {more} more" if more > 0 else "")
        )


@contextmanager
def line_named(path: Path, sample: Sample) -> Iterator[None]:
    """Puts file, line and id in front of the ValueErrors of what is done with a sample."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} line {sample.line} (id {sample.id!r}): {error}") from error


def media_arguments(sample: Sample) -> dict[str, list[Path]]:
    """A sample's files as keyword arguments of `Answerer.answer` and `UniMoEProcessor.ask`."""
    names = {"image": "images", "video": "videos", "speech": "speech", "audio": "audio"}
    return {names[kind]: list(files) for kind, files in sample.media.items()}
