"""Results files: description of the machine, location, and the baseline to compare with."""

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unimoe_kernels import atomic_write

from .limits import Limits, best_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def machine_class(device: torch.device) -> str:
    """Name of all machines whose ratios may be compared, such as `nvidia-h100-80gb-hbm3`."""
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return f"{_slug(_processor())}-{torch.get_num_threads()}-threads"


def machine(device: torch.device) -> dict[str, Any]:
    """Returns facts about the machine and its software, without names of hosts or folders."""
    facts: dict[str, Any] = {
        "class": machine_class(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for name in ("transformers", "triton", "zentorch", "kt_kernel", "torchao", "liger_kernel"):
        version = _version(name)
        if version:
            facts[name] = version
    return facts


def commit() -> str:
    """Returns the checked-out commit, with `+` appended if files differ, or `"unknown"`.

    `UNIMOE_BENCH_COMMIT` names it for a copy of the files without their git folder.
    """
    if os.environ.get("UNIMOE_BENCH_COMMIT"):
        return os.environ["UNIMOE_BENCH_COMMIT"]
    name = _git("rev-parse", "--short=12", "HEAD").strip()
    if not name:
        return "unknown"
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results").strip()
    return name + ("+" if changed else "")


def committed_rows(of_class: str) -> tuple[str, dict[str, Row]]:
    """Rows of all committed results of a machine class, by key, and the file of the newest.

    If several files have a row, the newest is used. Outside a git checkout, the files in the folder
    are used instead of committed ones.
    """
    names = _git("ls-tree", "--name-only", "HEAD", "benchmarks/results/").split()
    if names:
        texts = {name: _git("show", f"HEAD:{name}") for name in names if name.endswith(".json")}
    else:
        texts = {str(p.relative_to(ROOT)): p.read_text() for p in FOLDER.glob("[!.]*.json")}
    results = {name: json.loads(text) for name, text in texts.items()}
    own = {n: r for n, r in results.items() if r.get("machine", {}).get("class") == of_class}
    if not own:
        return "", {}
    in_order = sorted(own, key=lambda name: own[name]["date"])
    return in_order[-1], {row["key"]: row for name in in_order for row in own[name]["rows"]}


class ResultsFile:
    """A results file to which rows are added as they finish; an interrupted run is continued.

    Args:
        path: the file; rows that it already has are kept if they are of the same commit, with
            unchanged files, and of the same machine.
        head: everything but the rows. `commands` in the file lists the commands of all its rows.

    Attributes:
        rows: by key.
        limits: best of those of the head and of the file.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path, self._head = path, head
        self.rows: dict[str, Row] = {}
        self.limits = Limits(**head["limits"])
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            clean = head["commit"] != "unknown" and not head["commit"].endswith("+")
            same = all(held[name] == head[name] for name in ("commit", "machine"))
            if clean and same:
                self.rows = {row["key"]: row for row in held["rows"]}
                commands = dict.fromkeys([*held["commands"], *head["commands"]])
                self._head = head | {"commands": list(commands)}
                self.limits = best_of(self.limits, Limits(**held["limits"]))

    def add(self, row: Row) -> None:
        """Rewrites the file with this row, atomically."""
        self.rows[row["key"]] = row
        self._write()

    def finish(self, limits: Limits, rows: Iterable[Row]) -> None:
        """Writes the final rows, and the limits that their shares refer to."""
        self.limits = limits
        self.rows |= {row["key"]: row for row in rows}
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = self._head | {"limits": vars(self.limits), "rows": list(self.rows.values())}
        with atomic_write(self._path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def results_path(device: torch.device, shapes: str) -> Path:
    """`benchmarks/results/<class>-<shapes>-<date>.json`, with the name of a set of shapes."""
    today = datetime.date.today().isoformat()
    return FOLDER / f"{machine_class(device)}-{shapes}-{today}.json"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    facts = dict(re.findall(r"^([^\t\n]+?)\s*: (.+)$", text, re.MULTILINE))
    name = facts.get("model name", platform.machine()).strip()
    # Virtual machines often report only the manufacturer's name.
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return result.stdout if result.returncode == 0 else ""
