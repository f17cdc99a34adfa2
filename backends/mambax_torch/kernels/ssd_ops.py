"""Mamba-2's scan by Triton as a PyTorch operator: ``mambax::triton_ssd``, differentiable once.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambax.scan import refuse_mask_with_boundaries
from mambax.ssd import check_shapes
from mambax_torch.cpu_ops import may_call_directly
from mambax_torch.kernels import ssd as kernels
from mambax_torch.kernels.ssd_plan import arguments


def _none(like: Tensor) -> Tensor:
    """A tensor without elements, which stands for None in what an operator returns."""
    return like.new_empty(0)


@torch.library.custom_op("mambax::triton_ssd", mutates_args=())
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    dt_softplus: bool,
    smallest: float,
    largest: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that the backward pass starts from (no elements unless `save`)."""
    limit = (smallest, largest)
    given = arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, limit, initial_state, mask, boundaries)
    y, final, saved = kernels.forward(given, save=save)
    return y, final, _none(final) if saved is None else saved


@_ssd.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    dt_softplus: bool,
    smallest: float,
    largest: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, width = x.shape
    final = x.new_empty((batch, heads, width, B.shape[3]), dtype=torch.float32)
    return x.new_empty(x.shape), final, final.new_empty(kernels.saved_shape(x, B) if save else (0,))


@torch.library.custom_op("mambax::triton_ssd_backward", mutates_args=())
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
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    dt_softplus: bool,
    smallest: float,
    largest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D, dt_bias and initial_state; without elements for what is None."""
    limit = (smallest, largest)
    given = arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, limit, initial_state, mask, boundaries)
    g = kernels.backward(given, saved, dy, dfinal)

    def of(x: Tensor | None, gradient: Tensor | None) -> Tensor:
        return _none(dy) if x is None or gradient is None else gradient.to(x.dtype)

    return (
        of(x, g.x), of(dt, g.dt), of(A, g.A), of(B, g.B), of(C, g.C), of(D, g.D), of(dt_bias, g.dt_bias),
        of(initial_state, g.initial_state),
    )  # fmt: skip


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
    initial_state: Tensor | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
    dt_softplus: bool,
    smallest: float,
    largest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def of(x: Tensor | None) -> Tensor:
        return _none(dy) if x is None else x.new_empty(x.shape)

    return of(x), of(dt), of(A), of(B), of(C), of(D), of(dt_bias), of(initial_state)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2], *inputs[:10])
    ctx.options = inputs[10:13]


def _gradient(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved, *tensors = ctx.saved_tensors
    gradients = _ssd_backward(dy, dfinal, saved, *tensors, *ctx.options)
    of_tensors = (g if x is not None else None for g, x in zip(gradients, tensors[:8], strict=True))
    return *of_tensors, *[None] * 6


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
    tensors = (x, dt, A, B, C, D, dt_bias, initial_state)
    if may_call_directly(tensors):
        y, final, _ = kernels.forward(
            arguments(x, dt, A, B, C, D, dt_bias, dt_softplus, (low, high), initial_state, mask, boundaries),
            save=False,
        )
        return y, final
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final, _ = _ssd(*tensors, mask, boundaries, dt_softplus, low, high, save)
    return y, final
