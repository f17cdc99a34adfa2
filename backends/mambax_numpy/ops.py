"""The array functions and the host edge of the seam, in NumPy.

bfloat16 arrays are ``ml_dtypes.bfloat16``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np

from mambax_numpy import normal

__all__ = [
    "arange", "argmax", "argsort", "astype", "bool_", "compile", "concat", "cos", "cumulative_logsumexp",
    "cumulative_sum", "devices", "dtype", "evaluate", "exp", "float32", "float64", "from_numpy", "gelu", "int64",
    "log", "max", "maximum", "name", "no_grad", "silu", "sin", "softplus", "sort", "stack", "stop_gradient", "sum",
    "take_along_axis", "to_numpy", "unstack", "version", "where", "zeros",
]  # fmt: skip

Array = np.ndarray
name = "numpy"
float32, float64, int64, bool_ = (np.dtype(t) for t in (np.float32, np.float64, np.int64, np.bool_))


def version() -> str:
    """NumPy's version."""
    return np.__version__


def devices() -> Sequence[str]:
    """Host memory alone."""
    return ("cpu",)


def dtype(name: str) -> np.dtype:
    """The dtype of this name."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def zeros(shape: tuple[int, ...], dtype: Any, *, like: Array) -> Array:
    """Zeros of a shape and dtype."""
    return np.zeros(shape, dtype)


def arange(stop: int, *, like: Array) -> Array:
    """0 to stop - 1, int64."""
    return np.arange(stop, dtype=np.int64)


def astype(x: Array, dtype: Any) -> Array:
    """x in another dtype; x itself when it has it."""
    return x.astype(dtype, copy=False)


def concat(arrays: Sequence[Array], axis: int) -> Array:
    """Joined along an axis."""
    return np.concatenate(arrays, axis)


def stack(arrays: Sequence[Array], axis: int) -> Array:
    """Joined along a new axis."""
    return np.stack(arrays, axis)


def unstack(x: Array, axis: int) -> Sequence[Array]:
    """The slices along an axis."""
    return list(np.moveaxis(x, axis, 0))


def where(condition: Array, x: Array, y: Array | float) -> Array:
    """x where the condition holds, else y."""
    return np.where(condition, x, y)


def take_along_axis(x: Array, indices: Array, axis: int) -> Array:
    """x at indices along an axis."""
    return np.take_along_axis(x, indices, axis)


def exp(x: Array) -> Array:
    """e to the x."""
    return np.exp(x)


def log(x: Array) -> Array:
    """Natural logarithm."""
    return np.log(x)


def cos(x: Array) -> Array:
    """Cosine."""
    return np.cos(x)


def sin(x: Array) -> Array:
    """Sine."""
    return np.sin(x)


def maximum(x: Array, y: float) -> Array:
    """The larger of each element and y."""
    return np.maximum(x, y)


def sum(x: Array, axis: int) -> Array:
    """Sum along an axis."""
    return np.sum(x, axis)


def max(x: Array, axis: int) -> Array:
    """Largest along an axis; NaN if there is one."""
    return np.max(x, axis)


def argmax(x: Array, axis: int) -> Array:
    """Index of the first largest along an axis."""
    return np.argmax(x, axis)


def sort(x: Array, axis: int) -> Array:
    """Ascending."""
    return np.sort(x, axis)


def argsort(x: Array, axis: int) -> Array:
    """Indices that sort, ascending."""
    return np.argsort(x, axis)


def cumulative_sum(x: Array, axis: int) -> Array:
    """Running sum along an axis."""
    return np.cumsum(x, axis)


def cumulative_logsumexp(x: Array, axis: int) -> Array:
    """Running log of the sum of exponentials along an axis."""
    return np.logaddexp.accumulate(x, axis)


def stop_gradient(x: Array) -> Array:
    """x, from which no gradient flows back."""
    return x


def softplus(x: Array) -> Array:
    """log(1 + e^x), exact at both ends."""
    return np.logaddexp(x, x.dtype.type(0))


def silu(x: Array) -> Array:
    """x times its logistic function, without overflow at either end."""
    small = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1, small) / (1 + small)


def gelu(x: Array) -> Array:
    """x times the normal distribution's function of x, which is computed in float64."""
    return (x * normal.distribution(x.astype(np.float64))).astype(x.dtype)


def from_numpy(array: Array, *, like: Array | None = None, device: str | None = None) -> Array:
    """The array itself."""
    if device not in (None, "cpu"):
        raise ValueError(f"device is {device!r}; the numpy backend has 'cpu' alone")
    return array


def to_numpy(x: Array) -> Array:
    """The array itself."""
    return x


def no_grad() -> AbstractContextManager[None]:
    """There are no gradients here."""
    return nullcontext()


def evaluate(*arrays: Array, wait: bool = True) -> None:
    """Everything is computed as it is written."""


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself."""
    return function
