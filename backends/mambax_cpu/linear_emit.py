"""The instructions that the tiles of linear layers are made of, which intrinsics emit.

Vectors have sixteen lanes. See :mod:`mambax_cpu.linear_tiles` for how weights of four bits are stored and read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from llvmlite import ir

from mambax_cpu import kernel_types as types
from mambax_cpu.kernel_types import allocated, declared
from mambax_cpu.simd import WIDTH

LANE, INDEX = ir.IntType(32), ir.IntType(64)
FLOATS, INTEGERS = ir.VectorType(ir.FloatType(), WIDTH), ir.VectorType(LANE, WIDTH)
_OFFSET, _MANTISSA, _ONE = 19, 0x00780000, 0x3F800000  # the four upper bits of a mantissa, and the bits of 1.0


class Stored(NamedTuple):
    """How LLVM sees sixteen stored weights."""

    name: str
    vector: Any
    size: int


STORED = {
    types.float32: Stored("f32", FLOATS, 4),
    types.int16: Stored("i16", ir.VectorType(ir.IntType(16), WIDTH), 2),  # the bits of bfloat16
    types.uint16: Stored("i16", ir.VectorType(ir.IntType(16), WIDTH), 2),  # the bits of float16
    types.int8: Stored("i8", ir.VectorType(ir.IntType(8), WIDTH), 1),
}


class Emitter:
    """Emits what tiles are made of. Vectors have sixteen lanes."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def bits(self, value: int) -> Any:
        """The same 32 bits in every lane."""
        return ir.Constant(INTEGERS, [value] * WIDTH)

    def index(self, value: int) -> Any:
        return ir.Constant(INDEX, value)

    def times(self, value: Any, factor: int) -> Any:
        return self.builder.mul(value, self.index(factor))

    def plus(self, value: Any, more: int) -> Any:
        return self.builder.add(value, self.index(more))

    def rows(self, base: Any, stride: Any, count: int) -> list[Any]:
        """The addresses of `count` rows."""
        return [self.builder.gep(base, [self.times(stride, i)]) for i in range(count)]

    def address(self, base: Any, index: Any, vector: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(base, [index]), vector.as_pointer())

    def load(self, base: Any, index: Any, stored: Stored = STORED[types.float32]) -> Any:
        """Sixteen elements from base[index] on."""
        return self.builder.load(self.address(base, index, stored.vector), align=stored.size)

    def load_some(self, base: Any, index: Any, present: Any, stored: Stored = STORED[types.float32]) -> Any:
        """The elements of those lanes that are present; zero in the others, which are not read."""
        vector, name = stored.vector, f"v{WIDTH}{stored.name}"
        kind = ir.FunctionType(vector, [vector.as_pointer(), LANE, present.type, vector])
        function = declared(self.builder.module, f"llvm.masked.load.{name}.p0{name}", kind)
        zeros = ir.Constant(vector, [0.0 if vector is FLOATS else 0] * WIDTH)
        align = ir.Constant(LANE, stored.size)
        return self.builder.call(function, [self.address(base, index, vector), align, present, zeros])

    def store_some(
        self, value: Any, base: Any, index: Any, present: Any, stored: Stored = STORED[types.float32]
    ) -> None:
        """The lanes that are present to base[index] and on; nothing else is written."""
        vector, name = stored.vector, f"v{WIDTH}{stored.name}"
        kind = ir.FunctionType(ir.VoidType(), [vector, vector.as_pointer(), LANE, present.type])
        function = declared(self.builder.module, f"llvm.masked.store.{name}.p0{name}", kind)
        align = ir.Constant(LANE, stored.size)
        self.builder.call(function, [value, self.address(base, index, vector), align, present])

    def present(self, count: Any) -> Any:
        """Which lanes are below a count (int64)."""
        numbers = ir.Constant(INTEGERS, list(range(WIDTH)))
        return self.builder.icmp_signed("<", numbers, self.spread(self.builder.trunc(count, LANE)))

    def fetch(self, base: Any, index: Any) -> None:
        """Have the cache line of base[index] fetched, which may be no memory at all."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, LANE, LANE, LANE])
        function = declared(self.builder.module, "llvm.prefetch.p0i8", kind)
        read, keep, data = (ir.Constant(LANE, value) for value in (0, 3, 1))
        self.builder.call(function, [self.builder.bitcast(self.builder.gep(base, [index]), byte), read, keep, data])

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a b + c."""
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        function = declared(self.builder.module, f"llvm.fmuladd.v{WIDTH}f32", kind)
        return self.builder.call(function, [a, b, c])

    def spread(self, value: Any, count: int = WIDTH) -> Any:
        """The same value in `count` lanes."""
        undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
        one = self.builder.insert_element(undefined, value, ir.Constant(LANE, 0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(LANE, count), [0] * count))

    def as_floats(self, bits: Any) -> Any:
        return self.builder.bitcast(bits, FLOATS)

    @contextmanager
    def counting(self, stop: Any, step: int = 1) -> Iterator[Any]:
        """A loop, with the number that counts from 0 to below `stop`."""
        b = self.builder
        before, again, inside, after = b.block, *(b.append_basic_block() for _ in range(3))
        b.branch(again)
        b.position_at_end(again)
        number = b.phi(INDEX)
        number.add_incoming(self.index(0), before)
        b.cbranch(b.icmp_signed("<", number, stop), inside, after)
        b.position_at_end(inside)
        yield number
        number.add_incoming(b.add(number, self.index(step), flags=["nsw"]), b.block)
        b.branch(again)
        b.position_at_end(after)

    def sums(self, rows: int, columns: int) -> list[list[Any]]:
        """Places of rows * columns sums of sixteen lanes, zero."""
        sums = [[allocated(self.builder, FLOATS) for _ in range(columns)] for _ in range(rows)]
        for place in (place for row in sums for place in row):
            self.builder.store(ir.Constant(FLOATS, [0.0] * WIDTH), place)
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
                    order = ir.Constant(INTEGERS, [lane ^ distance for lane in range(WIDTH)])
                    value = b.fadd(value, b.shuffle_vector(value, ir.Constant(FLOATS, ir.Undefined), order))
                index = self.plus(self.times(stride, r), j)
                b.store(b.extract_element(value, ir.Constant(LANE, 0)), b.gep(out, [index]))

    def lanes_added(self, vectors: list[Any]) -> Any:
        """Of sixteen vectors, the sum of the lanes of each; always added in the same order."""
        while len(vectors) > 1:
            vectors = [self._halves_added(*vectors[i : i + 2], len(vectors)) for i in range(0, len(vectors), 2)]
        return vectors[0]

    def _halves_added(self, a: Any, b: Any, length: int) -> Any:
        """Of runs of so many lanes in a, then in b, the first half of each plus the second."""
        starts = [start + i for start in range(0, 2 * WIDTH, length) for i in range(length // 2)]
        first = self.builder.shuffle_vector(a, b, ir.Constant(INTEGERS, starts))
        second = self.builder.shuffle_vector(a, b, ir.Constant(INTEGERS, [i + length // 2 for i in starts]))
        return self.builder.fadd(first, second)

    def widened(self, stored: Any, element: Any) -> Any:
        """Sixteen stored weights as float32."""
        b = self.builder
        if element is types.float32:
            return stored
        if element is types.int8:
            return b.sitofp(stored, FLOATS)
        bits = b.zext(stored, INTEGERS)
        if element is types.int16:  # bfloat16 is the upper half of float32
            return self.as_floats(b.shl(bits, self.bits(16)))
        # float16: its bits in the places of float32 are 2^112 times too small; the product makes subnormals right
        # as well. Infinity and NaN have the largest exponent, there and here.
        magnitude = b.and_(bits, self.bits(0x7FFF))
        small = self.as_floats(b.shl(magnitude, self.bits(13)))
        wide = b.bitcast(b.fmul(small, ir.Constant(FLOATS, [2.0**112] * WIDTH)), INTEGERS)
        finite = b.icmp_unsigned("<", magnitude, self.bits(0x7C00))
        wide = b.select(finite, wide, b.or_(wide, self.bits(0x7F800000)))
        return self.as_floats(b.or_(wide, b.shl(b.and_(bits, self.bits(0x8000)), self.bits(16))))

    def narrowed(self, value: Any, element: Any) -> Any:
        """Sixteen float32 as they are stored: rounded to the nearest, to even between two; NaN stays NaN."""
        if element is types.float32:
            return value
        bits = self._to_bfloat16(value) if element is types.int16 else self._to_float16(value)
        return self.builder.trunc(bits, STORED[element].vector)

    def _to_bfloat16(self, value: Any) -> Any:
        b = self.builder
        bits = b.bitcast(value, INTEGERS)
        upper = b.lshr(bits, self.bits(16))
        odd = b.and_(upper, self.bits(1))
        rounded = b.lshr(b.add(bits, b.add(odd, self.bits(0x7FFF))), self.bits(16))
        return b.select(b.fcmp_unordered("uno", value, value), b.or_(upper, self.bits(0x40)), rounded)

    def _to_float16(self, value: Any) -> Any:
        b = self.builder
        bits = b.bitcast(value, INTEGERS)
        magnitude = b.and_(bits, self.bits(0x7FFFFFFF))
        odd = b.and_(b.lshr(magnitude, self.bits(13)), self.bits(1))
        moved = b.sub(b.add(magnitude, b.add(odd, self.bits(0xFFF))), self.bits(112 << 23))  # its bias is 15
        normal = b.lshr(moved, self.bits(13))
        # Below 2^-14 all values have the same last place, 2^-24: that of float32 from 0.5 on.
        half = ir.Constant(FLOATS, [0.5] * WIDTH)
        small = b.sub(b.bitcast(b.fadd(self.as_floats(magnitude), half), INTEGERS), b.bitcast(half, INTEGERS))
        result = b.select(b.icmp_unsigned("<", magnitude, self.bits(113 << 23)), small, normal)
        infinite = b.icmp_unsigned(">=", magnitude, self.bits(0x477FF000))  # 65520, half way to the next
        result = b.select(infinite, self.bits(0x7C00), result)
        result = b.select(b.icmp_unsigned(">", magnitude, self.bits(0x7F800000)), self.bits(0x7E00), result)
        return b.or_(result, b.lshr(b.and_(bits, self.bits(0x80000000)), self.bits(16)))

    def bfloat16(self, bits: Any) -> Any:
        """A bfloat16, of which the bits are given, as float32 in every lane."""
        twice = self.builder.bitcast(self.spread(bits, 2 * WIDTH), INTEGERS)  # in both halves of a lane
        return self.as_floats(self.builder.shl(twice, self.bits(16)))

    def nibbles(self, words: Any, k: int) -> Any:
        """1 + q / 16 for the sixteen weights q of four bits at bits 4k of the words."""
        b, shift = self.builder, _OFFSET - 4 * k
        moved = b.shl(words, self.bits(shift)) if shift > 0 else b.lshr(words, self.bits(-shift))
        return self.as_floats(b.or_(b.and_(moved, self.bits(_MANTISSA)), self.bits(_ONE)))
