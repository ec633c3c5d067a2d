"""Lets tests import `benchmarks`, which is in the checkout and in no package; last in the path, so
that an installed `unimoe_kernels` stays the one that is tested."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
