"""Triton kernels of the selective scan, forwards.

The recurrence is linear in the state, so that time can be cut into segments that run side by side::

    advance_kernel   the state that each segment but the last ends in when it starts from zero, and the sum of its
                     steps, which gives its decay exp(A * sum);
    carry_kernel     the state that each segment starts in, one segment after another;
    output_kernel    y, each segment started from its state.

Where rows and channels fill the GPU by themselves there is one segment, and the output kernel alone runs.

Limits, of B L D N updates of a state: each takes one exponential, of which an H100 makes 16 per clock and SM, and
five instructions in the output kernel (A dt, exp2, dt u B, h, y), of which it issues 128: the exponentials are the
limit, 3.7e12 a second at 1.75 GHz. With d_state 16 and bfloat16, 16 exponentials stand against 8 bytes (u, delta,
z and y), which memory moves in half the time. Cutting time takes the exponentials twice, so it pays where channels
and rows alone would leave more than half of the GPU idle; nothing else is worth saving before the exponentials.

In the machine code for sm_90 (Triton 3.6), a step of 64 channels of 16 states takes a warp 332 instructions and 38
exponentials and reciprocals in the output kernel, which are 332 and 304 clocks of a scheduler, and 213 and 34, or
272 clocks, in the advance kernel. A scheduler with one warp waits for most of that time, with three or four for
little of it; 168 registers leave room for three. mamba_ssm's kernel, compiled for the same chip, takes 726 of the
same units of work (305 instructions for each state of 16 steps, 935 for what the states share), once. So with time
cut the instructions of both kernels are 0.75 of mamba_ssm's, and without that 0.46.

Dimensions: B batch, L length, D channels, N d_state, S segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambax_torch.kernels.scan_steps import LOG2_E, flag, row, sigmoid, time_step


@triton.jit
def _columns(program, blocks, D, N, BD: tl.constexpr, BN: tl.constexpr):
    """Of a program: its channels (BD,), its states (BN,), and which of them are there."""
    d = (program % blocks).to(tl.int32) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    return d, n, d < D, n < N


@triton.jit(do_not_specialize=["A_row", "state_row"])  # of unknown alignment: a thread then holds all n of a d
def advance_kernel(
    u, delta, A, B, bias, mask, boundaries, ends, sums,
    u_batch, u_row, delta_batch, delta_row, B_batch, B_row, A_row, state_row,
    length, D, N, blocks, segments, steps,
    SOFTPLUS: tl.constexpr, EVEN_N: tl.constexpr, SIDE: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """ends (B, S, N, D) of all segments but the last, sums (B, S, D) float32; infinity where a sequence begins.

    Programs: B * (S-1) * blocks, the channels fastest. A: (N, D) contiguous. SIDE divides D: a thread holds so many
    channels side by side, as it reads them.
    """
    program = tl.program_id(0).to(tl.int64)
    d, n, has_d, has_n = _columns(program, blocks, D, N, BD, BN)  # pyright: ignore[reportGeneralTypeIssues] by jit
    segment = program // blocks % (segments - 1)
    batch = program // blocks // (segments - 1)
    start = tl.cast(segment, tl.int32) * steps
    end = tl.minimum(start + steps, length)
    first = start.to(tl.int64)
    u_at = u + batch * u_batch + first * u_row + d
    delta_at = delta + batch * delta_batch + first * delta_row + d
    B_at = B + batch * B_batch + first * B_row + n
    if mask is not None:
        mask += batch * length
    if boundaries is not None:
        boundaries += batch * length
    inside = has_n[:, None] & has_d[None, :]
    decay = tl.load(A + n[:, None] * (A_row // SIDE * SIDE) + d[None, :], mask=inside, other=0.0) * LOG2_E
    shift = 0.0 if bias is None else tl.load(bias + d, mask=has_d, other=0.0)

    h = tl.zeros((BN, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    wanted = None if EVEN_N else has_n
    at_start = flag(mask, start)
    dt_next = row(delta_at, has_d, at_start)
    u_next = row(u_at, has_d, at_start)
    B_next = row(B_at, wanted, at_start)
    for t in range(start, end):
        dt = time_step(dt_next, shift, flag(mask, t), SOFTPLUS)
        x = dt * u_next.to(tl.float32)
        b = B_next.to(tl.float32)
        following = tl.minimum(t + 1, end - 1)
        hop = following - t
        at_following = flag(mask, following)
        delta_at += hop * delta_row
        u_at += hop * u_row
        B_at += hop * B_row
        dt_next = row(delta_at, has_d, at_following)
        u_next = row(u_at, has_d, at_following)
        B_next = row(B_at, wanted, at_following)
        if boundaries is not None:
            begins = flag(boundaries, t)
            h = tl.where(begins, 0.0, h)
            total = tl.where(begins, float("inf"), total)
        h = tl.exp2(dt[None, :] * decay) * h + x[None, :] * b[:, None]
        total += dt
    place = batch * segments + segment
    tl.store(ends + place * N * D + n[:, None] * (state_row // SIDE * SIDE) + d[None, :], h, mask=inside)
    tl.store(sums + place * D + d, total, mask=has_d)


@triton.jit(do_not_specialize=["A_row", "state_row"])
def output_kernel(
    u, delta, A, B, C, skip, z, bias, mask, boundaries, starts, y, final, saved,
    u_batch, u_row, delta_batch, delta_row, B_batch, B_row, C_batch, C_row, z_batch, z_row, A_row, state_row,
    length, D, N, blocks, segments, steps,
    INTERVAL: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN_N: tl.constexpr, SIDE: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """y (B, L, D), final (B, D, N), and saved (B, ceil(L / INTERVAL), N, D), the state before every interval.

    Programs: B * S * blocks, the channels fastest. starts: (B, S, N, D), or None for zero. SIDE as in
    :func:`advance_kernel`.
    """
    program = tl.program_id(0).to(tl.int64)
    d, n, has_d, has_n = _columns(program, blocks, D, N, BD, BN)  # pyright: ignore[reportGeneralTypeIssues] by jit
    segment = program // blocks % segments
    batch = program // blocks // segments
    start = tl.cast(segment, tl.int32) * steps
    end = tl.minimum(start + steps, length)
    first = start.to(tl.int64)
    u_at = u + batch * u_batch + first * u_row + d
    delta_at = delta + batch * delta_batch + first * delta_row + d
    B_at = B + batch * B_batch + first * B_row + n
    C_at = C + batch * C_batch + first * C_row + n
    z_at = u_at if z is None else z + batch * z_batch + first * z_row + d
    y_at = y + (batch * length + first) * D + d
    if mask is not None:
        mask += batch * length
    if boundaries is not None:
        boundaries += batch * length
    cells = n[:, None] * (state_row // SIDE * SIDE) + d[None, :]
    inside = has_n[:, None] & has_d[None, :]
    decay = tl.load(A + n[:, None] * (A_row // SIDE * SIDE) + d[None, :], mask=inside, other=0.0) * LOG2_E
    shift = 0.0 if bias is None else tl.load(bias + d, mask=has_d, other=0.0)
    direct = None if skip is None else tl.load(skip + d, mask=has_d, other=0.0)
    if starts is None:
        h = tl.zeros((BN, BD), tl.float32)
    else:
        h = tl.load(starts + (batch * segments + segment) * N * D + cells, mask=inside, other=0.0)

    wanted = None if EVEN_N else has_n
    at_start = flag(mask, start)
    dt_next = row(delta_at, has_d, at_start)
    u_next = row(u_at, has_d, at_start)
    z_next = u_next if z is None else row(z_at, has_d, at_start)
    B_next = row(B_at, wanted, at_start)
    C_next = row(C_at, wanted, at_start)
    for t in range(start, end):
        if saved is not None:  # noqa: SIM102 known when compiling; joined, both would be compiled for None too
            if t % INTERVAL == 0:  # pyright: ignore[reportOperatorIssue] numbers to Triton
                place = batch * tl.cdiv(length, INTERVAL) + t // INTERVAL
                tl.store(saved + place * N * D + cells, h, mask=inside)
        dt = time_step(dt_next, shift, flag(mask, t), SOFTPLUS)
        now = u_next.to(tl.float32)
        gate = z_next.to(tl.float32)
        b = B_next.to(tl.float32)
        c = C_next.to(tl.float32)
        following = tl.minimum(t + 1, end - 1)
        hop = following - t
        at_following = flag(mask, following)
        delta_at += hop * delta_row
        u_at += hop * u_row
        z_at += hop * z_row
        B_at += hop * B_row
        C_at += hop * C_row
        dt_next = row(delta_at, has_d, at_following)
        u_next = row(u_at, has_d, at_following)
        z_next = u_next if z is None else row(z_at, has_d, at_following)
        B_next = row(B_at, wanted, at_following)
        C_next = row(C_at, wanted, at_following)
        if boundaries is not None:
            h = tl.where(flag(boundaries, t), 0.0, h)
        h = tl.exp2(dt[None, :] * decay) * h + (dt * now)[None, :] * b[:, None]
        out = tl.sum(h * c[:, None], axis=0)
        if skip is not None:
            out += direct * now
        if z is not None:
            out *= gate * sigmoid(gate)
        tl.store(y_at, out.to(y.dtype.element_ty), mask=has_d)
        y_at += D
    if segment == segments - 1:
        tl.store(final + batch * D * N + d[None, :] * N + n[:, None], h, mask=inside)
