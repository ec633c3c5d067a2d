"""Visits: rows timed again, each time in a new process.

Memory placement and other load differ more between processes than the noise within one process
shows. A visit is one process, which times only the anchor and ours.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .history import ROOT, Row


def visit(rows: Sequence[Row], processes: int, shapes: str, say: Callable[[str], None]) -> None:
    """Times rows in new processes and adds their results to each row.

    Args:
        rows: rows of this run; ratio and noise are updated to those over all visits.
        processes: number of processes, run one by one.
        shapes: value of the option `--shapes`.
        say: function that prints progress.

    Raises:
        RuntimeError: If a process fails; its output is in the message.
    """
    for number in range(1, processes + 1):
        say(f"process {number} of {processes}: {len(rows)} rows again")
        ratios = _in_fresh_process({row["key"]: row["anchor"] for row in rows}, shapes)
        for row in rows:
            row["visits"].append(ratios[row["key"]])
    for row in rows:
        ours = row["providers"]["ours"]
        ours["ratio"] = statistics.median(row["visits"])
        ours["noise"] = noise_of_visits(row["visits"])


def noise_of_visits(ratios: Sequence[float]) -> float:
    """Returns half the 95 % interval of the median of a few values, divided by the median.

    Computed from the median absolute deviation, which is robust against a single outlier: times
    1.4826 it estimates the standard deviation, and that of the median is sqrt(pi / 2n) times this.
    """
    middle = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(ratio - middle) for ratio in ratios)
    return 1.96 * deviation * math.sqrt(math.pi / 2 / len(ratios)) / middle


def _in_fresh_process(anchors: dict[str, str], shapes: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "visit.json"
        path.write_text(json.dumps(anchors), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
        result = subprocess.run(
            [*command, "--shapes", shapes, "--visit", str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        ratios = VisitFile(path).ratios()
    missing = anchors.keys() - ratios.keys()
    if result.returncode or missing:
        raise RuntimeError(f"a visit failed ({missing or result.returncode}):\n{result.stdout}")
    return ratios


class VisitFile:
    """The request of the parent to a visit, and the results.

    Attributes:
        anchors: name of the anchor by key of the row.
    """

    def __init__(self, path: Path) -> None:
        self.anchors: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        self._answers = path.with_suffix(".answers")

    def add(self, key: str, ratio: float) -> None:
        """Adds the results of one row."""
        with self._answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, ratio]) + "\n")

    def ratios(self) -> dict[str, float]:
        """Returns all results, by key."""
        if not self._answers.exists():
            return {}
        return dict(map(json.loads, self._answers.read_text(encoding="utf-8").splitlines()))
