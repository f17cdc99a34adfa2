"""The causal depthwise convolution with bias and SiLU, and its gradient: the kernels.

The forward kernel takes rows of time: it reads the inputs in the order in which they lie in memory. The backward
kernel takes sixteen channels through the sequence in tiles, because their gradients of weight and bias are sums
over time; the gradient before the activation is computed for a tile, and that of the inputs K-1 steps behind it.

An input is named by its step, and one of the initial state by a negative number, -1 the last. Steps that a mask
leaves out are passed over; at a step that begins a sequence, whatever came before counts as zero.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from collections import namedtuple

from mambax_cpu.compilation import inlined, kernel, part, spliced
from mambax_cpu.linear_tiles import bfloat16_at, float16_at
from mambax_cpu.memory import (
    at,
    begins,
    element_at,
    exists,
    load_columns,
    load_some,
    load_vector,
    store_columns,
    store_some,
    zero,
)
from mambax_cpu.precision import number_of, read_or_zero, write
from mambax_cpu.simd import (
    integers_at,
    load,
    multiply_add,
    pointer,
    prefetch,
    sigmoid,
    splat,
    store,
)
from mambax_cpu.tiles import CONV_TILE as TILE
from mambax_cpu.tiles import WIDTH

# Rows of the operand table (see operands.py); W is the weight as (D, K). Then, for the backward the
# gradients given and those to write: of the weight (B, D, K) and the bias (B, D) one share per row of the batch.
X, W, BIAS, INITIAL, FLAGS, Y = range(6)
DY, DX, DW, DBIAS, DINITIAL = range(6, 11)


@inlined
def _place(kind, views, row, source, past):  # pragma: no cover
    """The address of the channels of an input, an int64; 0 for one that counts as zero, which all below -past do.

    `kind` is an address of the type of x.
    """
    if source >= 0:
        return number_of(element_at(kind, views, X, row, source))
    if source < -past or views[3 * INITIAL] == 0:
        return 0
    return number_of(element_at(kind, views, INITIAL, row, past + source))


@part
def _find_places(kind, views, row, step, width, places):  # pragma: no cover
    """Where the inputs of the output at a step are, one for each k."""
    source, over = step, False
    for k in range(width - 1, -1, -1):
        places[k] = 0 if over else _place(kind, views, row, source, width - 1)
        over = over or (source >= 0 and begins(views, FLAGS, row, source))
        source -= 1
        while source >= 0 and not exists(views, FLAGS, row, source):
            source -= 1


@kernel
def forward(table, length, channels, width, silu, first, last, scratch):  # pragma: no cover
    """Rows of time `first` to `last` - 1, of B * L. Zero where a position does not exist.

    Args:
        table: the operand table up to Y. X, INITIAL and Y are of the kernel's precision, the others float32.
        length, channels, width: L, D, K.
        silu: whether the output goes through SiLU.
        scratch: float32, of :func:`mambax_cpu.tiles.conv_scratch`.
    """
    _convolve(pointer(0), table, length, channels, width, silu, first, last, scratch)


@kernel
def forward_bfloat16(table, length, channels, width, silu, first, last, scratch):  # pragma: no cover
    """As :func:`forward`."""
    _convolve(bfloat16_at(0), table, length, channels, width, silu, first, last, scratch)


@kernel
def forward_float16(table, length, channels, width, silu, first, last, scratch):  # pragma: no cover
    """As :func:`forward`."""
    _convolve(float16_at(0), table, length, channels, width, silu, first, last, scratch)


@spliced
def _convolve(kind, table, length, channels, width, silu, first, last, scratch):  # pragma: no cover
    """The body of the kernels; `kind` is an address of the type of x and y."""
    views, size = integers_at(table.ctypes.data), 4 * WIDTH
    blocks = (channels + WIDTH - 1) // WIDTH
    spare, weights = pointer(scratch.ctypes.data), pointer(scratch.ctypes.data + size)
    places = integers_at(scratch.ctypes.data + size * (1 + blocks * width))
    for block in range(blocks):
        lanes = min(WIDTH, channels - block * WIDTH)
        columns = pointer(scratch.ctypes.data + size * (1 + block * width))
        load_columns(at(views, W, block * WIDTH, 0), views[3 * W + 1], lanes, width, columns, 1.0)
    for place in range(first, last):
        row, step = place // length, place % length
        real = exists(views, FLAGS, row, step)
        if real:
            _find_places(kind, views, row, step, width, places)
        for block in range(blocks):
            channel = block * WIDTH
            lanes = min(WIDTH, channels - channel)
            value = splat(0.0)
            if real:
                value = load_vector(views, BIAS, channel, lanes, spare)
                for k in range(width):
                    x = read_or_zero(kind, places[k], channel, lanes)
                    value = multiply_add(x, load(weights, (block * width + k) * WIDTH), value)
                if silu:
                    value = value * sigmoid(value)
            write(element_at(kind, views, Y, row, step), channel, value, lanes)


# What the backward kernel works on. The window is the last K-1 inputs of the tile before, then those of a tile;
# each has the gradient before the activation of the output at its step (`inner`), the step, and the number of its
# sequence.
Window = namedtuple("Window", "weights dweights inner steps numbers spare")


@kernel
def backward(table, length, channels, width, silu, first, last, scratch):  # pragma: no cover
    """Tasks `first` to `last` - 1 of the gradient, of B * ceil(D / 16). Arguments as of :func:`forward`, with
    the table up to DINITIAL and scratch of :func:`mambax_cpu.tiles.conv_backward_scratch`."""
    views, base, size = integers_at(table.ctypes.data), scratch.ctypes.data, 4 * WIDTH
    integers = base + size * (4 * width + 1 + TILE)
    w = Window(
        pointer(base),
        pointer(base + size * width),
        pointer(base + size * (2 * width + 1)),
        integers_at(integers),
        integers_at(integers + 8 * (TILE + 2 * width)),
        pointer(base + size * 2 * width),
    )
    past = width - 1
    blocks = (channels + WIDTH - 1) // WIDTH
    for task in range(first, last):
        row, channel = task // blocks, task % blocks * WIDTH
        lanes = min(WIDTH, channels - channel)
        load_columns(at(views, W, channel, 0), views[3 * W + 1], lanes, width, w.weights, 1.0)
        zero(w.dweights, width)
        zero(w.inner, past)
        for k in range(past):
            w.steps[k], w.numbers[k] = k - past, 0
        number, dbias, step = 0, splat(0.0), 0
        while step < length:
            count = past
            while step < length and count < past + TILE:
                prefetch(at(views, X, row, step + TILE), channel)
                prefetch(at(views, DY, row, step + TILE), channel)
                if exists(views, FLAGS, row, step):
                    number += 1 if begins(views, FLAGS, row, step) else 0
                    w.steps[count], w.numbers[count] = step, number
                    value = _inner(views, silu, row, count - past, width, channel, lanes, w)
                    store(w.inner, count * WIDTH, value)
                    dbias = dbias + value
                    count += 1
                else:
                    store_some(at(views, DX, row, step), channel, lanes, splat(0.0), w.spare)
                step += 1
            _to_inputs(views, row, count - past, width, channel, lanes, w)
            for k in range(past):
                i = count - past + k
                store(w.inner, k * WIDTH, load(w.inner, i * WIDTH))
                w.steps[k], w.numbers[k] = w.steps[i], w.numbers[i]
        for k in range(past, 2 * past):
            store(w.inner, k * WIDTH, splat(0.0))
            w.numbers[k] = number
        _to_inputs(views, row, past, width, channel, lanes, w)
        store_columns(w.dweights, width, lanes, at(views, DW, row, channel), views[3 * DW + 2])
        store_some(pointer(views[3 * DBIAS] + 4 * row * views[3 * DBIAS + 1]), channel, lanes, dbias, w.spare)


@part
def _inner(views, silu, row, first, width, channel, lanes, w):  # pragma: no cover
    """The gradient before the activation of the output whose inputs are `first` to `first` + K-1 of the window.

    Adds its share to that of the weight.
    """
    past = width - 1
    step, number = w.steps[first + past], w.numbers[first + past]
    value = load_some(at(views, DY, row, step), channel, lanes, w.spare)
    if silu:
        before = load_vector(views, BIAS, channel, lanes, w.spare)
        for k in range(width):
            if w.numbers[first + k] == number:
                place = _place(pointer(0), views, row, w.steps[first + k], past)
                x = read_or_zero(pointer(0), place, channel, lanes)
                before = before + x * load(w.weights, k * WIDTH)
        s = sigmoid(before)
        value = value * (s + before * s * (splat(1.0) - s))
    for k in range(width):
        if w.numbers[first + k] == number:
            place = _place(pointer(0), views, row, w.steps[first + k], past)
            x = read_or_zero(pointer(0), place, channel, lanes)
            store(w.dweights, k * WIDTH, load(w.dweights, k * WIDTH) + value * x)
    return value


@part
def _to_inputs(views, row, count, width, channel, lanes, w):  # pragma: no cover
    """The gradients of the first `count` inputs of the window, from those of the outputs that they reach."""
    for i in range(count):
        value = splat(0.0)
        for k in range(width):
            if w.numbers[i + k] == w.numbers[i]:
                value = value + load(w.inner, (i + k) * WIDTH) * load(w.weights, (width - 1 - k) * WIDTH)
        step = w.steps[i]
        if step >= 0:
            store_some(at(views, DX, row, step), channel, lanes, value, w.spare)
        elif views[3 * DINITIAL] != 0:
            store_some(at(views, DINITIAL, row, width - 1 + step), channel, lanes, value, w.spare)
