"""RMSNorm with the residual stream as a PyTorch operator: ``mambax::triton_rms_norm``, differentiable once.

Dimensions: M channels of a row; R rows, which all dimensions before the last make up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambax_torch.kernels import norm_kernels
from mambax_torch.kernels.devices import on_device_of
from mambax_torch.kernels.fusion import UNFUSED
from mambax_torch.kernels.sizes import cdiv, next_power_of_2
from mambax_torch.operators import may_call_directly

KERNELS: Any = norm_kernels  # in whose signatures pyright does not see that numbers may be constants

WIDEST = 1 << 16
"""Channels that a program can hold."""

PROGRAMS = 512
"""Of the backward pass, at most: their sums for the weight are kept apart, and always added in the same order."""


def launch_of(block: int) -> dict[str, Any]:
    """The options of kernels that hold a row of up to `block` channels, a power of two."""
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512)), **UNFUSED}


def as_rows(x: Tensor) -> Tensor:
    """(R, M) with neighbouring channels side by side; a copy only if it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, residual + x (no elements without a residual), and 1 / rms (R,) for the backward pass, if `keep`."""
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    stream = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    width = x.shape[-1]
    count = x.numel() // width if width else 0
    inverse = torch.empty(count if keep else 0, dtype=torch.float32, device=x.device)
    if count == 0:
        return y, stream, inverse
    rows = as_rows(x)
    before = rows if residual is None else as_rows(residual)
    block = next_power_of_2(width)
    with on_device_of(x):
        KERNELS.forward_kernel[(count,)](
            rows, before, weight.contiguous(), y, y if residual is None else stream, inverse,
            rows.stride(0), before.stride(0), width, eps,
            HAS_RESIDUAL=residual is not None, KEEP=keep, **launch_of(block),
        )  # fmt: skip
    return y, stream, inverse


def _gradients(
    dy: Tensor, dtotal: Tensor | None, s: Tensor, weight: Tensor, inverse: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x in its dtype, of the residual in that of s (no elements where it is the same), and of the weight."""
    dx = torch.empty(s.shape, dtype=x_dtype, device=s.device)
    both = x_dtype != s.dtype
    dresidual = torch.empty(s.shape if both else (0,), dtype=s.dtype, device=s.device)
    width = s.shape[-1]
    count = s.numel() // width if width else 0
    if count == 0:
        return dx, dresidual, torch.zeros_like(weight)
    each = cdiv(count, PROGRAMS)
    programs = cdiv(count, each)
    partials = torch.empty((programs, width), dtype=torch.float32, device=s.device)
    rows, of_y = as_rows(s), as_rows(dy)
    of_total = of_y if dtotal is None else as_rows(dtotal)
    block = next_power_of_2(width)
    with on_device_of(s):
        KERNELS.backward_kernel[(programs,)](
            of_y, of_total, rows, weight.contiguous(), inverse, dx, dresidual if both else dx, partials,
            of_y.stride(0), of_total.stride(0), rows.stride(0), count, width, each,
            HAS_DTOTAL=dtotal is not None, BOTH=both, **launch_of(block),
        )  # fmt: skip
    return dx, dresidual, partials.sum(0).to(weight.dtype)


_norm = torch.library.custom_op("mambax::triton_rms_norm", forward, mutates_args=())


@_norm.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    stream = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    count = x.shape[:-1].numel() if keep else 0
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    return y, stream, torch.empty(count, dtype=torch.float32, device=x.device)


_backward = torch.library.custom_op("mambax::triton_rms_norm_backward", _gradients, mutates_args=())


@_backward.register_fake
def _(
    dy: Tensor, dtotal: Tensor | None, s: Tensor, weight: Tensor, inverse: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(s.shape, dtype=x_dtype, device=s.device)
    dresidual = torch.empty(s.shape if x_dtype != s.dtype else (0,), dtype=s.dtype, device=s.device)
    return dx, dresidual, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, _ = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
    ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None


def _gradient(ctx: Any, dy: Tensor, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    s, weight, inverse = ctx.saved_tensors
    of_total = dtotal if ctx.has_residual else None
    dx, dresidual, dweight = _backward(dy, of_total, s, weight, inverse, ctx.x_dtype)
    if not ctx.has_residual:
        return dx, None, dweight, None, None
    return dx, dx if ctx.x_dtype == s.dtype else dresidual, dweight, None, None


_norm.register_autograd(_gradient, setup_context=_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s / rms(s) * weight with s = residual + x, by the Triton kernels, differentiable (once).

    Args:
        x: (..., M).
        weight: (M,).
        eps: added to the mean square.
        residual: (..., M), or None for s = x.

    Returns:
        (..., M) in the dtype of the weight, and s in the dtype of the residual (x itself without one). Statistics
        are in float32, the gradient of the weight is the same every time.

    Raises:
        ValueError: for a shape that does not fit, and for more than 65,536 channels.
    """
    if not 0 < x.shape[-1] <= WIDEST or tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(
            f"rms_norm: expected a weight for each of at most {WIDEST} channels, found {tuple(weight.shape)} for "
            f"inputs of {tuple(x.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual is {tuple(residual.shape)}; expected {tuple(x.shape)}")
    if may_call_directly((x, residual, weight)):
        y, total, _ = forward(x, residual, weight, eps, False)
    else:
        tensors = (x, residual, weight)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, total, _ = _norm(x, residual, weight, eps, keep)
    return y, x if residual is None else total
