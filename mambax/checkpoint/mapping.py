"""Weights used where they lie in a file, instead of a copy of them.

A mapping is private: arrays over it may be written to, which copies the page that is written and changes no file.
What it cannot have is a file that changes under it. A file that is replaced, as mambax and downloads do, goes on
living for those who have mapped it. One that is rewritten in place, as other programs may do, would change the
weights, so that :class:`Mappings` notices.

Windows lets nobody replace a file that is mapped, so that a model could not be saved to where it came from. There
weights are read.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mambax.checkpoint.tensors import TensorInfo

AVAILABLE = sys.platform != "win32"


class MappedFile:
    """A file in memory.

    Args:
        path: the file.
        identity: what :func:`identity_of` said when its header was read.

    Raises:
        ValueError: when it is not the file that it was.
        OSError: when it cannot be mapped, which not every file system can.
    """

    def __init__(self, path: Path, identity: tuple[int, ...]) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._identity = identity
        self.check()
        self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)

    def array(self, offset: int, info: TensorInfo) -> np.ndarray:
        """The elements from `offset` (bytes) on, writable, the file unchanged by what is written."""
        count = info.nbytes // info.dtype.itemsize
        return np.frombuffer(self._map, info.dtype, count, offset).reshape(info.shape)

    def check(self) -> None:
        """Refuse to go on with a file that has been written to.

        Raises:
            ValueError: with what to do.
        """
        if identity_of(self._file) != self._identity:
            raise ValueError(
                f"{self.path}: the file was written to after a model was loaded from it, which uses it where it "
                "lies; load the model again. To keep both, write a new file and move it to the place of the old one"
            )


class Mappings:
    """The files that a model uses. A copy of the model, or one that was pickled, uses none."""

    def __init__(self, files: Iterable[MappedFile] = ()) -> None:
        self.files = tuple(files)

    def check(self) -> None:
        """Refuse to go on when one of them has been written to; see :meth:`MappedFile.check`."""
        for file in self.files:
            file.check()

    def __reduce__(self) -> tuple[Any, ...]:
        return Mappings, ()


def identity_of(file: int | Path) -> tuple[int, ...]:
    """What changes when a file, open or by its path, is replaced or written to."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
