"""The gated RMSNorm of Mamba-2 over NumPy arrays, in one pass.

Dimensions: B batch, L length, D channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mambax_cpu.buffers import narrow_room, room
from mambax_cpu.compilation import KernelFile
from mambax_cpu.operands import check_shape, kernel_of, kernel_ready, narrow_ready, refuse_float64, table
from mambax_cpu.ssd_tiles import whole
from mambax_cpu.threads import default_threads, run

_kernels = KernelFile("mambax_cpu.gated_norm_kernels")

_SMALL = 1 << 15
"""Values below which waking another thread costs more than it saves."""


def gated_rms_norm(
    y: np.ndarray, z: np.ndarray, weight: np.ndarray, groups: int, epsilon: float, *, threads: int | None = None
) -> np.ndarray:
    """:func:`mambax.mamba2.gated_rms_norm`, the gate first; the same bits whatever the number of threads.

    Args:
        y, z: (B, L, D), float32 or narrower.
        weight: (D,), float32 or narrower.
        groups: equal parts of D, each with a mean square of its own.
        epsilon: added to the mean square.
        threads: how many may work; as many as :func:`mambax_cpu.threads.default_threads` says when None.

    Returns:
        (B, L, D) in the dtype of the weight.

    Raises:
        ValueError: for shapes that do not fit, and float64.
    """
    if y.ndim != 3:
        raise ValueError(f"gated_rms_norm: y must be (B, L, D), found {y.shape}")
    batch, length, channels = y.shape
    check_shape("gated_rms_norm", "z", z, y.shape)
    check_shape("gated_rms_norm", "weight", weight, (channels,))
    if groups < 1 or channels % groups:
        raise ValueError(f"gated_rms_norm: {channels} channels do not divide into {groups} equal groups")
    for array in (y, z, weight):
        refuse_float64("gated_rms_norm", array)
    given: Any = narrow_ready(y, z) if y.dtype == weight.dtype else (kernel_ready(y), kernel_ready(z))
    dtype = given[0].dtype
    out = narrow_room(dtype, batch, length, channels)
    operands = [*given, kernel_ready(weight), out]  # alive until the kernels are done
    views = table(operands)
    kernel, scratch = kernel_of(_kernels, "gated_norm", dtype), whole(channels // groups)

    def work(first: int, last: int) -> None:
        kernel(views, length, channels, groups, float(epsilon), first, last, room(scratch))

    if y.size < _SMALL:
        work(0, batch * length)
    else:
        run(work, batch * length, default_threads() if threads is None else threads)
    return out.astype(weight.dtype, copy=False)
