"""The Triton scan as a PyTorch operator: ``mambax::triton_selective_scan``, differentiable once.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambax.scan import check_shapes, refuse_mask_with_boundaries
from mambax_torch.cpu_ops import may_call_directly
from mambax_torch.kernels import scan


def _none(like: Tensor) -> Tensor:
    """A tensor without elements, which stands for None in what an operator returns."""
    return like.new_empty(0)


@torch.library.custom_op("mambax::triton_selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that the backward pass starts from (no elements unless `save`)."""
    given = scan.arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries)
    y, final, saved = scan.forward(given, save=save)
    return y, final, _none(final) if saved is None else saved


@_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    states = A.shape[1]
    final = u.new_empty((batch, channels, states), dtype=torch.float32)
    shape = scan.saved_shape(batch, length, channels, states) if save else (0,)
    return u.new_empty((batch, length, channels)), final, final.new_empty(shape)


@torch.library.custom_op("mambax::triton_selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dfinal: Tensor,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state; without elements for what is None."""
    given = scan.arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries)
    g = scan.backward(given, saved, dy, dfinal)

    def of(x: Tensor | None, gradient: Tensor | None) -> Tensor:
        return _none(u) if x is None or gradient is None else gradient.to(x.dtype)

    return (
        of(u, g.u), of(delta, g.delta), of(A, g.A), of(B, g.B), of(C, g.C), of(D, g.D), of(z, g.z),
        of(delta_bias, g.delta_bias), of(initial_state, g.initial_state),
    )  # fmt: skip


@_scan_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def of(x: Tensor | None) -> Tensor:
        return _none(u) if x is None else x.new_empty(x.shape)

    return of(u), of(delta), of(A), of(B), of(C), of(D), of(z), of(delta_bias), of(initial_state)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, softplus, initial_state, mask, boundaries, _ = inputs
    ctx.save_for_backward(output[2], *tensors, initial_state, mask, boundaries)
    ctx.softplus = softplus


def _gradient(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved, *tensors, initial_state, mask, boundaries = ctx.saved_tensors
    gradients = _scan_backward(dy, dfinal, saved, *tensors, ctx.softplus, initial_state, mask, boundaries)
    *of_tensors, of_initial = (
        gradient if x is not None else None
        for gradient, x in zip(gradients, (*tensors, initial_state), strict=True)
    )
    return *of_tensors, None, of_initial, None, None, None


_scan.register_autograd(_gradient, setup_context=_context)


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

    u, delta, B, C and z are taken by their strides where neighbouring channels lie side by side.

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
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if may_call_directly(tensors):
        y, final, _ = scan.forward(
            scan.arguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries),
            save=False,
        )
        return y, final
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, final, _ = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries, save)
    return y, final
