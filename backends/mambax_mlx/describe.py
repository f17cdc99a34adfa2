"""Where MLX computes here and what runs each op, in words."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import mambax_cpu
import mlx.core as mx

from mambax_mlx import products
from mambax_mlx.fused import automatic_on_gpu
from mambax_mlx.host import default_device


def describe() -> Mapping[str, str]:
    """The device and, for each op, what runs it there; see :meth:`mambax.backend.Backend.describe`."""
    if default_device() == "gpu":
        scan = automatic_on_gpu()
        return {
            "device": str(mx.device_info().get("device_name", "GPU")),
            "selective_scan": scan,
            "causal_conv1d": "MLX's operations" if scan == "chunked" else scan,
            "ssd": scan,
            "products": "MLX",
            "one token": "compiled by mx.compile",
        }
    fused = not mambax_cpu.missing()
    inside = " (inside mx.compile and mx.vmap: {})" if fused else "{}"
    kernels = "kernels of mambax_cpu" if fused else ""
    by_numpy = "NumPy and kernels of mambax_cpu (inside mx.compile and mx.vmap: MLX)"
    return {
        "device": f"{platform.processor() or platform.machine()} (CPU)",
        "selective_scan": kernels + inside.format("chunked, and sequential for one token"),
        "causal_conv1d": kernels + inside.format("MLX's operations"),
        "ssd": kernels + inside.format("chunked, and sequential for one token"),
        "products": by_numpy if products.by_numpy() else "MLX",
        "one token": "blocks of the numpy backend, where no gradient is wanted (in generation)",
    }
