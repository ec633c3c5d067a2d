"""A limit on the time that a provider takes to be ready."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .candidates import UnavailableError


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Raises `UnavailableError` in the block when the time is over; None for no limit.

    The alarm interrupts Python code, but not a single call into C. Outside the main thread, which
    has no alarms, there is no limit.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: object) -> None:
        raise UnavailableError(f"it was not ready within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
