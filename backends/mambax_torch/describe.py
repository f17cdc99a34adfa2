"""Where PyTorch computes, in words."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch

from mambax_torch import ops
from mambax_torch.fused import scan_implementations
from mambax_torch.kernels.devices import old_for_ssd


def describe() -> Mapping[str, str]:
    """See :meth:`mambax.backend.Backend.describe`."""
    device = ops.devices()[0]
    if device == "cuda":
        found = f"{torch.cuda.get_device_name()} (CUDA)"
    else:
        found = f"{platform.processor() or platform.machine()} ({device.upper()})"
    return {"device": found, "scan of Mamba-2": _ssd(device)}


def _ssd(device: str) -> str:
    """What "auto" takes on a device, for as many tokens as one likes."""
    name = {"cuda": "triton", "cpu": "cpu"}.get(device)
    if name is None:
        return "chunked, in tensor operations"
    reason = scan_implementations()[name] or (old_for_ssd() if name == "triton" else "")
    if reason:
        return f"chunked, in tensor operations: {reason}"
    return "fused kernels (cpu)" if name == "cpu" else "Triton kernels (triton); a single token sequentially"
