"""Progress of a study: how many runs are done, above the stage that is at work."""

import sys
from typing import Protocol

from tqdm import tqdm

from unimoe_model.training.progress import BarReporter, LineReporter, ProgressReporter


class StudyReporter(ProgressReporter, Protocol):
    """Receives what a study is doing, besides its stages."""

    def begin(self, total: int, done: int) -> None:
        """There are `total` runs, `done` of them are already there."""

    def name(self, run: str) -> None:
        """The stages that follow are those of a run."""

    def done(self) -> None:
        """A run is done."""


class StudyBars(BarReporter):
    """A bar of all runs, and one of the stage below it."""

    def __init__(self):
        super().__init__(position=1)
        self._runs: tqdm | None = None

    def begin(self, total: int, done: int) -> None:
        """Opens the bar of the runs."""
        self._runs = tqdm(
            total=total, initial=done, desc="runs", position=0, dynamic_ncols=True, unit="run"
        )

    def name(self, run: str) -> None:
        """Shows the run before its stages."""
        self._prefix = f"{run} "

    def done(self) -> None:
        """Moves the bar of the runs on."""
        self._runs.update(1)
        if self._runs.n == self._runs.total:
            self._runs.close()


class StudyLines(LineReporter):
    """Prints lines where there is no terminal."""

    def begin(self, total: int, done: int) -> None:
        """Prints how many runs there are."""
        self._runs, self._all = done, total
        self.say(f"runs {done}/{total}")

    def name(self, run: str) -> None:
        """Prints the run."""
        self.say(f"run {run}")

    def done(self) -> None:
        """Prints how many runs are done."""
        self._runs += 1
        self.say(f"runs {self._runs}/{self._all}")


def study_reporter() -> StudyReporter:
    """Bars on a terminal, lines elsewhere."""
    return StudyBars() if sys.stderr.isatty() else StudyLines()
