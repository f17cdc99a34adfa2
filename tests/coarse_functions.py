"""A kernel that calls the functions for results to be rounded to bfloat16; for tests/test_cpu_prefill.py.

Dimensions: none.
"""

from __future__ import annotations

from mambax_cpu.compilation import kernel
from mambax_cpu.linear_tiles import bfloat16_at
from mambax_cpu.simd import exp2_for, load, pointer, sigmoid_for, softplus_for, store
from mambax_cpu.tiles import WIDTH


@kernel
def coarse(x, results, count):
    """2^x, softplus and the logistic function of `count` values, whole vectors, one after another to results."""
    values, found, narrow = pointer(x.ctypes.data), pointer(results.ctypes.data), bfloat16_at(0)
    for i in range(0, count, WIDTH):
        value = load(values, i)
        store(found, i, exp2_for(narrow, value))
        store(found, count + i, softplus_for(narrow, value))
        store(found, 2 * count + i, sigmoid_for(narrow, value))
