"""The log `answers.jsonl`, appended output by output, from which a stopped run resumes."""

import json
from collections.abc import Sequence
from os import SEEK_END
from pathlib import Path
from typing import Any

from unimoe_model.evaluation.files import write_whole
from unimoe_model.folder_lock import FolderLock

_ANSWERS, _RUN = "answers.jsonl", "run.json"


class AnswerLog:
    """The outputs of an evaluation run, including those of an interrupted one.

    A context manager: while it is open, no other process can open a log in the same folder.

    Args:
        folder: folder of `answers.jsonl`, and of `run.json`, which identifies the run.
        run: everything that determines the outputs; a folder with those of another run is refused.
        ids: ids of the questions, in order. An earlier run may have covered more of them.

    Attributes:
        answers: outputs so far, for the first questions of `ids`.
    """

    def __init__(self, folder: Path, run: dict[str, Any], ids: Sequence[str | int]):
        self.answers: list[str] = []
        self._folder = folder
        self._run = run
        self._ids = list(ids)
        self._lock = FolderLock(folder)
        self._file = None

    def __enter__(self) -> "AnswerLog":
        """Opens the log.

        Raises:
            ValueError: If the folder holds outputs of another run or a damaged log, or is in use.
        """
        self._lock.__enter__()
        path = self._folder / _ANSWERS
        try:
            self._file = path.open("a+b")
            self._check_run()
            self.answers = self._read(path)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        """Closes the log and releases the folder."""
        if self._file:
            self._file.close()
        self._lock.__exit__()

    def append(self, answer: str) -> None:
        """Appends the output for the next question and flushes the file."""
        line = {"id": self._ids[len(self.answers)], "answer": answer}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.answers.append(answer)

    def _check_run(self) -> None:
        path = self._folder / _RUN
        if not self._file.seek(0, SEEK_END):
            write_whole(path, json.dumps(self._run, indent=2) + "\n")
            return
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); delete {self._folder} to start anew"
            ) from error
        # Earlier versions did not record all of them.
        differing = [
            f"{key} ({found[key]} there, {value} now)"
            for key, value in self._run.items()
            if key in found and found[key] != value
        ]
        if differing:
            raise ValueError(
                f"output ({self._folder}) holds answers of another run, which differs in"
                f" {', '.join(differing)}; give another output, or delete it"
            )

    def _read(self, path: Path) -> list[str]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        answers = []
        for number, line in enumerate(content[:whole].splitlines()):
            try:
                entry = json.loads(line)
                name, answer = entry["id"], entry["answer"]
                if not isinstance(answer, str):
                    raise ValueError(f"answer ({answer!r}) must be a text")
                if number < len(self._ids) and name != self._ids[number]:
                    raise ValueError(f"id ({name!r}) must be {self._ids[number]!r}")
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path} line {number + 1} is damaged ({error}); delete {self._folder} to"
                    " start anew"
                ) from error
            answers.append(answer)
        # Drops a line truncated by a kill: its question is asked again.
        self._file.truncate(whole)
        return answers
