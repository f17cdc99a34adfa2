"""Products with weights as MLX packs them, over NumPy arrays.

Dimensions: R rows of x, O outputs, W words of a row of weights, G groups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mambax_cpu import threads
from mambax_cpu.compilation import KernelFile
from mambax_numpy.module import Module

from mambax_mlx.host import values

_kernels = KernelFile("mambax_mlx.affine_kernels")

BITS = (4, 8)
"""Numbers of bits for which there are kernels; 2, 3 and 6 are MLX's alone."""

_SMALL = 1 << 20
"""Bytes of weights, once for each row, below which waking another thread costs more than it saves."""


class Packed(NamedTuple):
    """A matrix (O, in) as MLX packs it: (O, W) uint32, and scales and biases (O, G) float32; C-contiguous."""

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int


def product(x: np.ndarray, matrix: Packed) -> np.ndarray:
    """x (..., in) times the matrix transposed, (..., O) float32. For few rows: every row reads the weights."""
    weight, scales, biases, bits = matrix
    rows, (outputs, words) = math.prod(x.shape[:-1]), weight.shape
    places, sums = arranged(x.astype(np.float32, copy=False).reshape(rows, -1), words)
    out = np.empty((rows, outputs), np.float32)
    shift = (words // scales.shape[1]).bit_length() - 1
    kernel = _kernels.product4 if bits == 4 else _kernels.product8

    def work(first: int, last: int) -> None:
        kernel(weight, scales, biases, places, sums, rows, words, shift, out, outputs, first, last)

    small = weight.nbytes * rows < _SMALL
    threads.run(work, outputs, 1 if small else threads.default_threads())
    return out.reshape(*x.shape[:-1], outputs)


def arranged(x: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
    """x (R, in) as the kernels take it, (R, V, W) with V weights to a word, and its sum over each word, (R, W)."""
    by_word = x.reshape(len(x), words, -1)
    return np.ascontiguousarray(by_word.transpose(0, 2, 1)), np.ascontiguousarray(by_word.sum(2))


def packed(weight: mx.array, scales: mx.array, biases: mx.array, bits: int) -> Packed:
    """The arrays of MLX, in the same memory where their dtype and their layout allow it."""
    arrays = (values(weight), values(scales.astype(mx.float32)), values(biases.astype(mx.float32)))
    words, factors, offsets = map(np.ascontiguousarray, arrays)
    return Packed(words, factors, offsets, bits)


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
