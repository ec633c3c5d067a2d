"""What torchrun starts in `test_torchrun.py`: the tiny stages, as `unimoe train` starts them."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import stage_ranks
import torch
from launcher import write

from unimoe_kernels.distributed import attributed, finish_parallel
from unimoe_model.data.tokenizer import train_tokenizer
from unimoe_model.training.progress import SilentReporter
from unimoe_model.training.settings import ParallelSettings
from unimoe_model.training.stages import Trainer
from unimoe_model.training.start import own_device, start_ranks


class Dying(SilentReporter):
    """Kills its process at the second step of stage 3."""

    def start(self, stage, total, done):
        self._stage, self._steps = stage, 0

    def advance(self, steps, **figures):
        self._steps += steps
        if (self._stage, self._steps) == ("tune", 2):
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, expert, victim):
    torch.set_num_threads(1)
    settings = dataclasses.replace(
        stage_ranks.settings(), parallel=ParallelSettings(data=1, expert=expert, timeout=60)
    )
    device = own_device()
    mesh = start_ranks(settings, device)
    rank = mesh.get_rank()
    tokenizer = train_tokenizer(["what shape is it? a red circle", "which word? yes no"] * 3, 300)
    with attributed("training"):
        Trainer(
            settings,
            "moe",
            folder / "run",
            folder / "base",
            *stage_ranks.tasks_and_bank(),
            tokenizer,
            stage_ranks.speech_decoder(),
            Dying() if rank == victim else SilentReporter(),
            device,
            mesh,
        ).run()
    finish_parallel()
    write(folder, rank, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
