"""Host-side launch parameters: device properties, accumulation dtype and matmul precision."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Device(NamedTuple):
    """Device properties that the choice of tiles depends on."""

    capability: int  # 10 * major + minor, such as 90
    processors: int
    shared_bytes: int  # available to one program


# Device of tensors that are not on a GPU: the interpreter. It has few processors, so that a program
# processes several tiles as on a GPU. Tests replace it, to compile for a GPU without one.
STAND_IN = Device(0, 2, 0)


def interpreted() -> bool:
    """Returns whether kernels run in Triton's interpreter."""
    return triton.knobs.runtime.interpret


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    shared = properties.shared_memory_per_block_optin
    return Device(capability, properties.multi_processor_count, shared)


def device_of(tensor: Tensor) -> Device:
    """Returns the GPU of a tensor, or `STAND_IN` for a tensor that is not on one."""
    return _device(tensor.device.index) if tensor.is_cuda else STAND_IN


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Returns the accumulation dtype: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """Returns how float32 is multiplied: as TF32 only where torch's own matmuls may do so."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def matmul_constants(dtype: torch.dtype) -> dict[str, object]:
    """Returns the constants of a kernel that multiplies tiles of a dtype."""
    return {
        "ACC": accumulator(dtype),
        "PRECISION": precision(dtype),
        # The interpreter multiplies the bit patterns of bfloat16 values, not their values.
        "UPCAST": interpreted(),
    }


def float_bits(value: float) -> int:
    """Returns the bits of a float64 for `bits_to_float`; Triton passes floats as float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def bits_to_float(bits, ACC: tl.constexpr):
    """Returns the value encoded by `float_bits`; `bits` must not be specialised."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
