"""Where NumPy computes, in words."""

from __future__ import annotations

import platform
from collections.abc import Mapping


def describe() -> Mapping[str, str]:
    """See :meth:`mambax.backend.Backend.describe`."""
    kernels = "kernels of mambax_cpu up to float32, plain NumPy in float64"
    return {
        "device": f"{platform.processor() or platform.machine()} (CPU)",
        "selective_scan": kernels,
        "causal_conv1d": kernels,
        "products": "NumPy for one row and for many in float32, else kernels of mambax_cpu",
    }
