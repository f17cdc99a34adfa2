"""What a phase does besides its product: norms, the convolution and gate of one token, the recurrence.

`views` is a row of :mod:`mambax_cpu.phase_table`, `narrow` any address of the type of narrow values. Everything is
computed in float32.

Dimensions: B rows, M d_model, D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

import numpy as np

from mambax_cpu import phase_table as field
from mambax_cpu.compilation import part, spliced
from mambax_cpu.linear_tiles import dot_rows, moved
from mambax_cpu.norm_kernels import normalise_row
from mambax_cpu.precision import like, read, read_or_zero, sums_of_rows, write
from mambax_cpu.simd import (
    LOG2_E,
    WIDTH,
    exp,
    exp2,
    load,
    multiply_add,
    pointer,
    prefetch,
    sigmoid,
    softplus,
    splat,
    store,
)


@part
def normalise(narrow, views, epsilon):  # pragma: no cover
    """X = HIDDEN / rms(HIDDEN) * NORM, the mean square over each of PARTS."""
    parts, weight = views[field.PARTS], like(narrow, views[field.NORM])
    size = views[field.INPUTS] // parts
    for i in range(views[field.ROWS] * parts):
        hidden, out = pointer(views[field.HIDDEN] + 4 * i * size), pointer(views[field.X] + 4 * i * size)
        normalise_row(hidden, moved(weight, i % parts * size), out, size, epsilon)


@spliced
def _bias(narrow, views, j, count):  # pragma: no cover
    """The biases from `j` on."""
    return read_or_zero(narrow, views[field.BIAS], j, count) + read_or_zero(
        pointer(0), views[field.WIDE_BIAS], j, count
    )


@part
def finish_product(narrow, views, first, last):  # pragma: no cover
    """OUT += BIAS for outputs `first` to `last` - 1; and where there is a SUM, SUM += OUT instead."""
    outs, target = views[field.OUTPUTS], views[field.SUM]
    if target == 0:
        if views[field.BIAS] == 0 and views[field.WIDE_BIAS] == 0:
            return
        target = views[field.OUT]
    for j in range(first, last, WIDTH):
        shift = _bias(narrow, views, j, last - j)
        for r in range(views[field.ROWS]):
            value = read(pointer(views[field.OUT]), r * outs + j, last - j) + shift
            if views[field.SUM] != 0:
                value = read(pointer(target), r * outs + j, last - j) + value
            write(pointer(target), r * outs + j, value, last - j)


@part
def convolve_and_gate(narrow, views, first, last, scratch):  # pragma: no cover
    """Of the outputs `first` to `last` - 1 of in_proj: some through the convolution to U, z to silu(z) in OUT."""
    begin, channels, outs = views[field.CONVOLVED], views[field.CHANNELS], views[field.OUTPUTS]
    end, out = begin + channels, pointer(views[field.OUT])
    j = first
    while j < last:
        count = min(WIDTH, last - j)
        if j < begin:
            count = min(count, begin - j)
        elif j < end:
            count = min(count, end - j)
            _columns(narrow, views, j - begin, count, scratch)
        convolved, gate = begin <= j and j < end, j < views[field.PLAIN]
        shift = _bias(narrow, views, j, count)
        for r in range(views[field.ROWS]):
            value = read(out, r * outs + j, count) + shift
            if convolved:
                value = _convolve(narrow, views, r, j - begin, count, value, scratch)
            if gate:
                value = value * sigmoid(value)
            if convolved:
                write(pointer(views[field.U]), r * channels + j - begin, value, count)
            else:
                write(out, r * outs + j, value, count)
        j += count


@spliced
def _columns(narrow, views, channel, count, scratch):  # pragma: no cover
    """The weights of the convolution for `count` channels, (K, 16), to the beginning of scratch."""
    width = views[field.CONV_WIDTH]
    columns, taps = pointer(scratch), pointer(scratch + 4 * WIDTH * width)
    for i in range(0, count * width, WIDTH):
        store(taps, i, read(like(narrow, views[field.CONV]), channel * width + i, count * width - i))
    for k in range(width):
        for lane in range(count):
            columns[k * WIDTH + lane] = taps[lane * width + k]


@spliced
def _convolve(narrow, views, row, channel, count, x, scratch):  # pragma: no cover
    """The convolution at x, with bias; and the new state."""
    channels, past = views[field.CHANNELS], views[field.CONV_WIDTH] - 1
    columns = pointer(scratch)
    old, new = like(narrow, views[field.CONV_STATE]), like(narrow, views[field.NEW_CONV_STATE])
    value = read_or_zero(narrow, views[field.CONV_BIAS], channel, count)
    for k in range(past):
        place = (row * past + k) * channels + channel
        before = read(old, place, count)
        value = multiply_add(before, load(columns, k * WIDTH), value)
        if k > 0:
            write(new, place - channels, before, count)
    if past > 0:
        write(new, (row * past + past - 1) * channels + channel, x, count)
    return multiply_add(x, load(columns, past * WIDTH), value)


@part
def recur(narrow, views, first, last, slots, scratch):  # pragma: no cover
    """Channels `first` to `last` - 1 of one token: dt_proj, softplus, the recurrence, the skip and the gate to OUT.

    While it computes, weights of the next phase are fetched: those that the same slot will need first.
    """
    rows, channels, rank = views[field.ROWS], views[field.CHANNELS], views[field.INPUTS]
    size = 4 * WIDTH * rows
    times, steps, skipped = pointer(scratch), pointer(scratch + size), pointer(scratch + 2 * size)
    products = pointer(scratch + 3 * size)  # (B, 16, 16)
    slot = first * slots // channels
    following = moved(views, field.FIELDS)
    fetched = following[field.WEIGHT] + following[field.NBYTES] * slot // slots
    fetched -= channels * slot // slots * 64 * views[field.FETCHED]
    for channel in range(first, last, WIDTH):
        count = min(WIDTH, last - channel)
        weights = moved(like(narrow, views[field.DT]), channel * rank)
        bias = read_or_zero(times, views[field.DT_BIAS], channel, count)
        skip = read(pointer(views[field.SKIP]), channel, count)
        for r in range(rows):
            x = moved(pointer(views[field.X]), r * (rank + 2 * views[field.STATES]))
            dt = softplus(dot_rows(weights, count, x, rank) + bias)
            u = read(pointer(views[field.U]), r * channels + channel, count)
            store(times, r * WIDTH, dt * splat(np.float32(LOG2_E)))
            store(steps, r * WIDTH, dt * u)
            store(skipped, r * WIDTH, u * skip)
        _advance(views, channel, count, times, steps, products, fetched)
        for r in range(rows):
            value = load(skipped, r * WIDTH) + sums_of_rows(moved(products, r * WIDTH * WIDTH))
            gate = read(pointer(views[field.GATE]), (2 * r + 1) * channels + channel, count)
            write(pointer(views[field.OUT]), r * channels + channel, value * gate, count)


@spliced
def _advance(views, channel, count, times, steps, products, fetched):  # pragma: no cover
    """h = exp(dt A) h + dt u B; products[r][lane] = C * h. State numbers go across the lanes, as in memory."""
    rows, channels = views[field.ROWS], views[field.CHANNELS]
    states, rank = views[field.STATES], views[field.INPUTS]
    for lane in range(count):
        line = fetched + (channel + lane) * 64 * views[field.FETCHED]
        for i in range(views[field.FETCHED]):
            prefetch(pointer(line + 64 * i), 0)
        for n in range(0, states, WIDTH):
            many = states - n
            a = splat(0.0) - exp(read(pointer(views[field.A_LOG]), (channel + lane) * states + n, many))
            for r in range(rows):
                place = (r * channels + channel + lane) * states + n
                selected = pointer(views[field.X] + 4 * (r * (rank + 2 * states) + rank + n))
                decay = exp2(splat(times[r * WIDTH + lane]) * a)
                h = splat(steps[r * WIDTH + lane]) * read(selected, 0, many)
                h = multiply_add(decay, read(pointer(views[field.STATE]), place, many), h)
                write(pointer(views[field.NEW_STATE]), place, h, many)
                value = h * read(selected, states, many)
                row = (r * WIDTH + lane) * WIDTH
                if n > 0:
                    value = value + load(products, row)
                store(products, row, value)
