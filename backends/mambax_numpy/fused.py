"""The fused ops of the seam, in NumPy: the fused CPU kernels up to float32, the shared algorithms in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mambax_cpu
import numpy as np

from mambax import convolution, scan
from mambax_numpy import ops


def scan_implementations() -> Mapping[str, str]:
    """Every algorithm of :mod:`mambax.scan`, and the fused CPU kernels."""
    return {**dict.fromkeys(scan.ALGORITHMS, ""), "cpu": mambax_cpu.missing()}


def chosen(impl: str, x: np.ndarray, algorithms: Iterable[str]) -> str:
    """The implementation of a scan over x: unless named otherwise the fused kernels, and in float64 sequential.

    Raises:
        ValueError: for an unknown name, and for ``cpu`` in float64.
    """
    exact = x.dtype == np.float64
    reason = "it computes in float32 and the arrays are float64; use 'sequential'" if exact else ""
    return scan.choose(impl, "sequential" if exact else "cpu", {**dict.fromkeys(algorithms, ""), "cpu": reason})


def selective_scan(u: np.ndarray, *args: Any, impl: str = "auto", **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The selective scan; unless named otherwise by the fused kernels up to float32, else sequential."""
    algorithm = chosen(impl, u, scan.ALGORITHMS)
    if algorithm == "cpu":
        from mambax_cpu import scan as fused

        return fused.selective_scan(u, *args, **options)
    return scan.selective_scan(ops, u, *args, algorithm=algorithm, **options)


def causal_conv1d(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    initial_state: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    boundaries: np.ndarray | None = None,
    activation: str | None = "silu",
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`mambax.convolution.causal_conv1d`; by the fused kernels up to float32."""
    options: dict[str, Any] = {"initial_state": initial_state, "mask": mask, "boundaries": boundaries}
    if x.dtype != np.float64:
        from mambax_cpu import convolution as fused

        return fused.causal_conv1d(x, weight, bias, activation=activation, **options)
    return convolution.causal_conv1d(ops, x, weight, bias, activation=activation, **options)
