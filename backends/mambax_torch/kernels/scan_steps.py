"""What the Triton kernels of the selective scan share: softplus, and reading a time step.

Every kernel of the scan is run by single warps, so that nothing waits for another. Forwards, a step is read one
ahead of its use.

Dimensions: B batch, L length, D channels, N d_state; in a program BD channels, BN >= N a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), small and not 0 for very negative x.

    log1p(e) / e on [0, 1] by a polynomial of degree 9, fitted for the least relative error (5e-9). The power of two
    loses digits with |x|, 2.5e-6 at -60; that of :mod:`mambax_torch.kernels.step_kernels`, for one token, does not
    and takes two functions more.
    """
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    p = e * -0.003243980696424842 + 0.019851261749863625
    p = p * e - 0.056959159672260284
    p = p * e + 0.10603617131710052
    p = p * e - 0.15305569767951965
    p = p * e + 0.19675931334495544
    p = p * e - 0.24954132735729218
    p = p * e + 0.3332996368408203
    p = p * e - 0.4999990165233612
    p = p * e + 1.0
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def time_step(delta, bias, there, SOFTPLUS: tl.constexpr):
    """(BD,) the step that the recurrence takes; 0 where there is none, so that the state stays as it is."""
    x = delta.to(tl.float32) + bias
    if SOFTPLUS:
        x = softplus(x)
    if there is not None:
        x = tl.where(there, x, 0.0)
    return x


@triton.jit
def flag(flags, t):
    """What a row of flags (L,) says of step t; None where there are none."""
    said = None
    if flags is not None:
        said = tl.load(flags + t) != 0
    return said


@triton.jit
def both(inside, there, shape: tl.constexpr):
    """(columns,) whether a column is inside and the step there; None for what always is, and when both are."""
    if there is None:
        found = inside
    elif inside is None:
        found = tl.where(there, tl.full(shape, True, tl.int1), False)
    else:
        found = tl.where(there, inside, False)
    return found


@triton.jit
def row(pointers, inside, there):
    """What lies at pointers (columns,), in its dtype; zero where a column is not inside, or the step not there.

    inside: (columns,), or None when all are; there: one flag, or None when it is.
    """
    found = both(inside, there, pointers.shape)
    if found is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=found, other=0.0)
