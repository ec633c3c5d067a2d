"""Detection of bfloat16 hardware, and the choice of precision."""

import functools
import os
import warnings

import torch

PRECISIONS = ("auto", "bf16", "fp32")

_ONEDNN_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of `ONEDNN_MAX_CPU_ISA` with which oneDNN, used by torch, has no bf16 instructions."""


def multiplies_bf16(device: torch.device) -> bool:
    """Whether torch has hardware instructions for bfloat16 matmuls on `device`.

    Without them torch's matmuls are about ten times slower in bfloat16 than in float32. The limits
    set by `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` are taken into account.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    return (
        torch.cpu._is_avx512_bf16_supported()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in _ONEDNN_WITHOUT_BF16
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolves `"auto"` to bfloat16 on devices with bfloat16 hardware, and to float32 elsewhere.

    `"bf16"` on a device without such hardware is kept, with a warning.

    Args:
        precision: `"auto"`, `"bf16"` or `"fp32"`.
        device: device of the model.

    Returns:
        `"bf16"` or `"fp32"`.

    Raises:
        ValueError: If `precision` has another value.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision ({precision!r}) must be one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    if precision == "bf16" and not multiplies_bf16(device):
        warn_of_slow_bf16(device.type)
    return precision


def resolve_dtype(precision: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of weights in inference.

    Args:
        precision: `"auto"` keeps every dtype on a GPU. On a CPU it keeps float32 and float64, and
            converts 16-bit weights to bfloat16 if the CPU has instructions for it, otherwise to
            float32, at twice their memory. `"bf16"` and `"fp32"` select that dtype.
        stored: dtype of the weights in the checkpoint.
        device: device of the model.

    Raises:
        ValueError: If `precision` has another value.
    """
    if precision == "auto" and (stored.itemsize > 2 or device.type != "cpu"):
        return stored
    return torch.bfloat16 if resolve_precision(precision, device) == "bf16" else torch.float32


@functools.cache
def warn_of_slow_bf16(device_type: str) -> None:
    """Warns, once per process, that bfloat16 is slow on a device without instructions for it."""
    warnings.warn(
        f"this {device_type} has no bfloat16 instructions: torch's matmuls (attention, connectors,"
        " dense FFNs, the head, encoders) take about ten times as long in bfloat16 as in float32;"
        " only MoE layers stay fast. Use precision 'auto' or 'fp32'.",
        RuntimeWarning,
        stacklevel=3,
    )
