"""Triton kernels of one token: the convolution over its state, and one step of the recurrence.

The state after may be written over the state before: what a program writes it has read before, every thread of it.
That takes a barrier, because where there are more threads than channels several of them hold the same ones.

Dimensions: B batch, D channels, K width of the convolution, N d_state; BLOCK_N the power of two that holds N.
"""

# Triton's language is not Python's: what pyright knows of its types does not hold inside kernels.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def conv_step_kernel(
    x, weight, bias, before, y, after, x_stride, D, blocks,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y (B, D) and the last K-1 inputs, (B, K-1, D), from those before and x (B, D). Programs: B * blocks."""
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    channels = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < D
    newest = tl.load(x + batch * x_stride + channels, mask=inside, other=0.0)
    total = newest.to(tl.float32) * tl.load(weight + channels * K + (K - 1), mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    rows = batch * (K - 1) * D + channels
    for k in tl.static_range(K - 1):
        value = tl.load(before + rows + k * D, mask=inside, other=0.0)
        total += value.to(tl.float32) * tl.load(weight + channels * K + k, mask=inside, other=0.0).to(tl.float32)
        if k > 0:
            tl.debug_barrier()  # after may be before
            tl.store(after + rows + (k - 1) * D, value.to(after.dtype.element_ty), mask=inside)
    if K > 1:
        tl.debug_barrier()
        tl.store(after + rows + (K - 2) * D, newest.to(after.dtype.element_ty), mask=inside)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(y + batch * D + channels, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def softplus(x):
    """log(1 + e^x) in float32, exact to a few roundings for every x; NaN stays NaN.

    A GPU takes e^x as 2 to the power of a rounded product, and of a large product the rounding is felt. So the
    whole part of x is multiplied by the first 16 bits of log2(e), which is exact, and all else comes separately.
    """
    limited = tl.minimum(tl.maximum(x, -200.0), 20.0)
    whole = tl.floor(limited)
    rest = whole * 7.052607713387005e-06 + (limited - whole) * 1.4426950408889634
    grown = tl.exp2(whole * 1.44268798828125) * tl.exp2(rest)
    one_more = 1.0 + grown
    rounded = one_more - 1.0  # what of e^x is left in 1 + e^x
    left = tl.where(rounded > 0.0, rounded, 1.0)
    small = tl.where(rounded > 0.0, tl.log(one_more) * (grown / left), grown)
    return tl.where(x <= 20.0, small, x)


@triton.jit
def scan_step_kernel(
    u, delta, A, B, C, D_skip, z, bias, before, y, after,
    u_stride, delta_stride, B_stride, C_stride, z_stride, D, N, blocks,
    IS_LOG: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BEFORE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (B, D) and the state after, (B, D, N) float32. A (D, N) is the state matrix, or log(-A) if IS_LOG.

    u, delta, z (B, D) and B, C (B, N) may be parts of larger arrays. Programs: B * blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    channels = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    states = tl.arange(0, BLOCK_N)
    inside, whole = channels < D, states < N
    both = inside[:, None] & whole[None, :]
    of_A = channels[:, None] * N + states[None, :]
    of_state = batch * D * N + of_A
    if HAS_BEFORE:  # the longest wait: asked for first
        h = tl.load(before + of_state, mask=both, other=0.0)
    decay = tl.load(A + of_A, mask=both, other=0.0).to(tl.float32)
    dt = tl.load(delta + batch * delta_stride + channels, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(u + batch * u_stride + channels, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + batch * B_stride + states, mask=whole, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_stride + states, mask=whole, other=0.0).to(tl.float32)
    if IS_LOG:
        decay = -tl.exp(decay)
    if HAS_BIAS:
        dt += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    new = (dt * value)[:, None] * b[None, :]
    if HAS_BEFORE:
        new += tl.exp(dt[:, None] * decay) * h
    tl.debug_barrier()  # after may be before
    tl.store(after + of_state, new, mask=both)
    out = tl.sum(tl.where(both, new * c[None, :], 0.0), axis=1)
    if HAS_SKIP:
        out += value * tl.load(D_skip + channels, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(z + batch * z_stride + channels, mask=inside, other=0.0).to(tl.float32)
        out *= gate * tl.sigmoid(gate)
    tl.store(y + batch * D + channels, out.to(y.dtype.element_ty), mask=inside)
