"""Where NumPy computes, and what runs each op, in words."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import mambax_cpu


def describe() -> Mapping[str, str]:
    """See :meth:`mambax.backend.Backend.describe`."""
    reason = mambax_cpu.missing()
    kernels = f"no kernels: {reason}" if reason else "kernels of mambax_cpu up to float32, plain NumPy in float64"
    products = "the faster of NumPy and kernels of mambax_cpu, NumPy in float64"
    return {
        "device": f"{platform.processor() or platform.machine()} (CPU)",
        "selective_scan": kernels,
        "causal_conv1d": kernels,
        "ssd": kernels,
        "products": f"no kernels: {reason}" if reason else products,
    }
