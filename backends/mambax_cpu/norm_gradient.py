"""The gradient of :func:`mambax_cpu.norm.rms_norm` over NumPy arrays.

Dimensions: M values of a row.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu.buffers import room
from mambax_cpu.compilation import KernelFile
from mambax_cpu.operands import check_shape, kernel_ready, refuse_float64, table
from mambax_cpu.threads import default_threads, run
from mambax_cpu.tiles import NORM_ROWS, norm_scratch

_kernels = KernelFile("mambax_cpu.norm_gradient_kernels")

_SMALL = 1 << 16
"""Values below which waking another thread costs more than it saves."""


def rms_norm_gradient(
    x: np.ndarray, weight: np.ndarray, epsilon: float, dy: np.ndarray, *, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of x (..., M) and weight (M,), float32, the same bits whatever the number of threads.

    Args:
        x, weight, epsilon: what :func:`mambax_cpu.norm.rms_norm` was given.
        dy: (..., M) gradient of its result.
        threads: how many may work; as many as :func:`mambax_cpu.threads.default_threads` says when None.

    Raises:
        ValueError: for shapes that do not fit, and float64.
    """
    refuse_float64("rms_norm", x)
    check_shape("rms_norm", "weight", weight, x.shape[-1:])
    check_shape("rms_norm", "the gradient of y", dy, x.shape)
    count, dx = x.shape[-1], room(*x.shape)
    if x.size == 0:
        return dx, np.zeros(count, np.float32)
    rows, dy, weight = *(kernel_ready(a.reshape(1, -1, count)) for a in (x, dy)), kernel_ready(weight)
    tasks = -(-rows.shape[1] // NORM_ROWS)
    dweight = room(1, tasks, count)
    views = table([rows, weight, dy, dx.reshape(rows.shape), dweight])

    def work(first: int, last: int) -> None:
        scratch = np.empty(norm_scratch(count), np.float32)
        _kernels.backward(views, rows.shape[1], count, float(epsilon), first, last, scratch)

    run(work, tasks, 1 if x.size < _SMALL else (default_threads() if threads is None else threads))
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is infinite is for the caller to notice
        return dx, dweight[0].sum(0)
