"""Tiles of a product of a few rows with a matrix: up to four by four sums that stay in registers.

Their instructions are emitted while Numba compiles; LLVM's own vectoriser neither keeps that many sums nor reads weights
of four bits. Each weight is widened once in registers, for all rows of x of the tile.

Weights of four bits come sixteen words of 32 bits at a time, which hold 128 of them: bits 4k to 4k + 3 of word l are
the weight at input 16 k + l. A weight q of 0 to 15 is moved to the top of the mantissa of 1.0, which makes it the
float32 1 + q / 16 without a conversion. It stands for (q - 8) times its scale, so that its product with x is 16 times
too small and 1.5 x too large: each sum starts with that subtracted, and the caller multiplies the result by 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mambax_cpu.simd import WIDTH, floats

BLOCK = 128
"""Inputs that lie together in weights of four bits."""

GROUP = 32
"""Inputs that have their own scale, or the multiple of this many."""

_LANE, _INDEX = ir.IntType(32), ir.IntType(64)
_FLOATS, _INTEGERS = ir.VectorType(ir.FloatType(), WIDTH), ir.VectorType(_LANE, WIDTH)
_OFFSET, _MANTISSA, _ONE = 19, 0x00780000, 0x3F800000  # the four upper bits of a mantissa, and the bits of 1.0


class _Stored(NamedTuple):
    """How LLVM sees sixteen stored weights."""

    name: str
    vector: Any
    size: int


_STORED = {
    types.float32: _Stored("f32", _FLOATS, 4),
    types.int16: _Stored("i16", ir.VectorType(ir.IntType(16), WIDTH), 2),  # the bits of bfloat16
    types.uint16: _Stored("i16", ir.VectorType(ir.IntType(16), WIDTH), 2),  # the bits of float16
    types.int8: _Stored("i8", ir.VectorType(ir.IntType(8), WIDTH), 1),
}


def _address_of(element: Any) -> Any:
    """An intrinsic: an int64 address as an address of elements of this Numba type."""
    result = types.CPointer(element)

    @intrinsic
    def emit(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), generate

    return emit


bfloat16_at, float16_at = _address_of(types.int16), _address_of(types.uint16)
int8_at, words_at = _address_of(types.int8), _address_of(types.uint32)


@intrinsic
def moved(typing_context: Any, base: Any, count: Any) -> Any:
    """The address `count` elements further on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return base(base, types.int64), generate


