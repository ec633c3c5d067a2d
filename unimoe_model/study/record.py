"""Records of complete runs: small JSON files, identified by hashes."""

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
    """Routing of held-out questions.

    Attributes:
        layers: indices of the decoder layers with experts.
        experts: names of the experts.
        top_k: number of experts per token.
        taken: number of routed rows per expert, `[layers][E]`, by modality.
    """

    layers: list[int]
    experts: list[str]
    top_k: int
    taken: dict[str, list[list[int]]]


@dataclass(frozen=True)
class Record:
    """Results of one arm with one seed.

    Attributes:
        arm: name of the arm.
        seed: the seed.
        hash: hash of everything that determines the results, except precision and machine.
        settings: hash of the settings in the files of the study (`arm_settings`).
        stage: the last stage, which is measured.
        losses: loss of each step of that stage, nats per token.
        accuracy: score of each evaluation, 0 to 1.
        items: number of questions of each evaluation.
        routing: routing of the MoE layers; None for a dense model.
        seconds: training time of each stage.
        precision: `"bf16"` or `"fp32"`.
        machine: name of the GPU, or of the CPU and the number of threads.
        version: version of unimoe.
        commit: commit of unimoe in a checkout, else "".
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
    commit: str


def record_path(folder: Path, arm: str, seed: int) -> Path:
    """Path of the record of a run."""
    return folder / f"{arm}-{seed}.json"


def write_record(folder: Path, record: Record) -> Path:
    """Writes the record of a run atomically.

    Raises:
        ValueError: If it is larger than `MOST_BYTES`.
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
    """Reads the record of a run.

    Raises:
        ValueError: If the file is missing or not a record, naming the file and the key.
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
