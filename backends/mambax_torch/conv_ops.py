"""The fused CPU convolution as a PyTorch operator: ``mambax::cpu_causal_conv1d``.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

import torch
from mambax_cpu import convolution
from torch import Tensor

from mambax_torch import ops
from mambax_torch.cpu_ops import array, shared, tensors
from mambax_torch.operands import ConvOperands
from mambax_torch.operators import differentiable_once


def _arguments(given: ConvOperands, narrow: bool = True) -> convolution.Arguments:
    """The arguments for the kernels, of which the backward one takes no `narrow` x."""
    keep = shared if narrow else array
    return convolution.arguments(
        keep(given.x),
        *map(array, (given.weight, given.bias)),
        initial_state=keep(given.initial_state),
        mask=array(given.mask),
        boundaries=array(given.boundaries),
        activation=given.activation,
    )


def _forward(given: ConvOperands) -> Tensor:
    y = convolution.forward(_arguments(given), threads=torch.get_num_threads())
    return ops.from_numpy(y).to(given.x.dtype)


def _backward(given: ConvOperands, dy: Tensor) -> list[Tensor | None]:
    kernel_arguments = _arguments(given, narrow=False)
    return tensors(convolution.backward(kernel_arguments, array(dy), threads=torch.get_num_threads()))


_conv = differentiable_once(
    "mambax::cpu_causal_conv1d",
    ConvOperands,
    forward=_forward,
    room=ConvOperands.room,
    backward=_backward,
    device_types="cpu",
)


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
    y = _conv(ConvOperands(x, weight, bias, initial_state, mask, boundaries, activation))
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
