"""The recurrence of Mamba-2 as a phase: one token, its skip and its gate.

`views` is a row of :mod:`mambax_cpu.phase_table`. Everything is computed in float32.

Dimensions: B rows, D d_inner = H P, H heads, P head_dim, G groups, N d_state, C = D + 2 G N.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu import phase_table as field
from mambax_cpu.compilation import inlined, part
from mambax_cpu.linear_tiles import moved
from mambax_cpu.precision import read, write
from mambax_cpu.simd import LOG2_E, WIDTH, exp, exp2, multiply_add, pointer, softplus, splat, store
from mambax_cpu.ssd_step import advance


@part
def recur(views, task, scratch):  # pragma: no cover
    """A task: up to SIZE channels of one head, of every row."""
    heads, width, states = views[field.HEADS], views[field.HEAD_DIM], views[field.STATES]
    outs, convolved, size = views[field.OUTPUTS], views[field.CHANNELS], views[field.SIZE]
    tasks = (width + size - 1) // size  # of a head
    head, begin = task // tasks, task % tasks * size
    group, inner = head // (heads // views[field.GROUPS]), heads * width
    rate = (splat(0.0) - exp(splat(pointer(views[field.A_LOG])[head]))) * splat(np.float32(LOG2_E))
    skip = splat(pointer(views[field.SKIP])[head])
    for r in range(views[field.ROWS]):
        projected = pointer(views[field.X] + 4 * r * outs)
        mixed = pointer(views[field.U] + 4 * r * convolved)
        b = moved(mixed, inner + group * states)
        c = moved(b, views[field.GROUPS] * states)
        dt = splat(_time_step(views, head, projected[outs - heads + head], pointer(scratch)))
        place = 4 * (r * heads + head) * width * states
        before, after = pointer(views[field.STATE] + place), pointer(views[field.NEW_STATE] + place)
        decay = exp2(dt * rate)
        for p in range(begin, min(width, begin + size), WIDTH):
            channel, count = head * width + p, min(width, begin + size) - p
            x = read(mixed, channel, count)
            y = advance(True, True, decay, x * dt, b, c, states, before, after, p, count, pointer(scratch))
            y = multiply_add(x, skip, y) * read(projected, channel, count)
            write(pointer(views[field.OUT]), r * inner + channel, y, count)


@inlined
def _time_step(views, head, value, spare):  # pragma: no cover
    """softplus(value + dt_bias) within the limits. `spare` is room for sixteen values."""
    limits = pointer(views[field.LIMITS])
    store(spare, 0, softplus(splat(value + pointer(views[field.DT_BIAS])[head])))
    if spare[0] < limits[0]:
        return limits[0]
    return limits[1] if spare[0] > limits[1] else spare[0]
