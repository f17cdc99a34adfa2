"""The selective scan: the kernels.

A task is one row of the batch and sixteen neighbouring channels. It goes through the sequence in tiles of `TILE`
steps: what depends on the step and the channel alone is prepared for the whole tile, then each state number runs
over the tile in a register, channels across its lanes. Tiles live in the first-level cache. On request the state
before every tile is saved, for :mod:`mambax_cpu.scan_backward`.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu.compilation import inlined, kernel, part, spliced
from mambax_cpu.linear_tiles import bfloat16_at, float16_at
from mambax_cpu.memory import (
    at,
    begins,
    element_at,
    exists,
    load_columns,
    load_some,
    load_state,
    load_vector,
    store_columns,
    store_some,
    zero,
)
from mambax_cpu.precision import read, write
from mambax_cpu.simd import (
    LOG2_E,
    exp2,
    integers_at,
    load,
    multiply_add,
    pointer,
    prefetch,
    sigmoid,
    softplus,
    splat,
    store,
    total,
)
from mambax_cpu.tiles import SCAN_TILE as TILE
from mambax_cpu.tiles import WIDTH

# Rows of the operand table (see operands.py).
U, DELTA, Z, B, C, FLAGS, A, D, BIAS, INITIAL, SAVED, Y, FINAL = range(13)


@part
def prepare(kind, views, use_softplus, row, start, steps, channel, width, dt, x, ahead, spare):  # pragma: no cover
    """delta after bias, softplus and mask to `dt`, u after mask to `x`, for the steps of a tile.

    `kind` is an address of the type of u. Neighbouring steps lie so far apart in memory that no hardware sees the
    pattern: what will be read `ahead` steps from here is asked for now.
    """
    bias = load_vector(views, BIAS, channel, width, spare)
    for t in range(steps):
        later = start + t + ahead
        prefetch(at(views, DELTA, row, later), channel)
        prefetch(element_at(kind, views, U, row, later), channel)
        if views[3 * Z] != 0:
            prefetch(element_at(kind, views, Z, row, later), channel)
        if not exists(views, FLAGS, row, start + t):
            store(dt, t * WIDTH, splat(0.0))
            store(x, t * WIDTH, splat(0.0))
            continue
        raw = load_some(at(views, DELTA, row, start + t), channel, width, spare) + bias
        if use_softplus:
            raw = softplus(raw)
        store(dt, t * WIDTH, raw)
        store(x, t * WIDTH, read(element_at(kind, views, U, row, start + t), channel, width))


@kernel
def forward(table, length, channels, states, use_softplus, first, last, scratch):  # pragma: no cover
    """Tasks `first` to `last` - 1 of the forward scan.

    Args:
        table: the operand table up to FINAL. U, Z and Y are of the kernel's precision, the others float32.
        length, channels, states: L, D, N.
        use_softplus: whether delta goes through softplus.
        first, last: tasks, of B * ceil(D / 16).
        scratch: float32, of :func:`mambax_cpu.tiles.scan_scratch`.
    """
    _scan(pointer(0), table, length, channels, states, use_softplus, first, last, scratch)


@kernel
def forward_bfloat16(table, length, channels, states, use_softplus, first, last, scratch):  # pragma: no cover
    """As :func:`forward`."""
    _scan(bfloat16_at(0), table, length, channels, states, use_softplus, first, last, scratch)


@kernel
def forward_float16(table, length, channels, states, use_softplus, first, last, scratch):  # pragma: no cover
    """As :func:`forward`."""
    _scan(float16_at(0), table, length, channels, states, use_softplus, first, last, scratch)


@spliced
def _scan(kind, table, length, channels, states, use_softplus, first, last, scratch):  # pragma: no cover
    """The body of the kernels; `kind` is an address of the type of u, z and y."""
    views, base = integers_at(table.ctypes.data), scratch.ctypes.data
    dt, dtu = pointer(base), pointer(base + 4 * TILE * WIDTH)
    y, spare = pointer(base + 8 * TILE * WIDTH), pointer(base + 12 * TILE * WIDTH)
    base += 4 * WIDTH * (3 * TILE + 1)
    h, a = pointer(base), pointer(base + 4 * WIDTH * states)
    blocks = (channels + WIDTH - 1) // WIDTH
    tiles = (length + TILE - 1) // TILE
    for task in range(first, last):
        row, channel = task // blocks, task % blocks * WIDTH
        width = min(WIDTH, channels - channel)
        if length == 1 and views[3 * SAVED] == 0:
            prepare(kind, views, use_softplus, row, 0, 1, channel, width, dt, dtu, 0, spare)
            _start_outputs(views, 1, channel, width, dt, dtu, y, spare)
            _step(views, row, channel, width, states, dt, dtu, y, spare)
            _finish_outputs(kind, views, row, 0, 1, channel, width, y)
            continue
        load_columns(at(views, A, channel, 0), views[3 * A + 1], width, states, a, LOG2_E)
        load_state(views, INITIAL, row, channel, width, states, h)
        for tile in range(tiles):
            start = tile * TILE
            steps = min(TILE, length - start)
            if views[3 * SAVED] != 0:
                saved = pointer(views[3 * SAVED] + 4 * WIDTH * states * (task * tiles + tile))
                for n in range(states):
                    store(saved, n * WIDTH, load(h, n * WIDTH))
            prepare(kind, views, use_softplus, row, start, steps, channel, width, dt, dtu, TILE, spare)
            _start_outputs(views, steps, channel, width, dt, dtu, y, spare)
            low = 0
            while low < steps:  # from one beginning of a sequence to the next
                if begins(views, FLAGS, row, start + low):
                    zero(h, states)
                high = end_of_sequence(views, row, start, low, steps)
                _advance(views, row, start, low, high, states, a, h, dt, dtu, y)
                low = high
            _finish_outputs(kind, views, row, start, steps, channel, width, y)
        store_columns(h, states, width, at(views, FINAL, row, channel), views[3 * FINAL + 2])


@part
def _start_outputs(views, steps, channel, width, dt, x, y, spare):  # pragma: no cover
    """y = D u; then x, which held u, becomes delta u."""
    skip = load_vector(views, D, channel, width, spare)
    for t in range(steps):
        u = load(x, t * WIDTH)
        store(y, t * WIDTH, u * skip)
        store(x, t * WIDTH, u * load(dt, t * WIDTH))


@inlined
def end_of_sequence(views, row, start, low, steps):  # pragma: no cover
    """The first step of a tile after `low` at which a sequence begins; `steps` where none does."""
    if views[3 * FLAGS] == 0:
        return steps
    high = low + 1
    while high < steps and not begins(views, FLAGS, row, start + high):
        high += 1
    return high


@part
def _advance(views, row, start, low, high, states, a, h, dt, dtu, y):  # pragma: no cover
    """The recurrence: h over steps `low` to `high` - 1 of a tile, y += C . h."""
    b, c = at(views, B, row, start), at(views, C, row, start)
    b_stride, c_stride = views[3 * B + 2], views[3 * C + 2]
    n = 0
    while n + 2 <= states:  # two at a time, which read delta and y once
        i, j = n * WIDTH, n * WIDTH + WIDTH
        a_0, h_0, a_1, h_1 = load(a, i), load(h, i), load(a, j), load(h, j)
        for t in range(low, high):
            delta, input = load(dt, t * WIDTH), load(dtu, t * WIDTH)
            at_b, at_c = t * b_stride + n, t * c_stride + n
            h_0 = multiply_add(exp2(delta * a_0), h_0, input * splat(b[at_b]))
            h_1 = multiply_add(exp2(delta * a_1), h_1, input * splat(b[at_b + 1]))
            out = multiply_add(h_0, splat(c[at_c]), load(y, t * WIDTH))
            store(y, t * WIDTH, multiply_add(h_1, splat(c[at_c + 1]), out))
        store(h, i, h_0)
        store(h, j, h_1)
        n += 2
    if n < states:
        a_0, h_0 = load(a, n * WIDTH), load(h, n * WIDTH)
        for t in range(low, high):
            h_0 = multiply_add(
                exp2(load(dt, t * WIDTH) * a_0), h_0, load(dtu, t * WIDTH) * splat(b[t * b_stride + n])
            )
            store(y, t * WIDTH, multiply_add(h_0, splat(c[t * c_stride + n]), load(y, t * WIDTH)))
        store(h, n * WIDTH, h_0)


@part
def _step(views, row, channel, width, states, dt, dtu, y, spare):  # pragma: no cover
    """The recurrence for a single step: state numbers across lanes, as they lie in memory; y += C . h."""
    b, c = at(views, B, row, 0), at(views, C, row, 0)
    goes_on = views[3 * INITIAL] != 0 and not begins(views, FLAGS, row, 0)
    for lane in range(width):
        a, final = at(views, A, channel + lane, 0), at(views, FINAL, row, channel + lane)
        initial = at(views, INITIAL, row, channel + lane)
        dt_lane, dtu_lane = splat(dt[lane] * np.float32(LOG2_E)), splat(dtu[lane])
        out = splat(0.0)
        for n in range(0, states, WIDTH):
            count = min(WIDTH, states - n)
            h = dtu_lane * load_some(b, n, count, spare)
            if goes_on:
                decay = exp2(dt_lane * load_some(a, n, count, spare))
                h = multiply_add(decay, load_some(initial, n, count, spare), h)
            store_some(final, n, count, h, spare)
            out = multiply_add(h, load_some(c, n, count, spare), out)
        y[lane] += total(out)


@part
def _finish_outputs(kind, views, row, start, steps, channel, width, y):  # pragma: no cover
    """y through the gate and out; zero where a position does not exist."""
    for t in range(steps):
        value = load(y, t * WIDTH)
        if not exists(views, FLAGS, row, start + t):
            value = splat(0.0)
        elif views[3 * Z] != 0:
            z = read(element_at(kind, views, Z, row, start + t), channel, width)
            value = value * z * sigmoid(z)
        write(element_at(kind, views, Y, row, start + t), channel, value, width)
