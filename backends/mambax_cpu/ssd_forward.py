"""The scan of Mamba-2: the kernels.

A task is one row of the batch and some heads of one group. It goes through the sequence in chunks (see
:mod:`mambax_cpu.ssd_chunks`); with X = dt x, S[t, s] = C[t] . B[s] and the decays d from step s, or from before
the chunk, to step t, whose last step is e::

    y[t] = d[t] C[t] . h + sum over s <= t of d[t, s] S[t, s] X[s] + D x[t]
    h    = d[e] h + sum over s of d[e, s] B[s] X[s]

All of it are products of matrices that lie in the first and second cache. S is computed once for all heads of a
task. On request the state before every chunk is saved, for :mod:`mambax_cpu.ssd_backward`.

Why not one step after another: with the state in registers that takes three operations on each value of the state
for each step, the products 2 + CHUNK / N. Measured at H 24, P 64, N 128, L 512 on one core of an AMD EPYC (Zen 5):
3.4 ms for all of this file, 5.5 ms for that recurrence alone, and over 15 ms for the same products by NumPy, one
chunk at a time, without what is between them. Chunks of 32 steps take as long and save twice as many states.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state, T steps of a chunk; in kernels, P and N are
in whole vectors, width and states the sizes themselves.
"""

from __future__ import annotations

from mambax_cpu.compilation import kernel, part, spliced
from mambax_cpu.linear_tiles import bfloat16_at, float16_at
from mambax_cpu.memory import begins, element_at, exists, zero
from mambax_cpu.precision import read, write
from mambax_cpu.simd import integers_at, load, multiply_add, pointer, splat, store
from mambax_cpu.ssd_chunks import (
    FINAL,
    FLAGS,
    INITIAL,
    B,
    C,
    D,
    X,
    Y,
    copy,
    correlate,
    find_decays,
    find_steps,
    in_rows,
    load_rows,
    load_state,
    load_time_steps,
    lower_product,
    saved_state,
    scale,
    scale_rows,
    store_state,
)
from mambax_cpu.ssd_products import multiply, multiply_lower
from mambax_cpu.ssd_tiles import CHUNK
from mambax_cpu.tiles import WIDTH


@kernel
def forward(
    table, length, heads, width, groups, states, shared, use_softplus, low, high, first, last, scratch
):  # pragma: no cover
    """Tasks `first` to `last` - 1 of the forward scan.

    Args:
        table: the operand table up to FINAL. X and Y are of the kernel's precision, the others float32.
        length, heads, width, groups, states: L, H, P, G, N.
        shared: heads of a task, of one group.
        use_softplus: whether dt goes through softplus.
        low, high: limits of dt.
        first, last: tasks, of B * G * ceil(H / G / shared).
        scratch: float32, of :func:`mambax_cpu.ssd_tiles.ssd_scratch`.
    """
    _scan(
        pointer(0), table, length, heads, width, groups, states, shared, use_softplus, low, high, first, last,
        scratch,
    )  # fmt: skip


@kernel
def forward_bfloat16(
    table, length, heads, width, groups, states, shared, use_softplus, low, high, first, last, scratch
):  # pragma: no cover
    """As :func:`forward`."""
    _scan(
        bfloat16_at(0), table, length, heads, width, groups, states, shared, use_softplus, low, high, first, last,
        scratch,
    )  # fmt: skip


@kernel
def forward_float16(
    table, length, heads, width, groups, states, shared, use_softplus, low, high, first, last, scratch
):  # pragma: no cover
    """As :func:`forward`."""
    _scan(
        float16_at(0), table, length, heads, width, groups, states, shared, use_softplus, low, high, first, last,
        scratch,
    )  # fmt: skip


