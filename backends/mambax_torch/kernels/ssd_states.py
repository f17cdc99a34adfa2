"""Triton kernels that carry the states of Mamba-2's scan through time, and their gradients back.

Time is cut into chunks of T steps, whose contribution to the state is one product of matrices, and into segments of
whole chunks, which run side by side::

    sweep_kernel   what each segment ends in, started from zero or a state; it can keep the state at every chunk;
    carry_kernel   the state that each segment starts in, one segment after another.

Backwards the same kernels carry the gradient of the state, which has the same recurrence with dy for x and C for B.

Dimensions: B batch, L length, H heads, P head_dim, N d_state, R heads of a group, K chunks of T steps, S segments;
in a program BP of the P, BN >= N a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambax_torch.kernels.ssd_steps import decay_from_start, decay_to_end, existing, numbered, product, tile


@triton.jit
def sweep_kernel(
    values, vectors, steps, high, low, mask, numbers, starts, ends, decays, kept,
    values_batch, values_row, vectors_batch, vectors_row,
    length, H, P, N, R, blocks, segments, chunks, per,
    BACKWARDS: tl.constexpr, EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, T: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through `per` chunks of a segment: h = decay h + (weights values)^T vectors; from the last when BACKWARDS.

    Programs: B * S * H * blocks, blocks of P fastest. values: (B, L, H, P), vectors: (B, L, G, N), by strides.
    starts, ends: (B, S, H, P, N), decays: (B, S, H) of whole segments, kept: (B, K, H, P, N) what stood before each
    chunk was taken, all float32 and each of them or None.
    """
    program = tl.program_id(0).to(tl.int64)
    p = (program % blocks).to(tl.int32) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    head = program // blocks % H
    segment = program // blocks // H % segments
    batch = program // blocks // H // segments
    values += batch * values_batch + head * P
    vectors += batch * vectors_batch + head // R * N
    of_head = (batch * H + head) * (chunks * T)
    if mask is not None:
        mask += batch * length
    if numbers is not None:
        numbers += batch * length
    cells = p[:, None] * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    place = ((batch * segments + segment) * H + head) * P * N
    if starts is None:
        h = tl.zeros((BP, BN), tl.float32)
    else:
        h = tl.load(starts + place + cells, mask=inside, other=0.0)
    kept_of_all = 1.0
    first = segment * per
    count = tl.minimum(per, chunks - first)
    for i in range(count):
        chunk = first + (count - 1 - i if BACKWARDS else i)
        start = chunk * T
        t = start + tl.arange(0, T)
        there = existing(mask, t, length)
        of_step, before, after = None, None, None
        if numbers is not None:
            of_step, before, after = numbered(numbers, t, start, length, T)
        upper, lower = tl.load(high + of_head + t), tl.load(low + of_head + t)
        end = of_head + start + T - 1
        upper_end, lower_end = tl.load(high + end), tl.load(low + end)
        if BACKWARDS:
            weights = decay_from_start(upper, lower, of_step, before)
        else:
            weights = decay_to_end(upper, lower, upper_end, lower_end, of_step, after)
            weights *= tl.load(steps + of_head + t)
        value = tile(values, values_row, t, p, P, there, EVEN_P)
        vector = tile(vectors, vectors_row, t, n, N, there, EVEN_N).to(WORK)
        weighted = (value.to(tl.float32) * weights[:, None]).to(WORK)
        if kept is not None:
            tl.store(kept + ((batch * chunks + chunk) * H + head) * P * N + cells, h, mask=inside)
        whole = decay_from_start(upper_end, lower_end, after, before)
        h = h * whole + product(tl.trans(weighted), vector, PRECISION)
        kept_of_all *= whole
    if ends is not None:
        tl.store(ends + place + cells, h, mask=inside)
    if decays is not None:
        tl.store(decays + (batch * segments + segment) * H + head, kept_of_all)


@triton.jit
def carry_kernel(
    ends, decays, first, before, last, H, cells, blocks, segments,
    BACKWARDS: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """before[0] = first, before[s + 1] = decays[s] before[s] + ends[s]; segments from the last when BACKWARDS.

    Programs: B * H * blocks of BC cells of a state. ends, before: (B, S, H, cells), decays: (B, S, H); first, last:
    (B, H, cells), each of these or None. before may be ends. ROWS segments are read at once, or the time would be
    that of waiting for memory.
    """
    program = tl.program_id(0).to(tl.int64)
    c = (program % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    head = program // blocks % H
    batch = program // blocks // H
    inside = c < cells
    state = (batch * H + head) * cells + c
    h = tl.zeros((BC,), tl.float32)
    if first is not None:
        h = tl.load(first + state, mask=inside, other=0.0)
    number = tl.arange(0, ROWS)
    for start in range(0, segments, ROWS):
        order = start + number
        segment = segments - 1 - order if BACKWARDS else order
        there = order < segments
        places = (batch * segments + segment) * H + head
        rows = places[:, None] * cells + c[None, :]
        both = there[:, None] & inside[None, :]
        decay = tl.load(decays + places, mask=there, other=1.0)
        end = tl.load(ends + rows, mask=both, other=0.0)
        states = tl.zeros((ROWS, BC), tl.float32)
        for i in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues] Triton iterates over it
            picked = number == i
            states = tl.where(picked[:, None], h[None, :], states)
            a = tl.sum(tl.where(picked, decay, 0.0), axis=0)
            b = tl.sum(tl.where(picked[:, None], end, 0.0), axis=0)
            h = tl.where(a == 0.0, b, a * h + b)  # also where h is not finite
        tl.debug_barrier()  # before may be ends
        tl.store(before + rows, states, mask=both)
    if last is not None:
        tl.store(last + state, h, mask=inside)
