"""Threads that help with the work of kernels: kept, one set for the process, any number of callers at once.

Kernels release the GIL, so Python's threads will do. Whoever calls does the work; helpers take a share of it. A
helper that comes late, because it has to be woken or its processor is busy, finds less to do or nothing. So no
caller waits for a helper that has not begun.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

_PIECES = 4
"""Ranges per thread."""

Work = Callable[[int], Any]
"""What a thread does, called with its slot: 0 for the caller, 1 and on for helpers."""


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


class _Helper:
    """A thread that sleeps until it is given work. It ends with the process."""

    def __init__(self) -> None:
        self._work: tuple[Work, int] | None = None
        self._given = threading.Lock()
        self._given.acquire()
        threading.Thread(target=self._serve, name="mambax", daemon=True).start()

    def give(self, work: Work, slot: int) -> None:
        """Have it do this, which must not raise, and come back to the idle ones."""
        self._work = work, slot
        self._given.release()

    def _serve(self) -> None:
        while True:
            self._given.acquire()
            assert self._work is not None
            work, slot = self._work
            self._work = None
            work(slot)
            del work  # and with it the arrays that it holds
            _idle.append(self)


_idle: deque[_Helper] = deque()
_callers: deque[None] = deque()  # one entry for each caller; both deques change in single operations


def _after_fork() -> None:
    """The child has none of the threads."""
    _idle.clear()
    _callers.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)


def together(work: Work, threads: int) -> None:
    """`work(slot)` by the calling thread and up to `threads` - 1 helpers; returns when the caller's own returns.

    Helpers may begin at any time, after that as well, and each at most once; `work` holds what it needs and must
    not raise in them. Where several callers are at it, they share the processors.
    """
    _callers.append(None)
    try:
        if len(_callers) > 1:
            threads = min(threads, max(1, _processors() // len(_callers)))
        for slot in range(1, threads):
            helper = _helper()
            if helper is None:
                break
            helper.give(work, slot)
        work(0)
    finally:
        _callers.pop()


def _helper() -> _Helper | None:
    """An idle helper, or a new one; None where the system has no thread to give."""
    try:
        return _idle.pop()
    except IndexError:
        pass
    try:
        return _Helper()
    except RuntimeError:  # too many threads, or the interpreter is ending
        return None


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
    done: SimpleQueue[BaseException | None] = SimpleQueue()

    def work(slot: int) -> None:
        while True:
            try:
                first, last = ranges.popleft()  # one operation, whatever other threads do
            except IndexError:
                return
            try:
                kernel(first, last)
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)

    together(work, threads)
    errors = [error for error in (done.get() for _ in range(pieces)) if error is not None]
    if errors:
        raise errors[0]
