"""The array functions and the host edge of the seam, in MLX.

MLX places arrays on its default device; there is nothing to say per array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version as _distribution_version
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.nn
import numpy as np

from mambax_mlx.host import default_device, exp, without_gradients

__all__ = [
    "arange", "argmax", "argsort", "astype", "bool_", "compile", "concat", "cos", "cumulative_logsumexp",
    "cumulative_sum", "devices", "dtype", "evaluate", "exp", "float32", "float64", "from_numpy", "gelu", "int64",
    "log", "max", "maximum", "name", "no_grad", "silu", "sin", "softplus", "sort", "stack", "stop_gradient", "sum",
    "take_along_axis", "to_numpy", "unstack", "version", "where", "zeros",
]  # fmt: skip

Array = mx.array
name = "mlx"
float32, float64, int64, bool_ = mx.float32, mx.float64, mx.int64, mx.bool_


def version() -> str:
    """MLX's version."""
    return _distribution_version("mlx")


def devices() -> Sequence[str]:
    """The GPU where MLX has one, and the CPU; the default device first."""
    default = default_device()
    found = [default]
    if default == "cpu" and (mx.metal.is_available() or mx.cuda.is_available()):
        found.append("gpu")
    if default == "gpu":
        found.append("cpu")
    return tuple(found)


def dtype(name: str) -> mx.Dtype:
    """The dtype of this name.

    Raises:
        ValueError: for float64, which MLX computes on the CPU alone and only in part.
    """
    if name == "float64":
        raise ValueError("dtype float64 is not supported by the mlx backend; use float32, or backend='numpy'")
    return getattr(mx, name)


def zeros(shape: tuple[int, ...], dtype: mx.Dtype, *, like: Array) -> Array:
    """Zeros of a shape and dtype."""
    return mx.zeros(shape, dtype)


def arange(stop: int, *, like: Array) -> Array:
    """0 to stop - 1, int64."""
    return mx.arange(stop, dtype=mx.int64)


def astype(x: Array, dtype: mx.Dtype) -> Array:
    """x in another dtype; x itself when it has it."""
    return x.astype(dtype)


def concat(arrays: Sequence[Array], axis: int) -> Array:
    """Joined along an axis."""
    return mx.concatenate(list(arrays), axis)


def stack(arrays: Sequence[Array], axis: int) -> Array:
    """Joined along a new axis."""
    return mx.stack(list(arrays), axis)


def unstack(x: Array, axis: int) -> Sequence[Array]:
    """The slices along an axis."""
    if x.shape[axis] == 1:
        return [mx.squeeze(x, axis)]
    return [mx.squeeze(part, axis) for part in mx.split(x, x.shape[axis], axis)]


def where(condition: Array, x: Array, y: Array | float) -> Array:
    """x where the condition holds, else y."""
    return mx.where(condition, x, y)


def take_along_axis(x: Array, indices: Array, axis: int) -> Array:
    """x at indices along an axis."""
    return mx.take_along_axis(x, indices, axis)


def log(x: Array) -> Array:
    """Natural logarithm."""
    return mx.log(x)


def cos(x: Array) -> Array:
    """Cosine."""
    return mx.cos(x)


def sin(x: Array) -> Array:
    """Sine."""
    return mx.sin(x)


def maximum(x: Array, y: float) -> Array:
    """The larger of each element and y."""
    return mx.maximum(x, y)


def sum(x: Array, axis: int) -> Array:
    """Sum along an axis."""
    return mx.sum(x, axis)


def max(x: Array, axis: int) -> Array:
    """Largest along an axis; NaN if there is one."""
    return mx.max(x, axis)


def argmax(x: Array, axis: int) -> Array:
    """Index of the first largest along an axis."""
    return mx.argmax(x, axis).astype(mx.int64)


def sort(x: Array, axis: int) -> Array:
    """Ascending."""
    return mx.sort(x, axis)


def argsort(x: Array, axis: int) -> Array:
    """Indices that sort, ascending."""
    return mx.argsort(x, axis)


def cumulative_sum(x: Array, axis: int) -> Array:
    """Running sum along an axis."""
    return mx.cumsum(x, axis)


def cumulative_logsumexp(x: Array, axis: int) -> Array:
    """Running log of the sum of exponentials along an axis."""
    return mx.logcumsumexp(x, axis)


def stop_gradient(x: Array) -> Array:
    """x, from which no gradient flows back."""
    return mx.stop_gradient(x)


def softplus(x: Array) -> Array:
    """log(1 + e^x), exact at both ends."""
    return mx.logaddexp(x, mx.zeros_like(x))


def silu(x: Array) -> Array:
    """x times its logistic function."""
    return mlx.nn.silu(x)


def gelu(x: Array) -> Array:
    """x times the normal distribution's function of x."""
    return mlx.nn.gelu(x)


def from_numpy(array: np.ndarray, *, like: Array | None = None, device: str | None = None) -> Array:
    """A copy on the default device.

    Raises:
        ValueError: for float64 values, and for a device that is not MLX's default one.
    """
    if device not in (None, default_device()):
        raise ValueError(
            f"device is {device!r}, but MLX's default device is {default_device()!r}; "
            f"call mlx.core.set_default_device(mlx.core.{device}) first"
        )
    if array.dtype == np.float64:
        raise ValueError("float64 values are not supported by the mlx backend; convert them to float32")
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_numpy(x: Array) -> np.ndarray:
    """An array in host memory; bfloat16 as ``ml_dtypes.bfloat16``."""
    if x.dtype == mx.bfloat16:
        return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(x)


def no_grad() -> AbstractContextManager[Any]:
    """MLX records gradients only where it is asked for them. In here nobody will, so that more may be fused."""
    return without_gradients()


def evaluate(*arrays: Array, wait: bool = True) -> None:
    """Compute the arrays, or start to. What waits, as each chunk of a prompt does, gives unused memory back."""
    if wait:
        mx.eval(*arrays)
        mx.clear_cache()
    else:
        mx.async_eval(*arrays)


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """``mx.compile``."""
    return mx.compile(function)
