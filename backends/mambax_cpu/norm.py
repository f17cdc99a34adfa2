"""RMSNorm over NumPy arrays, statistics in float32; its gradient is in :mod:`mambax_cpu.norm_gradient`.

Dimensions: M values of a row.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from mambax_cpu.buffers import narrow_room
from mambax_cpu.compilation import KernelFile
from mambax_cpu.operands import check_shape, refuse_float64
from mambax_cpu.threads import default_threads, run

_SMALL = 1 << 16
"""Values below which waking another thread costs more than it saves."""

_kernels = KernelFile("mambax_cpu.norm_kernels")

_NAMES = {
    np.dtype(np.float32): "float32",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float16): "float16",
}


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float, *, threads: int | None = None) -> np.ndarray:
    """x / sqrt(mean(x^2) + epsilon) * weight along the last axis, the same bits whatever the number of threads.

    Args:
        x: (..., M), float32 or narrower.
        weight: (M,), float32, bfloat16 or float16.
        epsilon: added to the mean square.
        threads: how many may work; as many as :func:`mambax_cpu.threads.default_threads` says when None.

    Returns:
        (..., M) in the dtype of the weight.

    Raises:
        ValueError: for shapes that do not fit, and other dtypes.
    """
    refuse_float64("rms_norm", x)
    name = _NAMES.get(weight.dtype)
    if name is None:
        raise ValueError(f"rms_norm: weight must be float32, bfloat16 or float16, found {weight.dtype.name}")
    check_shape("rms_norm", "weight", weight, x.shape[-1:])
    x = np.require(x, np.float32, ("C", "A"))
    weight = np.require(weight, None, ("C", "A"))
    out = narrow_room(weight.dtype, *x.shape)
    count, kernel = x.shape[-1], getattr(_kernels, name)
    places = tuple(array.__array_interface__["data"][0] for array in (x, weight, out))

    def work(first: int, last: int) -> None:
        kernel(*places, count, float(epsilon), first, last)

    rows = x.size // max(1, count)
    if x.size < _SMALL:
        work(0, rows)
    else:
        run(work, rows, default_threads() if threads is None else threads)
    return out
