"""Triton kernels of Mamba-2's gated norm, and of its gradient.

Dimensions: R rows, G groups, W channels of a group, D = G W, BLOCK the power of two that holds them, P parts of the
rows.
"""

# Triton's language is not Python's: what pyright knows of its types does not hold inside kernels.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(y, z, weight, normed, z_stride, W, groups, eps, NORM_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """normed (R, D) = rms(y silu(z)) weight, or rms(y) weight silu(z) if NORM_FIRST. y (R, D) is contiguous.

    The mean square is that of a group. Programs: R * G.
    """
    program = tl.program_id(0)
    row, group = (program // groups).to(tl.int64), program % groups
    places = tl.arange(0, BLOCK)
    inside = places < W
    channels = group * W + places
    values = tl.load(y + row * groups * W + channels, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_stride + channels, mask=inside, other=0.0).to(tl.float32)
    factors = tl.load(weight + channels, mask=inside, other=0.0)
    gate *= tl.sigmoid(gate)
    if not NORM_FIRST:
        values *= gate
    values *= 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / W + eps)
    if NORM_FIRST:
        values *= factors.to(tl.float32) * gate
    else:
        values = values.to(factors.dtype).to(tl.float32) * factors.to(tl.float32)  # rounded before the product
    tl.store(normed + row * groups * W + channels, values.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    dnormed, y, z, weight, dy, dz, partials, dnormed_stride, y_stride, z_stride, R, W, groups, each, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of y and z, (R, G * W), of normed = rms(y silu(z)) weight, the mean square that of a group.

    A program goes through `each` rows of a group; partials (P, G * W) float32 get what they give the weight, whose
    product is taken of values that are not rounded. Programs: P * G.
    """
    program = tl.program_id(0)
    part, group = (program // groups).to(tl.int64), program % groups
    places = tl.arange(0, BLOCK)
    inside = places < W
    channels = group * W + places
    factors = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(part * each, tl.minimum(part * each + each, R)):
        values = tl.load(y + row * y_stride + channels, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(z + row * z_stride + channels, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dnormed + row * dnormed_stride + channels, mask=inside, other=0.0).to(tl.float32)
        opened = tl.sigmoid(gate)
        gated = values * gate * opened
        scale = 1.0 / tl.sqrt_rn(tl.sum(gated * gated, axis=0) / W + eps)
        normed = gated * scale
        of_weight += gradient * normed
        gradient *= factors
        gradient = (gradient - normed * (tl.sum(gradient * normed, axis=0) / W)) * scale
        of_y = gradient * gate * opened
        of_z = gradient * values * opened * (1.0 + gate * (1.0 - opened))
        tl.store(dy + row * groups * W + channels, of_y.to(dy.dtype.element_ty), mask=inside)
        tl.store(dz + row * groups * W + channels, of_z.to(dz.dtype.element_ty), mask=inside)
    tl.store(partials + part * groups * W + channels, of_weight, mask=inside)
