"""Tiles are compiled at the same time and before any runs, by Triton's own way to a launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_all_tiles_are_compiled_and_a_broken_one_harms_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
    environment |= {
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_tiles.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])
    found = sorted((row["num_stages"], row["tma"]) for row in rows)
    assert found == [(2, True), (3, False), (3, True)]
