"""The fused ops of the seam, in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mambax import convolution, scan
from mambax_torch import ops


def scan_implementations() -> Mapping[str, str]:
    """Every algorithm of :mod:`mambax.scan` runs here."""
    return dict.fromkeys(scan.ALGORITHMS, "")


def selective_scan(u: Tensor, *args: Any, impl: str = "auto", **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`mambax.scan.selective_scan`; parallel unless named otherwise or for a single token."""
    automatic = "sequential" if u.shape[1] == 1 else "pscan"
    algorithm = scan.choose(impl, automatic, scan_implementations())
    return scan.selective_scan(ops, u, *args, algorithm=algorithm, **options)


def causal_conv1d(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`mambax.convolution.causal_conv1d`."""
    return convolution.causal_conv1d(ops, *args, **options)
