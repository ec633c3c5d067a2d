"""Batches made in threads beside training."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Batch = TypeVar("Batch")


def prefetched(
    batch_of: Callable[[int], Batch], first: int, stop: int, workers: int
) -> Iterator[Batch]:
    """The batches of steps `first` to `stop - 1` in order, some made ahead.

    Args:
        batch_of: makes the batch of a step; must not depend on which batches were made before.
        first: first step.
        stop: step behind the last one.
        workers: threads, each of which is at most two batches ahead; 0 makes each when it is
            asked for.

    Raises:
        Exception: What `batch_of` raised, at the step that it raised for.
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
