r"""Reading of training data: conversations about media.

The format is detected from the content of the file:

1. JSON lines in the format of `unimoe eval` (`evaluation/samples.py`), one question per line. The
   training target is `answer`, or the first of `answers`. With `options`, the question is
   formatted as for the metric `choice`, and the target is the letter of the correct option.
2. JSON lines, one conversation per line:
   `{"id": 7, "image": "dog.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"},
   {"from": "gpt", "value": "a dog"}]}`. `image`, `video`, `speech` and `audio` are a path or a list
   of paths; `user` and `assistant` are synonyms of `human` and `gpt`; `id` is optional and need
   not be unique.
3. One JSON array of such conversations, as LLaVA publishes them.

Media are inserted at the placeholders `<image>`, `<video>`, `<speech>` and `<audio>` in the
questions, in order. Placeholders are not moved, as in the published Uni-MoE code; LLaVA moves
`<image>` to the front. Media of a kind without placeholders come first in the first question, one
per line. In a question of `unimoe eval`, media are added in this way only if it has no placeholder
of any kind, as in evaluation.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import index as whole_number
from pathlib import Path
from typing import Any

from unimoe_model.data.conversation_objects import Conversation, conversation_of
from unimoe_model.data.json_lines import JsonLines
from unimoe_model.evaluation.files import SizesDigest, file_digest
from unimoe_model.evaluation.samples import data_file, located, named, require_files
from unimoe_model.training.progress import ProgressReporter, reported_bytes


class Conversations(Sequence[Conversation]):
    """A sequence of the conversations of a data entry, each parsed on access.

    Args:
        get: returns the conversation of an index from 0.
        parts: number of conversations per file; their sum is the length.
        kinds: number of media items by kind.
        digest: hash of everything that affects training, 16 hexadecimal digits.

    Attributes:
        parts: number of conversations per file.
        kinds: number of media items by kind.
        digest: hash of everything that affects training.
    """

    def __init__(
        self,
        get: Callable[[int], Conversation],
        parts: Sequence[int],
        kinds: Mapping[str, int],
        digest: str,
    ):
        self._numbers = range(sum(parts))
        self._get = get
        self.parts = tuple(parts)
        self.kinds = dict(kinds)
        self.digest = digest

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Conversation:
        return self._get(self._numbers[whole_number(index)])


def read_conversations(
    path: Path, media_folder: Path | None = None, reporter: ProgressReporter | None = None
) -> Conversations:
    """Opens a file of training data after checking all of it.

    For JSON lines, only offsets are kept in memory, 16 bytes per line; a line is parsed again
    whenever its conversation is accessed. A JSON array is held in memory as a whole.

    Args:
        path: UTF-8 file, with or without a byte order mark, in a format of this module.
        media_folder: folder that media paths are relative to; None for the file's own folder.
        reporter: shows progress for long files.

    Returns:
        The conversations, at least one. Their digest covers the file's bytes and the sizes of its
        media.

    Raises:
        ValueError: For the first line or item that is invalid, naming file, line or item, and key;
            or if media files are missing.
    """
    path = Path(path)
    if media_folder is not None and not Path(media_folder).is_dir():
        raise ValueError(f"media_folder ({media_folder}) must be a folder; there is no such folder")
    place = partial(located, path.parent if media_folder is None else Path(media_folder))
    if _is_array(path):
        items = _items(path, place)
        kinds, sizes = _tallied(path, items)
        get, count, content = items.__getitem__, len(items), file_digest(path)
    else:
        get = lines = JsonLines(path, place)
        with reported_bytes(reporter, f"check {path.name}", path.stat().st_size) as advance:
            kinds, sizes = _tallied(path, lines.scanned(advance))
        count, content = len(lines), lines.digest
    if not count:
        raise ValueError(f"data ({path}) must hold at least one conversation")
    digest = hashlib.sha256(f"{content} {sizes}".encode()).hexdigest()[:16]
    return Conversations(get, (count,), kinds, digest)


def _tallied(path: Path, conversations: Iterable[Conversation]) -> tuple[dict[str, int], str]:
    """Returns the number of media by kind and the digest of their sizes.

    Raises ValueError for missing media, after one pass over all conversations.
    """
    kinds, sizes = Counter(), SizesDigest()

    def media() -> Iterator[tuple[str, str, Path]]:
        for conversation in conversations:
            for kind, file in conversation.media:
                kinds[kind] += 1
                with suppress(OSError):  # a missing file, which is reported below
                    sizes.add(file)
                yield conversation.where.removeprefix(f"{path} "), kind, file

    require_files(path, media())
    return kinds, sizes.hexdigest()


def _is_array(path: Path) -> bool:
    """Whether the first character other than white space is an opening bracket."""
    with data_file(path, "JSON lines, or of one JSON array") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
    return first == "["


def _items(path: Path, place: Callable[[str], Path]) -> list[Conversation]:
    with data_file(path, "JSON lines, or of one JSON array") as file:
        values = _array(path, file.read())
    conversations = []
    for number, value in enumerate(values, start=1):
        with named(f"{path} item {number}"):
            conversations.append(
                conversation_of(value, number, place, f"{path} item {number}", may_ask=False)
            )
    return conversations


def _array(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data ({path}) must be one whole JSON array: {error}") from error
