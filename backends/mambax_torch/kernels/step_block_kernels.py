"""Triton kernels of one token through a mixer: what lies between its two large products, in two launches.

At 3 TB/s one row takes 17 us for in_proj and 9 us for out_proj of a model with d_model 2560 in bfloat16. What lies
between moves little, but each launch waits for the one before, 2 to 3 us: convolution, x_proj, dt_proj and scan as
four would be a quarter of the step. Two are needed, because delta, B and C wait for every channel of x. So both
kernels take the convolution themselves, from the inputs that it remembers: a few operations for each value. x_proj
takes all channels at once, so that it waits for memory once; weights of the convolution are read four to an int64
where they are four of 16 bits, or each read would touch a line of the cache for every two channels.

Dimensions: D channels, K width of the convolution, N d_state, R dt_rank, O outputs of x_proj, R + 2 N.
"""

# Triton's language is not Python's: what pyright knows of its types does not hold inside kernels.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from mambax_torch.kernels.step_kernels import softplus


@triton.jit
def _tap(weight, channels, inside, k, dtype, K: tl.constexpr, PACKED: tl.constexpr):
    """Tap k of the convolution at channels, float32. PACKED: weight (D,) int64, the four taps of a channel."""
    if PACKED:
        four = tl.load(weight + channels, mask=inside, other=0)
        tap = (four >> (16 * k)).to(tl.int16).to(dtype, bitcast=True)
    else:
        tap = tl.load(weight + channels * K + k, mask=inside, other=0.0)
    return tap.to(tl.float32)


@triton.jit
def _convolved(
    newest, weight, bias, before, batch, channels, D, K: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr
):
    """SiLU of the convolution at channels, float32, from the newest inputs and the K-1 before them."""
    inside = channels < D
    total = newest.to(tl.float32) * _tap(weight, channels, inside, K - 1, newest.dtype, K, PACKED)
    if HAS_BIAS:
        total += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K - 1):
        value = tl.load(before + (batch * (K - 1) + k) * D + channels, mask=inside, other=0.0)
        total += value.to(tl.float32) * _tap(weight, channels, inside, k, newest.dtype, K, PACKED)
    return total * tl.sigmoid(total)


@triton.jit
def x_proj_kernel(
    x, conv_weight, conv_bias, before, weight, y, x_stride, D, count, blocks,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y (B, O) = x_proj of SiLU of the convolution, weight (O, D), O = `count`. Programs: B * blocks of O."""
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    outputs = (program % blocks) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_O, BLOCK_D), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        inside = (outputs < count)[:, None] & (channels < D)[None, :]
        rows = tl.load(weight + outputs[:, None] * D + channels[None, :], mask=inside, other=0.0)
        newest = tl.load(x + batch * x_stride + channels, mask=channels < D, other=0.0)
        value = _convolved(newest, conv_weight, conv_bias, before, batch, channels, D, K, HAS_BIAS, PACKED)
        total += rows.to(tl.float32) * value.to(newest.dtype).to(tl.float32)[None, :]  # as a product has its inputs
    tl.store(y + batch * count + outputs, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=outputs < count)


@triton.jit
def scan_kernel(
    x, z, conv_weight, conv_bias, conv_before, conv_after, dbc, dt_weight, dt_bias, A_log, skip, before, after, y,
    x_stride, D, N, R, blocks,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y (B, D), and both states after: convolution, dt_proj, one step of the recurrence, skip and gate.

    x and z (B, D) are halves of one array, dbc (B, R + 2 N) is contiguous. Programs: B * blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    channels = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    states = tl.arange(0, BLOCK_N)
    inside, whole = channels < D, states < N
    both = inside[:, None] & whole[None, :]
    of_A = channels[:, None] * N + states[None, :]
    of_state = batch * D * N + of_A
    h = tl.load(before + of_state, mask=both, other=0.0)
    newest = tl.load(x + batch * x_stride + channels, mask=inside, other=0.0)
    u = _convolved(newest, conv_weight, conv_bias, conv_before, batch, channels, D, K, HAS_BIAS, PACKED)
    u = u.to(newest.dtype).to(tl.float32)
    dbc += batch * (R + 2 * N)
    delta = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        inside_r = inside[:, None] & (ranks < R)[None, :]
        rows = tl.load(dt_weight + channels[:, None] * R + ranks[None, :], mask=inside_r, other=0.0).to(tl.float32)
        delta += rows * tl.load(dbc + ranks, mask=ranks < R, other=0.0).to(tl.float32)[None, :]
    dt = tl.sum(delta, axis=1).to(y.dtype.element_ty).to(tl.float32)
    if HAS_DT_BIAS:
        dt += tl.load(dt_bias + channels, mask=inside, other=0.0).to(tl.float32)
    dt = softplus(dt)
    b = tl.load(dbc + R + states, mask=whole, other=0.0).to(tl.float32)
    c = tl.load(dbc + R + N + states, mask=whole, other=0.0).to(tl.float32)
    decay = -tl.exp(tl.load(A_log + of_A, mask=both, other=0.0).to(tl.float32))
    new = tl.exp(dt[:, None] * decay) * h + (dt * u)[:, None] * b[None, :]
    tl.debug_barrier()  # the states after may lie where those before do, and several threads may hold the same cell
    tl.store(after + of_state, new, mask=both)
    out = tl.sum(tl.where(both, new * c[None, :], 0.0), axis=1)
    out += u * tl.load(skip + channels, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + batch * x_stride + channels, mask=inside, other=0.0).to(tl.float32)
    out *= gate * tl.sigmoid(gate)
    tl.store(y + batch * D + channels, out.to(y.dtype.element_ty), mask=inside)
    rows = batch * (K - 1) * D + channels
    for k in tl.static_range(1, K - 1):
        value = tl.load(conv_before + rows + k * D, mask=inside, other=0.0)
        tl.debug_barrier()
        tl.store(conv_after + rows + (k - 1) * D, value, mask=inside)
    if K > 1:
        tl.debug_barrier()
        tl.store(conv_after + rows + (K - 2) * D, newest.to(conv_after.dtype.element_ty), mask=inside)
