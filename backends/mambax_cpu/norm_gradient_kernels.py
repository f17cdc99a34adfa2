"""The gradient of RMSNorm: one pass for the sums of a row, one for what comes of them.

With s = 1 / sqrt(mean(x^2) + epsilon) and g = dy weight::

    y = x s weight
    dx = s g - x s^3 mean(g x)
    dweight = sum over rows of dy x s

Dimensions: R rows, M values in each.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu.compilation import kernel
from mambax_cpu.memory import at, load_some, load_vector, store_some
from mambax_cpu.simd import integers_at, load, multiply_add, pointer, splat, store, total
from mambax_cpu.tiles import NORM_ROWS, WIDTH

# Rows of the operand table (see operands.py); W is the weight, and DW has one row for NORM_ROWS rows of x.
X, W, DY, DX, DW = range(5)


@kernel
def backward(table, rows, count, epsilon, first, last, scratch):  # pragma: no cover
    """Tasks `first` to `last` - 1, of ceil(R / NORM_ROWS).

    Args:
        table: the operand table up to DW.
        rows, count: R, M.
        epsilon: added to the mean square.
        scratch: float32, :func:`mambax_cpu.tiles.norm_scratch`.
    """
    views, spare = integers_at(table.ctypes.data), pointer(scratch.ctypes.data)
    sums = pointer(scratch.ctypes.data + 4 * WIDTH)
    for task in range(first, last):
        for i in range(0, count, WIDTH):
            store(sums, i, splat(0.0))
        for row in range(task * NORM_ROWS, min(rows, (task + 1) * NORM_ROWS)):
            x, dy, dx = at(views, X, 0, row), at(views, DY, 0, row), at(views, DX, 0, row)
            squares, products = splat(0.0), splat(0.0)
            for i in range(0, count, WIDTH):
                lanes = min(WIDTH, count - i)
                value = load_some(x, i, lanes, spare)
                g = load_some(dy, i, lanes, spare) * load_vector(views, W, i, lanes, spare)
                squares = multiply_add(value, value, squares)
                products = multiply_add(g, value, products)
            s = np.float32(1) / np.sqrt(total(squares) / np.float32(count) + np.float32(epsilon))
            scale, share = splat(s), splat(s * s * s * total(products) / np.float32(count))
            for i in range(0, count, WIDTH):
                lanes = min(WIDTH, count - i)
                value, g = load_some(x, i, lanes, spare), load_some(dy, i, lanes, spare) * scale
                store(sums, i, multiply_add(g, value, load(sums, i)))
                store_some(dx, i, lanes, g * load_vector(views, W, i, lanes, spare) - value * share, spare)
        for i in range(0, count, WIDTH):
            store_some(at(views, DW, 0, task), i, min(WIDTH, count - i), load(sums, i), spare)
