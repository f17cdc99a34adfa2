"""The Triton kernels of Mamba-2's scan, backwards.

Every chunk by itself, from the state before it and the gradient of the state after it, both of which
:mod:`mambax_torch.kernels.ssd_states` computes again::

    inputs_kernel    gradients of x and dt, and shares of those of A, D and the bias;
    vectors_kernel   gradients of B and C.

A program takes the heads of a group one after another: C B^T is computed once for all, and the gradients of B and
C, to which every head of a group adds, are added up in registers, in the same order every time. One kernel for both
would need more registers than there are.

The gradient of log decay u of a chunk gathers every pair of steps s < u <= t::

    sum over t >= u of (sum over s < t of w[t, s]) - sum over s >= u of (sum over t > s of w[t, s])

where w is the pair's share of the loss, besides the pairs of a step of the chunk with what is before or after it.

Dimensions: B batch, L length, H heads, P head_dim, G groups, R heads of a group, N d_state, K chunks of T steps, S
shares of a group's heads; in a program BP >= P, and BN >= N or a block of them, powers of two.
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
def inputs_kernel(
    dy, x, B, C, A, skip, steps, high, low, slopes, mask, numbers, befores, afters, dx, ddt, dA, dskip, dbias,
    dy_batch, dy_row, x_batch, x_row, B_batch, B_row, C_batch, C_row,
    length, H, P, N, R, shares, each, chunks,
    EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, T: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx (B, L, H, P) and ddt (B, L, H); dA, dskip and dbias (B, K, H) float32, still to be added up.

    Programs: B * K * G * S, the shares fastest. befores, afters: (B, K, H, P, N) states before chunks, and
    gradients of those after, in the dtype of the products.
    """
    program = tl.program_id(0).to(tl.int64)
    groups = H // R
    share = program % shares
    group = program // shares % groups
    chunk = program // shares // groups % chunks
    batch = program // shares // groups // chunks
    p, n, s = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, T)
    start = chunk * T
    t = start + s
    if mask is not None:
        mask += batch * length
    if numbers is not None:
        numbers += batch * length
    there = existing(mask, t, length)
    of_step, before, after = None, None, None
    if numbers is not None:
        of_step, before, after = numbered(numbers, t, start, length, T)
    B_t = tile(B + batch * B_batch + group * N, B_row, t, n, N, there, EVEN_N).to(WORK)
    C_t = tile(C + batch * C_batch + group * N, C_row, t, n, N, there, EVEN_N).to(WORK)
    scores = product(C_t, tl.trans(B_t), PRECISION)  # (T, T), [t, s]
    inside = (p < P)[:, None] & (n < N)[None, :]
    cells = p[:, None] * N + n[None, :]
    in_row = (t < length)[:, None] & (p < P)[None, :]
    for number in range(share * each, tl.minimum(share * each + each, R)):
        head = group * R + number
        of_head = (batch * H + head) * (chunks * T)
        upper, lower = tl.load(high + of_head + t), tl.load(low + of_head + t)
        end = of_head + start + T - 1
        upper_end, lower_end = tl.load(high + end), tl.load(low + end)
        step = tl.load(steps + of_head + t)
        x_t = tile(x + batch * x_batch + head * P, x_row, t, p, P, there, EVEN_P)
        dy_t = tile(dy + batch * dy_batch + head * P, dy_row, t, p, P, there, EVEN_P)
        place = ((batch * chunks + chunk) * H + head) * P * N
        state = tl.load(befores + place + cells, mask=inside, other=0.0)
        adjoint = tl.load(afters + place + cells, mask=inside, other=0.0)
        through = tl.sum(tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), axis=1), axis=0)
        through *= decay_from_start(upper_end, lower_end, after, before)

        decay = decay_between(upper, lower, of_step, T)
        pairs = product(dy_t.to(WORK), tl.trans(x_t.to(WORK)), PRECISION) * decay * step[None, :]
        pairs = tl.where(s[:, None] > s[None, :], pairs * scores, 0.0)
        of_log = tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)  # pyright: ignore[reportOperatorIssue] no tuples
        of_product = product(tl.trans((scores * decay).to(WORK)), dy_t.to(WORK), PRECISION)

        from_start = decay_from_start(upper, lower, of_step, before)
        earlier = product(C_t, tl.trans(state), PRECISION) * from_start[:, None]  # (T, BP)
        of_log += tl.sum(dy_t.to(tl.float32) * earlier, axis=1)
        to_end = decay_to_end(upper, lower, upper_end, lower_end, of_step, after)
        later = product(B_t, tl.trans(adjoint), PRECISION) * to_end[:, None]
        of_product += later  # the gradient of dt x
        leaving = step * tl.sum(x_t.to(tl.float32) * later, axis=1)
        of_log = tl.cumsum(of_log, axis=0, reverse=True) + (tl.cumsum(leaving, axis=0) - leaving) + through

        of_dt = tl.sum(x_t.to(tl.float32) * of_product, axis=1) + tl.load(A + head) * of_log
        of_dt *= tl.load(slopes + of_head + t)
        tl.store(ddt + (batch * length + t) * H + head, of_dt, mask=t < length)
        of_x = of_product * step[:, None]
        if skip is not None:
            of_x += dy_t.to(tl.float32) * tl.load(skip + head)
        tl.store(dx + ((batch * length + t) * H + head)[:, None] * P + p[None, :], of_x, mask=in_row)
        to = (batch * chunks + chunk) * H + head
        tl.store(dA + to, tl.sum(of_log * step, axis=0))
        tl.store(dbias + to, tl.sum(of_dt, axis=0))
        tl.store(dskip + to, tl.sum(tl.sum(dy_t.to(tl.float32) * x_t.to(tl.float32), axis=1), axis=0))


