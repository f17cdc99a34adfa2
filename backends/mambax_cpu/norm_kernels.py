"""RMSNorm: one kernel for each precision of weights and results.

Dimensions: R rows, M values in each.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu.compilation import inlined, kernel, part
from mambax_cpu.linear_tiles import bfloat16_at, float16_at, moved
from mambax_cpu.precision import read, write
from mambax_cpu.simd import WIDTH, multiply_add, pointer, splat, total


@part
def normalise_row(x, weight, out, count, epsilon):  # pragma: no cover
    """out = x / sqrt(mean(x^2) + epsilon) * weight of a row; the sum always in the same order."""
    squares = splat(0.0)
    for i in range(0, count, WIDTH):
        value = read(x, i, count - i)
        squares = multiply_add(value, value, squares)
    scale = splat(np.float32(1) / np.sqrt(total(squares) / np.float32(count) + np.float32(epsilon)))
    for i in range(0, count, WIDTH):
        write(out, i, read(x, i, count - i) * scale * read(weight, i, count - i), count - i)


@inlined
def _rows(x, weight, out, count, epsilon, first, last):  # pragma: no cover
    """The body of the kernels."""
    for r in range(first, last):
        normalise_row(pointer(x + 4 * r * count), weight, moved(out, r * count), count, epsilon)


@kernel
def float32(x, weight, out, count, epsilon, first, last):  # pragma: no cover
    """Rows `first` to `last` - 1.

    Args:
        x: the address of (R, M) float32, contiguous as all are.
        weight: the address of (M,).
        out: the address of (R, M) in the precision of the weight, which is written.
        count: M.
        epsilon: added to the mean square, a float.
    """
    _rows(x, pointer(weight), pointer(out), count, epsilon, first, last)


@kernel
def bfloat16(x, weight, out, count, epsilon, first, last):  # pragma: no cover
    """As :func:`float32`, weight and result bfloat16."""
    _rows(x, bfloat16_at(weight), bfloat16_at(out), count, epsilon, first, last)


@kernel
def float16(x, weight, out, count, epsilon, first, last):  # pragma: no cover
    """As :func:`float32`, weight and result float16."""
    _rows(x, float16_at(weight), float16_at(out), count, epsilon, first, last)
