"""SIGINT and SIGTERM end a run at its next step, after a checkpoint; a second one at once."""

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(KeyboardInterrupt):
    """A run that a signal ended after it wrote a checkpoint.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.signal = number


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is only noted.

    Threads other than the main one cannot watch for signals; there it notes none.

    Attributes:
        signal: number of the signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Begins to watch."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        """Gives the signals back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
