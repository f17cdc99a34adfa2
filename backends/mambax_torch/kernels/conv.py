"""The Triton convolution as a PyTorch operator: ``mambax::triton_causal_conv1d``, differentiable once.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambax.scan import refuse_mask_with_boundaries
from mambax_torch.conv_ops import last_inputs
from mambax_torch.kernels import conv_kernels
from mambax_torch.kernels.devices import on_device_of
from mambax_torch.kernels.fusion import FUSED, UNFUSED
from mambax_torch.kernels.sizes import cdiv, next_power_of_2
from mambax_torch.kernels.step import conv_step
from mambax_torch.operands import ConvOperands
from mambax_torch.operators import differentiable_once, may_call_directly

KERNELS: Any = conv_kernels  # in whose signatures pyright does not see that numbers may be constants
BLOCK_T = 32
BLOCK_D = 128
WARPS = 8
PROGRAMS = 4096
"""Of the weights' gradient, about: their sums are kept apart, so that they are always added in the same order."""


class _Tables(NamedTuple):
    """What mask and boundaries mean for the kernels; None for what there is not.

    Attributes:
        links: (B, L) int64, of each position the row one step back; -2 where it is masked.
        nexts: (B, K-1+L) int64, of each row the next that exists, K-1+L after the last; -2 where it is masked.
        numbers: (B, L) int32, of each position the number of its sequence, from 1 after the first boundary.
    """

    links: Tensor | None = None
    nexts: Tensor | None = None
    numbers: Tensor | None = None


def _tables(mask: Tensor | None, boundaries: Tensor | None, past: int, *, backward: bool) -> _Tables:
    if boundaries is not None:
        return _Tables(numbers=boundaries.bool().cumsum(1, dtype=torch.int32))
    if mask is None:
        return _Tables()
    mask = mask.bool()
    batch, length = mask.shape
    rows = torch.arange(past, past + length, device=mask.device)
    last = torch.where(mask, rows, past - 1).cummax(1).values  # (B, L) the last that exists, up to here
    before = torch.cat([last.new_full((batch, 1), past - 1), last[:, :-1]], 1)
    links = torch.where(mask, before, -2)
    if not backward:
        return _Tables(links)
    exists = torch.cat([mask.new_ones(batch, past), mask], 1)  # (B, K-1+L)
    rows = torch.where(exists, torch.arange(past + length, device=mask.device), past + length)
    first = rows.flip(1).cummin(1).values.flip(1)  # the first that exists, from here on
    after = torch.cat([first[:, 1:], first.new_full((batch, 1), past + length)], 1)
    return _Tables(links, torch.where(exists, after, -2))


