"""Which devices multiply bfloat16 in hardware, and what a run that leaves it open trains in."""

import functools
import os
import warnings

import torch

PRECISIONS = ("auto", "bf16", "fp32")

_ONEDNN_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of `ONEDNN_MAX_CPU_ISA` that keep oneDNN, which multiplies for torch, off bf16."""


def multiplies_bf16(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 on `device` with instructions made for it.

    Without them torch's matmuls run about ten times slower in bfloat16 than in float32. The limits
    that `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` set to a CPU count.
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
    """Decides `"auto"`: bfloat16 where the device multiplies it in hardware, else float32.

    A `"bf16"` that the device has no instructions for is kept, with a warning.

    Args:
        precision: `"auto"`, `"bf16"` or `"fp32"`.
        device: where the model runs.

    Returns:
        `"bf16"` or `"fp32"`.

    Raises:
        ValueError: If `precision` is another value.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision ({precision!r}) must be one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    if precision == "bf16" and not multiplies_bf16(device):
        warn_of_slow_bf16(device.type)
    return precision


def resolve_dtype(precision: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that weights get for inference.

    Args:
        precision: `"auto"` keeps float32 and float64, and gives 16-bit weights bfloat16 where the
            device multiplies it in hardware, else float32, at twice their memory; on a GPU it keeps
            every dtype. `"bf16"` and `"fp32"` are taken as they are.
        stored: dtype of the weights in the checkpoint.
        device: where the model runs.

    Raises:
        ValueError: If `precision` is another value.
    """
    if precision == "auto" and (stored.itemsize > 2 or device.type != "cpu"):
        return stored
    return torch.bfloat16 if resolve_precision(precision, device) == "bf16" else torch.float32


@functools.cache
def warn_of_slow_bf16(device_type: str) -> None:
    """Warns that torch is slow at bfloat16 on a device without instructions; once in a process."""
    warnings.warn(
        f"this {device_type} has no bfloat16 instructions: torch's matmuls (attention, connectors,"
        " dense FFNs, the head, encoders) take about ten times as long in bfloat16 as in float32;"
        " only MoE layers stay fast. Use precision 'auto' or 'fp32'.",
        RuntimeWarning,
        stacklevel=3,
    )
