"""The fused ops of the seam, in NumPy: the shared algorithms as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mambax import convolution, scan
from mambax_numpy import ops


def scan_implementations() -> Mapping[str, str]:
    """Every algorithm of :mod:`mambax.scan` runs here."""
    return dict.fromkeys(scan.ALGORITHMS, "")


def selective_scan(*args: Any, impl: str = "auto", **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """:func:`mambax.scan.selective_scan`, sequential unless named otherwise."""
    algorithm = scan.choose(impl, "sequential", scan_implementations())
    return scan.selective_scan(ops, *args, algorithm=algorithm, **options)


def causal_conv1d(*args: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """:func:`mambax.convolution.causal_conv1d`."""
    return convolution.causal_conv1d(ops, *args, **options)
