"""Where the Triton kernels can run."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

OLDEST = (8, 0)
"""Compute capability from which the kernels are used: bfloat16 in hardware."""


@cache
def missing() -> str:
    """Why there are no kernels at all in this process; empty when Triton is there."""
    try:
        import triton  # noqa: F401 whether it is there is the question
    except ImportError as error:
        return f"Triton cannot be imported ({error}); it comes with PyTorch for CUDA, on Linux"
    return ""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _too_old(index: int | None) -> str:
    found = torch.cuda.get_device_capability(index)
    if found >= OLDEST:
        return ""
    expected, name = ".".join(map(str, OLDEST)), torch.cuda.get_device_name(index)
    return f"{name} has compute capability {found[0]}.{found[1]}; the kernels need {expected}"


def why_not_triton(x: Tensor) -> str:
    """Why the kernels cannot take this tensor here; empty when they can."""
    if x.device.type != "cuda" and not (interpreted() and x.device.type == "cpu"):
        return f"the tensors are on {x.device}"
    if torch.version.hip is not None:
        return "PyTorch was built for AMD GPUs, where the kernels were never tried"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32 and the tensors are {str(x.dtype).removeprefix('torch.')}; use 'pscan'"
    if torch.compiler.is_compiling():  # which takes Triton and such a GPU itself, and cannot trace what follows
        return ""
    if reason := missing():
        return reason
    if x.device.type == "cuda" and (reason := _too_old(x.device.index)):
        return reason
    # Here PyTorch would hand over wrapped tensors without memory, or drop the tangent.
    if _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "it cannot run inside torch.func transforms and forward-mode differentiation; use 'pscan'"
    return ""


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
