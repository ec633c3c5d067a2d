"""Memory of a call: its peak beyond what was already allocated, and what a forward saves."""

import ctypes
import gc
from collections.abc import Callable, Iterable

import torch

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that a call frees for the next one, as long runs do by themselves.

    Handed back and faulted in anew, page by page, it costs as much as a small operator, and whether
    that happens changes from one size and one moment to the next. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 1 << 28)


def give_back_freed_memory() -> None:
    """Returns free memory to the system, between one row and the next.

    Otherwise rows of different sizes fragment the memory until it runs out.
    """
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Returns the peak size in bytes of tensors allocated during a call.

    Measured by the allocator of a GPU, or by torch's profiler on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], object], ignored: Iterable[torch.Tensor]) -> int:
    """Returns the bytes that a forward pass saves for its backward.

    Args:
        forward: a forward pass with gradients; its result may be discarded.
        ignored: tensors that are not counted, such as weights.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
