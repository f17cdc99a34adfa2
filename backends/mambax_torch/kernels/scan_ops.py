"""The Triton scan as a PyTorch operator: ``mambax::triton_selective_scan``, differentiable once.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from torch import Tensor

from mambax.scan import check_shapes, refuse_mask_with_boundaries
from mambax_torch.kernels import scan
from mambax_torch.kernels.step import scan_step
from mambax_torch.operands import ScanOperands
from mambax_torch.operators import differentiable_once, may_call_directly


def _forward(given: ScanOperands, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    y, final, saved = scan.forward(scan.arguments(given), save=save)
    return y, final, final.new_empty(0) if saved is None else saved


def _backward(given: ScanOperands, dy: Tensor, dfinal: Tensor, saved: Tensor) -> scan.Gradients:
    return scan.backward(scan.arguments(given), saved, dy, dfinal)


_scan = differentiable_once(
    "mambax::triton_selective_scan",
    ScanOperands,
    forward=_forward,
    room=lambda given, save: given.room(scan.saved_shape, save),
    backward=_backward,
    results=3,
    keeps=True,
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
    """:func:`mambax.scan.selective_scan` by the Triton kernels, differentiable (once), the same bits every time.

    u, delta, B, C and z are taken by their strides where neighbouring channels lie side by side. One position of
    which no gradient is wanted is one launch; :mod:`mambax_torch.kernels.step_targets` says where its state goes.

    Raises:
        ValueError: for a shape that does not fit, tensors on another device than u, and a mask with boundaries.
    """
    optional = {
        "D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state, "mask": mask,
        "boundaries": boundaries,
    }  # fmt: skip
    check_shapes(u, A, delta=delta, B=B, C=C, **optional)
    refuse_mask_with_boundaries("selective_scan", mask, boundaries)
    for name, x in {"delta": delta, "A": A, "B": B, "C": C, **optional}.items():
        if x is not None and x.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {x.device} and u on {u.device}; move it there")
    given = ScanOperands(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries)
    is_step = u.shape[1] == 1 and mask is None and boundaries is None
    if is_step and may_call_directly([x for x in given if not isinstance(x, bool)]):
        options = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, "initial_state": initial_state}
        return scan_step(u, delta, A, B, C, D, z=z, **options)
    y, final, _ = _scan(given)
    return y, final
