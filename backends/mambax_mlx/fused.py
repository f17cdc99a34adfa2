"""The fused ops of the seam, in MLX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mambax_cpu
import mlx.core as mx

from mambax import convolution, scan
from mambax_mlx import chunked, host, ops
from mambax_mlx.kernels import launch


def scan_implementations() -> Mapping[str, str]:
    """Every algorithm of :mod:`mambax.scan`, ``chunked``, and the kernels of the CPU and of either kind of GPU."""
    device = host.default_device()
    reason = mambax_cpu.missing() if device == "cpu" else f"MLX's default device is {device!r}"
    kernels = {dialect: launch.missing(dialect) for dialect in launch.DIALECTS}
    return {**dict.fromkeys(scan.ALGORITHMS, ""), "chunked": "", "cpu": reason, **kernels}


def selective_scan(
    u: mx.array, delta: mx.array, A: mx.array, *args: Any, impl: str = "auto", **options: Any
) -> tuple[mx.array, mx.array]:
    """The selective scan; unless named otherwise by the kernels of the device.

    On a GPU these are ``metal`` or ``cuda``; where they cannot take an argument, such as a d_state above 256, it is
    ``chunked``. On the CPU they are the fused CPU kernels; where those cannot run, inside ``mx.compile`` and
    ``mx.vmap``, it is ``chunked``, and ``sequential`` for one token. See :mod:`mambax_mlx.host`.
    """
    algorithm = impl
    if impl == "auto":
        algorithm = _automatic(u, A, delta, *args, *options.values())
    scan.choose(algorithm, "", scan_implementations())
    if algorithm == "cpu":
        from mambax_mlx import cpu_scan

        return cpu_scan.selective_scan(u, delta, A, *args, **options)
    if algorithm in launch.DIALECTS:
        from mambax_mlx.kernels import scan as on_gpu

        return on_gpu.selective_scan(getattr(launch, algorithm), u, delta, A, *args, **options)
    if algorithm == "chunked":
        return chunked.selective_scan(u, delta, A, *args, **options)
    return scan.selective_scan(ops, u, delta, A, *args, algorithm=algorithm, **options)


def _automatic(u: mx.array, A: mx.array, *others: Any) -> str:
    """The implementation for these arguments."""
    arrays = [x for x in others if isinstance(x, mx.array)]
    dialect = launch.dialect()
    if dialect:
        from mambax_mlx.kernels import scan as on_gpu

        floats = [x for x in arrays if x.dtype != mx.bool_]
        return "chunked" if on_gpu.refusal(u, A, *floats) else dialect
    if not mambax_cpu.missing() and host.computable(u, A, *arrays):
        return "cpu"
    return "sequential" if u.shape[1] == 1 else "chunked"


def automatic_on_gpu() -> str:
    """The implementation for more than one token where the CPU's kernels do not run."""
    return launch.dialect() or "chunked"


def causal_conv1d(x: mx.array, weight: mx.array, *args: Any, **options: Any) -> tuple[mx.array, mx.array]:
    """:func:`mambax.convolution.causal_conv1d`, by the kernels of the device where they can run."""
    arrays = [array for array in (weight, *args, *options.values()) if isinstance(array, mx.array)]
    dialect = launch.dialect()
    if dialect:
        from mambax_mlx.kernels import convolution as on_gpu

        if not on_gpu.refusal(x, *(array for array in arrays if array.dtype != mx.bool_)):
            return on_gpu.causal_conv1d(getattr(launch, dialect), x, weight, *args, **options)
    elif not mambax_cpu.missing() and host.computable(x, *arrays):
        from mambax_mlx import cpu_convolution

        return cpu_convolution.causal_conv1d(x, weight, *args, **options)
    return convolution.causal_conv1d(ops, x, weight, *args, **options)
