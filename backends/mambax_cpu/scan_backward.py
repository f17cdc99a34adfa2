"""The gradient of the selective scan: the kernel.

With g the gradient of the output before the gate and G[t] that of the state h[t], backwards in time::

    G[t] = exp(delta[t+1] A) G[t+1] + g[t] C[t]
    dC[t] = sum over channels of g[t] h[t]
    dB[t] = sum over channels of G[t] delta[t] u[t]
    du[t] = delta[t] (G[t] . B[t]) + D g[t]
    ddelta[t] = u[t] (G[t] . B[t]) + sum over n of G[t] exp(delta[t] A) h[t-1] A
    dA = sum over t of G[t] exp(delta[t] A) h[t-1] delta[t]

Tiles and lanes are those of :mod:`mambax_cpu.scan_forward`, from the last tile to the first. For one state number
at a time the states of a tile are computed again from the saved one and gone back over at once, so that nothing is
ever as large as (B, L, D, N). Sums over channels and rows are made in an order that does not depend on the number
of threads.
"""

from __future__ import annotations

from collections import namedtuple

from mambax_cpu.compilation import inlined, kernel, part
from mambax_cpu.memory import (
    at,
    begins,
    exists,
    load_columns,
    load_some,
    load_state,
    load_vector,
    store_columns,
    store_some,
    zero,
)
from mambax_cpu.scan_forward import (
    BIAS,
    DELTA,
    FINAL,
    FLAGS,
    SAVED,
    A,
    B,
    C,
    D,
    Z,
    prepare,
)
from mambax_cpu.simd import (
    LOG2_E,
    exp2,
    integers_at,
    load,
    multiply_add,
    pointer,
    prefetch,
    sigmoid,
    splat,
    store,
    total,
)
from mambax_cpu.tiles import BACKWARD_VECTORS as VECTORS
from mambax_cpu.tiles import SCAN_GROUP as GROUP
from mambax_cpu.tiles import SCAN_TILE as TILE
from mambax_cpu.tiles import WIDTH

# Rows of the operand table after those of the forward kernel: gradients given, then gradients to write. Those of B
# and C have one share per group, (groups, B * L, N); those of A, D and the bias one per row of the batch.
DY, DFINAL, DU, DDELTA, DZ, DB, DC, DA, DD, DBIAS, DINITIAL = range(FINAL + 1, FINAL + 12)

# Buffers of a tile, TILE vectors each: delta, u, delta u, g, ungated y, sums over n towards ddelta and du, the
# decays and the states of one n (`states` has one vector more).
Tile = namedtuple("Tile", "dt x dtu g y ddt gb decay states")


@inlined
def _tile(base):  # pragma: no cover
    size = 4 * WIDTH * (TILE + 5)
    return Tile(
        pointer(base),
        pointer(base + size),
        pointer(base + 2 * size),
        pointer(base + 3 * size),
        pointer(base + 4 * size),
        pointer(base + 5 * size),
        pointer(base + 6 * size),
        pointer(base + 7 * size),
        pointer(base + 8 * size),
    )


