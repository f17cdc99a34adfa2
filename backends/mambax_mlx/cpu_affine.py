"""Products with weights as MLX packs them, over NumPy arrays.

Dimensions: R rows of x, O outputs, W words of a row of weights, G groups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mambax_cpu import threads
from mambax_numpy.module import Module

from mambax_mlx import affine_kernels
from mambax_mlx.host import values

BITS = (4, 8)
"""Numbers of bits for which there are kernels; 2, 3 and 6 are MLX's alone."""

_SMALL = 1 << 20
"""Bytes of weights, once for each row, below which waking another thread costs more than it saves."""


class Packed(NamedTuple):
    """A matrix (O, in) as MLX packs it: (O, W) uint32, and scales and biases (O, G) float32."""

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int


def product(x: np.ndarray, matrix: Packed) -> np.ndarray:
    """x (..., in) times the matrix transposed, (..., O) float32. For few rows: every row reads the weights."""
    weight, scales, biases, bits = matrix
    rows, words = math.prod(x.shape[:-1]), weight.shape[1]
    places, sums = affine_kernels.arrange(x.astype(np.float32, copy=False).reshape(rows, -1), words)
    out = np.empty((rows, len(weight)), np.float32)
    shift = (words // scales.shape[1]).bit_length() - 1
    kernel = affine_kernels.product4 if bits == 4 else affine_kernels.product8

    def work(first: int, last: int) -> None:
        kernel(weight, scales, biases, places, sums, shift, out, first, last)

    small = weight.nbytes * rows < _SMALL
    threads.run(work, len(weight), 1 if small else threads.default_threads())
    return out.reshape(*x.shape[:-1], len(weight))


def packed(weight: mx.array, scales: mx.array, biases: mx.array, bits: int) -> Packed:
    """The arrays of MLX, in the same memory where their dtype allows it."""
    return Packed(values(weight), values(scales.astype(mx.float32)), values(biases.astype(mx.float32)), bits)


class AffineLinear(Module):
    """MLX's quantised layer as one of the NumPy backend: x (..., in) to (..., O) in the dtype of x.

    Args:
        matrix: (O, in).
        bias: (O,) or None.
    """

    def __init__(self, matrix: Packed, bias: np.ndarray | None) -> None:
        self.matrix = matrix
        self.bias = bias

    def forward(self, x: np.ndarray) -> np.ndarray:
        """(..., in) to (..., O)."""
        y = product(x, self.matrix).astype(x.dtype, copy=False)
        return y if self.bias is None else y + self.bias
