"""Handling of SIGINT and SIGTERM: the first ends a run after a checkpoint, a second immediately."""

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(KeyboardInterrupt):
    """Raised when a signal ended a run after a checkpoint.

    Args:
        text: message.
        number: number of the signal.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.signal = number


class StopRequest:
    """Context manager that records the first SIGINT or SIGTERM instead of raising.

    Outside of the main thread signals cannot be handled, so none are recorded.

    Attributes:
        signal: number of the signal received, 0 if none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Installs the signal handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
