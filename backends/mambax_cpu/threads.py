"""One pool of threads for all kernels of the process.

Numba's own parallel layers are either not safe from several Python threads at once, or not after a fork. Kernels
here release the GIL, so that Python's threads do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
    """`kernel(first, last)` over the tasks 0 to count - 1, in at most `threads` ranges of nearly equal length.

    The calling thread does the first range itself. Returns when all are done; an exception of any is raised.
    """
    threads = max(1, min(threads, count))
    if threads == 1:
        kernel(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    pool = _pool()
    others = [pool.submit(kernel, bounds[i], bounds[i + 1]) for i in range(1, threads)]
    kernel(0, bounds[1])
    for other in others:
        other.result()