@kernel
def backward(table, length, channels, states, use_softplus, first, last, scratch):  # pragma: no cover
    """Tasks `first` to `last` - 1 of the gradient.

    Args:
        table: the operand table up to DINITIAL.
        length, channels, states: L, D, N.
        use_softplus: whether delta went through softplus.
        first, last: tasks, of B * ceil(D / (16 GROUP)).
        scratch: float32, of :func:`mambax_cpu.tiles.scan_backward_scratch`.
    """
    size = 4 * WIDTH
    views, base = integers_at(table.ctypes.data), scratch.ctypes.data
    tile, spare = _tile(base), pointer(base + size * (VECTORS - 1))
    base += size * VECTORS
    db, base = pointer(base), base + size * states * TILE
    dc, base = pointer(base), base + size * states * TILE
    part = size * (3 * states + 2)  # of a block: A, the gradient of the later state, that of A, sums for D and bias
    zero(db, states * TILE)
    zero(dc, states * TILE)
    span = GROUP * WIDTH
    groups = (channels + span - 1) // span
    tiles = (length + TILE - 1) // TILE
    for task in range(first, last):
        row, group = task // groups, task % groups
        blocks = min(GROUP, (channels - group * span + WIDTH - 1) // WIDTH)
        for block in range(blocks):
            channel = group * span + block * WIDTH
            _open_block(views, row, channel, min(WIDTH, channels - channel), states, base + part * block)
        for number in range(tiles - 1, -1, -1):
            start = number * TILE
            steps = min(TILE, length - start)
            for block in range(blocks):
                channel = group * span + block * WIDTH
                width = min(WIDTH, channels - channel)
                place = (row * ((channels + WIDTH - 1) // WIDTH) + group * GROUP + block) * tiles + number
                saved = pointer(views[3 * SAVED] + size * states * place)
                sums = pointer(base + part * block + size * 3 * states)
                dt, x, kind = tile.dt, tile.x, pointer(0)
                prepare(kind, views, use_softplus, row, start, steps, channel, width, dt, x, -TILE, spare)
                _gate(views, row, start, steps, channel, width, tile, sums, spare)
                high = steps
                while high > 0:  # one sequence after another, the last first
                    low = _start_of_sequence(views, row, start, high)
                    fresh = begins(views, FLAGS, row, start + low)
                    block_part = base + part * block
                    _there_and_back(views, row, start, low, high, fresh, states, tile, saved, block_part, db, dc)
                    high = low
                _finish(views, use_softplus, row, start, steps, channel, width, tile, sums, spare)
            _sum_lanes(views, DB, group, row * length + start, steps, states, db)
            _sum_lanes(views, DC, group, row * length + start, steps, states, dc)
        for block in range(blocks):
            channel = group * span + block * WIDTH
            _close_block(views, row, channel, min(WIDTH, channels - channel), states, base + part * block, spare)


@part
def _open_block(views, row, channel, width, states, part):  # pragma: no cover
    """A and the gradient of the final state of sixteen channels; sums at zero."""
    size = 4 * WIDTH * states
    load_columns(at(views, A, channel, 0), views[3 * A + 1], width, states, pointer(part), LOG2_E)
    load_state(views, DFINAL, row, channel, width, states, pointer(part + size))
    zero(pointer(part + 2 * size), states + 2)


@part
def _close_block(views, row, channel, width, states, part, spare):  # pragma: no cover
    """Write the gradients of the initial state and of A, D and the bias of sixteen channels."""
    size = 4 * WIDTH * states
    store_columns(pointer(part + size), states, width, at(views, DINITIAL, row, channel), views[3 * DINITIAL + 2])
    store_columns(pointer(part + 2 * size), states, width, at(views, DA, row, channel), views[3 * DA + 2])
    sums = pointer(part + 3 * size)
    store_some(pointer(views[3 * DD] + 4 * row * views[3 * DD + 1]), channel, width, load(sums, 0), spare)
    store_some(pointer(views[3 * DBIAS] + 4 * row * views[3 * DBIAS + 1]), channel, width, load(sums, WIDTH), spare)


@part
def _gate(views, row, start, steps, channel, width, tile, sums, spare):  # pragma: no cover
    """g, delta u and D u of a tile; the sums over n start at zero."""
    skip = load_vector(views, D, channel, width, spare)
    dd = load(sums, 0)
    for t in range(steps):
        prefetch(at(views, DY, row, start + t - TILE), channel)
        prefetch(at(views, DU, row, start + t), channel)  # will be written by _finish
        prefetch(at(views, DDELTA, row, start + t), channel)
        prefetch(at(views, DZ, row, start + t), channel)
        g = splat(0.0)
        if exists(views, FLAGS, row, start + t):
            g = load_some(at(views, DY, row, start + t), channel, width, spare)
            if views[3 * Z] != 0:
                z = load_some(at(views, Z, row, start + t), channel, width, spare)
                g = g * z * sigmoid(z)
        u = load(tile.x, t * WIDTH)
        dd = dd + g * u
        store(tile.g, t * WIDTH, g)
        store(tile.y, t * WIDTH, skip * u)
        store(tile.dtu, t * WIDTH, u * load(tile.dt, t * WIDTH))
        store(tile.ddt, t * WIDTH, splat(0.0))
        store(tile.gb, t * WIDTH, splat(0.0))
    store(sums, 0, dd)


@inlined
def _start_of_sequence(views, row, start, high):  # pragma: no cover
    """The last step of a tile before `high` at which a sequence begins; 0 where none does."""
    if views[3 * FLAGS] == 0:
        return 0
    low = high - 1
    while low > 0 and not begins(views, FLAGS, row, start + low):
        low -= 1
    return low


@part
def _there_and_back(views, row, start, low, high, fresh, states, tile, saved, part, db, dc):  # pragma: no cover
    """Every state from step `low` to `high` - 1 of a tile again, forwards, and its gradient, backwards.

    One state number after another. Where `fresh`, a sequence begins at `low`: nothing comes in, and no gradient
    goes out.
    """
    b, c = at(views, B, row, start), at(views, C, row, start)
    b_stride, c_stride = views[3 * B + 2], views[3 * C + 2]
    size = 4 * WIDTH * states
    a, later, da = pointer(part), pointer(part + size), pointer(part + 2 * size)
    for n in range(states):
        a_n, h = load(a, n * WIDTH), load(saved, n * WIDTH)
        if fresh:
            h = splat(0.0)
        store(tile.states, low * WIDTH, h)
        for t in range(low, high):
            i = t * WIDTH
            decay = exp2(load(tile.dt, i) * a_n)
            h = multiply_add(decay, h, load(tile.dtu, i) * splat(b[t * b_stride + n]))
            store(tile.decay, i, decay)
            store(tile.states, i + WIDTH, h)
            store(tile.y, i, load(tile.y, i) + h * splat(c[t * c_stride + n]))
        later_n, da_n = load(later, n * WIDTH), load(da, n * WIDTH)
        for t in range(high - 1, low - 1, -1):
            i, share = t * WIDTH, (n * TILE + t) * WIDTH
            g = load(tile.g, i)
            gc = g * splat(c[t * c_stride + n])
            here = later_n + gc  # the gradient of h[t]
            store(dc, share, load(dc, share) + g * load(tile.states, i + WIDTH))
            store(db, share, load(db, share) + here * load(tile.dtu, i))
            store(tile.gb, i, load(tile.gb, i) + here * splat(b[t * b_stride + n]))
            decay = load(tile.decay, i)
            later_n = multiply_add(decay, later_n, decay * gc)
            of_exponent = later_n * load(tile.states, i)  # the gradient of delta[t] A
            store(tile.ddt, i, load(tile.ddt, i) + of_exponent * a_n)
            da_n = da_n + of_exponent * load(tile.dt, i)
        if fresh:
            later_n = splat(0.0)
        store(later, n * WIDTH, later_n)
        store(da, n * WIDTH, da_n)


@part
def _finish(views, use_softplus, row, start, steps, channel, width, tile, sums, spare):  # pragma: no cover
    """The gradients of u, delta and z of a tile."""
    skip = load_vector(views, D, channel, width, spare)
    bias = load_vector(views, BIAS, channel, width, spare)
    dbias = load(sums, WIDTH)
    for t in range(steps):
        du, ddelta, dz = splat(0.0), splat(0.0), splat(0.0)
        if exists(views, FLAGS, row, start + t):
            i = t * WIDTH
            gb = load(tile.gb, i)
            du = gb * load(tile.dt, i) + skip * load(tile.g, i)
            ddelta = gb * load(tile.x, i) + load(tile.ddt, i) * splat(1.0 / LOG2_E)  # `a` was in powers of two
            if use_softplus:
                raw = load_some(at(views, DELTA, row, start + t), channel, width, spare) + bias
                ddelta = ddelta * sigmoid(raw)
            dbias = dbias + ddelta
            if views[3 * Z] != 0:
                z = load_some(at(views, Z, row, start + t), channel, width, spare)
                s = sigmoid(z)
                slope = s + z * s * (splat(1.0) - s)
                dz = load_some(at(views, DY, row, start + t), channel, width, spare) * load(tile.y, i) * slope
        store_some(at(views, DU, row, start + t), channel, width, du, spare)
        store_some(at(views, DDELTA, row, start + t), channel, width, ddelta, spare)
        if views[3 * Z] != 0:
            store_some(at(views, DZ, row, start + t), channel, width, dz, spare)
    store(sums, WIDTH, dbias)


@part
def _sum_lanes(views, which, group, step, steps, states, shares):  # pragma: no cover
    """The sums over a group's channels to [group, step, :], and zero in their place."""
    for t in range(steps):
        out = at(views, which, group, step + t)
        for n in range(states):
            i = (n * TILE + t) * WIDTH
            out[n] = total(load(shares, i))
            store(shares, i, splat(0.0))
