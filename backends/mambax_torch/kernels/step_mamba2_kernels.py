"""Triton kernels of one token through a mixer of Mamba-2: all between its two large products, in two launches.

The state is most of what moves: each element is read and written once, four to a load, and asked for first. A
program has some channels of one head with their whole states. Programs that share B and C each take their
convolution, from a cache, which costs less than another launch; one of them keeps what is remembered of it. The
gated norm waits for all channels of a group, hence the second launch.

Dimensions: B batch, D channels = H P, H heads, P head_dim, G groups, N d_state, K width of the convolution, C its
channels = D + 2 G N.
"""

# Triton's language is not Python's: what pyright knows of its types does not hold inside kernels.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from mambax_torch.kernels.step_kernels import softplus


@triton.jit
def conv_inputs(
    x, weight, bias, before, channels, inside, C,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """What the convolution at channels reads: of x (C,), of the inputs before it (K-1, C), of weight and bias.

    The taps lie side by side, as in the weight, so that a channel is the work of one thread where there are enough.
    """
    taps = tl.arange(0, BLOCK_K)[None, :]
    found = (taps < K) & inside[:, None]
    last = (taps == K - 1) & found
    places = taps * C + channels[:, None]
    newest = tl.load(x + (places - (K - 1) * C), mask=last, other=0.0)
    past = tl.load(before + places, mask=(taps < K - 1) & found, other=0.0)
    factors = tl.load(weight + (channels[:, None] * K + taps), mask=found, other=0.0)
    biases = tl.load(bias + channels, mask=inside & HAS_BIAS, other=0.0)
    return newest, past, factors, biases


@triton.jit
def convolved(newest, past, factors, biases, after, channels, keeps, C, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """SiLU of the convolution, rounded to the dtype of x and float32 again. Keeps inputs in `after` (K-1, C)."""
    taps = tl.arange(0, BLOCK_K)[None, :]
    values = tl.where(taps == K - 1, newest, past)
    places = (taps - 1) * C + channels[:, None]
    tl.store(after + places, values, mask=(taps > 0) & (taps < K) & keeps[:, None])
    total = tl.sum(values.to(tl.float32) * factors.to(tl.float32), axis=1) + biases.to(tl.float32)
    return (total * tl.sigmoid(total)).to(values.dtype).to(tl.float32)


@triton.jit
def limited(dt, smallest, largest, LIMITED: tl.constexpr):
    """dt within limits if LIMITED, by comparisons, of which NaN stays NaN."""
    if LIMITED:
        dt = tl.where(dt < smallest, smallest, dt)
        dt = tl.where(dt > largest, largest, dt)
    return dt


@triton.jit
def ssd_kernel(
    projected, conv_weight, conv_bias, conv_before, conv_after, dt_bias, A_log, skip, before, after, y,
    stride, H, P, G, N, blocks, smallest, largest,
    K: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr, LIMITED: tl.constexpr, GATED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (B, D), and both states after: convolution, time step, one step of the recurrence, skip, and gate if GATED.

    projected (B, D + C + H): z, x, B, C and dt. State (B, H, P, N). Programs: B * H * blocks of P.
    """
    program = tl.program_id(0)
    block, place = program % blocks, program // blocks
    head, batch = place % H, (place // H).to(tl.int64)
    group, share = head // (H // G), H // G
    rows, states = block * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside, whole = rows < P, states < N
    both = inside[:, None] & whole[None, :]
    of_state = (batch * H + head) * P * N + (rows[:, None] * N + states[None, :])
    h = tl.load(before + of_state, mask=both, other=0.0)

    D = H * P
    C = D + 2 * G * N
    projected += batch * stride
    conv_before += batch * (K - 1) * C
    conv_after += batch * (K - 1) * C
    x = projected + D
    of_x, of_B = head * P + rows, D + group * N + states
    of_C = of_B + G * N
    keeps = states < tl.where((block == 0) & (head == group * share), N, 0)  # one program of the group
    dt = tl.load(x + C + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    rate = tl.load(A_log + head).to(tl.float32)
    weight_of_u = tl.load(skip + head).to(tl.float32)
    xn, xp, xf, xb = conv_inputs(x, conv_weight, conv_bias, conv_before, of_x, inside, C, K, BLOCK_K, HAS_BIAS)
    bn, bp, bf, bb = conv_inputs(x, conv_weight, conv_bias, conv_before, of_B, whole, C, K, BLOCK_K, HAS_BIAS)
    cn, cp, cf, cb = conv_inputs(x, conv_weight, conv_bias, conv_before, of_C, whole, C, K, BLOCK_K, HAS_BIAS)

    u = convolved(xn, xp, xf, xb, conv_after, of_x, inside, C, K, BLOCK_K)
    b = convolved(bn, bp, bf, bb, conv_after, of_B, keeps, C, K, BLOCK_K)
    c = convolved(cn, cp, cf, cb, conv_after, of_C, keeps, C, K, BLOCK_K)
    dt = limited(softplus(dt), smallest, largest, LIMITED)
    new = tl.exp(-tl.exp(rate) * dt) * h + (dt * u)[:, None] * b[None, :]
    tl.debug_barrier()  # after may be before, and several threads may hold the same cell
    tl.store(after + of_state, new, mask=both)
    out = tl.sum(tl.where(both, new * c[None, :], 0.0), axis=1) + u * weight_of_u
    out = out.to(y.dtype.element_ty)
    if GATED:
        gate = tl.load(projected + head * P + rows, mask=inside, other=0.0).to(tl.float32)
        out = (out.to(tl.float32) * gate * tl.sigmoid(gate)).to(y.dtype.element_ty)
    tl.store(y + batch * D + head * P + rows, out, mask=inside)


@triton.jit
def ssd_step_kernel(
    x, dt, A, B, C, skip, bias, before, after, y,
    x_stride, dt_stride, B_stride, C_stride, H, P, share, N, blocks, smallest, largest,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
    HAS_BEFORE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (B, H P) and the state after, (B, H, P, N) float32, of one step of the recurrence by itself.

    x (B, H P), dt (B, H), B and C (B, G N) may be parts of larger arrays; `share` heads, H / G, have one group.
    Programs: B * H * blocks of P.
    """
    program = tl.program_id(0)
    block, place = program % blocks, program // blocks
    head, batch = place % H, (place // H).to(tl.int64)
    rows, states = block * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside, whole = rows < P, states < N
    both = inside[:, None] & whole[None, :]
    of_state = (batch * H + head) * P * N + (rows[:, None] * N + states[None, :])
    of_group = head // share * N + states
    if HAS_BEFORE:  # the longest wait: asked for first
        h = tl.load(before + of_state, mask=both, other=0.0)
    u = tl.load(x + batch * x_stride + head * P + rows, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + batch * B_stride + of_group, mask=whole, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_stride + of_group, mask=whole, other=0.0).to(tl.float32)
    step = tl.load(dt + batch * dt_stride + head).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(bias + head).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    step = limited(step, smallest, largest, LIMITED)
    new = (step * u)[:, None] * b[None, :]
    if HAS_BEFORE:
        new += tl.exp(rate * step) * h
    tl.debug_barrier()  # after may be before, and several threads may hold the same cell
    tl.store(after + of_state, new, mask=both)
    out = tl.sum(tl.where(both, new * c[None, :], 0.0), axis=1)
    if HAS_SKIP:
        out += u * tl.load(skip + head).to(tl.float32)
    tl.store(y + (batch * H + head) * P + rows, out.to(y.dtype.element_ty), mask=inside)
