"""Who is replied to next: one request at a time, in the order in which they were complete."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass


class QueueFullError(RuntimeError):
    """No further request is taken now.

    Attributes:
        retry_after: seconds after which there should be room.
    """

    def __init__(self, most: int, retry_after: int):
        super().__init__(f"the queue ({most} requests) is full; try again in about {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Place:
    """Where a request stands: how many are before it, and for how many seconds about."""

    before: int
    seconds: float


class ReplyQueue:
    """A bounded line. All methods are called from one event loop.

    Args:
        most: requests that are admitted at a time, the one that is replied to included.
        guess: seconds a reply takes, before one was seen.
    """

    def __init__(self, most: int, guess: float = 5.0):
        self._most = most
        self._guess = guess
        self._durations: deque[float] = deque(maxlen=16)
        self._admitted: set[Ticket] = set()
        self._line: list[Ticket] = []

    def __len__(self) -> int:
        """Requests that were admitted and have not ended."""
        return len(self._admitted)

    @property
    def waiting(self) -> int:
        """Requests in line behind the one that is replied to."""
        return max(len(self._line) - 1, 0)

    def admit(self) -> "Ticket":
        """Takes a request in, before its body is read.

        Raises:
            QueueFullError: If as many as may be are here.
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
    """One request in a `ReplyQueue`; `leave` must be called in the end."""

    def __init__(self, queue: ReplyQueue):
        self._queue = queue
        self.called = asyncio.Event()
        self.started: float | None = None

    def place(self) -> Place:
        """How many are before it, and about how long they take."""
        line = self._queue._line
        before = line.index(self) if self in line else len(line)
        seconds = before * self._queue._duration()
        if before and line[0].started is not None:
            elapsed = time.monotonic() - line[0].started
            seconds -= min(elapsed, self._queue._duration())
        return Place(before, seconds)

    async def turn(self, every: float = 1.0) -> AsyncIterator[Place]:
        """Joins the line; ends when it is this request's turn, and gives its place meanwhile.

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
        """Makes room for others; twice does no harm."""
        queue = self._queue
        if self not in queue._admitted:
            return
        queue._admitted.discard(self)
        if self in queue._line:
            queue._line.remove(self)
        if self.started is not None:
            queue._durations.append(time.monotonic() - self.started)
        queue._advance()
