"""Rows timed again, each time in a fresh process.

Where memory lies and what the rest of the machine does differ more between one process and the next
than the noise within one shows. A visit is one process; it times the anchor and ours alone.
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
    """Times rows in fresh processes and adds what they found to each row.

    Args:
        rows: of this run; their ratio and noise become those over all visits.
        processes: how many, one after the other.
        shapes: as the option `--shapes`.
        say: is told what goes on.

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
    """Half the 95 % interval of the median of few values, by the median.

    From the median absolute deviation, which one process in a bad place does not move:
    1.4826 of it estimate the standard deviation, and the median's is sqrt(pi / 2n) of that.
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
    """What the parent asks a visit for, and what it answers.

    Attributes:
        anchors: name of the anchor by key of the row.
    """

    def __init__(self, path: Path) -> None:
        self.anchors: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        self._answers = path.with_suffix(".answers")

    def add(self, key: str, ratio: float) -> None:
        """Answers for one row."""
        with self._answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, ratio]) + "\n")

    def ratios(self) -> dict[str, float]:
        """All answers, by key."""
        if not self._answers.exists():
            return {}
        return dict(map(json.loads, self._answers.read_text(encoding="utf-8").splitlines()))
