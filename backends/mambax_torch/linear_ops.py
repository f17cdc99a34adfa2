"""Linear layers for a few rows on the CPU: ``mambax::cpu_linear``, and quantised weights there.

The operator is opaque to ``torch.compile``. As those of :mod:`mambax_torch.cpu_ops`, it is left out where no
gradient is wanted and nothing is traced. Of quantised weights :mod:`mambax_torch.quantized_ops` makes operators.
"""

from __future__ import annotations

import torch
from mambax_cpu.linear import FEW_ROWS, Weights, product, widen
from torch import Tensor

from mambax_torch.operators import may_call_directly

__all__ = ["FEW_ROWS", "dequantized", "few_rows", "linear", "product_dtype"]

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


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What many rows are multiplied in: float32, whatever they are."""
    return torch.float32


def few_rows(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    """x (M, in) to (M, out) in the dtype of x, computed in float32. The weights are contiguous."""
    return _few_rows(_weights(weight, scales, inputs), x, bias)


def dequantized(weight: Tensor, scales: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """(out, in) in a dtype, on the CPU. The weights are contiguous."""
    wide = torch.empty((weight.shape[0], inputs), dtype=torch.float32)
    threads = torch.get_num_threads()
    widen(_weights(weight, scales, inputs), wide.data_ptr(), 0, weight.shape[0], threads=threads)
    return wide.to(dtype)
