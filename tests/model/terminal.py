"""A program that runs in a pseudo-terminal."""

import os
import pty
import select
import signal
import sys
import time


class Terminal:
    """Runs a Python module in a pseudo-terminal, types into it and reads its output.

    Args:
        folder: where it runs.
        arguments: of `python -m`.
        environment: variables beside those of this process.
    """

    def __init__(self, folder, arguments, environment):
        command = [sys.executable, "-m", *map(str, arguments)]
        # A dumb terminal gets no escape sequences from readline.
        settings = {"TERM": "dumb", "INPUTRC": os.devnull, "PYTHONUNBUFFERED": "1"}
        variables = os.environ | settings | environment
        self._process, self._master = pty.fork()
        if self._process == 0:
            os.chdir(folder)
            # Tests that a shell runs in the background inherit that it is ignored.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(sys.executable, command, variables)
        self._shown = ""

    def type(self, text):
        os.write(self._master, text.encode())

    def interrupt(self):
        """Types Ctrl-C once the program waits for keys.

        Python's line editor sees a signal only while it waits: one that comes between a key and
        the wait for the next is seen when the line ends.
        """
        deadline = time.monotonic() + 60
        while self._state() != "S":
            assert time.monotonic() < deadline, "the program does not wait for keys"
        self.type("\x03")

    def _state(self):
        """The state of the program's main thread, as Linux names it: S is asleep."""
        with open(f"/proc/{self._process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]

    def expect(self, text, patience=60):
        """Waits for a text in the output; returns the output before it since the last call."""
        deadline = time.monotonic() + patience
        while text not in self._shown:
            ready, _, _ = select.select([self._master], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} did not come; shown were {self._shown!r}"
            self._shown += self._read() or self._fail(text)
        before, _, self._shown = self._shown.partition(text)
        return before

    def end(self):
        """Reads to the end; returns the remaining output and the exit code."""
        while more := self._read():
            self._shown += more
        os.close(self._master)
        _, status = os.waitpid(self._process, 0)
        return self._shown, os.waitstatus_to_exitcode(status)

    def _read(self):
        try:
            return os.read(self._master, 4096).decode().replace("\r\n", "\n")
        except OSError:  # Linux's way to say that the other side is closed
            return ""

    def _fail(self, text):
        raise AssertionError(f"the program ended before {text!r}; shown were {self._shown!r}")
