"""Settings that depend on the machine."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from unimoe_model.precision import multiplies_bf16, resolve_precision


@dataclass(frozen=True)
class Machine:
    """The machine, and the settings chosen for it.

    Attributes:
        processor: name of the GPU or CPU.
        cores: number of CPU cores.
        instructions: widest instruction set that torch uses on the CPU, such as `"AVX2"`.
        has_bf16: whether the device has bfloat16 instructions.
        precision: `"bf16"` or `"fp32"`, for training and encoders.
        processes: number of arms that train side by side.
        threads: number of threads per process.
    """

    processor: str
    cores: int
    instructions: str
    has_bf16: bool
    precision: str
    processes: int
    threads: int

    @classmethod
    def detect(cls, device: torch.device, processes: int) -> "Machine":
        """Detects this machine.

        Args:
            device: device of the run.
            processes: number of processes that train side by side.
        """
        cores = os.cpu_count() or 1
        return cls(
            processor=_processor(device),
            cores=cores,
            instructions=torch.backends.cpu.get_cpu_capability(),
            has_bf16=multiplies_bf16(device),
            precision=resolve_precision("auto", device),
            processes=processes,
            threads=max(1, cores // processes),
        )

    def __str__(self) -> str:
        having = "with" if self.has_bf16 else "no"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return (
            f"{self.processor}, {self.cores} cores, {self.instructions}, {having} bfloat16"
            f" instructions: trains in {self.precision}, {processes} of {threads}"
        )


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"
