"""Memory for the states after a step, used again when nobody holds it any more.

The states of Mamba-2 are many megabytes. Memory of that size comes from the system page by page, zeroed, at the
first touch, which takes longer than the step writes. Whoever decodes lets go of a state when the next but one is
computed: that is when its memory is free here. At most the memory of one state is kept that nobody uses.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from weakref import ReferenceType, ref

import numpy as np

_COUNTS = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()


class StateMemory:
    """Float32 arrays, each in memory of its own or in that of one that is gone. Safe from several threads."""

    def __init__(self) -> None:
        self._kept: deque[np.ndarray] = deque(maxlen=1)
        self._latest: ReferenceType[np.ndarray] | None = None

    def take(self, layers: int, shape: tuple[int, ...]) -> np.ndarray:
        """Memory (layers, *shape) for values that a kernel will write; it holds anything before.

        What refers to it, views and tensors that share it, keep it from being given out again.
        """
        size = layers * math.prod(shape)
        block = self._free(size)
        if block is None:
            block = np.empty(size, np.float32)
        latest = None if self._latest is None else self._latest()
        if latest is not None and _COUNTS:
            self._kept.append(latest)  # free by the next call, if it is not by then somebody's for longer
        self._latest = ref(block)
        return block.reshape(layers, *shape)

    def _free(self, size: int) -> np.ndarray | None:
        """The kept block, if it has this size and nobody else holds it; it is not kept any longer."""
        try:
            block = self._kept.pop()
        except IndexError:
            return None
        return block if block.size == size and sys.getrefcount(block) == _FREE else None


def _references() -> int:
    """What ``sys.getrefcount`` says of an array that one variable holds."""
    block = np.empty(1, np.float32)
    return sys.getrefcount(block)


_FREE = _references()
