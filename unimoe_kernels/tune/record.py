"""The output file: a tile table that is valid after every measurement.

It is written atomically, so an interrupted run loses only the current problem. A tile is recorded
before it runs for the first time: if it hangs or crashes the process, the next run finds it in the
file and does not try it again.
"""

from __future__ import annotations

import json
from pathlib import Path

from unimoe_kernels._files import atomic_write
from unimoe_kernels._triton.problem import Problem, Tile
from unimoe_kernels._triton.table import parse, parse_problem, parse_tile, read

NOTE = "Tiles measured by `python -m unimoe_kernels.tune`; see unimoe_kernels/_triton/table.py."
KILLED = "the run ended while this tile was tried for the first time"


class Record:
    """Measurements of one machine, kept in a file.

    Args:
        path: Path of the file; an existing one is continued.
        capability: Compute capability of the GPU, such as 90.
        machine: Description of the machine; a file of another GPU is rejected.

    Raises:
        ValueError: If the file is not a tile table, or is of another GPU.
    """

    def __init__(self, path: Path, capability: int, machine: dict[str, str]):
        self.path = path
        self.capability = capability
        self._content: dict = {"note": NOTE, "machine": machine, "entries": [], "unchanged": []}
        if path.exists():
            read(path, "output")
            old = json.loads(path.read_text(encoding="utf-8"))
            gpu = (old.get("machine") or {}).get("gpu")
            if gpu != machine["gpu"]:
                raise ValueError(
                    f"output ({path}) must be a file of the same GPU ({machine['gpu']}) or a new"
                    f" one; it holds tiles of {gpu}"
                )
            self._content |= old | {"machine": machine}
            self._content.setdefault("failed", [])
            if trying := self._content.pop("trying", None):
                self._content["failed"].append(trying | {"error": KILLED})
        self._content.setdefault("failed", [])

    def has(self, problem: Problem, analytic: Tile) -> bool:
        """Returns whether a problem was measured against this analytic tile."""
        return any(
            record["problem"] == as_fields(problem)
            and record["capability"] == self.capability
            and parse_tile("analytic", record["analytic"]) == analytic
            for part in ("entries", "unchanged")
            for record in self._content[part]
            if "analytic" in record
        )

    def failed(self, problem: Problem) -> set[Tile]:
        """Returns the tiles that did not run or gave wrong numbers."""
        return {
            parse_tile("tile", record["tile"])
            for record in self._content["failed"]
            if record["capability"] == self.capability
            and parse_problem("problem", record["problem"]) == problem
        }

    def begin(self, problem: Problem, tile: Tile) -> None:
        """Records that a tile is about to run for the first time."""
        self._content["trying"] = self._about(problem) | {"tile": tile._asdict()}
        self._write()

    def end(self, problem: Problem, tile: Tile, error: str = "") -> None:
        """Records that the tile has run; with `error`, that it must not be tried again."""
        del self._content["trying"]
        if error:
            failure = {"tile": tile._asdict(), "error": error}
            self._content["failed"].append(self._about(problem) | failure)
            self._write()

    def add(
        self,
        problem: Problem,
        analytic: Tile,
        analytic_seconds: float | None,
        tile: Tile,
        seconds: float,
    ) -> None:
        """Adds the outcome of a problem; without `analytic_seconds` the analytic tile failed."""
        about = self._about(problem)
        for part in ("entries", "unchanged"):
            self._content[part] = [
                record
                for record in self._content[part]
                if {key: record[key] for key in about} != about
            ]
        outcome = {"analytic": analytic._asdict(), "seconds": seconds}
        if analytic_seconds is not None:
            outcome["analytic_seconds"] = analytic_seconds
        if tile == analytic:
            self._content["unchanged"].append(about | outcome)
        else:
            self._content["entries"].append(about | {"tile": tile._asdict()} | outcome)
        self._write()

    def _about(self, problem: Problem) -> dict:
        return {"capability": self.capability, "problem": as_fields(problem)}

    def _write(self) -> None:
        parse(self._content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as partial:
            partial.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def as_fields(problem: Problem) -> dict:
    """Returns a problem in the format of a table."""
    return problem._asdict() | {"dtype": str(problem.dtype).removeprefix("torch.")}
