"""Where the Triton kernels can run."""

from __future__ import annotations

import importlib.metadata
import os
import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from mambax_torch.ops import inside_transform

OLDEST = (8, 0)
"""Compute capability from which the kernels are used: bfloat16 in hardware."""


def _triton_version() -> tuple[int, ...]:
    """Triton's major and minor version as installed; empty where that is not known."""
    for name in ("triton", "pytorch-triton"):
        try:
            found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(map(int, found.groups())) if found else ()
    return ()


TRITON = _triton_version()
"""A constant, because it is also asked for where torch.compile traces, which can look up nothing."""

OLDEST_TRITON_SSD = (3, 6)
"""Triton whose compiler is known to take the kernels of Mamba-2's scan; that of 3.2 ends the process."""

WIDEST_HEAD = (128, 256)
"""The largest head_dim and d_state of Mamba-2's scan: a program of its gradient kernels holds a whole state."""


@cache
def missing() -> str:
    """Why there are no kernels at all in this process; empty when Triton is there."""
    try:
        import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); it comes with PyTorch for CUDA, on Linux"
    return ""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_taken = {"cuda"}


def take_host_memory() -> None:
    """Let kernels take tensors in host memory: for whoever has put something in the place of a GPU's driver."""
    _taken.add("cpu")


def takes(device: str) -> bool:
    """Whether kernels run over tensors of such a device."""
    return device in _taken or (device == "cpu" and interpreted())


@cache
def _too_old(index: int | None) -> str:
    found = torch.cuda.get_device_capability(index)
    if found >= OLDEST:
        return ""
    expected, name = ".".join(map(str, OLDEST)), torch.cuda.get_device_name(index)
    return f"{name} has compute capability {found[0]}.{found[1]}; the kernels need {expected}"


def why_not_triton(x: Tensor, otherwise: str = "pscan") -> str:
    """Why the kernels cannot take this tensor here, and in some cases what can; empty when they can."""
    if not takes(x.device.type):
        return f"the tensors are on {x.device}"
    if torch.version.hip is not None:
        return "PyTorch was built for AMD GPUs, where the kernels were never tried"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found = str(x.dtype).removeprefix("torch.")
        return f"it computes in float32 and the tensors are {found}; use {otherwise!r}"
    if torch.compiler.is_compiling():  # which takes Triton and such a GPU itself, and cannot trace what follows
        return ""
    if reason := missing():
        return reason
    if x.device.type == "cuda" and (reason := _too_old(x.device.index)):
        return reason
    if inside_transform():
        return f"it cannot run inside torch.func transforms and forward-mode differentiation; use {otherwise!r}"
    return ""


def old_for_ssd() -> str:
    """Why no GPU can run the kernels of Mamba-2's scan in this process, where the others may run."""
    if TRITON and TRITON < OLDEST_TRITON_SSD:
        expected, found = (".".join(map(str, version)) for version in (OLDEST_TRITON_SSD, TRITON))
        return f"Triton is {found}; Mamba-2's scan needs {expected} or newer, as of PyTorch 2.11; use 'chunked'"
    return ""


def why_not_triton_ssd(x: Tensor, B: Tensor) -> str:
    """Why the kernels of Mamba-2's scan cannot take x (B, L, H, P) and B (B, L, G, N) here; empty when they can."""
    if reason := why_not_triton(x, "chunked") or old_for_ssd():
        return reason
    width, states = x.shape[-1], B.shape[-1]
    if width > WIDEST_HEAD[0] or states > WIDEST_HEAD[1]:
        return (
            f"head_dim is {width} and d_state {states}; the kernels hold at most {WIDEST_HEAD[0]} and "
            f"{WIDEST_HEAD[1]}; use 'chunked'"
        )
    return ""


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
