"""Triton kernels of the selective scan, backwards.

With g the gradient of the output before the gate and G[t] that of the state h[t]::

    G[t] = g[t] C[t] + exp(delta[t+1] A) G[t+1]
    dC[t] = sum over channels of g[t] h[t]
    dB[t] = sum over channels of G[t] delta[t] u[t]
    q[t] = G[t] exp(delta[t] A) h[t-1], which is the gradient of delta[t] A
    dA = sum over t of q[t] delta[t]
    du[t] = delta[t] (G[t] . B[t]) + D g[t]
    ddelta[t] = u[t] (G[t] . B[t]) + sum over n of A q[t]

The forward pass has saved the state before every interval of time, and the intervals are handled side by side::

    adjoint_kernel   the gradient of the state before each interval as far as it comes from that interval alone;
    carry_kernel     the gradient of the state after each interval, from the last to the first;
    gradient_kernel  all gradients of an interval, from the state before it and the gradient of the state after it.

The last one makes the states of its interval again and keeps one of TILE in memory: a place of its own per
program, which the next interval uses again, so that it stays in the second-level cache. Sums over channels are kept
apart for each group of channels, and those over time for each interval; they are added afterwards, always in the
same order.

Limits, of B L D N updates of a state: four exponentials, as recomputing costs less than keeping, and in the
gradient kernel about 55 instructions (read off the machine code for sm_90 that Triton 3.6 makes), of which an SM
issues 128 per clock. So instructions are the limit there: 21 of them are arithmetic and 3 shuffles. A thread holds
4 states of each of 4 channels, if there are 16 states: the sums over states (three per channel) and those over
channels (two per state) then take about as many shuffles. mamba_ssm's kernel takes 71, and adds to the gradients of
B and C by atomic operations, two for each update.

Dimensions: B batch, L length, D channels, N d_state, I intervals, G groups of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mambax_torch.kernels.scan_steps import LN_2, LOG2_E, both, row, sigmoid, time_step

TILE = tl.constexpr(2)
"""Steps that the gradient kernel handles at once, from a state that it keeps in memory."""

WINDOW = tl.constexpr(32)
"""Steps whose states it keeps at the same time: few enough that those of all programs stay in the cache."""


@triton.jit
def _there(mask, t, end, EVEN_T: tl.constexpr):
    """Whether step t is before the end and not masked; None when all are."""
    if EVEN_T and mask is None:
        there = None
    elif mask is None:
        there = t < end
    else:
        there = tl.load(mask + t, mask=t < end, other=0) != 0
    return there


@triton.jit
def _decay(dt, rates, boundaries, t, end):
    """(BD, BN) what of the state before step t is left after it."""
    a = tl.exp2(dt[:, None] * rates)
    if boundaries is not None:
        a = tl.where(tl.load(boundaries + t, mask=t < end, other=0) != 0, 0.0, a)
    return a


@triton.jit
def _step(u, delta, B, there, d, n, has_d, has_n, shift, SOFTPLUS: tl.constexpr):
    """Of the step whose rows these are: delta with its bias, dt, u (BD,) and B (BN,), in float32."""
    raw = row(delta + d, has_d, there).to(tl.float32) + shift
    now = row(u + d, has_d, there).to(tl.float32)
    b = row(B + n, has_n, there).to(tl.float32)
    return raw, time_step(raw, 0.0, there, SOFTPLUS), now, b


@triton.jit
def _kept(a, h, boundaries):
    """a * h, and zero where a sequence begins, even if h is not finite."""
    left = a * h
    if boundaries is not None:
        left = tl.where(a == 0.0, 0.0, left)
    return left


@triton.jit
def _forward(h, dt, now, b, rates, boundaries, t, end):
    """The state after step t, from that before it; (BD, BN)."""
    a = _decay(dt, rates, boundaries, t, end)
    return _kept(a, h, boundaries) + (dt * now)[:, None] * b[None, :]


@triton.jit
def _store(pointer, columns, values, inside, there):
    """Store a row where its columns are inside and its step is there; None for what always is."""
    found = both(inside, there, values.shape)
    values = values.to(pointer.dtype.element_ty)
    if found is None:
        tl.store(pointer + columns, values)
    else:
        tl.store(pointer + columns, values, mask=found)


@triton.jit
def _earlier(pointers, inside, there, again):
    """What earlier blocks of channels have summed up, (columns,), where `again`; 0 where there are none."""
    return 0.0 if again is None else row(pointers, inside, again if there is None else again & there)


@triton.jit
def _backward(
    h, adjoint, dA, dskip, dbias, raw, dt, now, b, there, t, end, again,
    dy, C, z, boundaries, du, ddelta, dz, dB, dC, d, n, has_d, has_n, direct, rates,
    SOFTPLUS: tl.constexpr, EVEN_T: tl.constexpr,
):  # fmt: skip
    """Step t from the state before it: stores its gradients; adds to those of A, D and the bias.

    adjoint: (BD, BN) gradient of the state after the step, from later steps; returned is that of the one before.
    """
    written = None if EVEN_T else t < end
    sum_C = _earlier(dC + n, has_n, written, again)  # read here, long before they are needed
    sum_B = _earlier(dB + n, has_n, written, again)
    g = row(dy + d, has_d, there).to(tl.float32)
    c = row(C + n, has_n, there).to(tl.float32)
    x = dt * now
    dout, gate, s = g, g, g  # for what is not there without a gate
    if z is not None:
        gate = row(z + d, has_d, there).to(tl.float32)
        s = sigmoid(gate)
        g = dout * gate * s
    a = _decay(dt, rates, boundaries, t, end)
    kept = _kept(a, h, boundaries)
    h = kept + x[:, None] * b[None, :]
    if z is not None:
        out = tl.sum(h * c[None, :], axis=1)
        if direct is not None:
            out += direct * now
        _store(dz, d, dout * out * s * (1.0 + gate * (1.0 - s)), has_d, written)
    adjoint += g[:, None] * c[None, :]
    if again is not None:
        tl.debug_barrier()  # several threads may have read a sum that one of them writes
    _store(dC, n, tl.sum(g[:, None] * h, axis=0) + sum_C, has_n, written)
    _store(dB, n, tl.sum(x[:, None] * adjoint, axis=0) + sum_B, has_n, written)
    of_x = tl.sum(adjoint * b[None, :], axis=1)
    q = adjoint * kept
    dA += dt[:, None] * q
    ddt = now * of_x + tl.sum(rates * q, axis=1) * LN_2
    if SOFTPLUS:
        ddt *= sigmoid(raw)
    if there is not None:
        ddt = tl.where(there, ddt, 0.0)
    dx = dt * of_x
    if direct is not None:
        dx += direct * g
        dskip += g * now
    dbias += ddt
    _store(du, d, dx, has_d, written)
    _store(ddelta, d, ddt, has_d, written)
    return _kept(a, adjoint, boundaries), dA, dskip, dbias


@triton.jit
def _sweep(
    h, begin, stop, start, end, places, u, delta, B, mask, boundaries, u_row, delta_row, B_row,
    d, n, has_d, has_n, shift, rates,
    KEEP, SOFTPLUS: tl.constexpr, EVEN_T: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The state `stop` steps into an interval, from that after `begin`; with KEEP, one of TILE is stored.

    A step is read one ahead of its use, as forwards.
    """
    first = tl.cast(begin, tl.int64)
    u_at, delta_at, B_at = u + first * u_row + d, delta + first * delta_row + d, B + first * B_row + n
    at_begin = _there(mask, start + begin, end, EVEN_T)
    u_next = row(u_at, has_d, at_begin)
    delta_next = row(delta_at, has_d, at_begin)
    B_next = row(B_at, has_n, at_begin)
    for tile in range((stop - begin) // TILE):
        if KEEP:
            tl.store(places + tile * (BD * BN), h)
        for i in range(TILE):
            t = start + begin + tile * TILE + i
            dt = time_step(delta_next, shift, _there(mask, t, end, EVEN_T), SOFTPLUS)
            now, b = u_next.to(tl.float32), B_next.to(tl.float32)
            hop = tl.minimum(start + stop - 1 - t, 1)
            at_following = _there(mask, t + hop, end, EVEN_T)
            u_at += hop * u_row
            delta_at += hop * delta_row
            B_at += hop * B_row
            u_next = row(u_at, has_d, at_following)
            delta_next = row(delta_at, has_d, at_following)
            B_next = row(B_at, has_n, at_following)
            h = _forward(h, dt, now, b, rates, boundaries, t, end)
    return h


@triton.jit
def gradient_kernel(
    dy, u, delta, A, B, C, skip, z, bias, mask, boundaries, saved, adjoints, scratch,
    du, ddelta, dz, dB, dC, dskip, dbias,
    dy_batch, dy_row, u_batch, u_row, delta_batch, delta_row, B_batch, B_row, C_batch, C_row, z_batch, z_row,
    length, D, N, blocks, groups, intervals, batches, programs,
    INTERVAL: tl.constexpr, SOFTPLUS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_T: tl.constexpr, ONCE: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All gradients, from saved (B, I, N, D) and adjoints (B, I, N, D), the gradients of states after intervals.

    du, ddelta, dz: (B, L, D) contiguous. dskip and dbias: (B, I, D), dB and dC: (G, B, L, N), float32, still to be
    added up over intervals and groups; so is that of A, which takes the place of adjoints. scratch: (programs,
    INTERVAL / WINDOW + WINDOW / TILE, BD, BN) float32. Each of `programs` programs handles one of B * I * G items
    after another. ONCE: a group is a single block of channels.
    """
    program = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    has_n = None if EVEN_N else n < N
    windows = scratch + program * ((WINDOW // TILE + INTERVAL // WINDOW) * BD * BN)
    windows += tl.arange(0, BD)[:, None] * BN + n[None, :]
    places = windows + INTERVAL // WINDOW * (BD * BN)
    for item in range(program, batches * intervals * groups, programs):
        number = item // groups % intervals
        batch = item // groups // intervals
        group = item % groups
        first = batch * length + number * INTERVAL
        start = tl.cast(number, tl.int32) * INTERVAL
        end = tl.minimum(start + INTERVAL, length)
        used = tl.cdiv(end - start, WINDOW)
        dy_ = dy + batch * dy_batch + number * INTERVAL * dy_row
        u_ = u + batch * u_batch + number * INTERVAL * u_row
        delta_ = delta + batch * delta_batch + number * INTERVAL * delta_row
        B_ = B + batch * B_batch + number * INTERVAL * B_row
        C_ = C + batch * C_batch + number * INTERVAL * C_row
        z_ = None if z is None else z + batch * z_batch + number * INTERVAL * z_row
        mask_ = None if mask is None else mask + batch * length
        boundaries_ = None if boundaries is None else boundaries + batch * length
        for block in range(group, blocks, groups):
            d = tl.cast(block, tl.int32) * BD + tl.arange(0, BD)
            has_d = d < D
            inside = has_d[:, None] & (n < N)[None, :]
            rates = tl.load(A + d[:, None] * N + n[None, :], mask=inside, other=0.0) * LOG2_E
            shift = 0.0 if bias is None else tl.load(bias + d, mask=has_d, other=0.0)
            direct = None if skip is None else tl.load(skip + d, mask=has_d, other=0.0)
            cells = (batch * intervals + number) * N * D + d[:, None] + n[None, :] * D
            again = None if ONCE else block != group

            h = tl.load(saved + cells, mask=inside, other=0.0)
            for window in range(used):
                tl.store(windows + window * (BD * BN), h)
                if window + 1 < used:
                    h = _sweep(
                        h, window * WINDOW, (window + 1) * WINDOW, start, end, places,
                        u_, delta_, B_, mask_, boundaries_, u_row, delta_row, B_row,
                        d, n, has_d, has_n, shift, rates, False, SOFTPLUS, EVEN_T, BD, BN,
                    )  # fmt: skip
            adjoint = tl.load(adjoints + cells, mask=inside, other=0.0)
            sum_A = tl.zeros((BD, BN), tl.float32)
            sum_skip = tl.zeros((BD,), tl.float32)
            sum_bias = tl.zeros((BD,), tl.float32)
            for back in range(used):
                begin = (used - 1 - back) * WINDOW
                tiles = tl.cdiv(tl.minimum(end - start - begin, WINDOW), TILE)
                tl.debug_barrier()  # threads may read what others wrote
                h = tl.load(windows + begin // WINDOW * (BD * BN))
                _sweep(
                    h, begin, begin + tiles * TILE, start, end, places,
                    u_, delta_, B_, mask_, boundaries_, u_row, delta_row, B_row, d, n, has_d, has_n, shift, rates,
                    True, SOFTPLUS, EVEN_T, BD, BN,
                )  # fmt: skip
                tl.debug_barrier()
                for i in range(tiles):
                    tile = tiles - 1 - i
                    step = tl.cast(begin + tile * TILE, tl.int64)
                    t = start + begin + tile * TILE
                    u_t, delta_t, B_t = u_ + step * u_row, delta_ + step * delta_row, B_ + step * B_row
                    dy_t, C_t = dy_ + step * dy_row, C_ + step * C_row
                    z_t = None if z is None else z_ + step * z_row
                    z_1 = None if z is None else z_t + z_row
                    to = (first + step) * D
                    dz_0 = None if z is None else dz + to
                    dz_1 = None if z is None else dz + to + D
                    to_N = (group * batches * length + first + step) * N
                    there0 = _there(mask_, t, end, EVEN_T)  # not as a pair: Triton 3.6 knows no tuple of None
                    there1 = _there(mask_, t + 1, end, EVEN_T)
                    raw0, dt0, now0, b0 = _step(u_t, delta_t, B_t, there0, d, n, has_d, has_n, shift, SOFTPLUS)
                    raw1, dt1, now1, b1 = _step(
                        u_t + u_row, delta_t + delta_row, B_t + B_row, there1, d, n, has_d, has_n, shift, SOFTPLUS
                    )
                    h0 = tl.load(places + tile * (BD * BN))
                    h1 = _forward(h0, dt0, now0, b0, rates, boundaries_, t, end)
                    adjoint, sum_A, sum_skip, sum_bias = _backward(
                        h1, adjoint, sum_A, sum_skip, sum_bias, raw1, dt1, now1, b1, there1, t + 1, end, again,
                        dy_t + dy_row, C_t + C_row, z_1, boundaries_, du + to + D, ddelta + to + D, dz_1,
                        dB + to_N + N, dC + to_N + N, d, n, has_d, has_n, direct, rates, SOFTPLUS, EVEN_T,
                    )  # fmt: skip
                    adjoint, sum_A, sum_skip, sum_bias = _backward(
                        h0, adjoint, sum_A, sum_skip, sum_bias, raw0, dt0, now0, b0, there0, t, end, again,
                        dy_t, C_t, z_t, boundaries_, du + to, ddelta + to, dz_0,
                        dB + to_N, dC + to_N, d, n, has_d, has_n, direct, rates, SOFTPLUS, EVEN_T,
                    )  # fmt: skip
            place = batch * intervals + number
            tl.store(adjoints + cells, sum_A, mask=inside)
            tl.store(dskip + place * D + d, sum_skip, mask=has_d)
            tl.store(dbias + place * D + d, sum_bias, mask=has_d)
            tl.debug_barrier()
