"""JSON files that are computed once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unimoe_kernels import atomic_write


def cached(file: Path, make: Callable[[], Any]) -> Any:
    """Returns the contents of a JSON file. A missing file is computed and written atomically."""
    if not file.exists():
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(made, indent=1, ensure_ascii=False), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))
