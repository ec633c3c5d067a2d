"""Lets tests import `families`, which stands beside them, and `launcher`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "distributed"))
