"""Linear layers for a few rows on the CPU: ``mambax::cpu_linear``, ``mambax::cpu_quantized_linear``, and its rows.

They are opaque to ``torch.compile``. As those of :mod:`mambax_torch.cpu_ops`, they are called without the operator
around them where no gradient is wanted and nothing is traced.
"""

from __future__ import annotations

from typing import Any

import torch
from mambax_cpu.linear import FEW_ROWS, Weights, product, widen
from torch import Tensor
from torch.nn import functional as F

from mambax_torch.operators import may_call_directly

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _contiguous_float32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _few_rows(weights: Weights, x: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) to (..., out) in the dtype of x, by the kernels."""
    rows = x.numel() // weights.inputs
    wide = _contiguous_float32(x)
    wide_bias = None if bias is None else _contiguous_float32(bias)
    y = torch.empty((*x.shape[:-1], weights.outputs), dtype=torch.float32)
    place = 0 if wide_bias is None else wide_bias.data_ptr()
    product(weights, wide.data_ptr(), rows, y.data_ptr(), place, threads=torch.get_num_threads())
    return y.to(x.dtype)


# --- weights of a float dtype --------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., out) in the dtype of x."""
    weight = weight.contiguous()
    return _few_rows(Weights(_KINDS[weight.dtype], weight.shape[0], weight.shape[1], weight.data_ptr()), x, bias)


_linear = torch.library.custom_op("mambax::cpu_linear", _product, mutates_args=(), device_types="cpu")


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) weight^T + bias (..., out), summed in float32, in the dtype of all three; has no gradient.

    Args:
        x: float32, bfloat16 or float16, on the CPU. Any number of rows; made for a few.
        weight: (out, in) in the dtype of x.
        bias: (out,) or None.
    """
    return (_product if may_call_directly((x, weight, bias)) else _linear)(x, weight, bias)


# --- quantised weights ---------------------------------------------------------------------------------------


def _weights(weight: Tensor, scales: Tensor, inputs: int) -> Weights:
    """The layout is that of :class:`mambax.quantization.Quantized`; both tensors are contiguous."""
    kind, shift = "int8", 0
    if weight.dtype == torch.uint8:
        kind, shift = "int4", (2 * weight.shape[1] // scales.shape[1] // 32).bit_length() - 1
    return Weights(kind, weight.shape[0], inputs, weight.data_ptr(), scales.data_ptr(), shift)


def dequantized(weight: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """(out, in) float32, on the CPU."""
    weight, scales = weight.contiguous(), scales.contiguous()
    wide = torch.empty((weight.shape[0], inputs), dtype=torch.float32)
    threads = torch.get_num_threads()
    widen(_weights(weight, scales, inputs), wide.data_ptr(), 0, weight.shape[0], threads=threads)
    return wide


def _quantized_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    """(..., out) in the dtype of x."""
    if x.numel() <= FEW_ROWS * inputs:
        weight, scales = weight.contiguous(), scales.contiguous()
        return _few_rows(_weights(weight, scales, inputs), x, bias)
    wide_bias = None if bias is None else bias.float()
    return F.linear(x.float(), dequantized(weight, scales, inputs), wide_bias).to(x.dtype)


_quantized_linear = torch.library.custom_op(
    "mambax::cpu_quantized_linear", _quantized_product, mutates_args=(), device_types="cpu"
)


@_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("mambax::cpu_quantized_linear_backward", mutates_args=(), device_types="cpu")
def _quantized_backward(dy: Tensor, weight: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """The gradient of x."""
    return (dy.float() @ dequantized(weight, scales, inputs)).to(dy.dtype)


@_quantized_backward.register_fake
def _(dy: Tensor, weight: Tensor, scales: Tensor, inputs: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], inputs))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, _, ctx.inputs = inputs
    ctx.save_for_backward(weight, scales)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, scales = ctx.saved_tensors
    dx = _quantized_backward(dy, weight, scales, ctx.inputs) if ctx.needs_input_grad[0] else None
    dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None


_quantized_linear.register_autograd(_gradient, setup_context=_context)


def quantized_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    """x (..., in) times quantised weights + bias (..., out), in the dtype of x; differentiable in x and bias.

    Args:
        x: float32, bfloat16 or float16, on the CPU.
        weight, scales: arrays of a :class:`mambax.quantization.Quantized`.
        bias: (out,) or None.
        inputs: in. Above :data:`mambax_cpu.linear.FEW_ROWS` rows weights are made float32 for PyTorch's product.
    """
    direct = may_call_directly((x, weight, scales, bias))
    return (_quantized_product if direct else _quantized_linear)(x, weight, scales, bias, inputs)


def _quantized_rows(weight: Tensor, scales: Tensor, ids: Tensor, inputs: int) -> Tensor:
    """(..., in) float32."""
    some = ids.reshape(-1)
    return dequantized(weight[some], scales[some], inputs).reshape(*ids.shape, inputs)


_rows = torch.library.custom_op("mambax::cpu_quantized_rows", _quantized_rows, mutates_args=(), device_types="cpu")


@_rows.register_fake
def _(weight: Tensor, scales: Tensor, ids: Tensor, inputs: int) -> Tensor:
    return weight.new_empty((*ids.shape, inputs), dtype=torch.float32)


def rows(weight: Tensor, scales: Tensor, ids: Tensor, inputs: int) -> Tensor:
    """Rows of quantised weights, (...) int64 to (..., in) float32, on the CPU."""
    return (_quantized_rows if may_call_directly((weight, scales, ids)) else _rows)(weight, scales, ids, inputs)
