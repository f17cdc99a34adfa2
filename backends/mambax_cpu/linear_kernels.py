"""Weights of any kind made float32: the kernels.

The arguments of kernels are int64: numbers, and addresses of contiguous arrays, 0 for one that is absent. They do
rows `first` to `last` - 1 of the weights.
"""

from __future__ import annotations

import numpy as np

from mambax.quantization import BLOCK
from mambax_cpu.compilation import inlined, kernel
from mambax_cpu.linear_tiles import (
    GROUP,
    bfloat16_at,
    float16_at,
    int8_at,
    moved,
    widen,
    widen_packed,
    words_at,
)
from mambax_cpu.simd import WIDTH, pointer


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
    """out (.., inputs) float32 = the weights of four bits; a scale for each group.

    Args:
        words: (outs, blocks * 16) uint32, `blocks` times 128 the inputs rounded up.
        scales: (outs, blocks * 4 >> shift) bfloat16; groups have 32 << shift inputs.
    """
    blocks = (inputs + BLOCK - 1) // BLOCK
    groups = (blocks * (BLOCK // GROUP)) >> shift
    for j in range(first, last):
        row, factors = moved(words_at(words), j * blocks * WIDTH), moved(float16_at(scales), j * groups)
        widen_packed(row, factors, shift, inputs, moved(pointer(out), j * inputs))
