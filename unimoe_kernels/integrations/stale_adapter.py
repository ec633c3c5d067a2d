"""Adapters of an earlier save, which must not remain beside weights that include them."""

from __future__ import annotations

import json
from pathlib import Path

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
State = dict[str, tuple[int, int]]


def adapter_state(folder: Path) -> State:
    """Returns what identifies the content of an adapter's files in a folder, by file name."""
    found = {}
    for name in (_CONFIG, _WEIGHTS):
        if (folder / name).is_file():
            stat = (folder / name).stat()
            found[name] = stat.st_ino, stat.st_mtime_ns
    return found


def remove_stale_adapter(folder: Path, before: State) -> None:
    """Removes an adapter with LoRA of experts, unless it was written after `before`."""
    if before.keys() != {_CONFIG, _WEIGHTS} or adapter_state(folder) != before:
        return
    if json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("target_parameters"):
        for name in before:
            (folder / name).unlink()
