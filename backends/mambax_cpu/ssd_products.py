"""Products of small matrices in scratch memory: what a chunk of the scan of Mamba-2 consists of.

Here everything is in whole vectors and in the first or second cache, so that nothing is packed, and the left
factor may be read along either axis: its values are put into all lanes one at a time.

Dimensions: M rows, a multiple of :data:`ROWS`, J columns, a multiple of sixteen, K inner.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir

from mambax_cpu import kernel_types as types
from mambax_cpu.compilation import intrinsic, part
from mambax_cpu.linear_emit import Emitter
from mambax_cpu.product_kernels import keep_small, transpose_square
from mambax_cpu.simd import WIDTH, floats, pointer

# Sums of a tile: 16 of the 32 registers of AVX-512, 8 of 16 halves with AVX2, 16 of 32 quarters with NEON.
_HEIGHT, _VECTORS = (8, 2) if binding.get_host_cpu_features().get("avx512f") else (4, 1)

ROWS = 8
"""Rows of an operand in scratch come in multiples of this; a tile has as many, or half as many."""

_INT64 = ir.IntType(64)


def _tile(vectors: int) -> Any:
    """An intrinsic for a tile of _HEIGHT rows and that many vectors.

    (a, a_row, a_inner, b, b_row, count, out, out_row): out += a b, strides in elements; a may lie anyhow, the rows
    of b and out are contiguous.
    """

    @intrinsic
    def emit(typing_context, a, a_row, a_inner, b, b_row, count, out, out_row):
        def generate(context, builder, signature, args):
            a, a_row, a_inner, b, b_row, count, out, out_row = args
            emit = Emitter(builder)
            lines, targets = emit.rows(a, a_row, _HEIGHT), emit.rows(out, out_row, _HEIGHT)
            offsets = [emit.index(v * WIDTH) for v in range(vectors)]
            first = [[emit.load(target, offset) for offset in offsets] for target in targets]
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)  # count is positive

            builder.position_at_end(loop)
            k = builder.phi(_INT64)
            sums = [[builder.phi(start.type) for start in row] for row in first]
            row = builder.gep(b, [builder.mul(k, b_row)])
            right = [emit.load(row, offset) for offset in offsets]
            place = builder.mul(k, a_inner)
            last = []
            for line, of_row in zip(lines, sums, strict=True):
                value = emit.spread(builder.load(builder.gep(line, [place]), align=4))
                last.append([emit.multiply_add(value, b, c) for b, c in zip(right, of_row, strict=True)])
            k_next = builder.add(k, emit.index(1))
            k.add_incoming(emit.index(0), before)
            k.add_incoming(k_next, loop)
            for i in range(_HEIGHT):
                for v in range(vectors):
                    sums[i][v].add_incoming(first[i][v], before)
                    sums[i][v].add_incoming(last[i][v], loop)
            keep_small(builder.module, builder.cbranch(builder.icmp_signed("<", k_next, count), loop, after))

            builder.position_at_end(after)
            for target, of_row in zip(targets, last, strict=True):
                for value, offset in zip(of_row, offsets, strict=True):
                    builder.store(value, emit.address(target, offset, value.type), align=4)
            return context.get_dummy_value()

        number = types.int64
        return types.void(floats, number, number, floats, number, number, floats, number), generate

    return emit


_wide, _narrow = _tile(_VECTORS), _tile(1)


@part
def multiply(a, a_row, a_inner, b, b_row, out, out_row, rows, columns, count):  # pragma: no cover
    """out (M, J) += a (M, K) b (K, J), all at int64 addresses; every sum in the order of the inner index."""
    j = 0
    while j < columns:
        if j + _VECTORS * WIDTH <= columns:
            for i in range(0, rows, _HEIGHT):
                line, target = pointer(a + 4 * i * a_row), pointer(out + 4 * (i * out_row + j))
                _wide(line, a_row, a_inner, pointer(b + 4 * j), b_row, count, target, out_row)
            j += _VECTORS * WIDTH
        else:
            for i in range(0, rows, _HEIGHT):
                line, target = pointer(a + 4 * i * a_row), pointer(out + 4 * (i * out_row + j))
                _narrow(line, a_row, a_inner, pointer(b + 4 * j), b_row, count, target, out_row)
            j += WIDTH


@part
def multiply_lower(a, a_row, b, b_row, out, out_row, rows, columns):  # pragma: no cover
    """out[t] += sum over s <= t of a[t, s] b[s], of a (M, M) whose upper triangle holds zeros."""
    for i in range(0, rows, ROWS):
        multiply(a + 4 * i * a_row, a_row, 1, b, b_row, out + 4 * i * out_row, out_row, ROWS, columns, i + ROWS)


@part
def multiply_lower_transposed(a, a_row, b, b_row, out, out_row, rows, columns):  # pragma: no cover
    """out[s] += sum over t >= s of a[t, s] b[t], of a (M, M) whose upper triangle holds zeros."""
    for i in range(0, rows, ROWS):
        multiply(
            a + 4 * i * (a_row + 1), 1, a_row, b + 4 * i * b_row, b_row, out + 4 * i * out_row, out_row,
            ROWS, columns, rows - i,
        )  # fmt: skip


@part
def transpose(source, source_row, rows, columns, target, target_row):  # pragma: no cover
    """target[j, i] = source[i, j], at int64 addresses; nothing else is written."""
    for i in range(0, rows, WIDTH):
        for j in range(0, columns, WIDTH):
            here, there = source + 4 * (i * source_row + j), target + 4 * (j * target_row + i)
            if i + WIDTH <= rows and j + WIDTH <= columns:
                transpose_square(pointer(here), source_row, pointer(there), target_row)
            else:
                for k in range(min(WIDTH, rows - i)):
                    for m in range(min(WIDTH, columns - j)):
                        pointer(there)[m * target_row + k] = pointer(here)[k * source_row + m]
