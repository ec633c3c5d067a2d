"""Lets tests import `launcher`, and ranks their own helpers, which stand beside them."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="session", params=WORLDS, ids=lambda world: f"{world} ranks")
def ops(request, tmp_path_factory):
    """What every scenario of `op_ranks.py` found, a list with one entry a rank."""
    from launcher import found

    return found("op_ranks.py", request.param, tmp_path_factory.mktemp("ops"))
