"""The causal depthwise convolution with bias and SiLU, and its gradient, in Numba.

The forward kernel takes rows of time: it reads the inputs in the order in which they lie in memory. The backward
kernel takes sixteen channels through the sequence in tiles, because their gradients of weight and bias are sums
over time; the gradient before the activation is computed for a tile, and that of the inputs K-1 steps behind it.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from mambax_cpu.compilation import inlined, kernel, part
from mambax_cpu.memory import at, load_columns, load_some, load_vector, store_columns, store_some, zero
from mambax_cpu.simd import (
    WIDTH,
    integers_at,
    load,
    pointer,
    prefetch,
    sigmoid,
    splat,
    store,
)

TILE = 64
"""Steps of a tile of the backward kernel."""

# Rows of the operand table (see operands.py); W is the weight as (D, K). Then, for the backward the
# gradients given and those to write: of the weight (B, D, K) and the bias (B, D) one share per row of the batch.
X, W, BIAS, INITIAL, Y = range(5)
DY, DX, DW, DBIAS, DINITIAL = range(5, 10)


def forward_scratch(channels: int, width: int) -> int:
    """float32 values that a thread of the forward kernel needs for D and K."""
    return WIDTH * (-(-channels // WIDTH) * width + 1)


def backward_scratch(width: int) -> int:
    """float32 values that a thread of the backward kernel needs for K."""
    return WIDTH * (TILE + 3 * width + 1)


@inlined
def _input(views, row, step, past, channel, lanes, spare):  # pragma: no cover
    """Sixteen channels of the input at a step, which lies in the initial state where it is negative."""
    if step >= 0:
        return load_some(at(views, X, row, step), channel, lanes, spare)
    if views[3 * INITIAL] == 0:
        return splat(0.0)
    return load_some(at(views, INITIAL, row, past + step), channel, lanes, spare)


@kernel
def forward(table, length, channels, width, silu, first, last, scratch):  # pragma: no cover
    """Rows of time `first` to `last` - 1, of B * L.

    Args:
        table: the operand table up to Y.
        length, channels, width: L, D, K.
        silu: whether the output goes through SiLU.
        scratch: float32, of :func:`forward_scratch`.
    """
    views = integers_at(table.ctypes.data)
    spare, weights = pointer(scratch.ctypes.data), pointer(scratch.ctypes.data + 4 * WIDTH)
    blocks = (channels + WIDTH - 1) // WIDTH
    for block in range(blocks):
        lanes = min(WIDTH, channels - block * WIDTH)
        columns = pointer(scratch.ctypes.data + 4 * WIDTH * (1 + block * width))
        load_columns(at(views, W, block * WIDTH, 0), views[3 * W + 1], lanes, width, columns, 1.0)
    for place in range(first, last):
        row, step = place // length, place % length
        for block in range(blocks):
            channel = block * WIDTH
            lanes = min(WIDTH, channels - channel)
            value = load_vector(views, BIAS, channel, lanes, spare)
            for k in range(width):
                x = _input(views, row, step - (width - 1) + k, width - 1, channel, lanes, spare)
                value = value + x * load(weights, (block * width + k) * WIDTH)
            if silu:
                value = value * sigmoid(value)
            store_some(at(views, Y, row, step), channel, lanes, value, spare)


@kernel
def backward(table, length, channels, width, silu, first, last, scratch):  # pragma: no cover
    """Tasks `first` to `last` - 1 of the gradient, of B * ceil(D / 16). Arguments as of :func:`forward`."""
    views, base, size = integers_at(table.ctypes.data), scratch.ctypes.data, 4 * WIDTH
    weights, dweights = pointer(base), pointer(base + size * width)
    inner = pointer(base + size * 2 * width)  # before the activation: the last K-1 of the tile before, then a tile
    spare = pointer(base + size * (3 * width + TILE))
    past = width - 1
    blocks = (channels + WIDTH - 1) // WIDTH
    for task in range(first, last):
        row, channel = task // blocks, task % blocks * WIDTH
        lanes = min(WIDTH, channels - channel)
        load_columns(at(views, W, channel, 0), views[3 * W + 1], lanes, width, weights, 1.0)
        zero(dweights, width)
        zero(inner, past)
        dbias = splat(0.0)
        for start in range(0, length, TILE):
            steps = min(TILE, length - start)
            for t in range(steps):
                prefetch(at(views, X, row, start + t + TILE), channel)
                prefetch(at(views, DY, row, start + t + TILE), channel)
                value = _inner(views, silu, row, start + t, width, channel, lanes, weights, dweights, spare)
                store(inner, (past + t) * WIDTH, value)
                dbias = dbias + value
            _to_inputs(views, row, start - past, steps, width, channel, lanes, weights, inner, spare)
            for k in range(past):
                store(inner, k * WIDTH, load(inner, (steps + k) * WIDTH))
        zero(pointer(base + size * (2 * width + past)), past)
        _to_inputs(views, row, length - past, past, width, channel, lanes, weights, inner, spare)
        store_columns(dweights, width, lanes, at(views, DW, row, channel), views[3 * DW + 2])
        store_some(pointer(views[3 * DBIAS] + 4 * row * views[3 * DBIAS + 1]), channel, lanes, dbias, spare)


@part
def _inner(views, silu, row, step, width, channel, lanes, weights, dweights, spare):  # pragma: no cover
    """The gradient before the activation at a step; adds its share to that of the weight."""
    past = width - 1
    value = load_some(at(views, DY, row, step), channel, lanes, spare)
    if silu:
        before = load_vector(views, BIAS, channel, lanes, spare)
        for k in range(width):
            x = _input(views, row, step - past + k, past, channel, lanes, spare)
            before = before + x * load(weights, k * WIDTH)
        s = sigmoid(before)
        value = value * (s + before * s * (splat(1.0) - s))
    for k in range(width):
        x = _input(views, row, step - past + k, past, channel, lanes, spare)
        store(dweights, k * WIDTH, load(dweights, k * WIDTH) + value * x)
    return value


@part
def _to_inputs(views, row, first, steps, width, channel, lanes, weights, inner, spare):  # pragma: no cover
    """The gradient of the inputs `first` to `first` + steps - 1; inner[0] is that of the output at `first`.

    Negative inputs are the initial state's.
    """
    for t in range(steps):
        value = splat(0.0)
        for k in range(width):
            value = value + load(inner, (t + k) * WIDTH) * load(weights, (width - 1 - k) * WIDTH)
        if first + t >= 0:
            store_some(at(views, DX, row, first + t), channel, lanes, value, spare)
        elif views[3 * DINITIAL] != 0:
            store_some(at(views, DINITIAL, row, width - 1 + first + t), channel, lanes, value, spare)
