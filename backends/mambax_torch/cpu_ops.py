"""The fused CPU scan as a PyTorch operator, ``mambax::cpu_selective_scan``, and what such operators share.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from mambax_cpu import scan
from torch import Tensor

from mambax_torch import ops
from mambax_torch.operands import ScanOperands
from mambax_torch.operators import differentiable_once


def array(x: Tensor | None) -> Any:
    """The values as a NumPy array, shared unless they are bfloat16, which become float32; None for None."""
    if x is None:
        return None
    x = x.detach()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def shared(x: Tensor | None) -> Any:
    """The values as a NumPy array that shares them, bfloat16 as ``ml_dtypes.bfloat16``; None for None."""
    if x is None:
        return None
    x = x.detach()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def tensors(arrays: Iterable[np.ndarray | None]) -> list[Tensor | None]:
    """Tensors of these values; None for None."""
    return [None if x is None else ops.from_numpy(x) for x in arrays]


def scan_results(y: np.ndarray, final: np.ndarray, saved: np.ndarray | None, dtype: torch.dtype) -> Any:
    """y in its dtype, the final state, and the saved states, without elements where there are none."""
    return (
        ops.from_numpy(y).to(dtype),
        torch.from_numpy(final),
        torch.empty(0) if saved is None else torch.from_numpy(saved),
    )


# --- the selective scan --------------------------------------------------------------------------------------


def _arguments(given: ScanOperands, narrow: bool = True) -> scan.Arguments:
    """The arguments for the kernels, of which the backward one takes no `narrow` u and z."""
    keep = shared if narrow else array
    return scan.arguments(
        keep(given.u),
        *map(array, (given.delta, given.A, given.B, given.C, given.D)),
        z=keep(given.z),
        delta_bias=array(given.delta_bias),
        delta_softplus=given.delta_softplus,
        initial_state=array(given.initial_state),
        mask=array(given.mask),
        boundaries=array(given.boundaries),
    )


def _forward(given: ScanOperands, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return scan_results(*scan.forward(_arguments(given), save=save, threads=torch.get_num_threads()), given.u.dtype)


def _backward(given: ScanOperands, dy: Tensor, dfinal: Tensor, saved: Tensor) -> list[Tensor | None]:
    kernel_arguments = _arguments(given, narrow=False)
    threads = torch.get_num_threads()
    return tensors(scan.backward(kernel_arguments, array(saved), array(dy), array(dfinal), threads=threads))


_scan = differentiable_once(
    "mambax::cpu_selective_scan",
    ScanOperands,
    forward=_forward,
    room=lambda given, save: given.room(scan.saved_shape, save),
    backward=_backward,
    results=3,
    keeps=True,
    device_types="cpu",
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    boundaries: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`mambax.scan.selective_scan` by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, and for float64.
    """
    y, final, _ = _scan(
        ScanOperands(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries)
    )
    return y, final
