"""RMSNorm by the fused CPU kernels as a PyTorch operator: ``mambax::cpu_rms_norm``.

For the backward pass it keeps its arguments and nothing else.

Dimensions: M channels of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from mambax_cpu.norm import rms_norm as normalise
from mambax_cpu.norm_gradient import rms_norm_gradient
from torch import Tensor

from mambax_torch import ops
from mambax_torch.cpu_ops import array
from mambax_torch.operators import may_call_directly


def _run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., M) in the dtype of the weight."""
    return ops.from_numpy(normalise(array(x), ops.to_numpy(weight), eps, threads=torch.get_num_threads()))


_norm = torch.library.custom_op("mambax::cpu_rms_norm", _run, mutates_args=(), device_types="cpu")


@_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=weight.dtype, device=x.device)


@torch.library.custom_op("mambax::cpu_rms_norm_backward", mutates_args=(), device_types="cpu")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    threads = torch.get_num_threads()
    dx, dweight = rms_norm_gradient(array(x), array(weight), eps, array(dy), threads=threads)
    return ops.from_numpy(dx).to(x.dtype), ops.from_numpy(dweight).to(weight.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this one may be wanted
        return *_differentiable(dy.float(), x, weight, ctx.eps), None
    return *_backward(dy, x, weight, ctx.eps), None


def _differentiable(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight by PyTorch's operations, as in :mod:`mambax_cpu.norm_gradient_kernels`."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    g = dy * weight.float()
    dx = scale * g - wide * scale**3 * (g * wide).mean(-1, keepdim=True)
    dweight = (dy * wide * scale).flatten(0, -2).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


_norm.register_autograd(_gradient, setup_context=_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis, in the dtype of the weight; differentiable.

    Args:
        x: (..., M) up to float32, on the CPU.
        weight: (M,) up to float32.
        eps: added to the mean square.
    """
    return (_run if may_call_directly((x, weight)) else _norm)(x, weight, eps)
