"""How arrays reach a kernel: one table of int64 rows (address, strides), so that a call passes a handful of values.

A kernel compiled for NumPy arrays would be compiled anew for every mix of memory layouts, and unboxing twenty
arrays takes longer than a one-token step. So arrays come as addresses and strides in elements; the last axis is
contiguous. Address 0 stands for an array that is absent. The caller keeps the arrays alive for the time of the
call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import ml_dtypes
import numpy as np

from mambax.scan import refuse_mask_with_boundaries


@overload
def kernel_ready(array: np.ndarray) -> np.ndarray: ...
@overload
def kernel_ready(array: None) -> None: ...
def kernel_ready(array: np.ndarray | None) -> np.ndarray | None:
    """The array in float32 (uint8 if it is that) with a contiguous last axis; a copy only where it has to be.

    float16, bfloat16 and values that are not aligned are converted here, at the edge.
    """
    if array is None:
        return None
    dtype = np.uint8 if array.dtype == np.uint8 else np.float32
    return _in_rows(array) if array.dtype == dtype else array.astype(dtype, order="C")


def narrow_ready(*arrays: np.ndarray | None) -> tuple[np.ndarray | None, ...]:
    """As :func:`kernel_ready`, but bfloat16 and float16 stay what they are where all arrays are of the same."""
    dtypes = {array.dtype for array in arrays if array is not None}
    if len(dtypes) > 1 or not dtypes <= _NARROW.keys():
        return tuple(kernel_ready(array) for array in arrays)
    return tuple(None if array is None else _in_rows(array) for array in arrays)


def kernel_of(kernels: Any, name: str, dtype: np.dtype) -> Callable[..., Any]:
    """The kernel of this name for values of this dtype: float32, or one that :func:`narrow_ready` lets through."""
    return getattr(kernels, name + _NARROW.get(dtype, ""))


_NARROW = {np.dtype(ml_dtypes.bfloat16): "_bfloat16", np.dtype(np.float16): "_float16"}


def _in_rows(array: np.ndarray) -> np.ndarray:
    """The array, aligned and with a contiguous last axis; a copy only where it has to be."""
    size = array.itemsize
    flags = array.flags
    if flags.c_contiguous and flags.aligned:
        return array
    if flags.aligned and array.strides[-1] == size and not any(stride % size for stride in array.strides):
        return array
    return np.array(array, order="C")


def flags(function: str, mask: np.ndarray | None, boundaries: np.ndarray | None) -> np.ndarray | None:
    """(B, L) uint8 for a kernel: 1 where a position exists, 2 more where a sequence begins. None without either.

    Raises:
        ValueError: for a mask together with boundaries.
    """
    refuse_mask_with_boundaries(function, mask, boundaries)
    if boundaries is not None:
        return np.where(np.asarray(boundaries, np.bool_), np.uint8(3), np.uint8(1))
    return None if mask is None else np.asarray(mask, np.bool_).view(np.uint8)


def check_shape(function: str, name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape; a kernel would read past its end.

    Raises:
        ValueError: with both shapes.
    """
    if array is not None and array.shape != shape:
        raise ValueError(f"{function}: {name} must be of shape {shape} to fit the others, found {array.shape}")


def refuse_float64(function: str, array: np.ndarray) -> None:
    """Refuse float64, which the kernels would round to float32.

    Raises:
        ValueError: with what to use instead.
    """
    if array.dtype == np.float64:
        raise ValueError(
            f"{function}: the fused CPU kernels compute in float32, found float64 values; "
            "use the implementation 'sequential' or convert to float32"
        )


def table(arrays: Sequence[np.ndarray | None]) -> np.ndarray:
    """(len(arrays), 3) int64 for a kernel: address, strides of the first and second axis (0 for a vector).

    Every array that is present must be :func:`kernel_ready`. One without elements counts as absent.
    """
    rows = []
    for array in arrays:
        if array is None or array.size == 0:
            rows.append((0, 0, 0))
            continue
        address, size, strides = array.__array_interface__["data"][0], array.itemsize, array.strides
        rows.append((address, strides[0] // size, strides[1] // size) if len(strides) > 1 else (address, 0, 0))
    return np.array(rows, np.int64)
