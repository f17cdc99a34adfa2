"""The fused ops of the seam, in MLX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mambax_cpu
import mlx.core as mx

from mambax import convolution, scan
from mambax_mlx import ops


def scan_implementations() -> Mapping[str, str]:
    """Every algorithm of :mod:`mambax.scan`, and the fused CPU kernels where MLX's default device is the CPU."""
    device = ops.devices()[0]
    reason = mambax_cpu.missing() if device == "cpu" else f"MLX's default device is {device!r}"
    return {**dict.fromkeys(scan.ALGORITHMS, ""), "cpu": reason}


def selective_scan(u: mx.array, *args: Any, impl: str = "auto", **options: Any) -> tuple[mx.array, mx.array]:
    """:func:`mambax.scan.selective_scan`; parallel unless named otherwise or for a single token.

    The fused CPU kernels have to be named: they cannot run inside ``mx.compile``.
    """
    automatic = "sequential" if u.shape[1] == 1 else "pscan"
    algorithm = automatic if impl == "auto" else scan.choose(impl, automatic, scan_implementations())
    if algorithm == "cpu":
        from mambax_mlx import cpu_ops

        return cpu_ops.selective_scan(u, *args, **options)
    return scan.selective_scan(ops, u, *args, algorithm=algorithm, **options)


def causal_conv1d(*args: Any, **options: Any) -> tuple[mx.array, mx.array]:
    """:func:`mambax.convolution.causal_conv1d`."""
    return convolution.causal_conv1d(ops, *args, **options)
