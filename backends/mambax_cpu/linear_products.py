"""Products of a few rows with a matrix whose weights are read once: a function for each kind of weights.

They take the matrix in blocks of four rows, and each block through all rows of x: from memory it comes once, then
it is in the first cache. `views` is a row of :mod:`mambax_cpu.phase_table`; rows `first` to `last` - 1 of the
weights are done, out[r, j] = weights[j] . x[r].
"""

from __future__ import annotations

import numpy as np

from mambax.quantization import BLOCK
from mambax_cpu import kernel_types as types
from mambax_cpu import phase_table as field
from mambax_cpu.compilation import inlined, part, selection
from mambax_cpu.linear_tiles import (
    GROUP,
    bfloat16_at,
    float16_at,
    int8_at,
    moved,
    packed_tile,
    tile,
    words_at,
)
from mambax_cpu.simd import WIDTH, load, pointer, splat, store

_AHEAD = 11000
"""Bytes from a weight to the one whose cache line is fetched along with it, at most: found by trying."""


@inlined
def _ahead(row_bytes):  # pragma: no cover
    """How many rows of weights ahead cache lines are fetched: whole blocks, at least one."""
    return 4 * max(1, _AHEAD // max(1, 4 * row_bytes))


@inlined
def _product(views, weights, size, first, last):  # pragma: no cover
    """The body of the next four; `size` is that of a weight in bytes."""
    inputs, rows, outs = views[field.INPUTS], views[field.ROWS], views[field.OUTPUTS]
    x, out = pointer(views[field.X]), pointer(views[field.OUT])
    ahead = _ahead(inputs * size) * inputs
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


@part
def float32_product(stored, views, first, last):  # pragma: no cover
    """The weights float32."""
    _product(views, pointer(views[field.WEIGHT]), 4, first, last)


@part
def bfloat16_product(stored, views, first, last):  # pragma: no cover
    """The weights bfloat16."""
    _product(views, bfloat16_at(views[field.WEIGHT]), 2, first, last)


@part
def float16_product(stored, views, first, last):  # pragma: no cover
    """The weights float16."""
    _product(views, float16_at(views[field.WEIGHT]), 2, first, last)


@part
def int8_product(stored, views, first, last):  # pragma: no cover
    """The weights int8, with a float32 factor for each row."""
    _product(views, int8_at(views[field.WEIGHT]), 1, first, last)
    out, factors, outs = pointer(views[field.OUT]), pointer(views[field.SCALES]), views[field.OUTPUTS]
    for r in range(views[field.ROWS]):
        for j in range(first, last):
            out[r * outs + j] *= factors[j]


@part
def prepare(views):  # pragma: no cover
    """x as :func:`int4_product` takes it: rows of whole blocks, then what the sums of each 32 inputs start with."""
    rows, inputs = views[field.ROWS], views[field.INPUTS]
    blocks = (inputs + BLOCK - 1) // BLOCK
    padded = pointer(views[field.PREPARED])
    starts = moved(padded, rows * blocks * BLOCK)
    for r in range(rows):
        row, source = moved(padded, r * blocks * BLOCK), moved(pointer(views[field.X]), r * inputs)
        for i in range(inputs):
            row[i] = source[i]
        for i in range(inputs, blocks * BLOCK):
            row[i] = np.float32(0)
        for g in range(blocks * (BLOCK // GROUP)):
            value = (load(row, g * GROUP) + load(row, g * GROUP + WIDTH)) * splat(np.float32(-1.5))
            store(starts, (r * blocks * (BLOCK // GROUP) + g) * WIDTH, value)


@part
def int4_product(stored, views, first, last):  # pragma: no cover
    """The weights of four bits with a scale for each group, x as :func:`prepare` made it.

    The weights are (O, blocks * 16) uint32, `blocks` times 128 the inputs rounded up, the scales
    (O, blocks * 4 >> shift) bfloat16; groups have 32 << shift inputs.
    """
    rows, inputs, outs, shift = views[field.ROWS], views[field.INPUTS], views[field.OUTPUTS], views[field.SHIFT]
    blocks = (inputs + BLOCK - 1) // BLOCK
    width, groups, step = blocks * BLOCK, (blocks * (BLOCK // GROUP)) >> shift, blocks * WIDTH
    weights, factors = words_at(views[field.WEIGHT]), float16_at(views[field.SCALES])
    result, padded = pointer(views[field.OUT]), pointer(views[field.PREPARED])
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
    for r in range(rows):
        for j in range(first, last):
            result[r * outs + j] *= np.float32(16)


@part
def _int4_or_int8_product(stored, views, first, last):  # pragma: no cover
    """The weights of four bits, or with SECOND int8."""
    if views[field.SECOND]:
        int8_product(stored, views, first, last)
    else:
        int4_product(stored, views, first, last)


@selection
def product(stored, views, first, last):
    """The product for weights of the kind that the type of `stored` says; with SECOND beside four bits, int8."""
    parts = {
        types.float32: float32_product,
        types.int16: bfloat16_product,
        types.uint16: float16_product,
        types.int8: int8_product,
        types.uint32: _int4_or_int8_product,
    }
    return parts[stored.dtype]
