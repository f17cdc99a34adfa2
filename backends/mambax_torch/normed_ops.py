"""Products with what RMSNorm gave on a GPU: for the gradient it is computed once more instead of kept.

The norm keeps its input for its own gradient, from which its output is one pass over memory away.

Dimensions: M channels of a row, O outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from mambax_torch.operators import are_plain, want_gradient
from mambax_torch.ops import inside_transform


class _Origin(NamedTuple):
    """What the output of a norm is computed from.

    Attributes:
        x: (..., M) input of the norm.
        weight: (M,) of the norm.
        eps: of the norm.
        version: of the output; another one means that somebody has written into it.
    """

    x: Tensor
    weight: Tensor
    eps: float
    version: int


_origins: Any = WeakTensorKeyDictionary()
"""By the output of a norm, as long as that lives."""


def remember(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y, of which is noted how it was made, if the norm keeps x for a gradient."""
    if not torch.compiler.is_compiling() and want_gradient((x, weight)) and are_plain((x, weight, y)):
        _origins[y] = _Origin(x.detach(), weight.detach(), eps, y._version)
    return y


def linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """y weight^T + bias, with a gradient that does not need y; None where that means nothing.

    Args:
        y: (..., M), what :func:`remember` returned, or anything else.
        weight: (O, M).
        bias: (O,) or None.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not weight.requires_grad:
        return None
    origin = _origins.get(y)
    if origin is None or y._version != origin.version or inside_transform() or not are_plain((y, weight, bias)):
        return None
    low = y.dtype
    if torch.is_autocast_enabled(y.device.type):
        low = torch.get_autocast_dtype(y.device.type)
        weight, bias = weight.to(low), None if bias is None else bias.to(low)
    if weight.dtype != low or (bias is not None and bias.dtype != low) or weight.shape[1] != y.shape[-1]:
        return None
    return _Linear.apply(y, weight, bias, *origin[:3])


class _Linear(torch.autograd.Function):
    """y (..., M), weight (O, M), bias (O,) or None, and how y was made, to (..., O) in the dtype of the weight."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, norm_weight: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(weight, x, norm_weight)
        ctx.eps, ctx.dtype = eps, y.dtype
        return F.linear(y.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] which the decorator makes of it
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        from mambax_torch.kernels import norm

        weight, x, norm_weight = ctx.saved_tensors
        of_y, of_weight, of_bias, *_ = ctx.needs_input_grad
        dy = dweight = dbias = None
        # whatever autocast does now, the dtypes are those of forward
        with torch.autocast(gradient.device.type, enabled=False):
            rows = gradient.flatten(0, -2)
            if of_weight:
                y = norm.forward(x, None, norm_weight, ctx.eps, False)[0].to(weight.dtype)
                dweight = rows.t() @ y.flatten(0, -2)
            if of_y:
                dy = (rows @ weight).view(x.shape).to(ctx.dtype)
            if of_bias:
                dbias = rows.sum(0)
        return dy, dweight, dbias, None, None, None
