"""Reuse of memory between training steps on a CPU."""

import ctypes

from unimoe_kernels import use_caching_allocator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
_LARGEST_KEPT = 32 << 20  # bytes
_NO_TRIMMING = 2**31 - 1


def keep_freed_memory() -> None:
    """Keeps freed memory of the process for later tensors instead of returning it to the system.

    Training steps allocate the same sizes repeatedly, and would fault in every page again. CPU
    tensors are allocated by [the caching allocator][unimoe_kernels.use_caching_allocator]. glibc
    keeps the memory of all else, and of tensors where that allocator cannot be used, except blocks
    of more than 32 MiB: kept, they would be split, and after a hundred steps of batches of
    different sizes the search for free blocks took 40 % of the time.
    """
    use_caching_allocator()
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    libc.mallopt(_M_TRIM_THRESHOLD, _NO_TRIMMING)
