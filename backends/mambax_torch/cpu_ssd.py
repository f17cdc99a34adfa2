"""The fused CPU scan of Mamba-2 as a PyTorch operator: ``mambax::cpu_ssd``. See :mod:`mambax_torch.cpu_ops`.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import Any

import torch
from mambax_cpu import ssd as fused
from torch import Tensor

from mambax_torch.cpu_ops import array, like, may_call_directly, room_like, shared


def _arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    narrow: bool = True,
) -> fused.Arguments:
    """The arguments for the kernels, of which the backward one takes no `narrow` x."""
    return fused.arguments(
        (shared if narrow else array)(x),
        *map(array, (dt, A, B, C, D)),
        dt_bias=array(dt_bias),
        dt_softplus=dt_softplus,
        dt_limit=(low, high),
        initial_state=array(initial_state),
        mask=array(mask),
        boundaries=array(boundaries),
    )


@torch.library.custom_op("mambax::cpu_ssd", mutates_args=(), device_types="cpu")
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that the backward pass starts from (no elements unless `save`)."""
    given = _arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, low, high, initial_state, mask, boundaries)
    y, final, saved = fused.forward(given, save=save, threads=torch.get_num_threads())
    return like(y, x), torch.from_numpy(final), torch.empty(0) if saved is None else torch.from_numpy(saved)


@_ssd.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = x.shape
    final = torch.empty((batch, heads, width, B.shape[3]), dtype=torch.float32)
    shape = fused.saved_shape(batch, length, heads, width, B.shape[3]) if save else (0,)
    return x.new_empty(x.shape), final, torch.empty(shape, dtype=torch.float32)


@torch.library.custom_op("mambax::cpu_ssd_backward", mutates_args=(), device_types="cpu")
def _ssd_backward(
    dy: Tensor,
    dfinal: Tensor,
    saved: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D, dt_bias and initial_state."""
    given = _arguments(
        x, dt, A, B, C, D, dt_bias, dt_softplus, low, high, initial_state, mask, boundaries, narrow=False
    )
    gradients = fused.backward(given, array(saved), array(dy), array(dfinal), threads=torch.get_num_threads())
    of = (x, dt, A, B, C, D, dt_bias, initial_state)
    return tuple(like(g, x) for g, x in zip(gradients, of, strict=True))  # pyright: ignore[reportReturnType] eight


@_ssd_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor,
    saved: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of = (x, dt, A, B, C, D, dt_bias, initial_state)
    return tuple(room_like(x) for x in of)  # pyright: ignore[reportReturnType] eight


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, softplus, low, high, initial_state, mask, boundaries, _ = inputs
    ctx.save_for_backward(output[2], *tensors, initial_state, mask, boundaries)
    ctx.settings = softplus, low, high


def _gradient(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved, *tensors, initial_state, mask, boundaries = ctx.saved_tensors
    gradients = _ssd_backward(dy, dfinal, saved, *tensors, *ctx.settings, initial_state, mask, boundaries)
    *of_tensors, of_initial = (
        gradient if x is not None else None
        for gradient, x in zip(gradients, (*tensors, initial_state), strict=True)
    )
    return *of_tensors, None, None, None, of_initial, None, None, None


_ssd.register_autograd(_gradient, setup_context=_context)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    boundaries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.ssd.ssd` by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, and for float64.
    """
    tensors = (x, dt, A, B, C, D, dt_bias, initial_state)
    settings = (dt_softplus, float(dt_limit[0]), float(dt_limit[1]))
    rest = (initial_state, mask, boundaries)
    if may_call_directly(tensors):
        given = _arguments(x, dt, A, B, C, D, dt_bias, *settings, *rest)
        y, final, _ = fused.forward(given, threads=torch.get_num_threads())
        return like(y, x), torch.from_numpy(final)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, final, _ = _ssd(x, dt, A, B, C, D, dt_bias, *settings, *rest, save)
    return y, final
