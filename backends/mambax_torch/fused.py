"""The fused ops of the seam, in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import mambax_cpu
import torch
from torch import Tensor

from mambax import convolution, scan
from mambax_torch import chunked, ops
from mambax_torch.kernels.devices import missing, takes, why_not_triton

weights_are_freed: ContextVar[bool] = ContextVar("weights_are_freed", default=False)
"""Whether the memory of weights is given back after use, as FSDP2 does. PyTorch never frees what NumPy has seen."""


def scan_implementations() -> Mapping[str, str]:
    """Every algorithm of :mod:`mambax.scan`, the fused kernels for tensors in host memory, and those in Triton."""
    reason = missing()
    if not reason and not takes("cpu") and not torch.cuda.is_available():
        reason = "PyTorch finds no CUDA device"
    return {**dict.fromkeys(scan.ALGORITHMS, ""), "cpu": mambax_cpu.missing(), "triton": reason}


def why_not_cpu_kernels(x: Tensor) -> str:
    """Why the fused CPU kernels cannot take this tensor here; empty when they can."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}"
    if x.dtype == torch.float64:
        return "it computes in float32 and the tensors are float64; use 'sequential' or 'pscan'"
    if torch.compiler.is_compiling():
        return ""
    if ops.inside_transform():
        return "it cannot run inside torch.func transforms and forward-mode differentiation; use 'pscan'"
    if weights_are_freed.get():
        return "FSDP2 frees the memory of weights after use, which NumPy does not allow; use 'pscan'"
    return ""


def selective_scan(u: Tensor, *args: Any, impl: str = "auto", **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`mambax.scan.selective_scan`. Unless named otherwise: fused kernels on the CPU and on NVIDIA GPUs up to
    float32, else parallel in chunks, or sequential for a single token."""
    available = dict.fromkeys(scan.ALGORITHMS, "") | {"cpu": why_not_cpu_kernels(u), "triton": why_not_triton(u)}
    if u.is_cuda and not available["triton"]:
        automatic = "triton"
    elif not available["cpu"]:
        automatic = "cpu"
    else:
        automatic = "sequential" if u.shape[1] == 1 else "pscan"
    algorithm = scan.choose(impl, automatic, available)
    if algorithm == "triton":
        from mambax_torch.kernels import scan_ops

        return scan_ops.selective_scan(u, *args, **options)
    if algorithm == "cpu":
        from mambax_torch import cpu_ops

        return cpu_ops.selective_scan(u, *args, **options)
    return chunked.selective_scan(u, *args, algorithm=algorithm, **options)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    boundaries: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.convolution.causal_conv1d`; by fused kernels on the CPU and on NVIDIA GPUs, up to float32."""
    options: dict[str, Any] = {"initial_state": initial_state, "mask": mask, "boundaries": boundaries}
    if x.is_cuda and not why_not_triton(x):
        from mambax_torch.kernels import conv

        return conv.causal_conv1d(x, weight, bias, activation=activation, **options)
    if not why_not_cpu_kernels(x):
        from mambax_torch import conv_ops

        return conv_ops.causal_conv1d(x, weight, bias, activation=activation, **options)
    return convolution.causal_conv1d(ops, x, weight, bias, activation=activation, **options)
