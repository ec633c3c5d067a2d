"""Errors of collectives that name the failed rank and the operation."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

# A rank is silent when it misses this many beats: several, so that a busy machine that runs its
# thread late is not taken for a dead one.
MISSED_BEATS = 6
# Number of beats for which rank 0, which may host the store, stays after it has reported an error.
READING_BEATS = 3

_heartbeat: Heartbeat | None = None


class CollectiveError(RuntimeError):
    """A collective failed or its ranks disagree; the message names the operation and the rank.

    Attributes:
        operation: name of the operation, such as `"dispatch of layers.3.mlp.experts"`.
        silent_ranks: ranks without a heartbeat, as far as known.
    """

    def __init__(self, operation: str, text: str, silent_ranks: tuple[int, ...] = ()) -> None:
        super().__init__(f"{_own_rank()}: {operation}: {text}")
        self.operation = operation
        self.silent_ranks = silent_ranks


class Heartbeat:
    """A thread that shows through the process group's store that this rank is alive.

    Args:
        store: the store that all ranks share.
        rank: rank of this process.
        world_size: number of ranks.
        seconds: interval between two heartbeats.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, seconds: float) -> None:
        # Clones, because a call that waits for a key blocks all others on the same connection.
        self._store, self._beating = store.clone(), store.clone()
        for own in (self._store, self._beating):
            own.set_timeout(timedelta(seconds=max(1.0, MISSED_BEATS * seconds)))
        self._rank, self._world_size, self._seconds = rank, world_size, seconds
        self._reports: dict[int, str] = {}
        self.place = f"rank {rank} of {world_size}"
        self._stopped = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, daemon=True, name="unimoe-heartbeat")
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread."""
        self._stopped.set()
        self._thread.join()

    def silent_ranks(self) -> tuple[int, ...]:
        """Returns ranks whose heartbeat has stopped; all others if the store is unreachable."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            before = [self._read(rank) for rank in others]
            self._stopped.wait(MISSED_BEATS * self._seconds)
            after = [self._read(rank) for rank in others]
        except (RuntimeError, dist.DistError):
            return (0,) if self._rank else ()
        silent = zip(others, before, after, strict=True)
        return tuple(rank for rank, old, new in silent if old == new)

    def report(self, text: str, linger: bool) -> None:
        """Reports to the other ranks why this one stops; only the first report of a rank is kept.

        Args:
            text: the reason.
            linger: whether rank 0, which may host the store, waits so that the others can read it.
        """
        key = self._key("failed", self._rank)
        with suppress(RuntimeError, dist.DistError):
            if self._store.check([key]):
                return
            self._store.set(key, text)
            self._store.set(self._key("failed", "any"), "")
            if linger and self._rank == 0:
                self._stopped.wait(READING_BEATS * self._seconds)

    def reports(self) -> dict[int, str]:
        """Returns the reports of other ranks, by rank."""
        with suppress(RuntimeError, dist.DistError):
            self._reports |= self._read_reports(self._store)
        return self._reports

    def _read_reports(self, store: dist.Store) -> dict[int, str]:
        if not store.check([self._key("failed", "any")]):
            return {}
        keys = {
            rank: self._key("failed", rank)
            for rank in range(self._world_size)
            if rank != self._rank
        }
        return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}

    def _run(self) -> None:
        beat = 1
        while not self._stopped.wait(self._seconds):
            try:
                self._beat(beat)
                # Read reports now: they are lost once the rank that hosts the store has exited.
                self._reports |= self._read_reports(self._beating)
            except (RuntimeError, dist.DistError):
                return
            beat += 1

    def _beat(self, beat: int) -> None:
        self._beating.set(self._key("beat", self._rank), str(beat))

    def _read(self, rank: int) -> bytes:
        key = self._key("beat", rank)
        return self._store.get(key) if self._store.check([key]) else b""

    @staticmethod
    def _key(kind: str, rank: int | str) -> str:
        return f"unimoe/{kind}/{rank}"


def start_heartbeat(store: dist.Store, rank: int, world_size: int, seconds: float) -> None:
    """Starts the heartbeat of this process."""
    global _heartbeat
    stop_heartbeat()
    # If Python terminates the thread inside a call of the store, the whole process crashes.
    atexit.register(stop_heartbeat)
    _heartbeat = Heartbeat(store, rank, world_size, seconds)


def stop_heartbeat() -> None:
    """Stops the heartbeat and reports this to ranks that still wait for this one."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.report("it had ended", linger=False)
        _heartbeat.stop()
        _heartbeat = None
        atexit.unregister(stop_heartbeat)


@contextmanager
def collective(operation: str) -> Iterator[None]:
    """Context manager that converts errors of a collective to `CollectiveError`.

    With the heartbeat of `start_parallel`, the error names the ranks that died or includes the
    report of a rank that stopped; without it, only this rank and the operation.

    Args:
        operation: name of the operation in the message.
    """
    try:
        yield
    except CollectiveError:
        raise
    except (RuntimeError, dist.DistError) as error:
        text, silent = _diagnosis(error)
        raise _reported(CollectiveError(operation, text, silent)) from error


@contextmanager
def attributed(operation: str) -> Iterator[None]:
    """Context manager that converts an error caused by another rank to `CollectiveError`.

    Use it for whole steps, which include collectives of torch. Errors that no other rank caused are
    raised unchanged and reported to the other ranks.

    Args:
        operation: name of the operation in the message.
    """
    try:
        yield
    except CollectiveError as error:
        _reported(error)
        raise
    except (Exception, KeyboardInterrupt) as error:
        if _heartbeat is None or not isinstance(error, RuntimeError | dist.DistError):
            _reported(error)
            raise
        text, silent = _diagnosis(error)
        if not silent and not _heartbeat.reports():
            _reported(error)
            raise
        raise _reported(CollectiveError(operation, text, silent)) from error


def _diagnosis(error: BaseException) -> tuple[str, tuple[int, ...]]:
    reason = " ".join(str(error).split())
    if _heartbeat is None:
        return f"failed ({reason})", ()
    silent, reports = _heartbeat.silent_ranks(), _heartbeat.reports()
    # A rank that reported why it stopped and has since exited is not the cause.
    silent = tuple(rank for rank in silent if rank not in reports)
    if silent:
        return f"{_ranks(silent)} died or hangs, no sign of life ({reason})", silent
    if reports:
        rank, text = next(iter(reports.items()))
        return f"rank {rank} stopped: {text}", ()
    return f"failed, though all ranks are alive ({reason})", ()


def _reported(error: BaseException) -> BaseException:
    if _heartbeat is not None:
        _heartbeat.report(" ".join(f"{type(error).__name__}: {error}".split()), linger=True)
    return error


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _own_rank() -> str:
    if dist.is_initialized():
        return f"rank {dist.get_rank()} of {dist.get_world_size()}"
    return "this rank" if _heartbeat is None else _heartbeat.place
