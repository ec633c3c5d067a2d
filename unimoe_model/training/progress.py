"""Progress of long operations: bars in a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class ProgressReporter(Protocol):
    """Receives the progress of stages."""

    def start(self, stage: str, total: int, done: int) -> None:
        """Called when a stage of `total` steps begins, `done` of which are complete."""

    def advance(self, steps: int, **figures: str) -> None:
        """Called after further `steps`; `figures` are displayed with the progress."""

    def finish(self) -> None:
        """Called when the stage has ended."""

    def say(self, text: str) -> None:
        """Called with a message for the user."""


class BarReporter:
    """Draws one progress bar per stage: steps, loss, tokens/s and the remaining time.

    Args:
        prefix: shown before every stage's name.
        position: line of the bar, for several at once.
    """

    def __init__(self, prefix: str = "", position: int = 0):
        self._prefix = prefix
        self._position = position
        self._bar: tqdm | None = None

    def start(self, stage: str, total: int, done: int) -> None:
        """Opens the stage's bar."""
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=f"{self._prefix}{stage}",
            position=self._position,
            leave=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
            dynamic_ncols=True,
        )

    def advance(self, steps: int, **figures: str) -> None:
        """Advances the bar."""
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(steps)

    def finish(self) -> None:
        """Closes the bar and leaves it on the screen."""
        self._bar.close()

    def say(self, text: str) -> None:
        """Prints a line."""
        tqdm.write(text)


class LineReporter:
    """Prints lines, for output that is not a terminal: start, end, and some in between.

    Args:
        seconds: minimum seconds between lines.
    """

    def __init__(self, seconds: float = 20.0):
        self._seconds = seconds
        self._stage, self._total, self._done = "", 0, 0
        self._said = 0.0

    def start(self, stage: str, total: int, done: int) -> None:
        """Prints the stage and its progress."""
        self._stage, self._total, self._done = stage, total, done
        self._figures: dict[str, str] = {}
        self._print()

    def advance(self, steps: int, **figures: str) -> None:
        """Prints a line if the last one was printed long enough ago."""
        self._done += steps
        self._figures = figures
        if self._done == self._total or time.monotonic() - self._said > self._seconds:
            self._print()

    def finish(self) -> None:
        """Does nothing: the last step has printed its line."""

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, file=sys.stderr, flush=True)

    def _print(self) -> None:
        self._said = time.monotonic()
        figures = "".join(f" {name} {value}" for name, value in self._figures.items())
        self.say(f"{self._stage} {self._done}/{self._total}{figures}")


def own_reporter() -> ProgressReporter:
    """A reporter that draws bars in a terminal and prints lines elsewhere."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()


_REPORTED_BYTES = 64 << 20
"""Files below this size are read without showing progress."""


@contextmanager
def reported_bytes(
    reporter: ProgressReporter | None, title: str, size: int
) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes processed, which shows progress in MiB.

    Args:
        reporter: shows progress; nothing is shown if it is None or the file is short.
        title: name of the operation.
        size: size of the file in bytes.
    """
    if reporter is None or size < _REPORTED_BYTES:
        yield lambda count: None
        return
    done = shown = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        if done >> 20 > shown:
            reporter.advance((done >> 20) - shown)
            shown = done >> 20

    reporter.start(f"{title}, MiB", size >> 20, 0)
    try:
        yield advance
    finally:
        reporter.finish()


class SilentReporter:
    """Shows nothing, for processes other than the first."""

    def start(self, stage: str, total: int, done: int) -> None:
        """Does nothing."""

    def advance(self, steps: int, **figures: str) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""
