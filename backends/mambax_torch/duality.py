"""The scan of Mamba-2 and its gated norm, in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mambax import mamba2, scan
from mambax import ssd as duality
from mambax_torch import ops
from mambax_torch.fused import scan_implementations, why_not_cpu_kernels
from mambax_torch.kernels.devices import why_not_triton, why_not_triton_ssd
from mambax_torch.operators import are_plain, may_call_directly


def ssd_implementations() -> Mapping[str, str]:
    """Every algorithm of :mod:`mambax.ssd`, the fused kernels for tensors in host memory, and those in Triton."""
    kernels = {name: reason for name, reason in scan_implementations().items() if name in ("cpu", "triton")}
    return {**dict.fromkeys(duality.ALGORITHMS, ""), **kernels}


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *args: Any, impl: str = "auto", **options: Any
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.ssd.ssd`. Unless named otherwise: fused kernels on the CPU and on NVIDIA GPUs, up to float32,
    there for a single token only where nothing is traced or wants a gradient; else chunked, or sequential for a
    single token."""
    available = dict.fromkeys(duality.ALGORITHMS, "")
    reason = why_not_cpu_kernels(x).replace("pscan", "chunked")  # which is what it is called here
    available |= {"cpu": reason, "triton": why_not_triton_ssd(x, B)}
    if x.is_cuda and not available["triton"] and x.shape[1] != 1:
        automatic = "triton"
    elif not available["cpu"]:
        automatic = "cpu"
    else:
        automatic = "sequential" if x.shape[1] == 1 else "chunked"
    algorithm = scan.choose(impl, automatic, available)
    if impl in ("auto", "triton") and _is_step(x, dt, A, B, *args, **options):
        from mambax_torch.kernels import step_mamba2

        return step_mamba2.ssd_step(x, dt, A, B, *args, **{k: options[k] for k in options if k not in _FLAGS})
    if algorithm == "triton":
        from mambax_torch.kernels import ssd_ops

        return ssd_ops.ssd(x, dt, A, B, *args, **options)
    if algorithm == "cpu":
        from mambax_torch import cpu_ssd

        return cpu_ssd.ssd(x, dt, A, B, *args, **options)
    with torch.autocast(x.device.type, enabled=False):  # its products of states stay in float32
        return duality.ssd(ops, x, dt, A, B, *args, algorithm=algorithm, **options)


_FLAGS = ("mask", "boundaries")


def _is_step(x: Tensor, *args: Any, **options: Any) -> bool:
    """Whether this is a single token on a GPU, without a mask or a boundary, of which nothing wants a gradient."""
    one = x.is_cuda and x.shape[1] == 1 and all(options.get(name) is None for name in _FLAGS)
    if not one or why_not_triton(x):
        return False
    return may_call_directly([x, *(t for t in (*args, *options.values()) if isinstance(t, Tensor))])


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """:func:`mambax.mamba2.gated_rms_norm`, the gate first; on NVIDIA GPUs, and on the CPU where nothing asks for a
    gradient, by the fused kernels up to float32."""
    floats = torch.float64 not in (y.dtype, z.dtype, weight.dtype)
    direct = floats and may_call_directly((y, z, weight))
    if floats and y.is_cuda and are_plain((y, z, weight)) and not why_not_triton(y):
        from mambax_torch.kernels import gated_norm, norm

        if weight.shape[0] // groups <= norm.WIDEST:
            by_kernel = gated_norm.normed if direct else gated_norm.gated_norm
            return by_kernel(y, z, weight.contiguous(), groups, eps)
    if not direct or why_not_cpu_kernels(y):
        return mamba2.gated_rms_norm(ops, y, z, weight, groups, eps)
    from mambax_cpu import gated_norm

    from mambax_torch.cpu_ops import shared

    threads = torch.get_num_threads()
    return ops.from_numpy(
        gated_norm.gated_rms_norm(shared(y), shared(z), shared(weight), groups, eps, threads=threads)
    )
