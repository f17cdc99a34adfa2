"""One pool of threads for all kernels of the process.

Numba's own parallel layers are either not safe from several Python threads at once, or not after a fork. Kernels
here release the GIL, so that Python's threads do.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_PIECES = 4
"""Ranges per thread."""

_pools: dict[int, ThreadPoolExecutor] = {}  # by process id: a fork inherits the object, but none of its threads


def default_threads() -> int:
    """``OMP_NUM_THREADS`` where it is set, else the number of processors that this process may use."""
    named = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if named.isdigit() and int(named) > 0:
        return int(named)
    return _processors()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _pool() -> ThreadPoolExecutor:
    process = os.getpid()
    pool = _pools.get(process)
    if pool is None:
        _pools.clear()
        # setdefault is atomic: of two threads that come first, both get the same pool
        pool = _pools.setdefault(process, ThreadPoolExecutor(_processors(), thread_name_prefix="mambax"))
    return pool


def run(kernel: Callable[[int, int], Any], count: int, threads: int) -> None:
    """`kernel(first, last)` over the tasks 0 to count - 1, in nearly equal ranges, by up to `threads` threads.

    The calling thread is one of them. Each takes the next range when it is done with one, so that a processor busy
    with something else does not hold up the others. Returns when all are done; an exception of any is raised.
    """
    threads = max(1, min(threads, count))
    if threads == 1:
        kernel(0, count)
        return
    pieces = min(count, _PIECES * threads)
    ranges = deque((count * i // pieces, count * (i + 1) // pieces) for i in range(pieces))

    def work() -> None:
        while True:
            try:
                first, last = ranges.popleft()  # one operation, whatever other threads do
            except IndexError:
                return
            kernel(first, last)

    pool = _pool()
    others = [pool.submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        if not other.cancel():  # one that has not begun has nothing left to do
            other.result()
