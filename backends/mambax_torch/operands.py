"""What the operators of the fused kernels are given, those for host memory and those for GPUs alike.

A named tuple each, from which :mod:`mambax_torch.operators` makes them, and what their results look like.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution; of Mamba-2's scan H heads, P
head_dim, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SavedShape = Callable[..., "tuple[int, ...]"]
"""(the sizes of the outputs, d_state) -> the shape of the states that a scan saves for its gradient."""


class ScanOperands(NamedTuple):
    """The arguments of :func:`mambax.scan.selective_scan`."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D)
    A: Tensor  # (D, N)
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)
    D: Tensor | None  # (D,)
    z: Tensor | None  # (B, L, D)
    delta_bias: Tensor | None  # (D,)
    delta_softplus: bool
    initial_state: Tensor | None  # (B, D, N)
    mask: Tensor | None  # (B, L)
    boundaries: Tensor | None  # (B, L)

    def room(self, saved_shape: SavedShape, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Room for y, the final state and the states that the backward pass starts from."""
        batch, length, channels = self.u.shape
        states = self.A.shape[1]
        final = self.u.new_empty((batch, channels, states), dtype=torch.float32)
        saved = final.new_empty(saved_shape(batch, length, channels, states) if save else 0)
        return self.u.new_empty(self.u.shape), final, saved


class SSDOperands(NamedTuple):
    """The arguments of :func:`mambax.ssd.ssd`."""

    x: Tensor  # (B, L, H, P)
    dt: Tensor  # (B, L, H)
    A: Tensor  # (H,)
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor | None  # (H,)
    dt_bias: Tensor | None  # (H,)
    dt_softplus: bool
    dt_min: float
    dt_max: float
    initial_state: Tensor | None  # (B, H, P, N)
    mask: Tensor | None  # (B, L)
    boundaries: Tensor | None  # (B, L)

    def room(self, saved_shape: SavedShape, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Room for y, the final state and the states that the backward pass starts from."""
        batch, length, heads, width = self.x.shape
        states = self.B.shape[3]
        final = self.x.new_empty((batch, heads, width, states), dtype=torch.float32)
        saved = final.new_empty(saved_shape(batch, length, heads, width, states) if save else 0)
        return self.x.new_empty(self.x.shape), final, saved


class ConvOperands(NamedTuple):
    """The arguments of :func:`mambax.convolution.causal_conv1d`."""

    x: Tensor  # (B, L, D)
    weight: Tensor  # (D, 1, K)
    bias: Tensor | None  # (D,)
    initial_state: Tensor | None  # (B, K-1, D)
    mask: Tensor | None  # (B, L)
    boundaries: Tensor | None  # (B, L)
    activation: str | None

    def room(self) -> Tensor:
        """Room for y."""
        return self.x.new_empty(self.x.shape)
