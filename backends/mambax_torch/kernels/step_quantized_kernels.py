"""Triton kernels of products of a few rows with quantised weights: the weights are read once, as they are stored.

Whole numbers are exact in bfloat16 and float16, so that products are exact and sums are in float32; a scale is
applied to the sum over the inputs that share it.

With WIDE the products are in float32 as well: Triton's interpreter has none in bfloat16.

Dimensions: M rows, O outputs, I inputs; see :mod:`mambax.quantization` for the formats.
"""

# Triton's language is not Python's: what pyright knows of its types does not hold inside kernels.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _finish(total, bias, y, rows, outputs, rows_in_all, outputs_in_all, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=outputs < outputs_in_all, other=0.0).to(tl.float32)[None, :]
    inside = (rows < rows_in_all)[:, None] & (outputs < outputs_in_all)[None, :]
    places = rows.to(tl.int64)[:, None] * outputs_in_all + outputs[None, :]
    tl.store(y + places, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def int8_kernel(
    x, weight, scales, bias, y, x_stride, rows_in_all, outputs_in_all, inputs_in_all,
    WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """y (M, O) of x (M, I) and weight (O, I) int8, scales (O,) float32. Programs: blocks of O, blocks of M."""
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for first in range(0, inputs_in_all, BLOCK_I):
        inputs = first + tl.arange(0, BLOCK_I)
        inside = (outputs < outputs_in_all)[:, None] & (inputs < inputs_in_all)[None, :]
        numbers = tl.load(
            weight + outputs.to(tl.int64)[:, None] * inputs_in_all + inputs[None, :], mask=inside, other=0
        )
        inside = (rows < rows_in_all)[:, None] & (inputs < inputs_in_all)[None, :]
        values = tl.load(x + rows.to(tl.int64)[:, None] * x_stride + inputs[None, :], mask=inside, other=0.0)
        if WIDE:
            values = values.to(tl.float32)
        total = tl.dot(values, tl.trans(numbers.to(values.dtype)), total, input_precision="ieee")
    total *= tl.load(scales + outputs, mask=outputs < outputs_in_all, other=0.0)[None, :]
    _finish(total, bias, y, rows, outputs, rows_in_all, outputs_in_all, HAS_BIAS)


@triton.jit
def int4_kernel(
    x, words, scales, bias, y, x_stride, rows_in_all, outputs_in_all, inputs_in_all, blocks,
    GROUP: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y (M, O) of x (M, I) and words (O, blocks, 16) int32, scales (O, 128 blocks / GROUP) bfloat16.

    Bits 4 k to 4 k + 3 of word l of a block of 128 inputs are the weight of input 16 k + l, plus 8.
    """
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, 16)
    inside_o = outputs < outputs_in_all
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for block in range(blocks):
        places = (outputs.to(tl.int64)[:, None] * blocks + block) * 16 + lanes[None, :]
        packed = tl.load(words + places, mask=inside_o[:, None], other=0)
        group = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
        for k in tl.static_range(8):
            inputs = block * 128 + 16 * k + lanes
            inside = (rows < rows_in_all)[:, None] & (inputs < inputs_in_all)[None, :]
            values = tl.load(x + rows.to(tl.int64)[:, None] * x_stride + inputs[None, :], mask=inside, other=0.0)
            if WIDE:
                values = values.to(tl.float32)
            numbers = ((packed >> (4 * k)) & 15) - 8
            group = tl.dot(values, tl.trans(numbers.to(values.dtype)), group, input_precision="ieee")
            if (16 * k + 16) % GROUP == 0:
                place = (
                    outputs.to(tl.int64) * (blocks * (128 // GROUP)) + block * (128 // GROUP) + (16 * k) // GROUP
                )
                scale = tl.load(scales + place, mask=inside_o, other=0.0).to(tl.float32)
                total += group * scale[None, :]
                group = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    _finish(total, bias, y, rows, outputs, rows_in_all, outputs_in_all, HAS_BIAS)