class _Emitter:
    """Emits what tiles are made of. Vectors have sixteen lanes."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def bits(self, value: int) -> Any:
        """The same 32 bits in every lane."""
        return ir.Constant(_INTEGERS, [value] * WIDTH)

    def index(self, value: int) -> Any:
        return ir.Constant(_INDEX, value)

    def times(self, value: Any, factor: int) -> Any:
        return self.builder.mul(value, self.index(factor))

    def plus(self, value: Any, more: int) -> Any:
        return self.builder.add(value, self.index(more))

    def rows(self, base: Any, stride: Any, count: int) -> list[Any]:
        """The addresses of `count` rows."""
        return [self.builder.gep(base, [self.times(stride, i)]) for i in range(count)]

    def address(self, base: Any, index: Any, vector: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(base, [index]), vector.as_pointer())

    def load(self, base: Any, index: Any, stored: _Stored = _STORED[types.float32]) -> Any:
        """Sixteen elements from base[index] on."""
        return self.builder.load(self.address(base, index, stored.vector), align=stored.size)

    def load_some(self, base: Any, index: Any, present: Any, stored: _Stored = _STORED[types.float32]) -> Any:
        """The elements of those lanes that are present; zero in the others, which are not read."""
        vector, name = stored.vector, f"v{WIDTH}{stored.name}"
        kind = ir.FunctionType(vector, [vector.as_pointer(), _LANE, present.type, vector])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.masked.load.{name}.p0{name}")
        zeros = ir.Constant(vector, [0.0 if vector is _FLOATS else 0] * WIDTH)
        align = ir.Constant(_LANE, stored.size)
        return self.builder.call(function, [self.address(base, index, vector), align, present, zeros])

    def store_some(self, value: Any, base: Any, index: Any, present: Any) -> None:
        """The lanes that are present to base[index] and on; nothing else is written."""
        kind = ir.FunctionType(ir.VoidType(), [_FLOATS, _FLOATS.as_pointer(), _LANE, present.type])
        name = f"v{WIDTH}f32"
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.masked.store.{name}.p0{name}")
        address = self.address(base, index, _FLOATS)
        self.builder.call(function, [value, address, ir.Constant(_LANE, 4), present])

    def present(self, count: Any) -> Any:
        """Which lanes are below a count (int64)."""
        numbers = ir.Constant(_INTEGERS, list(range(WIDTH)))
        return self.builder.icmp_signed("<", numbers, self.spread(self.builder.trunc(count, _LANE)))

    def fetch(self, base: Any, index: Any) -> None:
        """Have the cache line of base[index] fetched, which may be no memory at all."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _LANE, _LANE, _LANE])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        read, keep, data = (ir.Constant(_LANE, value) for value in (0, 3, 1))
        self.builder.call(function, [self.builder.bitcast(self.builder.gep(base, [index]), byte), read, keep, data])

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a b + c."""
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.v{WIDTH}f32")
        return self.builder.call(function, [a, b, c])

    def spread(self, value: Any, count: int = WIDTH) -> Any:
        """The same value in `count` lanes."""
        undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
        one = self.builder.insert_element(undefined, value, ir.Constant(_LANE, 0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_LANE, count), [0] * count))

    def as_floats(self, bits: Any) -> Any:
        return self.builder.bitcast(bits, _FLOATS)

    def sums(self, rows: int, columns: int) -> list[list[Any]]:
        """Places of rows * columns sums of sixteen lanes, zero."""
        sums = [[cgutils.alloca_once(self.builder, _FLOATS) for _ in range(columns)] for _ in range(rows)]
        for place in (place for row in sums for place in row):
            self.builder.store(ir.Constant(_FLOATS, [0.0] * WIDTH), place)
        return sums

    def add_product(self, a: Any, b: Any, place: Any) -> None:
        self.builder.store(self.multiply_add(a, b, self.builder.load(place)), place)

    def finish(self, sums: list[list[Any]], out: Any, stride: Any) -> None:
        """The lanes of sums[j][r] added up, always in the same order, to out[r * stride + j]."""
        b = self.builder
        for j, row in enumerate(sums):
            for r, place in enumerate(row):
                value = b.load(place)
                for distance in (8, 4, 2, 1):
                    order = ir.Constant(_INTEGERS, [lane ^ distance for lane in range(WIDTH)])
                    value = b.fadd(value, b.shuffle_vector(value, ir.Constant(_FLOATS, ir.Undefined), order))
                index = self.plus(self.times(stride, r), j)
                b.store(b.extract_element(value, ir.Constant(_LANE, 0)), b.gep(out, [index]))

    def widened(self, stored: Any, element: Any) -> Any:
        """Sixteen stored weights as float32."""
        b = self.builder
        if element == types.float32:
            return stored
        if element == types.int8:
            return b.sitofp(stored, _FLOATS)
        bits = b.zext(stored, _INTEGERS)
        if element == types.int16:  # bfloat16 is the upper half of float32
            return self.as_floats(b.shl(bits, self.bits(16)))
        # float16: its bits in the places of float32 are 2^112 times too small; the product makes subnormals right as
        # well. Infinity and NaN have the largest exponent, there and here.
        magnitude = b.and_(bits, self.bits(0x7FFF))
        small = self.as_floats(b.shl(magnitude, self.bits(13)))
        wide = b.bitcast(b.fmul(small, ir.Constant(_FLOATS, [2.0**112] * WIDTH)), _INTEGERS)
        finite = b.icmp_unsigned("<", magnitude, self.bits(0x7C00))
        wide = b.select(finite, wide, b.or_(wide, self.bits(0x7F800000)))
        return self.as_floats(b.or_(wide, b.shl(b.and_(bits, self.bits(0x8000)), self.bits(16))))

    def bfloat16(self, bits: Any) -> Any:
        """A bfloat16, of which the bits are given, as float32 in every lane."""
        twice = self.builder.bitcast(self.spread(bits, 2 * WIDTH), _INTEGERS)  # in both halves of a lane
        return self.as_floats(self.builder.shl(twice, self.bits(16)))

    def nibbles(self, words: Any, k: int) -> Any:
        """1 + q / 16 for the sixteen weights q of four bits at bits 4k of the words."""
        b, shift = self.builder, _OFFSET - 4 * k
        moved = b.shl(words, self.bits(shift)) if shift > 0 else b.lshr(words, self.bits(-shift))
        return self.as_floats(b.or_(b.and_(moved, self.bits(_MANTISSA)), self.bits(_ONE)))


@intrinsic(prefer_literal=True)
def tile(
    typing_context: Any, weights: Any, stride: Any, ahead: Any, x: Any, inputs: Any, out: Any, outs: Any, J: Any, R: Any
) -> Any:
    """out[r, j] = weights[j] . x[r] for J rows of weights and R rows of x, both literal.

    Args:
        weights: the address of the first row; its type says how weights are stored. `stride` elements to the next.
        ahead: how many elements from a weight to the one whose cache line is fetched along with it.
        x: the address of the first row, float32; `inputs` values, and as many to the next.
        out: an address, float32; `outs` values to the next row.
    """
    if not (isinstance(J, types.IntegerLiteral) and isinstance(R, types.IntegerLiteral)):
        return None
    element = weights.dtype
    stored, height, width = _STORED[element], J.literal_value, R.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, stride, ahead, x, inputs, out, outs, _, _ = args
        emit = _Emitter(builder)
        rows, columns = emit.rows(base, stride, height), emit.rows(x, inputs, width)
        sums = emit.sums(height, width)

        def step(loaded_rows: list[Any], loaded_columns: list[Any]) -> None:
            for weight, row in zip([emit.widened(w, element) for w in loaded_rows], sums, strict=True):
                for value, place in zip(loaded_columns, row, strict=True):
                    emit.add_product(weight, value, place)

        whole = builder.and_(inputs, emit.index(-WIDTH))
        with cgutils.for_range_slice(builder, emit.index(0), whole, emit.index(WIDTH), _INDEX) as (i, _):
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


@intrinsic(prefer_literal=True)
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
    if not (isinstance(J, types.IntegerLiteral) and isinstance(R, types.IntegerLiteral)):
        return None
    height, width = J.literal_value, R.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, scales, shift, ahead, x, starts, blocks, out, outs, _, _ = args
        emit = _Emitter(builder)
        b = builder
        rows = emit.rows(base, emit.times(blocks, WIDTH), height)
        factors = emit.rows(scales, b.lshr(emit.times(blocks, BLOCK // GROUP), shift), height)
        columns = emit.rows(x, emit.times(blocks, BLOCK), width)
        corrections = emit.rows(starts, emit.times(blocks, BLOCK // 2), width)
        sums = emit.sums(height, width)
        with cgutils.for_range(builder, blocks, intp=_INDEX) as loop:
            block = loop.index
            for row, factor, places in zip(rows, factors, sums, strict=True):
                place = emit.times(block, WIDTH)
                emit.fetch(row, b.add(place, ahead))
                words = b.load(emit.address(row, place, _INTEGERS), align=4)
                for group in range(BLOCK // GROUP):
                    index = b.lshr(emit.plus(emit.times(block, BLOCK // GROUP), group), shift)
                    scale = emit.bfloat16(b.load(b.gep(factor, [index])))
                    first, second = emit.nibbles(words, 2 * group), emit.nibbles(words, 2 * group + 1)
                    for column, correction, total in zip(columns, corrections, places, strict=True):
                        at = emit.plus(emit.times(block, BLOCK), GROUP * group)
                        value = emit.load(correction, emit.plus(emit.times(block, BLOCK // 2), WIDTH * group))
                        value = emit.multiply_add(first, emit.load(column, at), value)
                        value = emit.multiply_add(second, emit.load(column, emit.plus(at, WIDTH)), value)
                        emit.add_product(scale, value, total)
        emit.finish(sums, out, outs)
        return context.get_dummy_value()

    number = types.int64
    return types.void(words, scales, number, number, floats, floats, number, floats, number, J, R), generate


@intrinsic
def widen(typing_context: Any, weights: Any, count: Any, factor: Any, out: Any) -> Any:
    """out[i] = factor * weights[i] in float32 for i below a count; the type of the address says how weights are stored."""
    element = weights.dtype
    stored = _STORED[element]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, count, factor, out = args
        emit = _Emitter(builder)
        factor = emit.spread(factor)
        whole = builder.and_(count, emit.index(-WIDTH))
        with cgutils.for_range_slice(builder, emit.index(0), whole, emit.index(WIDTH), _INDEX) as (i, _):
            value = builder.fmul(emit.widened(emit.load(base, i, stored), element), factor)
            builder.store(value, emit.address(out, i, _FLOATS), align=4)
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
        emit, b = _Emitter(builder), builder
        blocks = b.lshr(emit.plus(count, BLOCK - 1), emit.index(BLOCK.bit_length() - 1))
        with cgutils.for_range(builder, blocks, intp=_INDEX) as loop:
            words = b.load(emit.address(base, emit.times(loop.index, WIDTH), _INTEGERS), align=4)
            for k in range(BLOCK // WIDTH):
                group = emit.plus(emit.times(loop.index, BLOCK // GROUP), k * WIDTH // GROUP)
                scale = emit.bfloat16(b.load(b.gep(scales, [b.lshr(group, shift)])))
                q = b.and_(b.lshr(words, emit.bits(4 * k)), emit.bits(15))
                value = b.fmul(b.sitofp(b.sub(q, emit.bits(8)), _FLOATS), scale)
                index = emit.plus(emit.times(loop.index, BLOCK), k * WIDTH)
                emit.store_some(value, out, index, emit.present(b.sub(count, index)))
        return context.get_dummy_value()

    return types.void(words, scales, types.int64, types.int64, floats), generate
