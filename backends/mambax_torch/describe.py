"""Where PyTorch computes, and what runs each op, in words."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import mambax_cpu
import torch

from mambax_torch import ops
from mambax_torch.fused import scan_implementations
from mambax_torch.kernels.devices import old_for_ssd

_KERNELS = {"cuda": "Triton kernels", "cpu": "kernels of mambax_cpu"}


def describe() -> Mapping[str, str]:
    """The device and, for each op, what runs it there; see :meth:`mambax.backend.Backend.describe`."""
    device = ops.devices()[0]
    if device == "cuda":
        found = f"{torch.cuda.get_device_name()} (CUDA)"
    else:
        found = f"{platform.processor() or platform.machine()} ({device.upper()})"
    products = "the faster of PyTorch and kernels of mambax_cpu" if device == "cpu" else "PyTorch"
    return {
        "device": found,
        "selective_scan": _fused(device, "pscan, in tensor operations"),
        "causal_conv1d": _fused(device, "tensor operations"),
        "ssd": _fused(
            device, "chunked, in tensor operations", old_for_ssd(), "; a single token with a gradient sequentially"
        ),
        "products": products,
        "one token": _one_token(device),
    }


def _one_token(device: str) -> str:
    """How a generation decodes on a device; see :mod:`mambax_torch.graph_limits`."""
    if device == "cpu" and not mambax_cpu.missing():
        return "all blocks at once by kernels of mambax_cpu, where no gradient is wanted; else block by block"
    if device != "cuda" or torch.version.hip is not None:
        return "block by block"
    return "a step captured in a CUDA graph; block by block with attention or mixtures of experts, and in autocast"


def _fused(device: str, otherwise: str, old: str = "", single: str = "") -> str:
    """What "auto" takes on a device, for as many tokens as one likes.

    Args:
        device: its name.
        otherwise: what it takes where there are no kernels.
        old: why the Triton kernels cannot run where others can.
        single: what more there is to say of these.
    """
    name = {"cuda": "triton", "cpu": "cpu"}.get(device)
    if name is None:
        return otherwise
    reason = scan_implementations()[name] or (old if name == "triton" else "")
    if reason:
        return f"{otherwise}: {reason}"
    return _KERNELS[device] + (single if name == "triton" else " up to float32")
