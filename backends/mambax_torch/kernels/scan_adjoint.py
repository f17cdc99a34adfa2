"""The Triton kernel that begins the selective scan's gradient: what the states before intervals of time get.

Dimensions: B batch, L length, D channels, N d_state, I intervals; in a program BD channels, BN >= N a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambax_torch.kernels.scan_steps import LOG2_E, flag, row, sigmoid, time_step


@triton.jit(do_not_specialize=["A_row", "state_row"])
def adjoint_kernel(
    dy, delta, A, C, z, bias, mask, boundaries, ends, sums,
    dy_batch, dy_row, delta_batch, delta_row, C_batch, C_row, z_batch, z_row, A_row, state_row,
    length, D, N, blocks, intervals, interval,
    SOFTPLUS: tl.constexpr, EVEN_N: tl.constexpr, SIDE: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """ends (B, I, N, D), sums (B, I, D) float32; infinity where a sequence begins.

    Programs: B * I * blocks, the channels fastest. A: (N, D) contiguous. SIDE divides D: a thread holds so many
    channels side by side, as it reads them.
    """
    program = tl.program_id(0).to(tl.int64)
    d = (program % blocks).to(tl.int32) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    has_d = d < D
    number = program // blocks % intervals
    batch = program // blocks // intervals
    start = tl.cast(number, tl.int32) * interval
    end = tl.minimum(start + interval, length)
    last = (end - 1).to(tl.int64)
    dy_at = dy + batch * dy_batch + last * dy_row + d
    delta_at = delta + batch * delta_batch + last * delta_row + d
    C_at = C + batch * C_batch + last * C_row + n
    z_at = dy_at if z is None else z + batch * z_batch + last * z_row + d
    if mask is not None:
        mask += batch * length
    if boundaries is not None:
        boundaries += batch * length
    inside = (n < N)[:, None] & has_d[None, :]
    decay = tl.load(A + n[:, None] * (A_row // SIDE * SIDE) + d[None, :], mask=inside, other=0.0) * LOG2_E
    shift = 0.0 if bias is None else tl.load(bias + d, mask=has_d, other=0.0)

    adjoint = tl.zeros((BN, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    wanted = None if EVEN_N else n < N
    at_end = flag(mask, end - 1)
    dy_next = row(dy_at, has_d, at_end)
    dt_next = row(delta_at, has_d, at_end)
    z_next = dy_next if z is None else row(z_at, has_d, at_end)
    C_next = row(C_at, wanted, at_end)
    for i in range(end - start):
        t = end - 1 - i
        dt = time_step(dt_next, shift, flag(mask, t), SOFTPLUS)
        g = dy_next.to(tl.float32)
        if z is not None:
            gate = z_next.to(tl.float32)
            g *= gate * sigmoid(gate)
        c = C_next.to(tl.float32)
        before = tl.maximum(t - 1, start)
        hop = before - t
        at_before = flag(mask, before)
        dy_at += hop * dy_row
        delta_at += hop * delta_row
        z_at += hop * z_row
        C_at += hop * C_row
        dy_next = row(dy_at, has_d, at_before)
        dt_next = row(delta_at, has_d, at_before)
        z_next = dy_next if z is None else row(z_at, has_d, at_before)
        C_next = row(C_at, wanted, at_before)
        adjoint = tl.exp2(dt[None, :] * decay) * (adjoint + g[None, :] * c[:, None])
        total += dt
        if boundaries is not None:
            first = flag(boundaries, t)
            adjoint = tl.where(first, 0.0, adjoint)
            total = tl.where(first, float("inf"), total)
    place = batch * intervals + number
    tl.store(ends + place * N * D + n[:, None] * (state_row // SIDE * SIDE) + d[None, :], adjoint, mask=inside)
    tl.store(sums + place * D + d, total, mask=has_d)
