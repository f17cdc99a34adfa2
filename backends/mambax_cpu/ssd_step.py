"""One step of the scan of Mamba-2: every value of the state is read and written once, as it lies.

Dimensions: B batch, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from mambax_cpu.compilation import inlined, kernel, part, spliced
from mambax_cpu.linear_tiles import bfloat16_at, float16_at, moved
from mambax_cpu.memory import at, begins, element_at, exists
from mambax_cpu.precision import read, sums_of_rows, write
from mambax_cpu.simd import exp2, integers_at, multiply_add, pointer, splat, store
from mambax_cpu.ssd_chunks import FINAL, FLAGS, INITIAL, B, C, D, X, Y, load_time_steps
from mambax_cpu.tiles import WIDTH


@kernel
def step(table, heads, width, groups, states, use_softplus, low, high, first, last, scratch):  # pragma: no cover
    """Tasks `first` to `last` - 1 of a single step.

    Args:
        table: the operand table up to FINAL, as of :func:`mambax_cpu.ssd_forward.forward`.
        heads, width, groups, states: H, P, G, N.
        use_softplus, low, high: as there.
        first, last: tasks, of B * H.
        scratch: float32, of :func:`mambax_cpu.ssd_tiles.ssd_step_scratch`.
    """
    _step(pointer(0), table, heads, width, groups, states, use_softplus, low, high, first, last, scratch)


@kernel
def step_bfloat16(
    table, heads, width, groups, states, use_softplus, low, high, first, last, scratch
):  # pragma: no cover
    """As :func:`step`."""
    _step(bfloat16_at(0), table, heads, width, groups, states, use_softplus, low, high, first, last, scratch)


@kernel
def step_float16(
    table, heads, width, groups, states, use_softplus, low, high, first, last, scratch
):  # pragma: no cover
    """As :func:`step`."""
    _step(float16_at(0), table, heads, width, groups, states, use_softplus, low, high, first, last, scratch)


@spliced
def _step(
    kind, table, heads, width, groups, states, use_softplus, low, high, first, last, scratch
):  # pragma: no cover
    """The body of the kernels; `kind` is an address of the type of x and y."""
    views, base = integers_at(table.ctypes.data), (scratch.ctypes.data + 63) // 64 * 64
    sums, inputs = pointer(base), pointer(base + 4 * WIDTH * WIDTH)
    for task in range(first, last):
        row, head = task // heads, task % heads
        group = head // (heads // groups)
        source, out = element_at(kind, views, X, row, 0), element_at(kind, views, Y, row, 0)
        here = exists(views, FLAGS, row, 0)
        goes_on = views[3 * INITIAL] != 0 and not begins(views, FLAGS, row, 0)
        dt, decay, skip = splat(0.0), splat(1.0), splat(0.0)
        if here:
            steps = integers_at(base)  # in room that is free until the first channel
            steps[0] = 0
            load_time_steps(views, row, head, steps, 1, use_softplus, low, high, pointer(base + 64), inputs)
            dt, decay = splat(pointer(base + 64)[0]), splat(inputs[0])
            decay = exp2(decay)
            if views[3 * D] != 0:
                skip = splat(pointer(views[3 * D])[head])
        before, after = at(views, INITIAL, row, head), at(views, FINAL, row, head)
        b, c = moved(at(views, B, row, 0), group * states), moved(at(views, C, row, 0), group * states)
        for p in range(0, width, WIDTH):
            x = splat(0.0)
            if here:
                x = read(source, head * width + p, width - p)
            y = advance(here, goes_on, decay, x * dt, b, c, states, before, after, p, width - p, sums)
            write(out, head * width + p, multiply_add(x, skip, y) if here else splat(0.0), width - p)


@inlined
def advance(here, goes_on, decay, x, b, c, states, before, after, channel, count, sums):  # pragma: no cover
    """C . h of up to sixteen channels of a head, `channel` and on, of which there are `count`; h after the step.

    Args:
        here: whether the position exists; where not, the states stay as they are.
        goes_on: whether there are states before; they are zero where not.
        decay: exp(dt A) in every lane.
        x: dt x, a channel in each lane.
        b, c: addresses of (N,).
        before, after: addresses of the states of the head, (P, N).
        sums: scratch, 17 vectors.
    """
    inputs = moved(sums, WIDTH * WIDTH)
    store(inputs, 0, x)
    for lane in range(min(WIDTH, count)):
        place = (channel + lane) * states
        total = _channel(here, goes_on, decay, splat(inputs[lane]), b, c, states, before, after, place)
        store(sums, lane * WIDTH, total)
    return sums_of_rows(sums)


@part
def _channel(here, goes_on, decay, x, b, c, states, before, after, place):  # pragma: no cover
    """The states of one channel after the step, and towards C . h, to be summed over lanes."""
    total = splat(0.0)
    for n in range(0, states, WIDTH):
        h = splat(0.0)
        if goes_on:
            h = read(before, place + n, states - n)
        if here:
            h = multiply_add(x, read(b, n, states - n), h * decay)
            total = multiply_add(h, read(c, n, states - n), total)
        write(after, place + n, h, states - n)
    return total
