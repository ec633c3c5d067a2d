"""`unimoe` under torchrun: the second process kills itself at the second step of stage `tune`."""

import os
import signal
import sys

from unimoe_model import cli
from unimoe_model.training import command
from unimoe_model.training.progress import SilentReporter


class Dying(SilentReporter):
    """What all processes but the first report to."""

    def start(self, stage, total, done):
        self._stage, self._steps = stage, done

    def advance(self, steps, **figures):
        self._steps += steps
        if (os.environ["RANK"], self._stage, self._steps) == ("1", "tune", 2):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    command.SilentReporter = Dying
    sys.exit(cli.main(sys.argv[1:]))
