"""Measures tiles for the layers in the goals for GPUs.

`python -m benchmarks.tune_tiles OUTPUT [options of python -m unimoe_kernels.tune]`
"""

import sys

from unimoe_kernels.tune.__main__ import main

from .shapes import LAYERS, SETS

SET = "goals"


def shapes():
    """Options that name every layer of the goals, in their order."""
    layers = dict.fromkeys(case.layer for case in SETS[SET].layer)
    return [
        option for layer in layers for option in ("--shape", *(str(size) for size in LAYERS[layer]))
    ]


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], *shapes()]))
