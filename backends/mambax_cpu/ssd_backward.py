"""The gradient of the scan of Mamba-2: the kernels.

Names are those of :mod:`mambax_cpu.ssd_forward`: X = dt x, S[t, s] = C[t] . B[s], h the state before a chunk, d
the decays and e the last step. With g the gradient of y, G that of the state after the chunk, sums over s <= t::

    M[t, s] = d[t, s] (g[t] . X[s])
    dX[s] = d[e, s] G B[s] + sum over t of d[t, s] S[t, s] g[t]
    dB[s] = d[e, s] X[s] G + sum over t of M[t, s] C[t]
    dC[t] = d[t] g[t] h + sum over s of M[t, s] B[s]
    G     = d[e] G + sum over t of d[t] g[t] C[t]^T          for the chunk before

The logarithm of the decay of step t, dt[t] A, takes part in every path from before t to t or after it: from a state
or an input, to an output or the state after::

    q[t] = C[t] . (first term of dC[t])        r[s] = X[s] . (first term of dX[s])
    d(dt[t] A) = sum over u >= t of q[u] + sum over s < t of r[s] + d[e] G . h
                 + sum over s < t <= u of M[u, s] S[u, s]

Chunks are gone through from the last to the first. The state before each was saved by the forward pass; all else is
computed again, so that nothing is ever as large as (B, L, H, P, N). Sums over heads and rows are made in an order
that does not depend on the number of threads.

Dimensions: as of :mod:`mambax_cpu.ssd_forward`.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu.compilation import kernel, part
from mambax_cpu.memory import at, begins, exists, zero
from mambax_cpu.precision import write
from mambax_cpu.simd import integers_at, load, multiply_add, pointer, sigmoid, splat, store, total
from mambax_cpu.ssd_chunks import (
    BIAS,
    DT,
    FINAL,
    FLAGS,
    A,
    B,
    C,
    D,
    X,
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
from mambax_cpu.ssd_products import multiply, multiply_lower, multiply_lower_transposed, transpose
from mambax_cpu.ssd_tiles import CHUNK
from mambax_cpu.tiles import WIDTH

# Rows of the operand table after those of the forward kernel: gradients given, then gradients to write. Those of B
# and C have one share per part of a group, (parts, B L, G N); those of A, D and the bias one per row, (B, H).
DY, DFINAL, DX, DDT, DB, DC, DA, DD, DBIAS, DINITIAL = range(FINAL + 1, FINAL + 11)


@kernel
def backward(
    table, length, heads, width, groups, states, shared, use_softplus, low, high, first, last, scratch
):  # pragma: no cover
    """Tasks `first` to `last` - 1 of the gradient.

    Args:
        table: the operand table up to DINITIAL, all float32.
        scratch: float32, of :func:`mambax_cpu.ssd_tiles.ssd_backward_scratch`.
        length, heads, width, groups, states, shared, use_softplus, low, high, first, last: as of
            :func:`mambax_cpu.ssd_forward.forward`.
    """
    views, base = integers_at(table.ctypes.data), (scratch.ctypes.data + 63) // 64 * 64
    P, N = (width + WIDTH - 1) // WIDTH * WIDTH, (states + WIDTH - 1) // WIDTH * WIDTH
    line = 4 * CHUNK
    b, c, turned, db, dc = base, base + line * N, base + 2 * line * N, base + 3 * line * N, base + 4 * line * N
    x = base + 6 * line * N
    scores = x + 5 * line * P
    dt = scores + 3 * line * CHUNK
    log_a, steps = dt + line, integers_at(dt + 9 * line)
    held = dt + 11 * line  # the gradients of the states of the heads
    size, of_group = 4 * N * P, heads // groups
    h = held + size * shared
    parts = (of_group + shared - 1) // shared
    for task in range(first, last):
        row, group, number = task // (groups * parts), task // parts % groups, task % parts
        head_first = group * of_group + number * shared
        head_end = min(head_first + shared, (group + 1) * of_group)
        for head in range(head_first, head_end):
            load_state(views, DFINAL, row, head, width, states, held + size * (head - head_first), P)
            for which in range(DA, DBIAS + 1):
                at(views, which, row, 0)[head] = 0
        end = length
        while end > 0:
            chunk = (end - 1) // CHUNK
            start = chunk * CHUNK if views[3 * FLAGS] == 0 else end - 1
            while start > chunk * CHUNK and not begins(views, FLAGS, row, start):
                start -= 1
            fresh = begins(views, FLAGS, row, start)
            count, _ = find_steps(views, row, start, end, steps)
            rows = in_rows(count)
            load_rows(pointer(0), views, B, row, steps, count, group * states, states, b, N)
            load_rows(pointer(0), views, C, row, steps, count, group * states, states, c, N)
            zero(pointer(db), 2 * CHUNK * N // WIDTH)  # and dc
            if count > 0:
                correlate(b, c, N, rows, turned, scores)
            for head in range(head_first, head_end):
                later = held + size * (head - head_first)
                if count > 0:
                    load_rows(pointer(0), views, X, row, steps, count, head * width, width, x, P)
                    load_rows(pointer(0), views, DY, row, steps, count, head * width, width, x + 2 * line * P, P)
                    load_time_steps(
                        views, row, head, steps, count, use_softplus, low, high, pointer(dt), pointer(log_a)
                    )
                    if fresh:
                        zero(pointer(h), N * P // WIDTH)
                    else:
                        copy(pointer(saved_state(views, row * heads + head, chunk)), pointer(h), N * P)
                    _go_back(base, h, later, rows, N, P)
                    _finish(
                        views, use_softplus, low, high, row, head, steps, count, width, x, x + 2 * line * P,
                        x + 3 * line * P, dt, P,
                    )  # fmt: skip
                if fresh:
                    zero(pointer(later), N * P // WIDTH)
                _skip(views, row, head, start, end, width)
            _write_shares(views, DB, number, row, length, start, end, group * states, states, db, N)
            _write_shares(views, DC, number, row, length, start, end, group * states, states, dc, N)
            end = start
        for head in range(head_first, head_end):
            store_state(views, DINITIAL, row, head, width, states, held + size * (head - head_first), P)


@part
def _go_back(base, h, later, rows, N, P):  # pragma: no cover
    """dX, the gradients of dt A and of the state before, in place; adds to those of B and C."""
    line = 4 * CHUNK
    b, c, db, dc, spare = base, base + line * N, base + 3 * line * N, base + 4 * line * N, base + 5 * line * N
    x = base + 6 * line * N
    inputs, g, dx, scaled = x + line * P, x + 2 * line * P, x + 3 * line * P, x + 4 * line * P
    scores = x + 5 * line * P
    decays, m = scores + line * CHUNK, scores + 2 * line * CHUNK
    dt = scores + 3 * line * CHUNK
    log_a, from_start, sums, to_end = dt + line, dt + 2 * line, dt + 3 * line, dt + 4 * line
    q, r, dlog = dt + 5 * line, dt + 6 * line, dt + 7 * line
    turned = h + 4 * N * P  # room for a state, (P, N)

    find_decays(pointer(log_a), rows, pointer(sums), pointer(from_start), pointer(decays))
    copy(pointer(decays + line * (rows - 1)), pointer(to_end), CHUNK)
    scale_rows(pointer(x), pointer(dt), rows, P, pointer(inputs))
    correlate(inputs, g, P, rows, scaled, m)
    lower_product(pointer(m), pointer(decays), rows, pointer(m))
    lower_product(pointer(decays), pointer(scores), rows, pointer(decays))

    zero(pointer(dx), rows * P // WIDTH)
    multiply(b, N, 1, later, P, dx, P, rows, P, N)
    scale_rows(pointer(dx), pointer(to_end), rows, P, pointer(dx))
    _dots(pointer(inputs), pointer(dx), rows, P, pointer(r))
    multiply_lower_transposed(decays, CHUNK, g, P, dx, P, rows, P)

    transpose(later, P, N, P, turned, N)
    scale_rows(pointer(inputs), pointer(to_end), rows, P, pointer(scaled))
    multiply(scaled, P, 1, turned, N, db, N, rows, N, P)
    multiply_lower_transposed(m, CHUNK, c, N, db, N, rows, N)

    transpose(h, P, N, P, turned, N)
    scale_rows(pointer(g), pointer(from_start), rows, P, pointer(scaled))
    zero(pointer(spare), rows * N // WIDTH)
    multiply(scaled, P, 1, turned, N, spare, N, rows, N, P)
    _dots(pointer(c), pointer(spare), rows, N, pointer(q))
    for i in range(0, rows * N, WIDTH):
        store(pointer(dc), i, load(pointer(dc), i) + load(pointer(spare), i))
    multiply_lower(m, CHUNK, b, N, dc, N, rows, N)

    left = pointer(from_start)[rows - 1]
    through = splat(0.0)
    for i in range(0, N * P, WIDTH):
        through = multiply_add(load(pointer(h), i), load(pointer(later), i), through)
    _gradient_of_logarithms(
        pointer(m),
        pointer(scores),
        pointer(q),
        pointer(r),
        total(through) * left,
        rows,
        pointer(sums),
        pointer(dlog),
    )
    scale(pointer(later), left, N * P)
    multiply(c, 1, N, scaled, P, later, P, N, P, rows)


@part
def _dots(a, b, rows, stride, out):  # pragma: no cover
    """out[t] = a[t] . b[t]."""
    for t in range(rows):
        value = splat(0.0)
        for j in range(t * stride, (t + 1) * stride, WIDTH):
            value = multiply_add(load(a, j), load(b, j), value)
        out[t] = total(value)


@part
def _gradient_of_logarithms(m, scores, q, r, through, rows, sums, out):  # pragma: no cover
    """The gradient of dt A of each step, as the head of this file says; `sums` is room."""
    before = np.float32(0)
    for t in range(rows):
        out[t] = before
        before += r[t]
    zero(sums, CHUNK // WIDTH)
    after = np.float32(0)
    for t in range(rows - 1, -1, -1):
        after += q[t]
        for s in range(0, t + 1, WIDTH):
            place = t * CHUNK + s
            store(sums, s, multiply_add(load(m, place), load(scores, place), load(sums, s)))
        sums[t] = 0  # a path over step t starts before it
        inside = splat(0.0)
        for s in range(0, t + 1, WIDTH):
            inside = inside + load(sums, s)
        out[t] += after + through + total(inside)


@part
def _finish(
    views, use_softplus, low, high, row, head, steps, count, width, x, g, dx, dt, stride
):  # pragma: no cover
    """The gradients of x and dt of a chunk out, and what it adds to those of A, D and the bias."""
    line = 4 * CHUNK
    slopes, dlog = pointer(dt + line), pointer(dt + 7 * line)
    bias = pointer(views[3 * BIAS])[head] if views[3 * BIAS] != 0 else np.float32(0)
    a = pointer(views[3 * A])[head]
    skip = splat(pointer(views[3 * D])[head]) if views[3 * D] != 0 else splat(0.0)
    for t in range((count + WIDTH - 1) // WIDTH * WIDTH):
        slopes[t] = at(views, DT, row, steps[t])[head] + bias if t < count else np.float32(0)
    for t in range(0, count, WIDTH):
        store(slopes, t, sigmoid(load(slopes, t)) if use_softplus else splat(1.0))
    da, dbias, dskip = np.float32(0), np.float32(0), splat(0.0)
    for t in range(count):
        length = pointer(dt)[t]
        out, of_step = at(views, DX, row, steps[t]), splat(0.0)
        for j in range(0, width, WIDTH):
            i = t * stride + j
            dx_j, x_j, g_j = load(pointer(dx), i), load(pointer(x), i), load(pointer(g), i)
            of_step = multiply_add(dx_j, x_j, of_step)
            dskip = multiply_add(g_j, x_j, dskip)
            write(out, head * width + j, multiply_add(dx_j, splat(length), g_j * skip), width - j)
        da += dlog[t] * length
        ddt = np.float32(0)
        if not (length <= low or length >= high):
            ddt = (total(of_step) + dlog[t] * a) * slopes[t]
        at(views, DDT, row, steps[t])[head] = ddt
        dbias += ddt
    at(views, DA, row, 0)[head] += da
    at(views, DBIAS, row, 0)[head] += dbias
    at(views, DD, row, 0)[head] += total(dskip)


@part
def _skip(views, row, head, start, end, width):  # pragma: no cover
    """Gradients of zero where a position does not exist."""
    for position in range(start, end):
        if not exists(views, FLAGS, row, position):
            at(views, DDT, row, position)[head] = 0
            for j in range(0, width, WIDTH):
                write(at(views, DX, row, position), head * width + j, splat(0.0), width - j)


@part
def _write_shares(
    views, which, number, row, length, start, end, column, states, values, stride
):  # pragma: no cover
    """The gradients of B or C of a chunk, summed over the heads of a task, to their share."""
    t = 0
    for position in range(start, end):
        out, here = at(views, which, number, row * length + position), exists(views, FLAGS, row, position)
        for n in range(0, states, WIDTH):
            value = load(pointer(values), t * stride + n) if here else splat(0.0)
            write(out, column + n, value, states - n)
        t += 1 if here else 0
