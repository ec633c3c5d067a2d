"""The file that results go to: a tile table that is whole after every measurement.

It is written under another name and renamed, so that a run that is cut short loses the problem it
was at and nothing else. Before a tile runs for the first time the file says so: one that hangs or
takes the process along is found there by the next run, and not tried again.
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
        path: Of the file; one that is there is continued.
        capability: Of the GPU, such as 90.
        machine: What is measured on; a file of another GPU is not mixed with it.

    Raises:
        ValueError: If the file is no tile table, or one of another GPU.
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
        """Notes that a tile is about to run for the first time."""
        self._content["trying"] = self._about(problem) | {"tile": tile._asdict()}
        self._write()

    def end(self, problem: Problem, tile: Tile, error: str = "") -> None:
        """Notes that it came back; with `error` as one that is not to be tried again."""
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
        """Keeps the outcome of a problem; without `analytic_seconds` that tile did not run."""
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
    """Returns a problem as a table has it."""
    return problem._asdict() | {"dtype": str(problem.dtype).removeprefix("torch.")}
