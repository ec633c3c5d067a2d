"""Preparation of batches in background threads."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Batch = TypeVar("Batch")


def prefetched(
    batch_of: Callable[[int], Batch], first: int, stop: int, workers: int
) -> Iterator[Batch]:
    """Yields the batches of steps `first` to `stop - 1` in order, preparing some in advance.

    Args:
        batch_of: returns the batch of a step, independently of earlier calls.
        first: first step.
        stop: step after the last one.
        workers: number of threads, each at most two batches ahead; 0 prepares batches on demand.

    Raises:
        Exception: The error of `batch_of`, when its step is reached.
    """
    if workers < 1:
        yield from map(batch_of, range(first, stop))
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
        steps = iter(range(first, stop))
        made = deque(pool.submit(batch_of, step) for step in islice(steps, 2 * workers))
        try:
            while made:
                batch = made.popleft().result()
                following = next(steps, None)
                if following is not None:
                    made.append(pool.submit(batch_of, following))
                yield batch
        finally:
            for future in made:
                future.cancel()
