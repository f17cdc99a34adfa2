"""Where PyTorch computes, in words."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch

from mambax_torch import ops


def describe() -> Mapping[str, str]:
    """See :meth:`mambax.backend.Backend.describe`."""
    device = ops.devices()[0]
    if device == "cuda":
        return {"device": f"{torch.cuda.get_device_name()} (CUDA)"}
    return {"device": f"{platform.processor() or platform.machine()} ({device.upper()})"}
