"""A Triton driver that stands in for a GPU: kernels compile, and a launch has no effect.

The remaining time of a launch is its host time.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from unimoe_kernels._triton import launch

# An H100: compute capability, multiprocessors, and maximum shared memory of a block in bytes.
HOPPER = launch.Device(90, 132, 227 * 1024)


class StandInDriver:
    """Triton's driver interface for `HOPPER`.

    Attributes:
        launches: arguments of each launch, if `keeps` them.
        keeps: whether launches are kept.
    """

    def __init__(self) -> None:
        self.keeps = False
        self.launches: list[tuple[Any, ...]] = []
        self.utils = self

    def launcher_cls(self, source: object, metadata: object) -> Any:
        """Makes what launches a compiled kernel."""
        return self._launch

    def _launch(self, *arguments: object) -> None:
        if self.keeps:
            self.launches.append(arguments)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """A module, a function, registers, spills and threads a block; none of them is used.

        The function is the kernel's name and a checksum of its code.
        """
        return object(), f"{name} {zlib.crc32(binary):08x}", 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What is asked of the GPU before a kernel is loaded."""
        return {"max_shared_mem": HOPPER.shared_bytes}

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return GPUTarget("cuda", HOPPER.capability, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


@contextmanager
def stand_in() -> Iterator[StandInDriver]:
    """Allows Triton kernels to be launched on CPU tensors, without effect."""
    driver, before = StandInDriver(), launch.STAND_IN
    triton.runtime.driver.set_active(driver)
    launch.STAND_IN = HOPPER
    try:
        yield driver
    finally:
        launch.STAND_IN = before
        triton.runtime.driver.set_active(None)
