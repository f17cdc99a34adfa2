"""Memory for results, used again when nobody holds it any more.

What a layer computes for a few hundred tokens is some megabytes. The C library gives memory of that size back to
the system when it is freed, and the system hands it out page by page, zeroed, at the next touch: for the layers of
a prompt that takes longer than the convolutions. So the last blocks are kept here.

A block is free when nothing refers to it but its entry here: arrays that are views of it count as references, and
so do tensors that share it.
"""

from __future__ import annotations

import math
import sys
from collections import deque

import numpy as np

KEPT = 128 << 20
"""Bytes that are kept for use again, at most."""

_LARGE = 1 << 19
"""Bytes below which memory is left to the C library, which keeps most of it."""

_blocks: deque[np.ndarray] = deque()  # the last one used at the end; each change is a single operation
_COUNTS = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()


def narrow_room(dtype: np.dtype, *shape: int) -> np.ndarray:
    """As :func:`room`, for values of another dtype not wider than float32."""
    size = math.prod(shape)
    return room(-(-size * dtype.itemsize // 4)).view(dtype)[:size].reshape(shape)


def room(*shape: int) -> np.ndarray:
    """Memory for float32 values that a kernel will write; it holds anything before."""
    size = math.prod(shape)
    if 4 * size < _LARGE or not _COUNTS:
        return np.empty(shape, np.float32)
    for _ in range(len(_blocks)):
        try:
            block = _blocks.popleft()  # no other thread finds it here in the meantime
        except IndexError:
            break
        if size <= block.size <= 2 * size and sys.getrefcount(block) == _FREE:
            found = block[:size].reshape(shape)
            _blocks.append(block)
            return found
        _blocks.append(block)
    block = np.empty(size, np.float32)
    if block.nbytes <= KEPT:
        _blocks.append(block)
        _forget()
    return block.reshape(shape)


def _forget() -> None:
    """Leave out the blocks that were not used for the longest time, down to what may be kept."""
    total = sum(block.nbytes for block in list(_blocks))
    while total > KEPT:
        try:
            total -= _blocks.popleft().nbytes
        except IndexError:
            return


def _references() -> int:
    """What ``sys.getrefcount`` says in :func:`room` of a block that is held by nothing else."""
    block = np.empty(1, np.float32)
    return sys.getrefcount(block)


_FREE = _references()
