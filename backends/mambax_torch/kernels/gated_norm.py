"""Mamba-2's gated norm by Triton kernels, one for each direction; for the gradient it keeps its inputs alone.

Dimensions: B batch, L length, D d_inner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambax_torch.kernels import gated_norm_kernels
from mambax_torch.kernels.devices import on_device_of
from mambax_torch.kernels.norm import PROGRAMS, as_rows, launch_of
from mambax_torch.kernels.sizes import cdiv, next_power_of_2
from mambax_torch.kernels.step import side_by_side

KERNELS: Any = gated_norm_kernels  # in whose signatures pyright does not see that numbers may be constants


def normed(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, *, norm_first: bool = False) -> Tensor:
    """:func:`mambax.mamba2.gated_rms_norm`; no gradients.

    Args:
        y, z: (..., D), of which z may be a part of a larger array.
        weight: (D,), contiguous.
        groups, eps, norm_first: as there; at most :data:`mambax_torch.kernels.norm.WIDEST` channels to a group.

    Returns:
        (..., D) in the dtype of the weight.

    Raises:
        ValueError: for a shape that does not fit, and tensors on another device than y.
    """
    channels = y.shape[-1]
    if z.shape != y.shape or tuple(weight.shape) != (channels,):
        raise ValueError(
            f"gated_rms_norm: z is {tuple(z.shape)} and weight {tuple(weight.shape)}; expected {tuple(y.shape)} "
            f"and ({channels},)"
        )
    if groups < 1 or channels % groups:
        raise ValueError(f"gated_rms_norm: {channels} channels do not divide into {groups} equal groups")
    for name, other in {"z": z, "weight": weight}.items():
        if other.device != y.device:
            raise ValueError(f"gated_rms_norm: {name} is on {other.device} and y on {y.device}; move it there")
    rows, gate = (side_by_side(x.reshape(-1, channels)) for x in (y.contiguous(), z))
    width = channels // groups
    made = torch.empty(y.shape, dtype=weight.dtype, device=y.device)
    block = next_power_of_2(width)
    with on_device_of(y):
        KERNELS.forward_kernel[(len(rows) * groups,)](
            rows, gate, weight, made, gate.stride(0), width, groups, eps,
            NORM_FIRST=norm_first, **launch_of(block),
        )  # fmt: skip
    return made


def gradients(
    dnormed: Tensor, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y, z and weight, shaped as they are and of their dtypes; the same bits every time."""
    dy, dz = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (y, z))
    if y.numel() == 0:
        return dy, dz, torch.zeros_like(weight)
    of_normed, rows, gate = map(as_rows, (dnormed, y, z))
    count, width = len(rows), weight.shape[0] // groups
    each = cdiv(count * groups, PROGRAMS)
    parts = cdiv(count, each)
    partials = torch.empty((parts, weight.shape[0]), dtype=torch.float32, device=y.device)
    block = next_power_of_2(width)
    with on_device_of(y):
        KERNELS.gradient_kernel[(parts * groups,)](
            of_normed, rows, gate, weight, dy, dz, partials, of_normed.stride(0), rows.stride(0), gate.stride(0),
            count, width, groups, each, eps, **launch_of(block),
        )  # fmt: skip
    return dy, dz, partials.sum(0).to(weight.dtype)


class _GatedNorm(torch.autograd.Function):
    """y and z (B, L, D), weight (D,), and the numbers of groups and epsilon to (B, L, D)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        return normed(y, z, weight, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] which the decorator makes of it
        ctx: Any, dnormed: Tensor
    ) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        return *gradients(dnormed, y, z, weight, ctx.groups, ctx.eps), None, None


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """:func:`mambax.mamba2.gated_rms_norm`, the gate first, by the kernels; differentiable once.

    Args:
        y, z: (B, L, D), of which z may be a part of a larger array.
        weight: (D,), contiguous.
        groups: which divide D evenly; at most :data:`mambax_torch.kernels.norm.WIDEST` channels to a group.
        eps: added to the mean square.

    Raises:
        ValueError: for a shape that does not fit, and tensors on another device than y.
    """
    return _GatedNorm.apply(y, z, weight, groups, eps)
