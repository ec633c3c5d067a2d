"""Reuse of memory between training steps on a CPU."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
_LARGEST_KEPT = 32 << 20  # bytes
_NO_TRIMMING = 2**31 - 1


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory instead of returning it to the system, in the whole process.

    Training steps allocate the same sizes repeatedly, and would fault in every page again. Blocks
    of more than 32 MiB are returned: kept, they would be split, and after a hundred steps of
    batches of different sizes the search for free blocks took 40 % of the time.

    It has no effect with another C library.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    libc.mallopt(_M_TRIM_THRESHOLD, _NO_TRIMMING)
