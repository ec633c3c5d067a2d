"""Compiles tiles as the tuner does on an H100, where there is none; prints what it compiled.

Run by `test_compiling.py` in a process without TRITON_INTERPRET.
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget

from unimoe_kernels._triton import launch
from unimoe_kernels._triton.problem import Tile
from unimoe_kernels.ops.moe_mlp import kernel
from unimoe_kernels.tune.matmuls import GATE
from unimoe_kernels.tune.search import compile_all, compiling_only

GOOD = Tile(64, 64, 32, 8, 4, 3)
TILES = [
    GOOD,
    GOOD._replace(descriptors=True),
    GOOD._replace(num_stages=2, descriptors=True),
    GOOD._replace(block_k=24),  # no power of 2: does not compile
]


class NoDriver:
    """What Triton asks of a driver before it launches something."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class NoMatmul:
    """The first matmul of a layer on tensors without data."""

    def launch(self, tile):
        def empty(*size, dtype=torch.bfloat16):
            return torch.empty(size, dtype=dtype, device="meta")

        x, weight = empty(512, 128), empty(4, 256, 128)
        offsets, order = empty(5, dtype=torch.int32), empty(1024, dtype=torch.int32)
        return kernel.gated(x, weight, None, offsets, order, 2, GATE, True, tile=tile)


def main():
    triton.runtime.driver.set_active(NoDriver())
    launch.STAND_IN = launch.Device(90, 132, 227 * 1024)
    compile_all(NoMatmul(), TILES, 2)
    compiled = kernel.gated_kernel.device_caches[0][0]
    rows = [
        {
            "num_stages": one.metadata.num_stages,
            "tma": "cp.async.bulk.tensor" in one.asm["ptx"],
        }
        for one in compiled.values()
    ]

    def again(*args):
        raise AssertionError("compiled a second time")

    kernel.gated_kernel._do_compile = again
    with compiling_only():
        for tile in TILES[:3]:
            NoMatmul().launch(tile)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