def _operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, tables: _Tables
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Pointers (weight, bias, initial_state, links, numbers), x in place of what is missing, and the switches."""
    past = initial_state if initial_state is not None and initial_state.numel() else None
    given = (bias, past, tables.links, tables.numbers)
    switches = dict(
        zip(("HAS_BIAS", "HAS_INITIAL", "LINKED", "NUMBERED"), (t is not None for t in given), strict=True)
    )
    pointers = (weight.contiguous(), *(x if t is None else t.contiguous() for t in given))
    return pointers, {"K": weight.shape[2], **switches}


def forward(given: ConvOperands) -> Tensor:
    """y (B, L, D)."""
    x, weight, bias, initial_state, mask, boundaries, activation = given
    batch, length, channels = x.shape
    y = x.new_empty(batch, length, channels)
    if y.numel() == 0:
        return y
    tables = _tables(mask, boundaries, weight.shape[2] - 1, backward=False)
    pointers, switches = _operands(x, weight, bias, initial_state, tables)
    block = min(BLOCK_D, next_power_of_2(channels))
    tiles, blocks = cdiv(length, BLOCK_T), cdiv(channels, block)
    with on_device_of(x):
        KERNELS.forward_kernel[(batch * tiles * blocks,)](
            x, *pointers, y, *x.stride(), *_strides(initial_state), length, channels, tiles, blocks,
            **switches, SILU=activation == "silu", BLOCK_T=BLOCK_T, BLOCK_D=block, num_warps=WARPS, **FUSED,
        )  # fmt: skip
    return y


def _strides(initial_state: Tensor | None) -> tuple[int, int]:
    """Of the batch and of the rows; the kernels get it contiguous."""
    if initial_state is None:
        return 0, 0
    return initial_state.shape[1] * initial_state.shape[2], initial_state.shape[2]


def backward(given: ConvOperands, dy: Tensor) -> list[Tensor | None]:
    """The gradients of x, weight, bias and initial_state; None for what is None."""
    x, weight, bias, initial_state, mask, boundaries, activation = given
    (batch, length, channels), width = x.shape, weight.shape[2]
    if x.numel() == 0:
        return [None if of is None else torch.zeros_like(of) for of in (x, weight, bias, initial_state)]
    silu = activation == "silu"
    tables = _tables(mask, boundaries, width - 1, backward=True)
    pointers, switches = _operands(x, weight, bias, initial_state, tables)
    block = min(BLOCK_D, next_power_of_2(channels))
    tiles, blocks = cdiv(length, BLOCK_T), cdiv(channels, block)
    each = max(1, batch * tiles * blocks // PROGRAMS)  # tiles of a program
    chunks = cdiv(tiles, each)
    g = x.new_empty(batch, length, channels) if silu else dy
    partials = x.new_empty((batch * chunks, width + 1, channels), dtype=torch.float32)
    dx = x.new_empty(x.shape)
    dinitial = x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    shape = {"BLOCK_T": BLOCK_T, "BLOCK_D": block, "num_warps": WARPS}
    rows = cdiv(length + (width - 1) * switches["HAS_INITIAL"], BLOCK_T)
    with on_device_of(x):
        KERNELS.weight_gradient_kernel[(batch * chunks * blocks,)](
            dy, x, *pointers, g, partials, *dy.stride(), *x.stride(), *_strides(initial_state), length, channels,
            chunks, blocks, each, **switches, ROWS=next_power_of_2(width + 1), SILU=silu, **shape, **UNFUSED,
        )  # fmt: skip
        del switches["HAS_BIAS"]
        weight, *_, numbers = pointers
        nexts = x if tables.nexts is None else tables.nexts
        KERNELS.input_gradient_kernel[(batch * rows * blocks,)](
            g, weight, nexts, numbers, dx, dinitial, *g.stride(), length, channels,
            rows, blocks, **switches, **shape, **FUSED,
        )  # fmt: skip
    dweight = partials[:, :width].sum(0).t().unsqueeze(1).contiguous()
    dbias = None if bias is None else partials[:, width].sum(0)
    return [dx, dweight, dbias, None if initial_state is None else dinitial]


_conv = differentiable_once(
    "mambax::triton_causal_conv1d", ConvOperands, forward=forward, room=ConvOperands.room, backward=backward
)


def causal_conv1d(
    x: Tensor,  # (B, L, D)
    weight: Tensor,  # (D, 1, K)
    bias: Tensor | None = None,  # (D,)
    *,
    initial_state: Tensor | None = None,  # (B, K-1, D)
    mask: Tensor | None = None,  # (B, L) bool
    boundaries: Tensor | None = None,  # (B, L) bool
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.convolution.causal_conv1d` by the Triton kernels, differentiable (once).

    x may be a part of a larger array. Sums are in float32, gradients of weight and bias the same every time.

    Raises:
        ValueError: for a shape that does not fit, another activation, and a mask together with boundaries.
    """
    _check(x, weight, bias, initial_state, mask, boundaries, activation)
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
        is_step = x.shape[1] == 1 and mask is None and boundaries is None
        if is_step and may_call_directly((x, weight, bias, initial_state)):
            y, state = conv_step(x[:, 0], weight, bias, initial_state, activation)
            return y[:, None], state
    y = _conv(ConvOperands(x, weight, bias, initial_state, mask, boundaries, activation))
    return y, last_inputs(x, initial_state, weight.shape[2] - 1, mask, boundaries)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    activation: str | None,
) -> None:
    """Refuse what the kernels would read beyond."""
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is {activation!r}; expected 'silu' or None")
    refuse_mask_with_boundaries("causal_conv1d", mask, boundaries)
    if x.ndim != 3 or weight.ndim != 3 or weight.shape[1] != 1 or weight.shape[2] < 1:
        raise ValueError(
            f"causal_conv1d: x must be (B, L, D) and weight (D, 1, K), found {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    batch, length, channels = x.shape
    expected = {
        "weight": (channels, 1, weight.shape[2]), "bias": (channels,), "mask": (batch, length),
        "initial_state": (batch, weight.shape[2] - 1, channels), "boundaries": (batch, length),
    }  # fmt: skip
    given = {"weight": weight, "bias": bias, "initial_state": initial_state, "mask": mask, "boundaries": boundaries}
    for name, tensor in given.items():
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise ValueError(f"causal_conv1d: {name} is {tuple(tensor.shape)}; expected {expected[name]}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {tensor.device} and x on {x.device}; move it there")