@triton.jit
def vectors_kernel(
    dy, x, B, C, steps, high, low, mask, numbers, befores, afters, dB, dC,
    dy_batch, dy_row, x_batch, x_row, B_batch, B_row, C_batch, C_row,
    length, H, P, N, R, blocks, shares, each, chunks, batches,
    EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, T: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB and dC (S, B, L, G, N) float32, still to be added up over the shares.

    Programs: B * K * G * S * blocks of BN states, which are fastest. befores, afters: as of :func:`inputs_kernel`.
    """
    program = tl.program_id(0).to(tl.int64)
    groups = H // R
    n = (program % blocks).to(tl.int32) * BN + tl.arange(0, BN)
    share = program // blocks % shares
    group = program // blocks // shares % groups
    chunk = program // blocks // shares // groups % chunks
    batch = program // blocks // shares // groups // chunks
    p = tl.arange(0, BP)
    start = chunk * T
    t = start + tl.arange(0, T)
    if mask is not None:
        mask += batch * length
    if numbers is not None:
        numbers += batch * length
    there = existing(mask, t, length)
    of_step, before, after = None, None, None
    if numbers is not None:
        of_step, before, after = numbered(numbers, t, start, length, T)
    of_scores = tl.zeros((T, T), tl.float32)
    sum_B = tl.zeros((T, BN), tl.float32)
    sum_C = tl.zeros((T, BN), tl.float32)
    inside = (p < P)[:, None] & (n < N)[None, :]
    cells = p[:, None] * N + n[None, :]
    for number in range(share * each, tl.minimum(share * each + each, R)):
        head = group * R + number
        of_head = (batch * H + head) * (chunks * T)
        upper, lower = tl.load(high + of_head + t), tl.load(low + of_head + t)
        end = of_head + start + T - 1
        upper_end, lower_end = tl.load(high + end), tl.load(low + end)
        step = tl.load(steps + of_head + t)
        x_t = tile(x + batch * x_batch + head * P, x_row, t, p, P, there, EVEN_P)
        dy_t = tile(dy + batch * dy_batch + head * P, dy_row, t, p, P, there, EVEN_P)
        place = ((batch * chunks + chunk) * H + head) * P * N
        state = tl.load(befores + place + cells, mask=inside, other=0.0)
        adjoint = tl.load(afters + place + cells, mask=inside, other=0.0)
        pairs = product(dy_t.to(WORK), tl.trans(x_t.to(WORK)), PRECISION)
        of_scores += pairs * decay_between(upper, lower, of_step, T) * step[None, :]
        weights = decay_to_end(upper, lower, upper_end, lower_end, of_step, after) * step
        weighted = (x_t.to(tl.float32) * weights[:, None]).to(WORK)
        sum_B = product(weighted, adjoint, PRECISION, sum_B)
        weights = decay_from_start(upper, lower, of_step, before)
        weighted = (dy_t.to(tl.float32) * weights[:, None]).to(WORK)
        sum_C = product(weighted, state, PRECISION, sum_C)
    B_t = tile(B + batch * B_batch + group * N, B_row, t, n, N, there, EVEN_N).to(WORK)
    C_t = tile(C + batch * C_batch + group * N, C_row, t, n, N, there, EVEN_N).to(WORK)
    narrow = of_scores.to(WORK)
    sum_C = product(narrow, B_t, PRECISION, sum_C)
    sum_B = product(tl.trans(narrow), C_t, PRECISION, sum_B)
    rows = (((share * batches + batch) * length + t) * groups + group)[:, None] * N + n[None, :]
    written = (t < length)[:, None] & (n < N)[None, :]
    tl.store(dB + rows, sum_B, mask=written)
    tl.store(dC + rows, sum_C, mask=written)
