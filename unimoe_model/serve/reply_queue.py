"""The queue of requests: one reply at a time, in the order in which requests were complete."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass


class QueueFullError(RuntimeError):
    """Raised when the queue accepts no further request.

    Attributes:
        retry_after: estimated seconds until there is room.
    """

    def __init__(self, most: int, retry_after: int):
        super().__init__(f"the queue ({most} requests) is full; try again in about {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Place:
    """A place in the queue: number of requests before, and the estimated wait in seconds."""

    before: int
    seconds: float


class ReplyQueue:
    """A bounded queue. All methods must be called from one event loop.

    Args:
        most: maximum number of admitted requests, including the one that is being replied to.
        guess: assumed seconds per reply before any was measured.
    """

    def __init__(self, most: int, guess: float = 5.0):
        self._most = most
        self._guess = guess
        self._durations: deque[float] = deque(maxlen=16)
        self._admitted: set[Ticket] = set()
        self._line: list[Ticket] = []

    def __len__(self) -> int:
        """Number of admitted requests that have not ended."""
        return len(self._admitted)

    @property
    def waiting(self) -> int:
        """Number of requests that wait behind the one that is being replied to."""
        return max(len(self._line) - 1, 0)

    def admit(self) -> "Ticket":
        """Admits a request, before its body is read.

        Raises:
            QueueFullError: If the maximum number of requests is admitted.
        """
        if len(self._admitted) >= self._most:
            raise QueueFullError(self._most, max(1, math.ceil(self._duration())))
        ticket = Ticket(self)
        self._admitted.add(ticket)
        return ticket

    def _duration(self) -> float:
        known = self._durations
        return sum(known) / len(known) if known else self._guess

    def _advance(self) -> None:
        if self._line and not self._line[0].called.is_set():
            self._line[0].started = time.monotonic()
            self._line[0].called.set()


class Ticket:
    """One request in a `ReplyQueue`; `leave` must be called when it ends."""

    def __init__(self, queue: ReplyQueue):
        self._queue = queue
        self.called = asyncio.Event()
        self.started: float | None = None

    def place(self) -> Place:
        """Returns the number of requests before this one, and the estimated wait."""
        line = self._queue._line
        before = line.index(self) if self in line else len(line)
        seconds = before * self._queue._duration()
        if before and line[0].started is not None:
            elapsed = time.monotonic() - line[0].started
            seconds -= min(elapsed, self._queue._duration())
        return Place(before, seconds)

    async def turn(self, every: float = 1.0) -> AsyncIterator[Place]:
        """Joins the queue, and yields the request's place until its turn.

        Args:
            every: seconds between places.
        """
        self._queue._line.append(self)
        self._queue._advance()
        while not self.called.is_set():
            yield self.place()
            try:
                async with asyncio.timeout(every):
                    await self.called.wait()
            except TimeoutError:
                continue

    def leave(self) -> None:
        """Leaves the queue; may be called more than once."""
        queue = self._queue
        if self not in queue._admitted:
            return
        queue._admitted.discard(self)
        if self in queue._line:
            queue._line.remove(self)
        if self.started is not None:
            queue._durations.append(time.monotonic() - self.started)
        queue._advance()
