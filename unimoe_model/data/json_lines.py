"""JSON lines of training data, of which only the offsets are held in memory."""

import codecs
import hashlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unimoe_model.data.conversation_objects import Conversation, conversation_of
from unimoe_model.data.indexed_files import IndexedFile
from unimoe_model.evaluation.samples import line_object, named, require_unique, sample_of


class JsonLines:
    """The conversations of a JSON lines file by index; `scanned` must be consumed first.

    Args:
        path: UTF-8 text file.
        place: returns the file of a media name.

    Attributes:
        digest: hash of the file's bytes, 16 hexadecimal digits.
    """

    def __init__(self, path: Path, place: Callable[[str], Path]):
        self._file = IndexedFile.of(path)
        self._place = place
        self._starts = self._lines = np.empty(0, np.int64)
        self.digest = ""

    def __len__(self) -> int:
        return len(self._lines)

    def __call__(self, index: int) -> Conversation:
        """Returns the conversation of the `index`-th non-empty line, counted from 0.

        Raises:
            ValueError: If the file has changed since it was scanned.
        """
        line = int(self._lines[index])
        with named(self._where(line)):
            return conversation_of(
                line_object(self._text(index)), line, self._place, self._where(line)
            )

    def scanned(self, advance: Callable[[int], None]) -> Iterator[Conversation]:
        """Yields all conversations after checking them, and records the offsets of their lines.

        Args:
            advance: called with the number of bytes of each line.

        Raises:
            ValueError: For the first line that is not a conversation, naming file, line and key;
                after the last line, if two questions have the same id.
        """
        starts, lines = array("q", [0]), array("q")
        # Questions in the format of `unimoe eval`, whose ids must be unique.
        asked, ids = array("q"), array("q")
        digest = hashlib.sha256()
        with self._file.path.open("rb") as file:
            for line, content in enumerate(file, start=1):
                digest.update(content)
                advance(len(content))
                text = self._decoded(content, line)
                starts.append(starts[-1] + len(content))
                if not text.strip():
                    starts.pop(-2)
                    continue
                with named(self._where(line)):
                    fields = line_object(text)
                    found = conversation_of(fields, line, self._place, self._where(line))
                if "conversations" not in fields:
                    asked.append(len(lines))
                    ids.append(hash(str(found.id)))
                lines.append(line)
                yield found
        self._starts, self._lines = np.frombuffer(starts, np.int64), np.frombuffer(lines, np.int64)
        self.digest = digest.hexdigest()[:16]
        self._require_unique(np.frombuffer(asked, np.int64), np.frombuffer(ids, np.int64))

    def _require_unique(self, asked: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """Checks ids for duplicates, parsing only lines whose hash of the id occurs twice."""
        order = np.argsort(ids, kind="stable")
        equal = np.flatnonzero(np.diff(ids[order]) == 0)
        seen: dict[str, int] = {}
        for index in np.unique(asked[order[np.concatenate((equal, equal + 1))]]).tolist():
            line = int(self._lines[index])
            with named(self._where(line)):
                require_unique(sample_of(line_object(self._text(index)), line, self._place), seen)

    def _text(self, index: int) -> str:
        start, end = self._starts[index : index + 2].tolist()
        return self._decoded(self._file.read(start, end - start), int(self._lines[index])).strip()

    def _decoded(self, content: bytes, line: int) -> str:
        if line == 1:
            content = content.removeprefix(codecs.BOM_UTF8)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data ({self._file.path}) must be UTF-8 text: line {line}: {error}"
            ) from error

    def _where(self, line: int) -> str:
        return f"{self._file.path} line {line}"
