"""What a finished run of a study leaves: one small JSON file, which counts as done by its hash."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from unimoe_model.evaluation.files import write_whole
from unimoe_model.value_types import fits_type

MOST_BYTES = 50_000


@dataclass(frozen=True)
class RoutingRecord:
    """Which expert took whose tokens, in the held-out questions.

    Attributes:
        layers: decoder layers that hold experts.
        experts: names of the experts.
        top_k: experts a token is routed to.
        taken: routed rows of every expert, by modality: `[layers][E]`.
    """

    layers: list[int]
    experts: list[str]
    top_k: int
    taken: dict[str, list[list[int]]]


@dataclass(frozen=True)
class Record:
    """The results of one arm with one seed.

    Attributes:
        arm: name of the arm.
        seed: the seed.
        hash: of everything that decides the results, precision and machine apart.
        settings: hash of the part of it that the files of the study hold (`arm_settings`).
        stage: the stage that was measured.
        losses: loss of each of its steps, nats a token.
        accuracy: score of each evaluation, 0 to 1.
        items: questions of each evaluation.
        routing: of the MoE layers; None for a dense model.
        seconds: of each stage that was trained for this arm.
        precision: `"bf16"` or `"fp32"`.
        machine: processor, and cores of a CPU.
        version: of unimoe.
    """

    arm: str
    seed: int
    hash: str
    settings: str
    stage: str
    losses: list[float]
    accuracy: dict[str, float]
    items: dict[str, int]
    routing: RoutingRecord | None
    seconds: dict[str, float]
    precision: str
    machine: str
    version: str


def record_path(folder: Path, arm: str, seed: int) -> Path:
    """The file of a run."""
    return folder / f"{arm}-{seed}.json"


def write_record(folder: Path, record: Record) -> Path:
    """Writes the file of a run, whole or not at all.

    Raises:
        ValueError: If it would have more than `MOST_BYTES`.
        OSError: If it cannot be written.
    """
    facts = asdict(record)
    facts["losses"] = [float(f"{loss:.4g}") for loss in record.losses]
    text = json.dumps(facts, separators=(",", ":")) + "\n"
    if len(text) > MOST_BYTES:
        raise ValueError(
            f"metrics of {record.arm}, seed {record.seed} ({len(text)} bytes) must be at most"
            f" {MOST_BYTES}: {len(record.losses)} steps are too many for a study"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = record_path(folder, record.arm, record.seed)
    write_whole(path, text)
    return path


def read_record(path: Path) -> Record:
    """Reads the file of a run.

    Raises:
        ValueError: If it is not as `write_record` leaves it, naming the file and the key.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"metrics ({path}) must be a JSON file: {error}") from error
    if not isinstance(raw, dict) or set(raw) != {f.name for f in fields(Record)}:
        raise ValueError(f"metrics ({path}) must have the keys of a run of a study")
    wanted: Mapping[str, Any] = {
        "arm": str,
        "seed": int,
        "hash": str,
        "settings": str,
        "losses": list[float],
        "accuracy": dict[str, float],
    }
    for key, kind in wanted.items():
        if not fits_type(raw[key], kind):
            raise ValueError(f"metrics ({path}): {key} ({str(raw[key])[:40]}) must be a {kind}")
    if raw["routing"] is not None:
        raw["routing"] = RoutingRecord(**raw["routing"])
    return Record(**raw)
