"""What a prompt goes through in :mod:`mambax_cpu.prompt_kernels`: a product, the convolution, the recurrence.

What :mod:`mambax_cpu.product_kernels`, :mod:`mambax_cpu.conv_kernels` and :mod:`mambax_cpu.scan_forward` do for any
arguments, for those of a block that reads a prompt: whole vectors, no mask, no packed rows, delta through softplus,
a gate, and nothing kept for a gradient. That leaves one loop of each, with as much done as possible while values
are in the first cache: the convolution makes four steps of seven inputs at a time, and the recurrence makes its own
time steps, as products with a strip of dt_proj.

Products are of words: a float32, or two bfloat16 that lie side by side. Processors that multiply those add the two
products of a pair of words to each of sixteen float32 lanes in one instruction, ``vdpbf16ps`` of AVX-512. Where
results are rounded to bfloat16, exponentials are only as exact as that needs.

Dimensions: B batch, L length, D channels, N d_state, R dt_rank; I inputs and O outputs of a product.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from mambax_cpu.compilation import inlined, part, spliced
from mambax_cpu.kernel_types import declared
from mambax_cpu.linear_tiles import moved
from mambax_cpu.memory import load_columns, store_columns
from mambax_cpu.precision import like, read, write
from mambax_cpu.product_kernels import COLUMNS, ROWS, pack, tile
from mambax_cpu.simd import (
    LOG2_E,
    exp,
    exp2_for,
    load,
    multiply_add,
    pointer,
    prefetch,
    sigmoid_for,
    softplus_for,
    splat,
    store,
)
from mambax_cpu.tiles import ADDED, CONV_STEPS, EDGE, NARROW, SCAN_TILE, STRIP, WIDTH

_LANES, _WORDS = ir.VectorType(ir.FloatType(), WIDTH), ir.VectorType(ir.IntType(32), WIDTH)


def _add_pairs(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_LANES, [_LANES, _WORDS, _WORDS])
    function = declared(builder.module, "llvm.x86.avx512bf16.dpbf16ps.512", kind)
    return builder.call(function, [c, builder.bitcast(a, _WORDS), builder.bitcast(b, _WORDS)])


tile_of_pairs = tile(ROWS, _add_pairs)
"""As :data:`mambax_cpu.product_kernels.tile_of_all`, of pairs of bfloat16."""


@spliced
def multiply(
    narrow, whole, x, x_row, weight, out, out_row, bias, form, rows, outputs, inputs, group, splits, task, scratch
):  # pragma: no cover
    """A task of out = x weight^T + bias, or of out += x weight^T + bias, of ceil(ceil(O / STRIP) / group) * splits.

    The panels are as long as the sums, which are rounded once.

    Args:
        narrow: an address of the type of x, weight and bias.
        whole: the tile of a product of words of such values.
        x: address of (rows, I), with contiguous rows `x_row` words apart.
        weight: address of (O, I).
        out: address of (rows, O), with contiguous rows `out_row` elements apart.
        bias: address of (O,), or 0.
        form: of :mod:`mambax_cpu.tiles`, what becomes of the sums.
        rows, outputs, inputs: at least a tile's rows; whole vectors; words.
        group: strips that a task takes together.
        splits: into how many ranges the rows are cut, each of at least a tile's.
        scratch: address of float32, of :func:`mambax_cpu.tiles.prompt_scratch`.
    """
    edge = pointer((scratch + 63) // 64 * 64)
    biases = (scratch + 63) // 64 * 64 + 4 * EDGE
    panels = biases + 4 * STRIP * group
    low, high = task // splits * group * STRIP, min(outputs, (task // splits + 1) * group * STRIP)
    first, end = rows * (task % splits) // splits, rows * (task % splits + 1) // splits
    for j in range(low, high, WIDTH):
        store(pointer(biases), j - low, read(like(narrow, bias), j, WIDTH) if bias != 0 else splat(0.0))
    for j in range(low, high, COLUMNS):
        pack(weight, inputs, 1, outputs, j, inputs, panels + 4 * (j - low) * inputs)
    for new in range(first, end, ROWS):
        i = min(new, end - ROWS)  # the last tile may begin in the one before, whose results are not written again
        for j in range(low, high, COLUMNS):
            panel, line = pointer(panels + 4 * (j - low) * inputs), pointer(x + 4 * i * x_row)
            place, wide = i * out_row + j, min(COLUMNS, outputs - j)
            start, start_row = pointer(biases + 4 * (j - low)), 0
            if form == ADDED:
                _add_bias(start, pointer(out + 4 * place), out_row, edge, wide)
                start, start_row = edge, COLUMNS
            if form == 0 and i == new and wide == COLUMNS:
                whole(line, x_row, panel, inputs, start, start_row, pointer(out + 4 * place), out_row)
                continue
            whole(line, x_row, panel, inputs, start, start_row, edge, COLUMNS)
            if form == NARROW:
                _copy(edge, new - i, moved(like(narrow, out), place), out_row, wide)
            else:
                _copy(edge, new - i, pointer(out + 4 * place), out_row, wide)


@part
def _copy(edge, first, out, out_row, wide):  # pragma: no cover
    """Rows of a tile, from `first` on, to where they belong."""
    for i in range(first, ROWS):
        for j in range(0, wide, WIDTH):
            write(out, i * out_row + j, load(edge, i * COLUMNS + j), WIDTH)


@part
def _add_bias(bias, out, out_row, edge, wide):  # pragma: no cover
    """What a tile is to be added to, and the bias, to the tile."""
    for i in range(ROWS):
        for j in range(0, wide, WIDTH):
            store(edge, i * COLUMNS + j, load(out, i * out_row + j) + load(bias, j))


@inlined
def _inputs(kind, x, x_row, state, length, channels, row, step):  # pragma: no cover
    """The inputs of a step; of one after the last, some."""
    if step < 0:
        return moved(like(kind, state), (row * 3 + 3 + step) * channels)
    return moved(like(kind, x), (row * length + min(step, length - 1)) * x_row)


@spliced
def convolve(kind, x, x_row, state, after, weights, out, length, channels, task):  # pragma: no cover
    """A task of the convolution with bias and SiLU, of B * ceil(L / 4) groups of four steps.

    Args:
        kind: an address of the type of x, state and out.
        x: address of (B, L, D), with contiguous rows `x_row` elements apart.
        state, after: addresses of (B, 3, D), the inputs before, and where the last ones are to be written.
        weights: address of (5, D) float32: those of the steps, then the bias.
        out: address of (B, L, D).
        length, channels: L, D, whole vectors.
    """
    groups = (length + CONV_STEPS - 1) // CONV_STEPS
    row, t = task // groups, task % groups * CONV_STEPS
    last, w = min(CONV_STEPS, length - t) - 1, pointer(weights)
    in_0 = _inputs(kind, x, x_row, state, length, channels, row, t - 3)
    in_1 = _inputs(kind, x, x_row, state, length, channels, row, t - 2)
    in_2 = _inputs(kind, x, x_row, state, length, channels, row, t - 1)
    in_3 = _inputs(kind, x, x_row, state, length, channels, row, t)
    in_4 = _inputs(kind, x, x_row, state, length, channels, row, t + 1)
    in_5 = _inputs(kind, x, x_row, state, length, channels, row, t + 2)
    in_6 = _inputs(kind, x, x_row, state, length, channels, row, t + 3)
    out_0 = moved(like(kind, out), (row * length + t) * channels)
    out_1, out_2 = moved(out_0, min(1, last) * channels), moved(out_0, min(2, last) * channels)
    out_3 = moved(out_0, last * channels)
    for i in range(0, channels, WIDTH):
        w_0, w_1, w_2 = load(w, i), load(w, channels + i), load(w, 2 * channels + i)
        w_3, bias = load(w, 3 * channels + i), load(w, 4 * channels + i)
        x_0, x_1, x_2 = read(in_0, i, WIDTH), read(in_1, i, WIDTH), read(in_2, i, WIDTH)
        x_3, x_4 = read(in_3, i, WIDTH), read(in_4, i, WIDTH)
        x_5, x_6 = read(in_5, i, WIDTH), read(in_6, i, WIDTH)
        # where there are fewer than four steps, those that are not there go first to the place of the last
        _write(kind, out_3, i, _sum(x_3, x_4, x_5, x_6, w_0, w_1, w_2, w_3, bias))
        _write(kind, out_2, i, _sum(x_2, x_3, x_4, x_5, w_0, w_1, w_2, w_3, bias))
        _write(kind, out_1, i, _sum(x_1, x_2, x_3, x_4, w_0, w_1, w_2, w_3, bias))
        _write(kind, out_0, i, _sum(x_0, x_1, x_2, x_3, w_0, w_1, w_2, w_3, bias))
    if t + last + 1 == length:
        for k in range(3):
            source = _inputs(kind, x, x_row, state, length, channels, row, length - 3 + k)
            target = moved(like(kind, after), (row * 3 + k) * channels)
            for i in range(0, channels, WIDTH):
                write(target, i, read(source, i, WIDTH), WIDTH)


@inlined
def _sum(x_0, x_1, x_2, x_3, w_0, w_1, w_2, w_3, value):  # pragma: no cover
    value = multiply_add(x_1, w_1, multiply_add(x_0, w_0, value))
    return multiply_add(x_3, w_3, multiply_add(x_2, w_2, value))


@inlined
def _write(kind, line, index, value):  # pragma: no cover
    write(line, index, value * sigmoid_for(kind, value), WIDTH)


@spliced
def recur(
    kind,
    whole,
    u,
    z,
    z_row,
    dt,
    dt_row,
    weight,
    bias,
    a_log,
    b,
    c,
    bc_row,
    skip,
    initial,
    final,
    out,
    length,
    channels,
    states,
    inner,
    task,
    scratch,
):  # pragma: no cover
    """A task of the recurrence, of B * ceil(D / STRIP).

    Args:
        kind: an address of the type of u, z, dt, weight and out.
        whole: the tile of a product of words of such values.
        u: address of (B, L, D).
        z: address of (B, L, D), with contiguous rows `z_row` elements apart.
        dt: address of (B, L, R), with contiguous rows `dt_row` words apart, and a tile's rows more after the last.
        weight, bias: addresses of (D, R), and of (D,) float32 or 0.
        a_log: address of (D, N) float32.
        b, c: addresses of (B, L, N) float32, with contiguous rows `bc_row` elements apart.
        skip: address of (D,) float32.
        initial, final: addresses of (B, D, N) float32, the state before and where that after is to be written.
        out: address of (B, L, D).
        length, channels, states: L; D, whole vectors; N, even.
        inner: R in words.
        scratch: address of float32, of :func:`mambax_cpu.tiles.prompt_scratch`.
    """
    base, size = (scratch + 63) // 64 * 64, 4 * COLUMNS
    biases, skips, delta = pointer(base), pointer(base + size), pointer(base + 2 * size)
    base += size * (2 + SCAN_TILE)
    x, y = pointer(base), pointer(base + size * SCAN_TILE)
    base += 2 * size * SCAN_TILE
    rates, h, panel = pointer(base), pointer(base + size * states), base + 2 * size * states
    strips = (channels + STRIP - 1) // STRIP
    row, border = task // strips, min(channels, (task % strips + 1) * STRIP)
    for low in range(task % strips * STRIP, border, COLUMNS):
        count = min(COLUMNS, channels - low)
        for j in range(COLUMNS):
            biases[j] = pointer(bias)[low + j] if bias != 0 and j < count else 0.0
            skips[j] = pointer(skip)[low + j] if j < count else 0.0
        pack(weight, inner, 1, channels, low, inner, panel)
        for v in range(0, count, WIDTH):
            own_rates, rows = moved(rates, v * states), pointer(a_log + 4 * (low + v) * states)
            load_columns(rows, states, WIDTH, states, own_rates, 1.0)
            for n in range(0, states * WIDTH, WIDTH):
                store(own_rates, n, exp(load(own_rates, n)) * splat(-LOG2_E))
            before = pointer(initial + 4 * (row * channels + low + v) * states)
            load_columns(before, states, WIDTH, states, moved(h, v * states), 1.0)
        for start in range(0, length, SCAN_TILE):
            steps, place = min(SCAN_TILE, length - start), row * length + start
            for i in range(0, steps, ROWS):
                line = pointer(dt + 4 * (place + i) * dt_row)
                whole(line, dt_row, pointer(panel), inner, biases, 0, moved(delta, i * COLUMNS), COLUMNS)
            of_u = moved(like(kind, u), place * channels + low)
            of_z = moved(like(kind, z), place * z_row + low)
            _begin(kind, of_u, channels, of_z, z_row, steps, count, delta, x, y, skips)
            of_b, of_c = pointer(b + 4 * place * bc_row), pointer(c + 4 * place * bc_row)
            for v in range(0, count, WIDTH):
                own_rates, own_h = moved(rates, v * states), moved(h, v * states)
                own_delta, own_x, own_y = moved(delta, v), moved(x, v), moved(y, v)
                _advance(kind, steps, states, own_rates, own_h, of_b, of_c, bc_row, own_delta, own_x, own_y)
            _finish(kind, moved(like(kind, out), place * channels + low), channels, of_z, z_row, steps, count, y)
        for v in range(0, count, WIDTH):
            after = pointer(final + 4 * (row * channels + low + v) * states)
            store_columns(moved(h, v * states), states, WIDTH, after, states)


@part
def _begin(kind, u, u_row, z, z_row, steps, count, delta, x, y, skips):  # pragma: no cover
    """delta through softplus; x = delta u; y = D u. What the next tile reads is asked for, in pages that the
    processor does not expect."""
    for t in range(steps):
        line, later, gate = (
            moved(u, t * u_row),
            moved(u, (t + SCAN_TILE) * u_row),
            moved(z, (t + SCAN_TILE) * z_row),
        )
        for v in range(0, count, WIDTH):
            prefetch(later, v)
            prefetch(gate, v)
            i = t * COLUMNS + v
            step, value = softplus_for(kind, load(delta, i)), read(line, v, WIDTH)
            store(delta, i, step)
            store(x, i, step * value)
            store(y, i, value * load(skips, v))


@part
def _advance(kind, steps, states, rates, h, b, c, bc_row, delta, x, y):  # pragma: no cover
    """The recurrence of sixteen channels over the steps of a tile: y += C . h."""
    for n in range(0, states, 2):  # two at a time, which read delta and y once
        i, j = n * WIDTH, n * WIDTH + WIDTH
        a_0, h_0, a_1, h_1 = load(rates, i), load(h, i), load(rates, j), load(h, j)
        for t in range(steps):
            step, input = load(delta, t * COLUMNS), load(x, t * COLUMNS)
            at = t * bc_row + n
            h_0 = multiply_add(exp2_for(kind, step * a_0), h_0, input * splat(b[at]))
            h_1 = multiply_add(exp2_for(kind, step * a_1), h_1, input * splat(b[at + 1]))
            out = multiply_add(h_0, splat(c[at]), load(y, t * COLUMNS))
            store(y, t * COLUMNS, multiply_add(h_1, splat(c[at + 1]), out))
        store(h, i, h_0)
        store(h, j, h_1)


@part
def _finish(kind, out, out_row, z, z_row, steps, count, y):  # pragma: no cover
    """y through the gate and out."""
    for t in range(steps):
        line, gate = moved(out, t * out_row), moved(z, t * z_row)
        for v in range(0, count, WIDTH):
            value = read(gate, v, WIDTH)
            write(line, v, load(y, t * COLUMNS + v) * value * sigmoid_for(kind, value), WIDTH)
