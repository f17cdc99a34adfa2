"""What the readers of tensor files have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from mambax.checkpoint.mapping import MappedFile

FLOATS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
"""The dtypes that weights may have, by name."""

_GIT_LFS = b"version https://git-lfs"
_SLICE = 2**19  # bytes that are looked at together, twice: they are in cache


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, before it is read.

    Args:
        dtype: of its elements.
        shape: of whole numbers, not negative.
    """

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name} {list(self.shape)}"


class TensorFile(Protocol):
    """A file whose header has been checked, and whose tensors are read one at a time."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray: ...  # a new, writable, contiguous array that owns its memory

    def view(self, name: str) -> np.ndarray | None: ...  # as it lies in the file; None where it has to be read

    @property
    def mapped(self) -> MappedFile | None: ...  # what views lie in, once there is one


def read_range(path: Path, offset: int, info: TensorInfo) -> np.ndarray:
    """The tensor whose elements lie one after another from ``offset`` (bytes) on.

    Raises:
        ValueError: when the file has become shorter than it was.
    """
    array = np.empty(info.shape, info.dtype)
    target = array.reshape(-1).view(np.uint8).data
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(target):
            count = file.readinto(target[done:])
            if not count:
                raise ValueError(f"{path}: the file ended while it was read; is something writing to it?")
            done += count
    return array


def check_not_pointer(path: Path) -> None:
    """Refuse what git leaves in place of a large file that was not downloaded.

    Raises:
        ValueError: saying how to get the file.
    """
    with path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            raise ValueError(
                f"{path}: this is a Git LFS pointer, not the weights; run 'git lfs pull' in its folder, "
                "or download the repository with mambax.load('owner/name')"
            )


def is_finite(array: np.ndarray) -> bool:
    """Whether a float array of any of :data:`FLOATS` holds neither NaN nor infinity.

    Looks at the bits: their exponent is the largest there is, so that among those of positive numbers they are the
    largest, and among all of them the largest are negative ones. Faster than ``np.isfinite``, many times for the
    16-bit types.
    """
    size = array.dtype.itemsize
    infinity = int(np.array(np.inf, array.dtype).view(f"u{size}"))
    bits = np.ascontiguousarray(array).reshape(-1)
    signed, unsigned = bits.view(f"i{size}"), bits.view(f"u{size}")
    sign, step = 1 << (8 * size - 1), _SLICE // size
    return all(
        signed[i : i + step].max() < infinity and unsigned[i : i + step].max() < infinity + sign
        for i in range(0, bits.size, step)
    )
