"""The compiled loop that reads memory for :mod:`benchmarks.contenders.limits`.

Dimensions: N values.
"""

from __future__ import annotations

from mambax_cpu.compilation import kernel
from mambax_cpu.precision import read
from mambax_cpu.simd import WIDTH, load, pointer, splat, total

_STEP = 4 * WIDTH  # four sums, so that none waits for an addition


@kernel
def add_up(values, count, out):  # pragma: no cover
    """out[0] = the sum of values, both float32.

    Args:
        values: (N,).
        count: N.
        out: (1,).
    """
    base = pointer(values.ctypes.data)
    head = min(count, -values.ctypes.data // 4 % WIDTH)  # from there on a vector is a cache line
    whole = head + (count - head) // _STEP * _STEP
    a, b, c, d = read(base, 0, head), splat(0.0), splat(0.0), splat(0.0)
    for i in range(head, whole, _STEP):
        a, b = a + load(base, i), b + load(base, i + WIDTH)
        c, d = c + load(base, i + 2 * WIDTH), d + load(base, i + 3 * WIDTH)
    for i in range(whole, count, WIDTH):
        a += read(base, i, count - i)
    pointer(out.ctypes.data)[0] = total((a + b) + (c + d))
