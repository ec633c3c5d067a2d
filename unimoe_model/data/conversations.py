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
    """The conversations of a data entry in their order, each made when it is asked for.

    Attributes:
        parts: conversations of each file; their sum is the length.
        kinds: how many items of each media kind they hold.
        digest: name of all that is learned from them, 16 hexadecimal digits.

    Args:
        get: makes the conversation of a number from 0.
        parts: see above.
        kinds: see above.
        digest: see above.
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
    """Checks a file of training data, all of it, before anything is done with it.

    Of JSON lines only their places are kept, 16 bytes a line; a line is parsed again whenever its
    conversation is asked for. One JSON array is held in memory as a whole.

    Args:
        path: file of UTF-8, with a byte order mark or without, in a format of this module.
        media_folder: what paths of media are relative to; None for the file's own folder.
        reporter: is told how far it is in a long file.

    Returns:
        The conversations, at least one. Their digest is of the file's bytes and of the sizes of its
        media.

    Raises:
        ValueError: Naming file, line or item, and key, for the first that is not as described
            above; or naming the media files that are missing.
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
    """Number of media by kind, and the digest of their sizes; raises ValueError for missing ones.

    The conversations are gone through once, and all of them before media are reported missing.
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
    """Whether the first character that is no space is a bracket."""
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
