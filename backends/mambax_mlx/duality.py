"""The scan of Mamba-2 and its gated norm, in MLX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mambax_cpu
import mlx.core as mx

from mambax import mamba2, scan
from mambax import ssd as duality
from mambax_mlx import host, ops
from mambax_mlx.kernels import launch


def ssd_implementations() -> Mapping[str, str]:
    """Every algorithm of :mod:`mambax.ssd`, and the kernels of the CPU and of each kind of GPU: "", or why not."""
    device = host.default_device()
    reason = mambax_cpu.missing() if device == "cpu" else f"MLX's default device is {device!r}"
    kernels = {dialect: launch.missing(dialect) for dialect in launch.DIALECTS}
    return {**dict.fromkeys(duality.ALGORITHMS, ""), "cpu": reason, **kernels}


def ssd(x: mx.array, *args: Any, impl: str = "auto", **options: Any) -> tuple[mx.array, mx.array]:
    """:func:`mambax.ssd.ssd`; unless named otherwise by the kernels of the device.

    On a GPU these are ``metal`` or ``cuda``, and on the CPU the fused kernels where values can be had (see
    :mod:`mambax_mlx.host`). Where they cannot run, or take an argument such as a d_state above 256, it is chunked,
    and sequential for a single token.
    """
    algorithm = _automatic(x, *args, **options) if impl == "auto" else impl
    scan.choose(algorithm, "", ssd_implementations())
    if algorithm == "cpu":
        from mambax_mlx import cpu_ssd

        return cpu_ssd.ssd(x, *args, **options)
    if algorithm in launch.DIALECTS:
        from mambax_mlx.kernels import ssd as on_gpu

        return on_gpu.ssd(getattr(launch, algorithm), x, *args, **options)
    return duality.ssd(ops, x, *args, algorithm=algorithm, **options)


def _automatic(x: mx.array, *args: Any, **options: Any) -> str:
    """The implementation for these arguments."""
    arrays = [argument for argument in (*args, *options.values()) if isinstance(argument, mx.array)]
    dialect = launch.dialect()
    if dialect:
        from mambax_mlx.kernels import ssd as on_gpu

        B = args[2] if len(args) > 2 else options["B"]
        if not on_gpu.refusal(x, B, *(array for array in arrays if array.dtype != mx.bool_)):
            return dialect
    elif not mambax_cpu.missing() and host.computable(x, *arrays):
        return "cpu"
    return "sequential" if x.shape[1] == 1 else "chunked"


def gated_rms_norm(y: mx.array, z: mx.array, weight: mx.array, groups: int, eps: float) -> mx.array:
    """:func:`mambax.mamba2.gated_rms_norm`, the gate first; by the fused CPU kernels where MLX computes on the CPU
    and values can be had."""
    if mambax_cpu.missing() or not host.computable(y, z, weight):
        return mamba2.gated_rms_norm(ops, y, z, weight, groups, eps)
    from mambax_mlx import cpu_ssd

    return cpu_ssd.gated_rms_norm(y, z, weight, groups, eps)
