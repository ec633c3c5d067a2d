"""JSON lines of training data: where each begins is kept in memory, and nothing else of it."""

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
    """The conversations of a file of JSON lines, by number; `scanned` comes first.

    Attributes:
        digest: of the bytes of the file, 16 hexadecimal digits.

    Args:
        path: of UTF-8 text.
        place: where the media file of a name is.
    """

    def __init__(self, path: Path, place: Callable[[str], Path]):
        self._file = IndexedFile.of(path)
        self._place = place
        self._starts = self._lines = np.empty(0, np.int64)
        self.digest = ""

    def __len__(self) -> int:
        return len(self._lines)

    def __call__(self, index: int) -> Conversation:
        """The conversation of a line that is not empty, counted from 0.

        Raises:
            ValueError: If the file has changed since it was scanned.
        """
        line = int(self._lines[index])
        with named(self._where(line)):
            return conversation_of(
                line_object(self._text(index)), line, self._place, self._where(line)
            )

    def scanned(self, advance: Callable[[int], None]) -> Iterator[Conversation]:
        """All conversations, checked, while the places of their lines are noted.

        Args:
            advance: is told the bytes of each line.

        Raises:
            ValueError: Naming file, line and key, for the first line that is no conversation; at
                the end, for a question whose id an earlier one has.
        """
        starts, lines = array("q", [0]), array("q")
        # Of questions as `unimoe eval` reads them, whose ids are unique.
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
        """Looks at the lines alone whose ids have a hash that occurs twice."""
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
