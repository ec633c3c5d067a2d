"""Launch plans, computed once for each signature and cached.

Everything a launch needs besides its tensors (tile, grid, constants, which operands use
descriptors, the compiled kernel) follows from sizes, strides and dtypes. A launcher gets it from a
function decorated with `planned`, which caches the results of the last `PLANS` signatures. A
`Launch` then calls the compiled kernel directly, bypassing Triton's JIT dispatch, which inspects
every argument on every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from unimoe_kernels._triton.launch import Device, device_of

PLANS = 1024
_caches: list[Callable] = []


class Place(NamedTuple):
    """Where a kernel runs: the first part of every signature.

    Attributes:
        device: device of the tensors.
        gpu: device properties that the choice of tiles depends on.
    """

    device: torch.device
    gpu: Device


def place_of(tensor: Tensor) -> Place:
    """Returns where kernels that read `tensor` run."""
    return Place(tensor.device, device_of(tensor))


class Layout(NamedTuple):
    """The properties of a tensor that decide how kernels read it."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool

    def transposed(self) -> Layout:
        """Returns the layout of `tensor.transpose(1, 2)`."""
        (first, *sizes), (stride, *strides) = self.shape, self.strides
        shape = torch.Size((first, *reversed(sizes)))
        return self._replace(shape=shape, strides=(stride, *reversed(strides)))


def layout_of(tensor: Tensor) -> Layout:
    """Returns the layout of a tensor."""
    aligned = tensor.data_ptr() % 16 == 0
    return Layout(tensor.shape, tensor.stride(), tensor.dtype, aligned)


def planned(plan: Callable) -> Callable:
    """Caches the results of a function for the last `PLANS` signatures.

    The first argument is a `Place`; all must be hashable. Nothing is cached under the interpreter,
    where tests change tiles.
    """
    kept = functools.lru_cache(maxsize=PLANS)(plan)
    _caches.append(kept)

    @functools.wraps(plan)
    def find(place: Place, *signature: object) -> object:
        return (kept if place.gpu.capability else plan)(place, *signature)

    return find


def forget_plans() -> None:
    """Clears the caches of all `planned` functions, after tiles have changed."""
    for kept in _caches:
        kept.cache_clear()


class Launch:
    """All launches of a kernel with the same grid, sizes and constants.

    Triton compiles a variant of a kernel for each combination of dtypes and 16-byte alignments of
    its pointers. No other property of the arguments can differ between these launches; descriptors
    are part of the signature.

    Args:
        place: where the kernel runs.
        kernel: a kernel whose parameters are pointers and descriptors, then sizes, then constants.
        grid: one to three integers.
        sizes: integers that follow the tensors.
        constants: constants by name, with options such as `num_warps`.
    """

    __slots__ = ("_compiled", "_constants", "_grid", "_kernel", "_place", "_sizes", "_tail")

    def __init__(
        self,
        place: Place,
        kernel: triton.JITFunction,
        grid: tuple[int, ...],
        sizes: tuple[int, ...],
        constants: dict[str, object],
    ):
        self._place, self._kernel = place, kernel
        self._grid = (*grid, 1, 1)[:3]
        self._sizes, self._constants = sizes, constants
        self._tail = (*sizes, *(constants[n] for n in kernel.arg_names if n in constants))
        self._compiled: dict[tuple, CompiledKernel] = {}

    def __call__(self, *tensors: object) -> None:
        """Launches on the current stream; None stands for an absent tensor."""
        device = self._place.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(tensors)
        else:
            self._launch(tensors)

    def _launch(self, tensors: tuple[object, ...]) -> None:
        variant = tuple(
            [
                (tensor.dtype, tensor.data_ptr() % 16 == 0) if isinstance(tensor, Tensor) else None
                for tensor in tensors
            ]
        )
        compiled = self._compiled.get(variant)
        if compiled is None:
            compiled = self._kernel[self._grid](*tensors, *self._sizes, **self._constants)
            # The interpreter returns None; on ROCm variants depend on more than alignment.
            if isinstance(compiled, CompiledKernel) and torch.version.hip is None:
                self._compiled[variant] = compiled
            return
        driver, hooks = triton.runtime.driver.active, triton.knobs.runtime
        stream = driver.get_current_stream(driver.get_current_device())
        arguments = (*tensors, *self._tail)
        compiled.run(
            *self._grid,
            stream,
            compiled.function,
            compiled.packed_metadata,
            compiled.launch_metadata(self._grid, stream, *arguments),
            hooks.launch_enter_hook,
            hooks.launch_exit_hook,
            *arguments,
        )
