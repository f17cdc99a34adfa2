"""Mamba-2's scan by Triton as a PyTorch operator: ``mambax::triton_ssd``, differentiable once.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from torch import Tensor

from mambax.scan import refuse_mask_with_boundaries
from mambax.ssd import check_shapes
from mambax_torch.kernels import ssd as kernels
from mambax_torch.kernels import ssd_plan
from mambax_torch.operands import SSDOperands
from mambax_torch.operators import differentiable_once


def _forward(given: SSDOperands, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    y, final, saved = kernels.forward(ssd_plan.arguments(given), save=save)
    return y, final, final.new_empty(0) if saved is None else saved


def _backward(given: SSDOperands, dy: Tensor, dfinal: Tensor, saved: Tensor) -> kernels.Gradients:
    return kernels.backward(ssd_plan.arguments(given), saved, dy, dfinal)


_ssd = differentiable_once(
    "mambax::triton_ssd",
    SSDOperands,
    forward=_forward,
    room=lambda given, save: given.room(kernels.saved_shape, save),
    backward=_backward,
    results=3,
    keeps=True,
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
    """:func:`mambax.ssd.ssd` by the Triton kernels, differentiable (once), the same bits every time.

    x, dt, B and C are taken by their strides where the values of a step lie side by side. Products are of bfloat16
    where x, B and C are, else of TF32, thrice where any of them is float32; sums and states are float32.

    Raises:
        ValueError: for a shape that does not fit, tensors on another device than x, and a mask with boundaries.
    """
    optional = {
        "D": D, "dt_bias": dt_bias, "initial_state": initial_state, "mask": mask, "boundaries": boundaries,
    }  # fmt: skip
    check_shapes(x, B, dt=dt, A=A, C=C, **optional)
    refuse_mask_with_boundaries("ssd", mask, boundaries)
    for name, other in {"dt": dt, "A": A, "B": B, "C": C, **optional}.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"ssd: {name} is on {other.device} and x on {x.device}; move it there")
    low, high = map(float, dt_limit)
    y, final, _ = _ssd(
        SSDOperands(x, dt, A, B, C, D, dt_bias, dt_softplus, low, high, initial_state, mask, boundaries)
    )
    return y, final
