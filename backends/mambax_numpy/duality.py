"""The scan of Mamba-2 and its gated norm, in NumPy: fused CPU kernels up to float32, else the shared forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mambax_cpu
import numpy as np

from mambax import mamba2
from mambax import ssd as duality
from mambax_numpy import ops
from mambax_numpy.fused import chosen


def ssd_implementations() -> Mapping[str, str]:
    """Every algorithm of :mod:`mambax.ssd`, and the fused CPU kernels."""
    return {**dict.fromkeys(duality.ALGORITHMS, ""), "cpu": mambax_cpu.missing()}


def ssd(x: np.ndarray, *args: Any, impl: str = "auto", **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """:func:`mambax.ssd.ssd`; unless named otherwise by the fused kernels up to float32, else sequential."""
    algorithm = chosen(impl, x, duality.ALGORITHMS)
    if algorithm == "cpu":
        from mambax_cpu import ssd as fused

        return fused.ssd(x, *args, **options)
    return duality.ssd(ops, x, *args, algorithm=algorithm, **options)


def gated_rms_norm(y: np.ndarray, z: np.ndarray, weight: np.ndarray, groups: int, eps: float) -> np.ndarray:
    """:func:`mambax.mamba2.gated_rms_norm`, the gate first; by the fused kernels up to float32."""
    if np.float64 in (y.dtype, z.dtype, weight.dtype):
        return mamba2.gated_rms_norm(ops, y, z, weight, groups, eps)
    from mambax_cpu import gated_norm

    return gated_norm.gated_rms_norm(y, z, weight, groups, eps)
