"""Checks of the caching allocator, in a process of their own: it is never taken out of a process.

`python allocator_checks.py` prints JSON: the traceback, or null, of each check by its name.
"""

import json
import os
import resource
import signal
import threading
import traceback

import numpy as np
import pytest
import torch

from unimoe_kernels.caching_allocator import empty_cache, memory_stats, use_caching_allocator

KIB, MIB = 2**10, 2**20


def empty(size):
    return torch.empty(size, dtype=torch.uint8)


def hold_and_drop(steps, seed):
    """Allocates and frees tensors of all sizes, each filled with its own byte."""
    rng = np.random.default_rng(seed)
    held = []
    for _ in range(steps):
        size = int(2 ** rng.uniform(0, 22))
        value = int(rng.integers(256))
        tensor = empty(size).fill_(value)
        assert tensor.data_ptr() % 64 == 0
        held.append((tensor, value))
        if len(held) > 12:
            kept, expected = held.pop(int(rng.integers(len(held))))
            assert (kept == expected).all()
    assert all((kept == expected).all() for kept, expected in held)


def contents():
    hold_and_drop(3000, seed=0)
    stats = memory_stats()
    assert stats.allocated == 0
    assert 0 < stats.max_allocated <= 13 * 4.5 * MIB


def reuse():
    first = empty(3 * MIB)
    place, stats = first.data_ptr(), memory_stats()
    assert stats.allocated == stats.reserved == 3 * MIB + 3 * MIB // 12, stats
    del first
    assert memory_stats() == (0, stats.max_allocated, stats.reserved)
    same, smaller = empty(3 * MIB), empty(3 * MIB - 100 * KIB)
    assert same.data_ptr() == place != smaller.data_ptr()
    del same
    half = empty(3 * MIB // 2)
    assert half.data_ptr() != place
    assert memory_stats().allocated < 3 * MIB // 2 * 1.13 + 3.3 * MIB


def bounded():
    held = empty(8 * MIB)
    for size in range(100 * KIB, 8 * MIB, 97 * KIB):
        empty(size)
        stats = memory_stats()
        assert stats.max_allocated <= (8 + 8) * MIB * 1.13
        assert stats.reserved <= 1.25 * stats.max_allocated
    before = resident_bytes()
    assert stats.reserved > stats.allocated
    empty_cache()
    stats = memory_stats()
    assert stats.reserved == stats.allocated == stats.max_allocated >= held.numel()
    big = empty(200 * MIB).fill_(1)
    del big
    assert resident_bytes() > before + 150 * MIB
    empty_cache()
    assert resident_bytes() < before + 20 * MIB


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def threads():
    failures = []

    def work(seed):
        try:
            hold_and_drop(600, seed)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures, failures
    assert memory_stats().allocated == 0


def fork():
    """A child allocates although another thread of the parent held the lock now and then."""
    torch.set_num_threads(1)
    ended = threading.Event()

    def work():
        while not ended.is_set():
            empty(MIB)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(100):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if empty(MIB).fill_(3).sum() == 3 * MIB else 1)
        assert os.waitpid(child, 0)[1] == 0
    ended.set()
    thread.join()


def earlier_tensors():
    tensor = EARLIER
    assert (tensor == 7).all()
    tensor.resize_(4 * MIB)
    assert (tensor[:MIB] == 7).all()
    tensor.set_()
    assert memory_stats().allocated == 0


def profiled():
    with torch.profiler.profile(profile_memory=True) as profile:
        held = [empty(size) for size in (10, 100 * KIB, 5 * MIB)]
        held.pop()
    changes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert changes == [10, 100 * KIB, 5 * MIB, -5 * MIB], changes


def too_large():
    empty(5 * MIB)
    for size in (2**50, 2**62):
        with pytest.raises(RuntimeError, match="alloc"):
            empty(size)
    hold_and_drop(100, seed=1)


def none():
    tensor = empty(0)
    assert tensor.numel() == 0
    assert memory_stats().allocated == 0


CHECKS = (contents, reuse, bounded, threads, fork, earlier_tensors, profiled, too_large, none)


def failure(check):
    empty_cache()
    try:
        check()
    except BaseException:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    EARLIER = torch.full((MIB,), 7, dtype=torch.uint8)
    assert memory_stats() == (0, 0, 0)
    assert use_caching_allocator() is None
    assert use_caching_allocator() is None
    print(json.dumps({check.__name__: failure(check) for check in CHECKS}))
