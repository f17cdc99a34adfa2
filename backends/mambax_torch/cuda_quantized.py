"""Products with quantised weights on NVIDIA GPUs: ``mambax::triton_quantized_linear``, and rows of such weights.

The formats are those of :mod:`mambax.quantization`. A few rows read the weights as they are stored; more make them
wide for PyTorch's own product.

Dimensions: M rows, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambax.quantization import BLOCK, WORDS
from mambax_torch.kernels.sizes import cdiv, next_power_of_2

FEW_ROWS = 64
"""Rows up to which the kernels read the stored weights; above, widening them once is spread over enough rows."""


def dequantized(weight: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """(O, I) float32, on any device."""
    if weight.dtype == torch.int8:
        return weight.float() * scales[:, None]
    rows = weight.shape[0]
    words = weight.contiguous().view(torch.int32).reshape(rows, -1, 1, WORDS)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)[:, None]
    numbers = ((words >> shifts) & 15).reshape(rows, -1).float() - 8
    group = numbers.shape[1] // scales.shape[1]
    return (numbers * scales.float().repeat_interleave(group, 1))[:, :inputs]


def _few(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    """x (M, I) to (M, O) by the kernels."""

    from mambax_torch.kernels import step_quantized_kernels
    from mambax_torch.kernels.devices import interpreted, on_device_of

    kernels: Any = step_quantized_kernels  # in whose signatures pyright does not see that numbers may be constants
    rows, outputs = x.shape[0], weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    weight, scales = weight.contiguous(), scales.contiguous()
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block_m, block_o = max(16, next_power_of_2(min(rows, FEW_ROWS))), 32
    grid = (cdiv(outputs, block_o), cdiv(rows, block_m))
    options = {
        "HAS_BIAS": bias is not None,
        "BLOCK_M": block_m,
        "BLOCK_O": block_o,
        "WIDE": interpreted(),
        "num_warps": 4,
    }
    given = x if bias is None else bias
    with on_device_of(x):
        if weight.dtype == torch.int8:
            kernels.int8_kernel[grid](
                x, weight, scales, given, y, x.stride(0), rows, outputs, inputs, BLOCK_I=128, **options
            )
        else:
            blocks = 2 * weight.shape[1] // BLOCK
            kernels.int4_kernel[grid](
                x, weight.view(torch.int32), scales, given, y, x.stride(0), rows, outputs, inputs, blocks,
                GROUP=2 * weight.shape[1] // scales.shape[1], **options,
            )  # fmt: skip
    return y


@torch.library.custom_op("mambax::triton_quantized_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    """(..., O) in the dtype of x."""
    rows = x.reshape(-1, inputs)
    if len(rows) <= FEW_ROWS:
        y = _few(rows, weight, scales, bias, inputs)
    else:
        y = F.linear(rows, dequantized(weight, scales, inputs).to(x.dtype))
        y = y if bias is None else (y + bias).to(x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("mambax::triton_quantized_linear_backward", mutates_args=())
def _backward(dy: Tensor, weight: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """The gradient of x."""
    return dy @ dequantized(weight, scales, inputs).to(dy.dtype)


@_backward.register_fake
def _(dy: Tensor, weight: Tensor, scales: Tensor, inputs: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], inputs))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, _, ctx.inputs = inputs
    ctx.save_for_backward(weight, scales)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, scales = ctx.saved_tensors
    dx = _backward(dy, weight, scales, ctx.inputs) if ctx.needs_input_grad[0] else None
    dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None


_linear.register_autograd(_gradient, setup_context=_context)


def linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    """x (..., I) times quantised weights + bias (..., O), in the dtype of x; differentiable in x and bias.

    Args:
        x: float32, bfloat16 or float16, beside the weights. Products are exact and sums in float32 for up to
            :data:`FEW_ROWS` rows; for more, the weights are rounded to the dtype of x.
        weight, scales: arrays of a :class:`mambax.quantization.Quantized`.
        bias: (O,) or None.
        inputs: I.

    Raises:
        ValueError: where the kernels cannot run, with the reason, and for a shape that does not fit.
    """
    from mambax_torch.kernels.devices import why_not_triton

    if reason := why_not_triton(x):
        raise ValueError(f"quantised layers on a GPU need the Triton kernels, which cannot run here: {reason}")
    if x.shape[-1] != inputs or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
        raise ValueError(
            f"quantised layer: expected inputs (..., {inputs}) and a bias ({weight.shape[0]},) if any, found "
            f"{tuple(x.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    return _linear(x, weight, scales, bias, inputs)


def rows(weight: Tensor, scales: Tensor, ids: Tensor, inputs: int) -> Tensor:
    """Rows of quantised weights, (...) int64 to (..., I) float32, on any device."""
    some = ids.reshape(-1)
    return dequantized(weight[some], scales[some], inputs).reshape(*ids.shape, inputs)
