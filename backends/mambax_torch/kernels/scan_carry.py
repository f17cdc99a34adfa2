"""The Triton kernel that carries states from segment to segment, forwards, and their gradients backwards.

Dimensions: B batch, D channels, N d_state, S segments; in a program BD channels of one state number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambax_torch.kernels.scan_steps import LOG2_E


@triton.jit(do_not_specialize=["D", "A_row", "first_row", "first_column"])
def carry_kernel(
    ends, sums, A, first, before, last,
    first_batch, first_row, first_column, A_row, D, N, blocks, segments,
    BACKWARDS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """before[0] = first, before[s + 1] = exp(A sums[s]) before[s] + ends[s]; segments from the last when BACKWARDS.

    Programs: B * N * blocks, the channels fastest. A: (N, D). ends, before: (B, S, N, D), sums: (B, S, D), all
    contiguous and float32; a sum of infinity stands for a decay of zero. first: (B, N, D) by strides, or None for
    zero. last: (B, N, D) contiguous gets what follows the last segment, or is None, and then ends of the last
    segment is not looked at. before may be ends: a program reads a cell before it writes it, and no other touches
    it. ROWS segments are read at once, or the time would be that of waiting for memory.
    """
    program = tl.program_id(0).to(tl.int64)
    d = (program % blocks).to(tl.int32) * BD + tl.arange(0, BD)
    n = program // blocks % N
    batch = program // blocks // N
    inside = d < D
    rate = tl.load(A + n * A_row + d, mask=inside, other=0.0) * LOG2_E
    if first is None:
        h = tl.zeros((BD,), tl.float32)
    else:
        h = tl.load(first + batch * first_batch + n * first_row + d * first_column, mask=inside, other=0.0)
        h = h.to(tl.float32)
    number = tl.arange(0, ROWS)
    for start in range(0, segments, ROWS):
        order = start + number
        segment = segments - 1 - order if BACKWARDS else order
        there = (order < segments)[:, None] & inside[None, :]
        known = there if last is not None else there & (order < segments - 1)[:, None]
        places = batch * segments + segment
        cells = (places * N + n)[:, None] * D + d[None, :]
        total = tl.load(sums + places[:, None] * D + d[None, :], mask=known, other=0.0)
        end = tl.load(ends + cells, mask=known, other=0.0)
        decay = tl.where(total == float("inf"), 0.0, tl.exp2(total * rate[None, :]))
        states = tl.zeros((ROWS, BD), tl.float32)
        for i in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues] Triton iterates over it
            picked = (number == i)[:, None]
            states = tl.where(picked, h[None, :], states)
            a = tl.sum(tl.where(picked, decay, 0.0), axis=0)
            b = tl.sum(tl.where(picked, end, 0.0), axis=0)
            after = tl.where(a == 0.0, b, a * h + b)  # also where h is not finite
            h = tl.where(start + i < segments, after, h)
        tl.debug_barrier()  # before may be ends
        tl.store(before + cells, states, mask=there)
    if last is not None:
        tl.store(last + (batch * N + n) * D + d, h, mask=inside)
