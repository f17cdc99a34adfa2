"""The fused CPU scan of Mamba-2 as a PyTorch operator: ``mambax::cpu_ssd``.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

import torch
from mambax_cpu import ssd as fused
from torch import Tensor

from mambax_torch.cpu_ops import array, scan_results, shared, tensors
from mambax_torch.operands import SSDOperands
from mambax_torch.operators import differentiable_once


def _arguments(given: SSDOperands, narrow: bool = True) -> fused.Arguments:
    """The arguments for the kernels, of which the backward one takes no `narrow` x."""
    return fused.arguments(
        (shared if narrow else array)(given.x),
        *map(array, (given.dt, given.A, given.B, given.C, given.D)),
        dt_bias=array(given.dt_bias),
        dt_softplus=given.dt_softplus,
        dt_limit=(given.dt_min, given.dt_max),
        initial_state=array(given.initial_state),
        mask=array(given.mask),
        boundaries=array(given.boundaries),
    )


def _forward(given: SSDOperands, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return scan_results(
        *fused.forward(_arguments(given), save=save, threads=torch.get_num_threads()), given.x.dtype
    )


def _backward(given: SSDOperands, dy: Tensor, dfinal: Tensor, saved: Tensor) -> list[Tensor | None]:
    kernel_arguments = _arguments(given, narrow=False)
    threads = torch.get_num_threads()
    return tensors(fused.backward(kernel_arguments, array(saved), array(dy), array(dfinal), threads=threads))


_ssd = differentiable_once(
    "mambax::cpu_ssd",
    SSDOperands,
    forward=_forward,
    room=lambda given, save: given.room(fused.saved_shape, save),
    backward=_backward,
    results=3,
    keeps=True,
    device_types="cpu",
)


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
    low, high = map(float, dt_limit)
    y, final, _ = _ssd(
        SSDOperands(x, dt, A, B, C, D, dt_bias, dt_softplus, low, high, initial_state, mask, boundaries)
    )
    return y, final
