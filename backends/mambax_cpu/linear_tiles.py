"""Tiles of a product of a few rows with a matrix: up to four by four sums that stay in registers.

Their instructions are emitted one by one; LLVM's own vectoriser neither keeps that many sums nor reads
weights of four bits. Each weight is widened once in registers, for all rows of x of the tile.

Weights of four bits come sixteen words of 32 bits at a time, which hold 128 of them, as :mod:`mambax.quantization`
describes. A weight q of 0 to 15 is moved to the top of the mantissa of 1.0, which makes it
the float32 1 + q / 16 without a conversion. It stands for (q - 8) times its scale, so that its product with x is 16
times too small and 1.5 x too large: each sum starts with that subtracted, and the caller multiplies by 16.
"""

from __future__ import annotations

from typing import Any

from mambax.quantization import BLOCK
from mambax_cpu import kernel_types as types
from mambax_cpu.compilation import intrinsic
from mambax_cpu.linear_emit import FLOATS, INTEGERS, STORED, Emitter
from mambax_cpu.simd import WIDTH, address_of, floats, lanes

GROUP = 32
"""Inputs that share a scale, at least."""


bfloat16_at, float16_at = address_of(types.int16), address_of(types.uint16)
int8_at, words_at = address_of(types.int8), address_of(types.uint32)


