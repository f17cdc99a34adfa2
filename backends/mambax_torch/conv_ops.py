"""The fused CPU convolution as a PyTorch operator: ``mambax::cpu_causal_conv1d``. See :mod:`mambax_torch.cpu_ops`.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from mambax_cpu import convolution
from torch import Tensor

from mambax_torch.cpu_ops import array, like, may_call_directly, room_like, shared


def _arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    activation: str | None,
    narrow: bool = True,
) -> convolution.Arguments:
    """The arguments for the kernels, of which the backward one takes no `narrow` x."""
    keep = shared if narrow else array
    return convolution.arguments(
        keep(x),
        *map(array, (weight, bias)),
        initial_state=keep(initial_state),
        mask=array(mask),
        boundaries=array(boundaries),
        activation=activation,
    )


@torch.library.custom_op("mambax::cpu_causal_conv1d", mutates_args=(), device_types="cpu")
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    activation: str | None,
) -> Tensor:
    """y (B, L, D)."""
    given = _arguments(x, weight, bias, initial_state, mask, boundaries, activation)
    return like(convolution.forward(given, threads=torch.get_num_threads()), x)


@_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    activation: str | None,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mambax::cpu_causal_conv1d_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and initial_state."""
    given = _arguments(x, weight, bias, initial_state, mask, boundaries, activation, narrow=False)
    g = convolution.backward(given, array(dy), threads=torch.get_num_threads())
    return like(g.x, x), like(g.weight, weight), like(g.bias, bias), like(g.initial_state, initial_state)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return room_like(x), room_like(weight), room_like(bias), room_like(initial_state)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, mask, boundaries = ctx.saved_tensors
    gradients = _backward(dy, *tensors, mask, boundaries, ctx.activation)
    return *(g if of is not None else None for g, of in zip(gradients, tensors, strict=True)), None, None, None


_conv.register_autograd(_gradient, setup_context=_context)


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
    """:func:`mambax.convolution.causal_conv1d` by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, another activation, a mask together with boundaries, and float64.
    """
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    if may_call_directly((x, weight, bias, initial_state)):
        given = _arguments(x, weight, bias, initial_state, mask, boundaries, activation)
        y = like(convolution.forward(given, threads=torch.get_num_threads()), x)
    else:
        y = _conv(x, weight, bias, initial_state, mask, boundaries, activation)
    return y, last_inputs(x, initial_state, weight.shape[2] - 1, mask, boundaries)


def last_inputs(
    x: Tensor, initial_state: Tensor | None, count: int, mask: Tensor | None, boundaries: Tensor | None
) -> Tensor:
    """The last `count` (K-1) inputs that exist, (B, count, D), in memory of their own; zeros before a boundary."""
    length = x.shape[1]
    if mask is None and length >= count:
        last = x[:, length - count :].clone(memory_format=torch.contiguous_format)
    else:
        before = x.new_zeros(x.shape[0], count, x.shape[2]) if initial_state is None else initial_state
        last = torch.cat([before[:, length:], x], 1) if mask is None else _last_that_exist(x, before, mask)
    if boundaries is None or count == 0 or length == 0:
        return last
    begun = boundaries.bool().cumsum(1)  # (B, L) the number of the sequence
    number = torch.cat([begun.new_zeros(begun.shape[0], count), begun], 1)[:, length:]  # of the last K-1 inputs
    return torch.where((number == begun[:, -1:])[..., None], last, 0.0)


def _last_that_exist(x: Tensor, before: Tensor, mask: Tensor) -> Tensor:
    """The last rows, as many as `before` (B, K-1, D) has, of it followed by those of x where the mask is True."""
    count = before.shape[1]
    full_mask = torch.cat([mask.new_ones(mask.shape[0], count, dtype=torch.bool), mask.bool()], 1)
    steps = torch.arange(full_mask.shape[1], device=x.device)
    last = torch.where(full_mask, steps, -1).topk(count, dim=1).values.flip(1)  # (B, K-1)
    index = last[..., None].expand(-1, -1, x.shape[2])
    of_x = x.gather(1, (index - count).clamp(min=0)) if x.shape[1] else before
    return torch.where(index >= count, of_x, before.gather(1, index.clamp(max=max(0, count - 1))))
