r"""What the Triton kernels of Mamba-2's scan share: time steps, and the decays between them.

Time is cut into chunks of T steps. Inside one, the decay from step s to step t is the exponential of the sum of
dt A over the steps between, which is a difference of two running sums::

    decay[t, s] = exp2(total[t] - total[s]),  total = cumsum(log2(e) dt A)

In one float32 that difference would lose digits wherever a step forgets much. So every term is cut in two: `high`
has the bits above a fixed power of two, so that its running sums are exact, and `low` the rest, whose sums are too
small to matter. Differences are then as good as sums of the terms between.

Dimensions: B batch, L length, H heads, K chunks of T steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambax_torch.kernels.scan_steps import LOG2_E, sigmoid, softplus


@triton.jit
def steps_kernel(
    dt, A, bias, mask, steps, high, low, slopes,
    dt_batch, dt_row, length, H, blocks, chunks, smallest, largest,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The steps that the recurrence takes, and the running sums of log2(e) dt A in each chunk, in two parts.

    Programs: B * K * blocks of BH heads. steps, high, low: (B, H, K T) float32; a step is 0 where there is none.
    slopes: the same, how a step grows with its raw value, or None.
    """
    program = tl.program_id(0).to(tl.int64)
    h = (program % blocks).to(tl.int32) * BH + tl.arange(0, BH)
    chunk = program // blocks % chunks
    batch = program // blocks // chunks
    t = chunk * T + tl.arange(0, T)
    has_h = h < H
    there = t < length
    if mask is not None:
        there = tl.load(mask + batch * length + t, mask=there, other=0) != 0
    found = there[:, None] & has_h[None, :]
    raw = tl.load(dt + batch * dt_batch + t[:, None] * dt_row + h[None, :], mask=found, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + h, mask=has_h, other=0.0)[None, :]
    step = softplus(raw) if SOFTPLUS else raw
    free = found
    if LIMITED:  # by comparisons, of which NaN stays NaN
        free = found & (step >= smallest) & (step <= largest)
        step = tl.where(step < smallest, smallest, step)
        step = tl.where(step > largest, largest, step)
    step = tl.where(found, step, 0.0)

    rate = tl.load(A + h, mask=has_h, other=0.0) * LOG2_E
    terms = step * rate[None, :]
    terms = tl.where(terms < -1e30, -1e30, terms)  # nothing is left of the state in any case
    size = tl.sum(tl.abs(terms), axis=0)
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # size < 2 power
    upper = (terms + 3.0 * power[None, :]) - 3.0 * power[None, :]  # no bits below power / 2^23
    places = (batch * H + h[None, :]) * (chunks * T) + t[:, None]
    inside = has_h[None, :] & (t >= 0)[:, None]
    tl.store(steps + places, step, mask=inside)
    tl.store(high + places, tl.cumsum(upper, axis=0), mask=inside)
    tl.store(low + places, tl.cumsum(terms - upper, axis=0), mask=inside)
    if slopes is not None:
        slope = sigmoid(raw) if SOFTPLUS else tl.full((T, BH), 1.0, tl.float32)
        tl.store(slopes + places, tl.where(free, slope, 0.0), mask=inside)


@triton.jit
def existing(mask, t, length):
    """(T,) whether there are steps t (T,) in a row with this mask (L,) or None."""
    there = t < length
    if mask is not None:
        there = tl.load(mask + t, mask=there, other=0) != 0
    return there


@triton.jit
def numbered(numbers, t, start, length, T: tl.constexpr):
    """Of a chunk: the number (T,) of each step's sequence, that of the state before, and that of the last step."""
    of_step = tl.load(numbers + tl.minimum(t, length - 1))
    before = tl.load(numbers + tl.maximum(start - 1, 0))
    after = tl.load(numbers + tl.minimum(start + T, length) - 1)
    return of_step, tl.where(start > 0, before, 0), after


@triton.jit
def decay_between(high, low, of_step, T: tl.constexpr):
    """(T, T) what step t keeps of step s, [t, s]; 0 where s comes after t, or is of another sequence."""
    t = tl.arange(0, T)
    kept = t[:, None] >= t[None, :]
    if of_step is not None:
        kept = kept & (of_step[:, None] == of_step[None, :])
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.where(kept, tl.exp2(tl.where(kept, exponent, 0.0)), 0.0)


@triton.jit
def decay_from_start(high, low, of_step, before):
    """What is left, at steps of these running sums, of the state before the chunk."""
    decay = tl.exp2(high + low)
    if of_step is not None:
        decay = tl.where(of_step == before, decay, 0.0)
    return decay


@triton.jit
def decay_to_end(high, low, high_end, low_end, of_step, after):
    """(T,) what is left of each step at the end of the chunk."""
    decay = tl.exp2((high_end - high) + (low_end - low))
    if of_step is not None:
        decay = tl.where(of_step == after, decay, 0.0)
    return decay


@triton.jit
def tile(pointer, row, t, columns, width, there, EVEN: tl.constexpr):
    """Rows t (T,) of a matrix, from where it starts: (T, columns); zero where a step is not there."""
    places = pointer + t[:, None] * row + columns[None, :]
    if EVEN:
        values = tl.load(places, mask=there[:, None], other=0.0)
    else:
        values = tl.load(places, mask=there[:, None] & (columns < width)[None, :], other=0.0)
    return values


@triton.jit
def product(a, b, PRECISION: tl.constexpr, so_far=None):
    """a b in float32, added to `so_far`. "ieee" is for Triton's interpreter, which cannot multiply bfloat16."""
    if PRECISION == "ieee":
        a, b = a.to(tl.float32), b.to(tl.float32)
    if so_far is None:
        found = tl.dot(a, b, input_precision=PRECISION)
    else:
        found = tl.dot(a, b, so_far, input_precision=PRECISION)
    return found
