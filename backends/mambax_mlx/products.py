"""Matrix products with weights, plain and quantised, which on the CPU of Linux are not left to MLX.

The wheels of MLX for Linux come with the reference BLAS: 650 ms for the product of (512, 768) and (768, 3072) on
one core of Zen 5, where NumPy's BLAS takes 22; its product with weights of 4 bits takes 1.8 ms for one row, the
kernels of :mod:`mambax_mlx.cpu_affine` 0.07. On macOS MLX uses Accelerate, and products of floats stay with it.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import mlx.core as mx
import numpy as np

from mambax_mlx.host import computable, default_device, values

_SMALL = 1 << 15
"""Weights below which a product is too short for a choice of implementation to matter."""


def by_numpy() -> bool:
    """Whether products are left to NumPy and the kernels of :mod:`mambax_cpu`, where values can be had."""
    return default_device() == "cpu" and sys.platform != "darwin"


def product(x: mx.array, weight: mx.array) -> mx.array:
    """x (..., in) weight^T, (..., out), in the dtype that MLX gives to it; weight is (out, in)."""
    if by_numpy() and computable(x, weight):
        return _product(x, weight)
    return x @ weight.T


def _multiply(x: mx.array, weight: mx.array) -> mx.array:
    from mambax_cpu import linear

    dtype = mx.result_type(x, weight)
    wide = values(x.astype(mx.float32))
    matrix = values(weight)
    if matrix.flags.c_contiguous and (matrix.dtype != np.float32 or matrix.size >= _SMALL):
        y = linear.linear(wide, matrix)
    else:  # in the gradient, the matrix is a transposed one, which those kernels would copy first
        y = wide @ matrix.T.astype(np.float32, copy=False)
    return mx.array(y).astype(dtype)


_product: Any = mx.custom_function(_multiply)


@_product.vjp
def _product_gradient(primals: Any, dy: mx.array, _: Any) -> tuple[mx.array, mx.array]:
    x, weight = primals
    outputs, inputs = weight.shape
    dy = dy.astype(mx.float32)
    dx = product(dy, weight.T)
    dweight = product(dy.reshape(-1, outputs).T, x.reshape(-1, inputs).T.astype(mx.float32))
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


@_product.jvp
def _product_tangent(primals: Any, tangents: Any) -> mx.array:
    (x, weight), (dx, dweight) = primals, tangents  # None of what does not vary
    parts = [] if dx is None else [product(dx, weight)]
    parts += [] if dweight is None else [product(x, dweight)]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def quantized_product(
    x: mx.array,  # (..., in)
    weight: mx.array,  # (out, in bits / 32) uint32
    scales: mx.array,  # (out, in / group size)
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    """x weight^T, (..., out), weights as ``mx.quantize`` packs them."""
    format_: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    if scales.dtype == mx.float32 != x.dtype:  # kept so, where rounding the scales would change the weights
        x32 = x.astype(mx.float32)
        return quantized_product(x32, weight, scales, biases, **format_).astype(x.dtype)
    if mode == "affine" and by_numpy() and computable(x, weight, scales, biases):
        return _quantized(x, weight, scales, biases, format_)
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, **format_)


def _quantized(x: mx.array, weight: mx.array, scales: mx.array, biases: Any, format_: dict[str, Any]) -> mx.array:
    from mambax_cpu import linear

    from mambax_mlx import cpu_affine

    def multiply(x: mx.array) -> mx.array:
        rows = math.prod(x.shape[:-1])
        if rows <= linear.FEW_ROWS and format_["bits"] in cpu_affine.BITS:
            matrix = cpu_affine.packed(weight, scales, biases, format_["bits"])
            return mx.array(cpu_affine.product(values(x.astype(mx.float32)), matrix)).astype(x.dtype)
        return product(x, dequantized()).astype(x.dtype)

    def dequantized() -> mx.array:
        return mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), **format_)

    def tangent(_: Any, dx: Any) -> mx.array:
        (dx,) = dx if isinstance(dx, (list, tuple)) else (dx,)
        return product(dx, dequantized()).astype(dx.dtype)

    function: Any = mx.custom_function(multiply)
    function.vjp(lambda x, dy, _: product(dy.astype(mx.float32), dequantized().T).astype(x.dtype))
    function.jvp(tangent)
    return function(x)
