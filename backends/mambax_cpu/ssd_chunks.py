"""What both directions of the scan of Mamba-2 do first with a chunk.

A chunk is what exists of up to `CHUNK` neighbouring positions of one sequence: positions that a mask leaves out are
skipped, and where a new sequence begins a new chunk does. Rows up to a multiple of `ROWS` are filled with steps of
no length, zero everywhere, which change nothing.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state, T steps of a chunk.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu.compilation import inlined, part
from mambax_cpu.memory import at, begins, element_at, exists, zero
from mambax_cpu.precision import read
from mambax_cpu.simd import LOG2_E, exp2, load, pointer, softplus, splat, store
from mambax_cpu.ssd_products import ROWS, multiply, transpose
from mambax_cpu.ssd_tiles import CHUNK
from mambax_cpu.tiles import WIDTH

# Rows of the operand table (see operands.py). X and Y are (B, L, H P), DT (B, L, H), B and C (B, L, G N), INITIAL
# and FINAL (B, H, P N), SAVED (B H, ceil(L / CHUNK), N P) with both sizes in whole vectors.
X, DT, B, C, FLAGS, A, D, BIAS, INITIAL, SAVED, Y, FINAL = range(12)

_NEVER = -1e30  # the logarithm of a decay that leaves nothing


@part
def find_steps(views, row, first, end, steps):  # pragma: no cover
    """The positions of a chunk from `first` on that exist, to `steps`: their number, and where the next begins."""
    position, count = first, 0
    while position < end and (position == first or not begins(views, FLAGS, row, position)):
        if exists(views, FLAGS, row, position):
            steps[count] = position
            count += 1
        position += 1
    return count, position


@inlined
def in_rows(count):  # pragma: no cover
    """`count` in multiples of ROWS."""
    return (count + ROWS - 1) // ROWS * ROWS


@part
def load_rows(kind, views, which, row, steps, count, column, columns, out, stride):  # pragma: no cover
    """`columns` values from `column` on of each step, widened, zero up to whole vectors; then rows of zeros.

    `kind` is an address of the type of the operand, `out` an int64 address.
    """
    for t in range(in_rows(count)):
        target = pointer(out + 4 * t * stride)
        if t >= count:
            zero(target, stride // WIDTH)
            continue
        source = element_at(kind, views, which, row, steps[t])
        for j in range(0, columns, WIDTH):
            store(target, j, read(source, column + j, columns - j))


@part
def load_time_steps(views, row, head, steps, count, use_softplus, low, high, dt, log_a):  # pragma: no cover
    """dt after bias, softplus and limits, and dt A as a power of two, of each step; zero up to whole vectors."""
    bias = pointer(views[3 * BIAS])[head] if views[3 * BIAS] != 0 else np.float32(0)
    a = splat(pointer(views[3 * A])[head] * np.float32(LOG2_E))
    rows = (count + WIDTH - 1) // WIDTH * WIDTH
    for t in range(rows):
        dt[t] = at(views, DT, row, steps[t])[head] + bias if t < count else np.float32(0)
    if use_softplus:
        for t in range(0, rows, WIDTH):
            store(dt, t, softplus(load(dt, t)))
    for t in range(rows):
        if t >= count:
            dt[t] = 0
        elif dt[t] < low:
            dt[t] = low
        elif dt[t] > high:
            dt[t] = high
    for t in range(0, rows, WIDTH):
        store(log_a, t, load(dt, t) * a)


@part
def find_decays(log_a, rows, sums, from_start, decays):  # pragma: no cover
    """What is left at step t of the state before the chunk, and of step s: decays[t, s], zero for s > t.

    Every exponent is summed by itself: the difference of two running sums would lose digits where a step forgets
    everything. `decays` has rows of CHUNK.
    """
    for v in range(0, CHUNK, WIDTH):
        store(sums, v, splat(_NEVER))
    total = np.float32(0)
    for t in range(rows):
        step, line = splat(log_a[t]), t * CHUNK
        total += log_a[t]
        from_start[t] = total
        for s in range(0, t + 1, WIDTH):
            store(sums, s, load(sums, s) + step)
        sums[t] = 0
        for s in range(0, CHUNK, WIDTH):
            store(decays, line + s, exp2(load(sums, s)) if s <= t else splat(0.0))
    for t in range(0, rows, WIDTH):
        store(from_start, t, exp2(load(from_start, t)))


@part
def correlate(b, c, states, rows, turned, scores):  # pragma: no cover
    """scores[t, s] = C[t] . B[s]; all at int64 addresses, `turned` is room for B^T."""
    transpose(b, states, rows, states, turned, CHUNK)
    columns = (rows + WIDTH - 1) // WIDTH * WIDTH
    if columns > rows:
        for n in range(states):
            for t in range(rows, columns):
                pointer(turned)[n * CHUNK + t] = 0
    zero(pointer(scores), rows * CHUNK // WIDTH)
    multiply(c, states, 1, turned, CHUNK, scores, CHUNK, rows, columns, states)


@part
def lower_product(a, b, rows, out):  # pragma: no cover
    """out = a b, value by value, of matrices with rows of CHUNK, a zero above the diagonal."""
    for t in range(rows):
        for s in range(t * CHUNK, (t + 1) * CHUNK, WIDTH):
            store(out, s, load(a, s) * load(b, s))


@part
def scale_rows(values, factors, rows, stride, out):  # pragma: no cover
    """out[t] = factors[t] values[t]."""
    for t in range(rows):
        factor = splat(factors[t])
        for j in range(t * stride, (t + 1) * stride, WIDTH):
            store(out, j, load(values, j) * factor)


@part
def scale(values, factor, count):  # pragma: no cover
    """values *= factor."""
    for i in range(0, count, WIDTH):
        store(values, i, load(values, i) * splat(factor))


@part
def load_state(views, which, row, head, width, states, out, columns):  # pragma: no cover
    """A state of a (B, H, P N) operand as (N, P) in whole vectors, zero beyond and where it is absent."""
    zero(pointer(out), (states + WIDTH - 1) // WIDTH * columns)
    if views[3 * which] != 0:
        source = views[3 * which] + 4 * (row * views[3 * which + 1] + head * views[3 * which + 2])
        transpose(source, states, width, states, out, columns)


@part
def store_state(views, which, row, head, width, states, values, columns):  # pragma: no cover
    """The reverse of :func:`load_state`."""
    target = views[3 * which] + 4 * (row * views[3 * which + 1] + head * views[3 * which + 2])
    transpose(values, columns, states, width, target, states)


@inlined
def saved_state(views, row_and_head, chunk):  # pragma: no cover
    """Where the state before a chunk is saved, (N, P) in whole vectors; 0 where none is to be."""
    place = row_and_head * views[3 * SAVED + 1] + chunk * views[3 * SAVED + 2]
    return views[3 * SAVED] + 4 * place if views[3 * SAVED] != 0 else 0


@part
def copy(source, target, count):  # pragma: no cover
    """target = source."""
    for i in range(0, count, WIDTH):
        store(target, i, load(source, i))
