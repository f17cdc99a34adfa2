"""Triton kernels over quantised weights, read once, as they are stored: products with few rows, and widening them.

One row is multiplied in float32 by plain instructions, sixteen bytes of weights to a thread at a time: a product of
matrices would work on sixteen rows for it. For more rows whole numbers are exact in bfloat16 and float16, so that
products are exact and sums are in float32. Either way a scale is applied to the sum over the inputs that share it.

Where the blocks of outputs are too few to keep a GPU's memory busy, the inputs are divided over `parts` programs,
whose sums :func:`sum_kernel` adds up in their order: equal inputs give equal bits.

With WIDE the products are in float32 as well: Triton's interpreter has none in bfloat16.

Dimensions: M rows, O outputs, I inputs; see :mod:`mambax.quantization` for the formats.
"""

# Triton's language is not Python's: what pyright knows of its types does not hold inside kernels.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scale_of(pairs, place, inside, second: tl.constexpr):
    """One of two scales, bfloat16, that lie in one int32, as float32."""
    pair = tl.load(pairs + place, mask=inside, other=0)
    bits = pair & -65536 if second else pair << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _number(packed, fifteen, k: tl.constexpr):
    """The weight in bits 4 k to 4 k + 3 as float32, exactly.

    As the last bits of 2^23 a whole number is a float without being converted, and without being moved there: one
    multiplication with an addition makes it what it is. The masks are made of an argument of the kernel, `fifteen`,
    which is 15, because the compiler copies a constant anew for every use.
    """
    PLACE: tl.constexpr = 16 ** (k % 5)
    bits = (packed if k < 5 else packed >> 20) & (fifteen * PLACE)
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) * (1.0 / PLACE) - (8388608.0 / PLACE + 8.0)


# --- one row -------------------------------------------------------------------------------------------------