@intrinsic
def moved(typing_context: Any, base: Any, count: Any) -> Any:
    """The address `count` elements further on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return base(base, types.int64), generate


@intrinsic
def tile(
    typing_context: Any, weights: Any, stride: Any, ahead: Any, x: Any, inputs: Any, out: Any, outs: Any,
    J: Any, R: Any,
) -> Any:  # fmt: skip
    """out[r, j] = weights[j] . x[r] for J rows of weights and R rows of x, both literal.

    Args:
        weights: the address of the first row; its type says how weights are stored. `stride` elements to the next.
        ahead: how many elements from a weight to the one whose cache line is fetched along with it.
        x: the address of the first row, float32; `inputs` values, and as many to the next.
        out: an address, float32; `outs` values to the next row.
    """
    element = weights.dtype
    stored, height, width = STORED[element], J.literal_value, R.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, stride, ahead, x, inputs, out, outs, _, _ = args
        emit = Emitter(builder)
        rows, columns = emit.rows(base, stride, height), emit.rows(x, inputs, width)
        sums = emit.sums(height, width)

        def step(loaded_rows: list[Any], loaded_columns: list[Any]) -> None:
            for weight, row in zip([emit.widened(w, element) for w in loaded_rows], sums, strict=True):
                for value, place in zip(loaded_columns, row, strict=True):
                    emit.add_product(weight, value, place)

        whole = builder.and_(inputs, emit.index(-WIDTH))
        with emit.counting(whole, WIDTH) as i:
            for row in rows:
                emit.fetch(row, builder.add(i, ahead))
            step([emit.load(row, i, stored) for row in rows], [emit.load(column, i) for column in columns])
        rest = builder.sub(inputs, whole)
        with builder.if_then(builder.icmp_signed(">", rest, emit.index(0))):
            present = emit.present(rest)
            step(
                [emit.load_some(row, whole, present, stored) for row in rows],
                [emit.load_some(column, whole, present) for column in columns],
            )
        emit.finish(sums, out, outs)
        return context.get_dummy_value()

    number = types.int64
    return types.void(weights, number, number, floats, number, floats, number, J, R), generate


@intrinsic
def dot_rows(typing_context: Any, weights: Any, count: Any, x: Any, inputs: Any) -> Any:
    """weights[j] . x in lane j, for the `count` rows, up to sixteen, of `inputs` weights; they follow one another.

    Args:
        weights: an address; its type says how weights are stored.
        x: an address, float32.
    """
    element = weights.dtype
    stored = STORED[element]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, count, x, inputs = args
        emit, b = Emitter(builder), builder
        rows = []
        for j in range(WIDTH):  # those that are not there stand for the last
            row = b.sub(count, emit.index(1)) if j else emit.index(0)
            row = b.select(b.icmp_signed("<", emit.index(j), count), emit.index(j), row)
            rows.append(b.gep(base, [b.mul(row, inputs)]))
        sums = emit.sums(WIDTH, 1)
        whole = b.and_(inputs, emit.index(-WIDTH))
        with emit.counting(whole, WIDTH) as i:
            value = emit.load(x, i)
            for row, (place,) in zip(rows, sums, strict=True):
                emit.fetch(row, b.add(i, emit.times(inputs, WIDTH)))  # of the sixteen rows after these
                emit.add_product(emit.widened(emit.load(row, i, stored), element), value, place)
        rest = b.sub(inputs, whole)
        with b.if_then(b.icmp_signed(">", rest, emit.index(0))):
            present = emit.present(rest)
            value = emit.load_some(x, whole, present)
            for row, (place,) in zip(rows, sums, strict=True):
                some = emit.load_some(row, whole, present, stored)
                emit.add_product(emit.widened(some, element), value, place)
        return emit.lanes_added([b.load(place) for (place,) in sums])

    return lanes(weights, types.int64, floats, types.int64), generate


@intrinsic
def packed_tile(
    typing_context: Any, words: Any, scales: Any, shift: Any, ahead: Any, x: Any, starts: Any, blocks: Any,
    out: Any, outs: Any, J: Any, R: Any,
) -> Any:  # fmt: skip
    """out[r, j] = weights[j] . x[r] / 16 for J rows of weights of four bits and R rows of x, both literal.

    Args:
        words: the address of the first row; `blocks` times sixteen, and as many to the next.
        scales: the address of the first row of bfloat16 scales, of which there are `blocks` * 4 >> `shift`.
        ahead: as of :func:`tile`.
        x: the address of the first row, float32; `blocks` times 128 values, and as many to the next.
        starts: what the sums start with, -1.5 times the sum of each lane of x over a group of 32.
        out, outs: as of :func:`tile`.
    """
    height, width = J.literal_value, R.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, scales, shift, ahead, x, starts, blocks, out, outs, _, _ = args
        emit = Emitter(builder)
        b = builder
        rows = emit.rows(base, emit.times(blocks, WIDTH), height)
        factors = emit.rows(scales, b.lshr(emit.times(blocks, BLOCK // GROUP), shift), height)
        columns = emit.rows(x, emit.times(blocks, BLOCK), width)
        corrections = emit.rows(starts, emit.times(blocks, BLOCK // 2), width)
        sums = emit.sums(height, width)
        with emit.counting(blocks) as number:
            place = emit.times(number, WIDTH)
            words = [b.load(emit.address(row, place, INTEGERS), align=4) for row in rows]
            for row in rows:
                emit.fetch(row, b.add(place, ahead))
            for group in range(BLOCK // GROUP):  # of x, only what one group needs is in registers
                index = emit.plus(emit.times(number, BLOCK // GROUP), group)
                start = [emit.load(correction, emit.times(index, WIDTH)) for correction in corrections]
                first = [emit.load(column, emit.times(index, GROUP)) for column in columns]
                second = [emit.load(column, emit.plus(emit.times(index, GROUP), WIDTH)) for column in columns]
                for j in range(height):
                    scale = emit.bfloat16(b.load(b.gep(factors[j], [b.lshr(index, shift)])))
                    low, high = emit.nibbles(words[j], 2 * group), emit.nibbles(words[j], 2 * group + 1)
                    for r in range(width):
                        value = emit.multiply_add(high, second[r], emit.multiply_add(low, first[r], start[r]))
                        emit.add_product(scale, value, sums[j][r])
        emit.finish(sums, out, outs)
        return context.get_dummy_value()

    number = types.int64
    return types.void(words, scales, number, number, floats, floats, number, floats, number, J, R), generate


@intrinsic
def widen(typing_context: Any, weights: Any, count: Any, factor: Any, out: Any) -> Any:
    """out[i] = factor * weights[i] in float32 for i below a count; weights as of :func:`tile`."""
    element = weights.dtype
    stored = STORED[element]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, count, factor, out = args
        emit = Emitter(builder)
        factor = emit.spread(factor)
        whole = builder.and_(count, emit.index(-WIDTH))
        with emit.counting(whole, WIDTH) as i:
            value = builder.fmul(emit.widened(emit.load(base, i, stored), element), factor)
            builder.store(value, emit.address(out, i, FLOATS), align=4)
        present = emit.present(builder.sub(count, whole))
        value = builder.fmul(emit.widened(emit.load_some(base, whole, present, stored), element), factor)
        emit.store_some(value, out, whole, present)
        return context.get_dummy_value()

    return types.void(weights, types.int64, types.float32, floats), generate


@intrinsic
def widen_packed(typing_context: Any, words: Any, scales: Any, shift: Any, count: Any, out: Any) -> Any:
    """out[i] = scale * (q - 8) in float32 for the weights q of four bits of one row, up to a count.

    Args:
        words, scales, shift: the addresses of a row and the size of its groups, as of :func:`packed_tile`.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, scales, shift, count, out = args
        emit, b = Emitter(builder), builder
        blocks = b.lshr(emit.plus(count, BLOCK - 1), emit.index(BLOCK.bit_length() - 1))
        with emit.counting(blocks) as number:
            words = b.load(emit.address(base, emit.times(number, WIDTH), INTEGERS), align=4)
            for k in range(BLOCK // WIDTH):
                group = emit.plus(emit.times(number, BLOCK // GROUP), k * WIDTH // GROUP)
                scale = emit.bfloat16(b.load(b.gep(scales, [b.lshr(group, shift)])))
                q = b.and_(b.lshr(words, emit.bits(4 * k)), emit.bits(15))
                value = b.fmul(b.sitofp(b.sub(q, emit.bits(8)), FLOATS), scale)
                index = emit.plus(emit.times(number, BLOCK), k * WIDTH)
                emit.store_some(value, out, index, emit.present(b.sub(count, index)))
        return context.get_dummy_value()

    return types.void(words, scales, types.int64, types.int64, floats), generate
