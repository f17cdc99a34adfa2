"""The Triton kernel of Mamba-2's scan, forwards.

A program takes one head through the chunks of a segment, its state in registers: per chunk, the products C B^T,
those of the masked scores with x, those of C with the state before, and the chunk's contribution to the state. No
state but those of segments and of saved intervals touches memory. Where rows and heads fill the GPU there is one
segment; else :mod:`mambax_torch.kernels.ssd_states` first finds what each segment starts in.

Limits, per step and head of P = 64, N = 128 in bfloat16 with T = 64: 2 (T N + T P + 2 N P) = 57,000 floating-point
operations on the tensor cores, and 256 bytes of x and y (B and C, shared by a group's heads, come from the
second-level cache). At 6e14 operations and 3e12 bytes a second these take 96 and 85 ps: they balance, so that
computing C B^T for each head again costs less than keeping it. Keeping the state of every chunk would move another
4 N P / T = 512 bytes a step each way.

Dimensions: B batch, L length, H heads, P head_dim, N d_state, R heads of a group, K chunks of T steps, S segments,
I saved intervals; in a program BP of the P, BN >= N a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambax_torch.kernels.ssd_steps import (
    decay_between,
    decay_from_start,
    decay_to_end,
    existing,
    numbered,
    product,
    tile,
)


@triton.jit
def output_kernel(
    x, B, C, skip, steps, high, low, mask, numbers, starts, y, final, saved,
    x_batch, x_row, B_batch, B_row, C_batch, C_row,
    length, H, P, N, R, blocks, segments, chunks, per, intervals, every,
    EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, T: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, L, H, P), final (B, H, P, N), and the state before every `every` chunks, saved (B, I, H, P, N) or None.

    Programs: B * S * H * blocks, blocks of P fastest. starts: (B, S, H, P, N), or None for zero.
    """
    program = tl.program_id(0).to(tl.int64)
    p = (program % blocks).to(tl.int32) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    head = program // blocks % H
    segment = program // blocks // H % segments
    batch = program // blocks // H // segments
    x += batch * x_batch + head * P
    B += batch * B_batch + head // R * N
    C += batch * C_batch + head // R * N
    y += (batch * length * H + head) * P
    of_head = (batch * H + head) * (chunks * T)
    if mask is not None:
        mask += batch * length
    if numbers is not None:
        numbers += batch * length
    cells = p[:, None] * N + n[None, :]
    inside = (p < P)[:, None] & (n < N)[None, :]
    if starts is None:
        h = tl.zeros((BP, BN), tl.float32)
    else:
        place = ((batch * segments + segment) * H + head) * P * N
        h = tl.load(starts + place + cells, mask=inside, other=0.0)
    direct = 0.0 if skip is None else tl.load(skip + head)
    first = segment * per
    count = tl.minimum(per, chunks - first)
    for i in range(count):
        chunk = first + i
        start = chunk * T
        t = start + tl.arange(0, T)
        there = existing(mask, t, length)
        of_step, before, after = None, None, None
        if numbers is not None:
            of_step, before, after = numbered(numbers, t, start, length, T)
        upper, lower = tl.load(high + of_head + t), tl.load(low + of_head + t)
        step = tl.load(steps + of_head + t)
        end = of_head + start + T - 1
        upper_end, lower_end = tl.load(high + end), tl.load(low + end)
        C_t = tile(C, C_row, t, n, N, there, EVEN_N).to(WORK)
        B_t = tile(B, B_row, t, n, N, there, EVEN_N).to(WORK)
        x_t = tile(x, x_row, t, p, P, there, EVEN_P)
        if saved is not None:  # noqa: SIM102 known when compiling; joined, both would be compiled for None too
            if chunk % every == 0:
                to = ((batch * intervals + chunk // every) * H + head) * P * N
                tl.store(saved + to + cells, h, mask=inside)
        scores = product(C_t, tl.trans(B_t), PRECISION)
        scores = scores * decay_between(upper, lower, of_step, T) * step[None, :]
        out = product(C_t, tl.trans(h.to(WORK)), PRECISION)
        out = out * decay_from_start(upper, lower, of_step, before)[:, None]
        out += product(scores.to(WORK), x_t.to(WORK), PRECISION)
        wide = x_t.to(tl.float32)
        if skip is not None:
            out += wide * direct
        written = (t < length)[:, None] & (p < P)[None, :]
        tl.store(y + t[:, None] * (H * P) + p[None, :], out, mask=written)
        weights = decay_to_end(upper, lower, upper_end, lower_end, of_step, after) * step
        weighted = (wide * weights[:, None]).to(WORK)
        whole = decay_from_start(upper_end, lower_end, after, before)
        h = h * whole + product(tl.trans(weighted), B_t, PRECISION)
    if segment == segments - 1:
        tl.store(final + (batch * H + head) * P * N + cells, h, mask=inside)