@triton.jit
def _finish_row(sums, bias, y, outputs, inside, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        sums += tl.load(bias + outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + outputs, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def int8_row_kernel(
    x, weight, scales, bias, y, outputs_in_all, inputs_in_all,
    HAS_BIAS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y (O,) of x (I,) and weight (O, I) int8, scales (O,) float32. Programs: blocks of O."""
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = outputs < outputs_in_all
    starts = weight + outputs.to(tl.int64)[:, None] * inputs_in_all
    total = tl.zeros((BLOCK_O, BLOCK_I // 16), dtype=tl.float32)
    for first in tl.range(0, inputs_in_all, BLOCK_I, num_stages=STAGES):
        inputs = first + tl.arange(0, BLOCK_I)
        there = inputs < inputs_in_all
        numbers = tl.load(starts + inputs[None, :], mask=inside[:, None] & there[None, :], other=0)
        values = tl.load(x + inputs, mask=there, other=0.0).to(tl.float32)
        products = numbers.to(tl.float32) * values[None, :]
        total += tl.sum(tl.reshape(products, (BLOCK_O, BLOCK_I // 16, 16)), axis=2)
    sums = tl.sum(total, axis=1) * tl.load(scales + outputs, mask=inside, other=0.0)
    _finish_row(sums, bias, y, outputs, inside, HAS_BIAS)


@triton.jit
def int4_row_kernel(
    x, words, pairs, bias, y, fifteen, outputs_in_all, inputs_in_all, words_in_all,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y (O,) of x (I,), words (O, W) int32 and scales (O, 8 W / GROUP) bfloat16, two to an int32.

    Bits 4 k to 4 k + 3 of word l of a block of 16 words, 128 inputs, are the weight of input 16 k + l, plus 8.
    Programs: blocks of O.
    """
    GROUPS: tl.constexpr = 128 // GROUP
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = outputs < outputs_in_all
    rows, here = outputs.to(tl.int64)[:, None], inside[:, None]
    total = tl.zeros((BLOCK_O, BLOCK_W // 4), dtype=tl.float32)
    for first in tl.range(0, words_in_all, BLOCK_W, num_stages=STAGES):
        word = first + tl.arange(0, BLOCK_W)
        there = (word < words_in_all)[None, :]
        packed = tl.load(words + rows * words_in_all + word[None, :], mask=here & there, other=0)
        block = (first // 4 + tl.arange(0, BLOCK_W // 4)) // 4  # of four words, which are a thread's
        blocks = here & (block < words_in_all // 16)[None, :]
        for group in tl.static_range(GROUPS):
            part = tl.zeros((BLOCK_O, BLOCK_W), dtype=tl.float32)
            for k in tl.static_range(group * (GROUP // 16), (group + 1) * (GROUP // 16)):
                inputs = word // 16 * 128 + word % 16 + 16 * k
                values = tl.load(x + inputs, mask=inputs < inputs_in_all, other=0.0).to(tl.float32)
                part += _number(packed, fifteen, k) * values[None, :]
            place = (rows * (words_in_all // 16) + block[None, :]) * (GROUPS // 2) + group // 2
            of_words = tl.sum(tl.reshape(part, (BLOCK_O, BLOCK_W // 4, 4)), axis=2)
            total += of_words * _scale_of(pairs, place, blocks, group % 2 == 1)
    _finish_row(tl.sum(total, axis=1), bias, y, outputs, inside, HAS_BIAS)


# --- a few rows ----------------------------------------------------------------------------------------------


@triton.jit
def _finish(
    total, bias, y, sums, part, rows, outputs, rows_in_all, outputs_in_all,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Store a block of y; of a part of the inputs, its sums."""
    inside = (rows < rows_in_all)[:, None] & (outputs < outputs_in_all)[None, :]
    places = rows.to(tl.int64)[:, None] * outputs_in_all + outputs[None, :]
    if PARTS > 1:
        tl.store(sums + part.to(tl.int64) * rows_in_all * outputs_in_all + places, total, mask=inside)
    else:
        if HAS_BIAS:
            total += tl.load(bias + outputs, mask=outputs < outputs_in_all, other=0.0).to(tl.float32)[None, :]
        tl.store(y + places, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(
    sums, bias, y, size, outputs_in_all, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """y (M, O) of sums (PARTS, M, O) float32 and bias (O,). Programs: blocks of the M O = size elements."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    total = tl.load(sums + places, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(sums + part * size + places, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + places % outputs_in_all, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + places, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def int8_kernel(
    x, weight, scales, bias, y, sums, x_stride, rows_in_all, outputs_in_all, inputs_in_all, part_inputs,
    WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """y (M, O) of x (M, I) and weight (O, I) int8, scales (O,) float32. Programs: blocks of O, of M, parts of I."""
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    inside_o, inside_m = outputs < outputs_in_all, rows < rows_in_all
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for first in range(part * part_inputs, tl.minimum((part + 1) * part_inputs, inputs_in_all), BLOCK_I):
        inputs = first + tl.arange(0, BLOCK_I)
        there = inputs < inputs_in_all
        numbers = tl.load(
            weight + outputs.to(tl.int64)[:, None] * inputs_in_all + inputs[None, :],
            mask=inside_o[:, None] & there[None, :], other=0,
        )  # fmt: skip
        values = tl.load(
            x + rows.to(tl.int64)[:, None] * x_stride + inputs[None, :],
            mask=inside_m[:, None] & there[None, :], other=0.0,
        )  # fmt: skip
        if WIDE:
            values = values.to(tl.float32)
        total = tl.dot(values, tl.trans(numbers.to(values.dtype)), total, input_precision="ieee")
    total *= tl.load(scales + outputs, mask=inside_o, other=0.0)[None, :]
    _finish(total, bias, y, sums, part, rows, outputs, rows_in_all, outputs_in_all, PARTS, HAS_BIAS)


@triton.jit
def int4_kernel(
    x, words, pairs, bias, y, sums, fifteen, x_stride, rows_in_all, outputs_in_all, inputs_in_all,
    blocks_in_all, part_blocks,
    GROUP: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y (M, O) of x (M, I), words (O, blocks, 16) int32, scales and `fifteen` as in :func:`int4_row_kernel`."""
    GROUPS: tl.constexpr = 128 // GROUP
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    lanes = tl.arange(0, 16)
    inside_o, inside_m = outputs < outputs_in_all, rows < rows_in_all
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for block in range(part * part_blocks, tl.minimum((part + 1) * part_blocks, blocks_in_all)):
        place = outputs.to(tl.int64) * blocks_in_all + block
        packed = tl.load(words + place[:, None] * 16 + lanes[None, :], mask=inside_o[:, None], other=0)
        for group in tl.static_range(GROUPS):
            sums_of_group = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
            for k in tl.static_range(group * (GROUP // 16), (group + 1) * (GROUP // 16)):
                inputs = block * 128 + 16 * k + lanes
                inside = inside_m[:, None] & (inputs < inputs_in_all)[None, :]
                values = tl.load(x_rows + inputs[None, :], mask=inside, other=0.0)
                if WIDE:
                    values = values.to(tl.float32)
                # whole numbers reach the registers of a small product without a barrier, floats do not
                numbers = ((packed >> (4 * k)) & 15) - 8 if BLOCK_M < 64 else _number(packed, fifteen, k)
                sums_of_group = tl.dot(
                    values, tl.trans(numbers.to(values.dtype)), sums_of_group, input_precision="ieee"
                )
            scale = _scale_of(pairs, place * (GROUPS // 2) + group // 2, inside_o, group % 2 == 1)
            total += sums_of_group * scale[None, :]
    _finish(total, bias, y, sums, part, rows, outputs, rows_in_all, outputs_in_all, PARTS, HAS_BIAS)


# --- wide weights --------------------------------------------------------------------------------------------


@triton.jit
def widen_int8_kernel(
    weight, scales, wide, outputs_in_all, inputs_in_all, blocks, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):
    """wide (O, I) of weight (O, I) int8 and scales (O,) float32. Programs: blocks of O, in each blocks of I."""
    outputs = tl.program_id(0) // blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    inputs = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    there = outputs < outputs_in_all
    inside = there[:, None] & (inputs < inputs_in_all)[None, :]
    places = outputs.to(tl.int64)[:, None] * inputs_in_all + inputs[None, :]
    scale = tl.load(scales + outputs, mask=there, other=0.0)
    values = tl.load(weight + places, mask=inside, other=0).to(tl.float32) * scale[:, None]
    tl.store(wide + places, values.to(wide.dtype.element_ty), mask=inside)


@triton.jit
def widen_int4_kernel(
    words, scales, wide, outputs_in_all, inputs_in_all, words_in_all, blocks,
    GROUP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """wide (O, I) of words (O, W) int32 and scales (O, 8 W / GROUP) bfloat16. Programs: as above, blocks of W."""
    outputs = tl.program_id(0) // blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    word = tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    there, rows = (outputs < outputs_in_all)[:, None], outputs.to(tl.int64)[:, None]
    inside = there & (word < words_in_all)[None, :]
    packed = tl.load(words + rows * words_in_all + word[None, :], mask=inside, other=0)
    for k in tl.static_range(8):
        inputs = word // 16 * 128 + word % 16 + 16 * k
        inside = there & (inputs < inputs_in_all)[None, :]
        places = rows * (words_in_all * 8 // GROUP) + (inputs // GROUP)[None, :]
        scale = tl.load(scales + places, mask=inside, other=0.0).to(tl.float32)
        values = (((packed >> (4 * k)) & 15) - 8).to(tl.float32) * scale
        tl.store(wide + rows * inputs_in_all + inputs[None, :], values.to(wide.dtype.element_ty), mask=inside)