@spliced
def _scan(
    kind, table, length, heads, width, groups, states, shared, use_softplus, low, high, first, last, scratch
):  # pragma: no cover
    """The body of the kernels; `kind` is an address of the type of x and y."""
    views, base = integers_at(table.ctypes.data), (scratch.ctypes.data + 63) // 64 * 64
    P, N = (width + WIDTH - 1) // WIDTH * WIDTH, (states + WIDTH - 1) // WIDTH * WIDTH
    b, c, turned = base, base + 4 * CHUNK * N, base + 8 * CHUNK * N
    x, y = base + 12 * CHUNK * N, base + 4 * CHUNK * (3 * N + P)
    scores = y + 4 * CHUNK * P
    weights = scores + 4 * CHUNK * CHUNK
    dt = weights + 4 * CHUNK * CHUNK
    log_a, from_start, sums, steps = dt + 4 * CHUNK, dt + 8 * CHUNK, dt + 12 * CHUNK, integers_at(dt + 16 * CHUNK)
    held = dt + 24 * CHUNK  # the states of the heads
    size, of_group = 4 * N * P, heads // groups
    parts = (of_group + shared - 1) // shared
    for task in range(first, last):
        row, group = task // (groups * parts), task // parts % groups
        head_first = group * of_group + task % parts * shared
        head_end = min(head_first + shared, (group + 1) * of_group)
        for head in range(head_first, head_end):
            load_state(views, INITIAL, row, head, width, states, held + size * (head - head_first), P)
        position = 0
        while position < length:
            chunk = position // CHUNK
            start, end = position, min(length, (chunk + 1) * CHUNK)
            fresh, saves = begins(views, FLAGS, row, start), start == chunk * CHUNK
            count, position = find_steps(views, row, start, end, steps)
            rows = in_rows(count)
            if count > 0:
                load_rows(pointer(0), views, B, row, steps, count, group * states, states, b, N)
                load_rows(pointer(0), views, C, row, steps, count, group * states, states, c, N)
                correlate(b, c, N, rows, turned, scores)
            for head in range(head_first, head_end):
                h = held + size * (head - head_first)
                if saves and saved_state(views, row * heads + head, chunk) != 0:
                    copy(pointer(h), pointer(saved_state(views, row * heads + head, chunk)), N * P)
                if fresh:
                    zero(pointer(h), N * P // WIDTH)
                if count > 0:
                    load_rows(kind, views, X, row, steps, count, head * width, width, x, P)
                    load_time_steps(
                        views, row, head, steps, count, use_softplus, low, high, pointer(dt), pointer(log_a)
                    )
                    find_decays(pointer(log_a), rows, pointer(sums), pointer(from_start), pointer(weights))
                    scale_rows(pointer(x), pointer(dt), rows, P, pointer(x))
                    _advance(b, c, scores, weights, from_start, x, y, h, rows, N, P)
                _write(kind, views, row, head, start, position, steps, count, width, pointer(y), P)
        for head in range(head_first, head_end):
            store_state(views, FINAL, row, head, width, states, held + size * (head - head_first), P)


@part
def _advance(b, c, scores, weights, from_start, x, y, h, rows, N, P):  # pragma: no cover
    """y without the skip, and the state after a chunk. `weights` holds the decays first; x is used up."""
    zero(pointer(y), rows * P // WIDTH)
    multiply(c, N, 1, h, P, y, P, rows, P, N)
    scale_rows(pointer(y), pointer(from_start), rows, P, pointer(y))
    to_end = weights + 4 * (rows - 1) * CHUNK
    decays = from_start - 4 * CHUNK  # the logarithms are not needed any more
    for s in range(0, rows, WIDTH):
        store(pointer(decays), s, load(pointer(to_end), s))
    lower_product(pointer(weights), pointer(scores), rows, pointer(weights))
    multiply_lower(weights, CHUNK, x, P, y, P, rows, P)
    scale_rows(pointer(x), pointer(decays), rows, P, pointer(x))
    scale(pointer(h), pointer(from_start)[rows - 1], N * P)
    multiply(b, 1, N, x, P, h, P, N, P, rows)


@part
def _write(kind, views, row, head, start, end, steps, count, width, y, stride):  # pragma: no cover
    """y + D x out; zero where a position does not exist."""
    skip = splat(pointer(views[3 * D])[head]) if views[3 * D] != 0 else splat(0.0)
    for position in range(start, end):
        if not exists(views, FLAGS, row, position):
            out = element_at(kind, views, Y, row, position)
            for j in range(0, width, WIDTH):
                write(out, head * width + j, splat(0.0), width - j)
    for t in range(count):
        source, out = element_at(kind, views, X, row, steps[t]), element_at(kind, views, Y, row, steps[t])
        for j in range(0, width, WIDTH):
            x = read(source, head * width + j, width - j)
            write(out, head * width + j, multiply_add(x, skip, load(y, t * stride + j)), width - j)
