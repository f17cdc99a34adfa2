"""Triton kernels of RMSNorm, with the addition of the residual stream before it.

A row is held in registers as a whole. Statistics are in float32 whatever the dtypes are.

Dimensions: R rows, M channels of a row, BLOCK the power of two that holds them, P programs.
"""

# Triton's language is not Python's: what pyright knows of its types does not hold inside kernels.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    x, residual, weight, y, total, inverse, x_stride, residual_stride, M, eps,
    HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (R, M) = s / rms(s) * weight with s = residual + x; s itself to `total`, 1 / rms to `inverse` (R,) if KEEP.

    The sum is rounded to the dtype of the residual before anything else reads it. Programs: R.
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < M
    values = tl.load(x + row * x_stride + channels, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        stream = tl.load(residual + row * residual_stride + channels, mask=inside, other=0.0)
        values = values.to(total.dtype.element_ty).to(tl.float32)  # the summand in the dtype of the stream
        rounded = (stream.to(tl.float32) + values).to(total.dtype.element_ty)
        tl.store(total + row * M + channels, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / M + eps)
    if KEEP:
        tl.store(inverse + row, scale)
    factors = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * M + channels, (values * scale * factors).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy, dtotal, s, weight, inverse, dx, dresidual, partials, dy_stride, dtotal_stride, s_stride, R, M, each,
    HAS_DTOTAL: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of s = residual + x, (R, M), to dx, and to dresidual too if BOTH (it has another dtype).

    A program goes through `each` rows; partials (P, M) float32 get what its rows give the weight. Programs: P.
    """
    program = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < M
    factors = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program * each, tl.minimum(program * each + each, R)):
        scale = tl.load(inverse + row)
        normed = tl.load(s + row * s_stride + channels, mask=inside, other=0.0).to(tl.float32) * scale
        gradient = tl.load(dy + row * dy_stride + channels, mask=inside, other=0.0).to(tl.float32)
        of_weight += gradient * normed
        gradient *= factors
        gradient = (gradient - normed * (tl.sum(gradient * normed, axis=0) / M)) * scale
        if HAS_DTOTAL:
            gradient += tl.load(dtotal + row * dtotal_stride + channels, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * M + channels, gradient.to(dx.dtype.element_ty), mask=inside)
        if BOTH:
            tl.store(dresidual + row * M + channels, gradient.to(dresidual.dtype.element_ty), mask=inside)
    tl.store(partials + program * M + channels, of_weight, mask=inside)
