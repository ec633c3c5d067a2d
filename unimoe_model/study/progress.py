"""Progress of a study: the number of complete runs, and the current stage."""

import sys
from typing import Protocol

from tqdm import tqdm

from unimoe_model.training.progress import BarReporter, LineReporter, ProgressReporter


class StudyReporter(ProgressReporter, Protocol):
    """A `ProgressReporter` that also receives the runs of a study."""

    def begin(self, total: int, done: int) -> None:
        """Starts a study of `total` runs, of which `done` are complete."""

    def name(self, run: str) -> None:
        """Starts a run, to which the following stages belong."""

    def done(self) -> None:
        """Completes a run."""


class StudyBars(BarReporter):
    """Progress bars of all runs and of the current stage."""

    def __init__(self):
        super().__init__(position=1)
        self._runs: tqdm | None = None

    def begin(self, total: int, done: int) -> None:
        """Opens the bar of runs."""
        self._runs = tqdm(
            total=total, initial=done, desc="runs", position=0, dynamic_ncols=True, unit="run"
        )

    def name(self, run: str) -> None:
        """Prefixes stages with the run."""
        self._prefix = f"{run} "

    def done(self) -> None:
        """Advances the bar of runs."""
        self._runs.update(1)
        if self._runs.n == self._runs.total:
            self._runs.close()


class StudyLines(LineReporter):
    """Progress lines, for output that is not a terminal."""

    def begin(self, total: int, done: int) -> None:
        """Prints the number of runs."""
        self._runs, self._all = done, total
        self.say(f"runs {done}/{total}")

    def name(self, run: str) -> None:
        """Prints the run."""
        self.say(f"run {run}")

    def done(self) -> None:
        """Prints the number of complete runs."""
        self._runs += 1
        self.say(f"runs {self._runs}/{self._all}")


def study_reporter() -> StudyReporter:
    """Bars on a terminal, lines elsewhere."""
    return StudyBars() if sys.stderr.isatty() else StudyLines()
