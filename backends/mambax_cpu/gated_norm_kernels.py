"""The kernels of the gated RMSNorm of Mamba-2: rms(y silu(z)) weight, the mean square over each group of channels.

Dimensions: B batch, L length, D channels, G groups of them.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu.compilation import kernel, spliced
from mambax_cpu.linear_tiles import bfloat16_at, float16_at
from mambax_cpu.memory import element_at
from mambax_cpu.precision import read, write
from mambax_cpu.simd import WIDTH, integers_at, load, multiply_add, pointer, sigmoid, splat, store, total

# Rows of the operand table (see operands.py): (B, L, D), (B, L, D), (D,) and (B, L, D).
Y, Z, WEIGHT, OUT = range(4)


@kernel
def gated_norm(table, length, channels, groups, epsilon, first, last, scratch):  # pragma: no cover
    """Tasks `first` to `last` - 1.

    Args:
        table: the operand table. Y, Z and OUT are of the kernel's precision, WEIGHT is float32.
        length, channels, groups: L, D, G.
        epsilon: added to the mean square, a float.
        first, last: tasks, of B * L.
        scratch: float32, D / G values in whole vectors.
    """
    _norm(pointer(0), table, length, channels, groups, epsilon, first, last, scratch)


@kernel
def gated_norm_bfloat16(table, length, channels, groups, epsilon, first, last, scratch):  # pragma: no cover
    """As :func:`gated_norm`."""
    _norm(bfloat16_at(0), table, length, channels, groups, epsilon, first, last, scratch)


@kernel
def gated_norm_float16(table, length, channels, groups, epsilon, first, last, scratch):  # pragma: no cover
    """As :func:`gated_norm`."""
    _norm(float16_at(0), table, length, channels, groups, epsilon, first, last, scratch)


@spliced
def _norm(kind, table, length, channels, groups, epsilon, first, last, scratch):  # pragma: no cover
    """The body of the kernels; `kind` is an address of the type of y, z and the result."""
    views, gated = integers_at(table.ctypes.data), pointer(scratch.ctypes.data)
    weight, size = pointer(views[3 * WEIGHT]), channels // groups
    for task in range(first, last):
        row, step = task // length, task % length
        y, z = element_at(kind, views, Y, row, step), element_at(kind, views, Z, row, step)
        out = element_at(kind, views, OUT, row, step)
        for start in range(0, channels, size):
            squares = splat(0.0)
            for i in range(0, size, WIDTH):
                gate = read(z, start + i, size - i)
                value = read(y, start + i, size - i) * gate * sigmoid(gate)
                squares = multiply_add(value, value, squares)
                store(gated, i, value)
            mean = total(squares) / np.float32(size)
            scale = splat(np.float32(1) / np.sqrt(mean + np.float32(epsilon)))
            for i in range(0, size, WIDTH):
                value = load(gated, i) * scale * read(weight, start + i, size - i)
                write(out, start + i, value, size - i)
