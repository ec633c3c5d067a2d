"""A caching allocator for CPU tensors, as CUDA tensors have one.

A training step allocates thousands of tensors of hundreds of sizes. The C library searches one
list of large free blocks, which takes longer as blocks are split, and faults in pages that it has
returned to the system. This allocator rounds sizes up to eight classes for each power of two, keeps
the free blocks of each class, and requests huge pages.

It is compiled with the extension, on Linux. torch's interface for allocators is not part of its
stable ABI, so the allocator is used only with the release of torch that it was compiled with.
"""

import ctypes
import importlib.util
from typing import NamedTuple

import torch

_NAME = f"{__package__}._caching_allocator"
_library: ctypes.CDLL | None = None


class MemoryStats(NamedTuple):
    """Memory of the caching allocator, in bytes.

    Attributes:
        allocated: of blocks that tensors use. Tensors of less than 64 KiB are not counted.
        max_allocated: the largest `allocated` since the start or the last `empty_cache`.
        reserved: `allocated`, and free blocks that are kept. After an allocation it is at most a
            quarter above `max_allocated`.
    """

    allocated: int
    max_allocated: int
    reserved: int


def use_caching_allocator() -> str | None:
    """Allocates CPU tensors with the caching allocator from here on, in the whole process.

    Call it before other threads allocate tensors. Tensors that exist remain valid. Calling it
    again has no effect.

    Returns:
        None if the allocator is in use, otherwise the reason why it cannot be used; torch's own
        allocator then remains.
    """
    global _library
    if _library is None:
        found = _load()
        if isinstance(found, str):
            return found
        found.unimoe_allocator_install()
        _library = found
    return None


def unusable_reason() -> str | None:
    """Returns why the caching allocator cannot be used here, or None. It is not put to use."""
    found = _load()
    return found if isinstance(found, str) else None


def _load() -> ctypes.CDLL | str:
    found = importlib.util.find_spec(_NAME)
    if found is None or found.origin is None:
        return "not compiled"
    try:
        library = ctypes.CDLL(found.origin)
    except OSError as error:
        return f"compiled, but cannot be loaded: {error}"
    library.unimoe_allocator_torch_version.restype = ctypes.c_char_p
    compiled_with = library.unimoe_allocator_torch_version().decode()
    if compiled_with != torch.__version__.split("+")[0]:
        return f"compiled with torch {compiled_with}, not {torch.__version__}"
    return library


def empty_cache() -> None:
    """Returns free blocks to the system. It has no effect if the allocator is not in use."""
    if _library is not None:
        _library.unimoe_allocator_empty_cache()


def memory_stats() -> MemoryStats:
    """Returns the memory of the caching allocator; zeros if it is not in use."""
    if _library is None:
        return MemoryStats(0, 0, 0)
    stats = (ctypes.c_uint64 * 3)()
    _library.unimoe_allocator_stats(stats)
    allocated, max_allocated, free = stats
    return MemoryStats(allocated, max_allocated, allocated + free)
