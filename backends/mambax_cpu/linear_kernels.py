"""Products of a few rows with a matrix whose weights are read once, and weights made float32, in Numba.

Kernels take the matrix in blocks of four rows, and each block through all rows of x: from memory it comes once,
then it is in the first cache. There is one entry point for each way of storing weights. Their arguments are int64:
numbers, and addresses of arrays, 0 for one that is absent. They do rows `first` to `last` - 1 of the weights.
"""

from __future__ import annotations

import numpy as np

from mambax.quantization import BLOCK
from mambax_cpu.compilation import inlined, kernel, part
from mambax_cpu.linear_tiles import (
    GROUP,
    bfloat16_at,
    float16_at,
    int8_at,
    moved,
    packed_tile,
    tile,
    widen,
    widen_packed,
    words_at,
)
from mambax_cpu.simd import WIDTH, load, pointer, splat, store

_AHEAD = 11000
"""Bytes from a weight to the one whose cache line is fetched along with it, at most: found by trying."""


def scratch_size(rows: int, blocks: int) -> int:
    """float32 values that :func:`prepare_int4` makes of this many rows of x and blocks of inputs."""
    return rows * blocks * (BLOCK + BLOCK // 2)


@inlined
def _ahead(row_bytes):  # pragma: no cover
    """How many rows of weights ahead cache lines are fetched: whole blocks, at least one."""
    return 4 * max(1, _AHEAD // max(1, 4 * row_bytes))


@part
def _finish(y, rows, outs, factors, factor, bias, first, last):  # pragma: no cover
    """y[:, first:last] times the factor of each column or of all, plus its bias, where there are any."""
    for r in range(rows):
        if factors != 0:
            column = pointer(factors)
            for j in range(first, last):
                y[r * outs + j] *= column[j]
        if factor != 1:
            for j in range(first, last):
                y[r * outs + j] *= np.float32(factor)
        if bias != 0:
            column = pointer(bias)
            for j in range(first, last):
                y[r * outs + j] += column[j]


@inlined
def _product(weights, size, inputs, x, rows, out, outs, factors, bias, first, last):  # pragma: no cover
    """The body of the entry points; `size` is that of a weight in bytes."""
    ahead = _ahead(inputs * size) * inputs
    x, out = pointer(x), pointer(out)
    j = first
    while j + 4 <= last:
        block = moved(weights, j * inputs)
        r = 0
        while r + 4 <= rows:
            tile(block, inputs, ahead, moved(x, r * inputs), inputs, moved(out, r * outs + j), outs, 4, 4)
            r += 4
        if r + 2 <= rows:
            tile(block, inputs, ahead, moved(x, r * inputs), inputs, moved(out, r * outs + j), outs, 4, 2)
            r += 2
        if r < rows:
            tile(block, inputs, ahead, moved(x, r * inputs), inputs, moved(out, r * outs + j), outs, 4, 1)
        j += 4
    while j < last:
        for r in range(rows):
            row = moved(weights, j * inputs)
            tile(row, inputs, 0, moved(x, r * inputs), inputs, moved(out, r * outs + j), outs, 1, 1)
        j += 1
    _finish(out, rows, outs, factors, 1, bias, first, last)


@kernel
def float32(weights, inputs, x, rows, out, outs, factors, bias, first, last):  # pragma: no cover
    """out[r, j] = weights[j] . x[r] (* factors[j] + bias[j]), the weights float32.

    Args:
        weights: (outs, inputs), contiguous, as is all that follows.
        x: (rows, inputs) float32.
        out: (rows, outs) float32.
        factors, bias: (outs,) float32, or 0.
    """
    _product(pointer(weights), 4, inputs, x, rows, out, outs, factors, bias, first, last)


@kernel
def bfloat16(weights, inputs, x, rows, out, outs, factors, bias, first, last):  # pragma: no cover
    """As :func:`float32`, the weights bfloat16."""
    _product(bfloat16_at(weights), 2, inputs, x, rows, out, outs, factors, bias, first, last)


@kernel
def float16(weights, inputs, x, rows, out, outs, factors, bias, first, last):  # pragma: no cover
    """As :func:`float32`, the weights float16."""
    _product(float16_at(weights), 2, inputs, x, rows, out, outs, factors, bias, first, last)


@kernel
def int8(weights, inputs, x, rows, out, outs, factors, bias, first, last):  # pragma: no cover
    """As :func:`float32`, the weights int8."""
    _product(int8_at(weights), 1, inputs, x, rows, out, outs, factors, bias, first, last)


@kernel
def prepare_int4(x, rows, inputs, scratch):  # pragma: no cover
    """x as :func:`int4` takes it: rows of whole blocks, then what the sums of each group of 32 inputs start with.

    Args:
        x: (rows, inputs) float32.
        scratch: of :func:`scratch_size`, which is written.
    """
    blocks = (inputs + BLOCK - 1) // BLOCK
    padded = pointer(scratch)
    starts = moved(padded, rows * blocks * BLOCK)
    for r in range(rows):
        row, source = moved(padded, r * blocks * BLOCK), moved(pointer(x), r * inputs)
        for i in range(inputs):
            row[i] = source[i]
        for i in range(inputs, blocks * BLOCK):
            row[i] = np.float32(0)
        for g in range(blocks * (BLOCK // GROUP)):
            value = (load(row, g * GROUP) + load(row, g * GROUP + WIDTH)) * splat(np.float32(-1.5))
            store(starts, (r * blocks * (BLOCK // GROUP) + g) * WIDTH, value)


@kernel
def int4(words, scales, shift, inputs, scratch, rows, out, outs, bias, first, last):  # pragma: no cover
    """As :func:`float32`, the weights of four bits with a scale for each group.

    Args:
        words: (outs, blocks * 16) uint32, `blocks` times 128 the inputs rounded up.
        scales: (outs, blocks * 4 >> shift) bfloat16; groups have 32 << shift inputs.
        scratch: what :func:`prepare_int4` made of x.
    """
    blocks = (inputs + BLOCK - 1) // BLOCK
    width, groups, step = blocks * BLOCK, (blocks * (BLOCK // GROUP)) >> shift, blocks * WIDTH
    weights, factors, result, padded = words_at(words), float16_at(scales), pointer(out), pointer(scratch)
    starts = moved(padded, rows * width)
    ahead = _ahead(step * 4) * step
    j = first
    while j + 4 <= last:
        block, factor = moved(weights, j * step), moved(factors, j * groups)
        r = 0
        while r + 4 <= rows:
            a, c, to = moved(padded, r * width), moved(starts, r * width // 2), moved(result, r * outs + j)
            packed_tile(block, factor, shift, ahead, a, c, blocks, to, outs, 2, 4)
            block_2, factor_2 = moved(block, 2 * step), moved(factor, 2 * groups)
            packed_tile(block_2, factor_2, shift, ahead, a, c, blocks, moved(to, 2), outs, 2, 4)
            r += 4
        while r < rows:
            a, c, to = moved(padded, r * width), moved(starts, r * width // 2), moved(result, r * outs + j)
            packed_tile(block, factor, shift, ahead, a, c, blocks, to, outs, 4, 1)
            r += 1
        j += 4
    while j < last:
        block, factor = moved(weights, j * step), moved(factors, j * groups)
        for r in range(rows):
            a, c, to = moved(padded, r * width), moved(starts, r * width // 2), moved(result, r * outs + j)
            packed_tile(block, factor, shift, 0, a, c, blocks, to, outs, 1, 1)
        j += 1
    _finish(result, rows, outs, 0, 16, bias, first, last)


# --- weights as float32 --------------------------------------------------------------------------------------


@inlined
def _widened(weights, inputs, factors, out, first, last):  # pragma: no cover
    """The body of the next four."""
    for j in range(first, last):
        factor = np.float32(1)
        if factors != 0:
            factor = pointer(factors)[j]
        widen(moved(weights, j * inputs), inputs, factor, moved(pointer(out), j * inputs))


@kernel
def widen_bfloat16(weights, inputs, factors, out, first, last):  # pragma: no cover
    """out (.., inputs) float32 = weights, bfloat16, times the factor of each row; factors (..,) float32, or 0."""
    _widened(bfloat16_at(weights), inputs, factors, out, first, last)


@kernel
def widen_float16(weights, inputs, factors, out, first, last):  # pragma: no cover
    """As :func:`widen_bfloat16`, the weights float16."""
    _widened(float16_at(weights), inputs, factors, out, first, last)


@kernel
def widen_int8(weights, inputs, factors, out, first, last):  # pragma: no cover
    """As :func:`widen_bfloat16`, the weights int8."""
    _widened(int8_at(weights), inputs, factors, out, first, last)


@kernel
def widen_int4(words, scales, shift, inputs, out, first, last):  # pragma: no cover
    """out (.., inputs) float32 = the weights of four bits; words, scales and shift as of :func:`int4`."""
    blocks = (inputs + BLOCK - 1) // BLOCK
    groups = (blocks * (BLOCK // GROUP)) >> shift
    for j in range(first, last):
        row, factors = moved(words_at(words), j * blocks * WIDTH), moved(float16_at(scales), j * groups)
        widen_packed(row, factors, shift, inputs, moved(pointer(out), j * inputs))
