"""Matrix products of many rows, out = a b^T + bias in float32: the kernels.

The columns of the result are cut into strips. A strip of b is copied into a panel, its values for one inner index
side by side, where it stays in the second cache while the rows of a go by in tiles: a tile of the result is kept in
registers over the whole sum, a value of `a` in all lanes times a row of the panel at a time. Long sums are made in
blocks, which bounds the panel and the rounding. Every sum runs in the order of the inner index, whatever the tile.

Source: the arrangement of loops of Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication".

Dimensions: M rows, N columns, K inner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir

from mambax_cpu import kernel_types as types
from mambax_cpu.compilation import intrinsic, kernel, part
from mambax_cpu.simd import floats, load, pointer, store
from mambax_cpu.tiles import BLOCK, EDGE, STRIP, WIDTH

# The tile: 8 x 48 fills the 32 registers of AVX-512, 6 x 16 those of AVX2 (16 of eight) and NEON (32 of four).
ROWS, _VECTORS = (8, 3) if binding.get_host_cpu_features().get("avx512f") else (6, 1)
HALF = ROWS // 2
COLUMNS = _VECTORS * WIDTH

_INT64 = ir.IntType(64)
_LANES = ir.VectorType(ir.FloatType(), WIDTH)
_ORDER = ir.VectorType(ir.IntType(32), WIDTH)


def _at(builder: Any, base: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(base, [index]), _LANES.as_pointer())


def tile(rows: int, multiply_add: Callable[[Any, Any, Any, Any], Any]) -> Any:
    """An intrinsic for a tile of that many rows.

    (a, a_row, panel, count, start, start_row, out, out_row): out = start + a panel, where a is (rows, count) with
    contiguous rows, panel (count, COLUMNS), and start and out are (rows, COLUMNS); strides in elements.
    """

    @intrinsic
    def emit(typing_context, a, a_row, panel, count, start, start_row, out, out_row):
        def generate(context, builder, signature, args):
            a, a_row, panel, count, start, start_row, out, out_row = args
            offsets = [_INT64(v * WIDTH) for v in range(_VECTORS)]
            first, lines = [], []
            for _ in range(rows):
                first.append([builder.load(_at(builder, start, offset), align=4) for offset in offsets])
                lines.append(a)
                start, a = builder.gep(start, [start_row]), builder.gep(a, [a_row])
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)  # count is positive

            builder.position_at_end(loop)
            k = builder.phi(_INT64)
            sums = [[builder.phi(_LANES) for _ in offsets] for _ in range(rows)]
            row = builder.gep(panel, [builder.mul(k, _INT64(COLUMNS))])
            b = [builder.load(_at(builder, row, offset), align=4) for offset in offsets]
            last = []
            for line, of_row in zip(lines, sums, strict=True):
                value = _everywhere(builder, builder.load(builder.gep(line, [k]), align=4))
                last.append([multiply_add(builder, value, b[v], of_row[v]) for v in range(_VECTORS)])
            k_next = builder.add(k, _INT64(1))
            k.add_incoming(_INT64(0), before)
            k.add_incoming(k_next, loop)
            for i in range(rows):
                for v in range(_VECTORS):
                    sums[i][v].add_incoming(first[i][v], before)
                    sums[i][v].add_incoming(last[i][v], loop)
            again = builder.cbranch(builder.icmp_signed("<", k_next, count), loop, after)
            keep_small(builder.module, again)

            builder.position_at_end(after)
            for of_row in last:
                for v in range(_VECTORS):
                    builder.store(of_row[v], _at(builder, out, offsets[v]), align=4)
                out = builder.gep(out, [out_row])
            return context.get_dummy_value()

        number = types.int64
        return types.void(floats, number, floats, number, floats, number, floats, number), generate

    return emit


def _everywhere(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_LANES, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_ORDER, [0] * WIDTH))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_LANES, [_LANES] * 3)
    function = builder.module.globals.get(f"llvm.fmuladd.v{WIDTH}f32")
    if function is None:
        function = ir.Function(builder.module, kind, f"llvm.fmuladd.v{WIDTH}f32")
    return builder.call(function, [a, b, c])


def keep_small(module: Any, branch: Any) -> None:
    """Have LLVM not unroll a loop: its body is long enough, and compiling takes three times as long otherwise."""
    disable = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    loop = module.add_metadata([ir.Constant(ir.IntType(32), len(module.metadata)), disable])
    loop.operands = (loop, disable)  # the name of a loop is a node that refers to itself
    branch.set_metadata("llvm.loop", loop)


tile_of_all, tile_of_half, tile_of_one = (tile(rows, _multiply_add) for rows in (ROWS, HALF, 1))


@intrinsic
def transpose_square(typing_context, source, source_row, target, target_row):
    """Sixteen rows of sixteen values, transposed: halves, quarters, ... of the square change places."""

    def generate(context, builder, signature, args):
        source, source_row, target, target_row = args
        rows = []
        for _ in range(WIDTH):
            rows.append(builder.load(_at(builder, source, _INT64(0)), align=4))
            source = builder.gep(source, [source_row])
        for size in (8, 4, 2, 1):
            low = [lane if not lane & size else lane - size + WIDTH for lane in range(WIDTH)]
            high = [lane + size if not lane & size else lane + WIDTH for lane in range(WIDTH)]
            for i in range(WIDTH):
                if not i & size:
                    pair = rows[i], rows[i + size]
                    rows[i] = builder.shuffle_vector(*pair, ir.Constant(_ORDER, low))
                    rows[i + size] = builder.shuffle_vector(*pair, ir.Constant(_ORDER, high))
        for row in rows:
            builder.store(row, _at(builder, target, _INT64(0)), align=4)
            target = builder.gep(target, [target_row])
        return context.get_dummy_value()

    return types.void(floats, types.int64, floats, types.int64), generate


@part
def pack(b, b_row, b_inner, columns, column, count, panel):  # pragma: no cover
    """Columns `column` to `column` + COLUMNS - 1 of b^T, `count` inner indices of them, to a panel.

    Beyond the last column the panel holds that one again: what comes of it is never stored.
    """
    for v in range(_VECTORS):
        j = column + v * WIDTH
        here = panel + 4 * v * WIDTH
        k = 0
        if j + WIDTH <= columns:
            if b_inner == 1:
                while k + WIDTH <= count:
                    transpose_square(
                        pointer(b + 4 * (j * b_row + k)), b_row, pointer(here + 4 * k * COLUMNS), COLUMNS
                    )
                    k += WIDTH
            elif b_row == 1:
                while k < count:
                    store(pointer(here + 4 * k * COLUMNS), 0, load(pointer(b + 4 * (j + k * b_inner)), 0))
                    k += 1
        while k < count:
            for lane in range(WIDTH):
                place = b + 4 * (min(j + lane, columns - 1) * b_row + k * b_inner)
                pointer(here)[k * COLUMNS + lane] = pointer(place)[0]
            k += 1


@kernel
def multiply(
    a, a_row, b, b_row, b_inner, out, out_row, bias, add, rows, columns, inner, group, splits, first, last, scratch
):  # pragma: no cover
    """Tasks `first` to `last` - 1 of out = a b^T + bias; of out += a b^T where `add` is not 0.

    Args:
        a: address of (M, K), with contiguous rows.
        b: address of (N, K), one of its axes contiguous.
        out: address of (M, N), with contiguous rows.
        bias: address of (N,), or 0.
        a_row, b_row, b_inner, out_row: strides in elements.
        rows, columns, inner: M, N, K.
        group: strips that a task takes together.
        splits: into how many ranges the rows are cut.
        first, last: tasks, of ceil(ceil(N / STRIP) / group) * splits.
        scratch: float32, of :func:`mambax_cpu.tiles.product_scratch`.
    """
    edge = (scratch.ctypes.data + 63) // 64 * 64
    biases = edge + 4 * EDGE
    panels = biases + 4 * STRIP * group
    for task in range(first, last):
        low, high = task // splits * group * STRIP, min(columns, (task // splits + 1) * group * STRIP)
        row, end = rows * (task % splits) // splits, rows * (task % splits + 1) // splits
        for j in range(low, low + group * STRIP):
            pointer(biases)[j - low] = pointer(bias)[j] if bias != 0 and j < columns else 0.0
        blocks = (inner + BLOCK - 1) // BLOCK
        for block in range(blocks):
            k, count = inner * block // blocks, inner * (block + 1) // blocks - inner * block // blocks
            for j in range(low, high, COLUMNS):
                pack(b + 4 * k * b_inner, b_row, b_inner, columns, j, count, panels + 4 * (j - low) * count)
            i = row
            while i < end:
                height = ROWS if i + ROWS <= end else (HALF if i + HALF <= end else 1)
                for j in range(low, high, COLUMNS):
                    panel, line = pointer(panels + 4 * (j - low) * count), pointer(a + 4 * (i * a_row + k))
                    place, wide = pointer(out + 4 * (i * out_row + j)), columns - j
                    target, target_row = place, out_row
                    if wide < COLUMNS:
                        target, target_row = pointer(edge), COLUMNS
                        if block > 0 or add != 0:
                            _copy(place, out_row, target, target_row, height, wide)
                    start, start_row = target, target_row
                    if block == 0 and add == 0:
                        start, start_row = pointer(biases + 4 * (j - low)), 0
                    if height == ROWS:
                        tile_of_all(line, a_row, panel, count, start, start_row, target, target_row)
                    elif height == HALF:
                        tile_of_half(line, a_row, panel, count, start, start_row, target, target_row)
                    else:
                        tile_of_one(line, a_row, panel, count, start, start_row, target, target_row)
                    if wide < COLUMNS:
                        _copy(target, target_row, place, out_row, height, wide)
                i += height


@part
def _copy(source, source_row, target, target_row, rows, columns):  # pragma: no cover
    for i in range(rows):
        for j in range(columns):
            target[i * target_row + j] = source[i * source_row + j]


@kernel
def transpose(source, source_row, target, rows, columns, first, last):  # pragma: no cover
    """Rows 16 `first` to 16 `last` - 1 of target (M, N), contiguous: the transpose of source, (N, M) in rows."""
    for i in range(first * WIDTH, min(rows, last * WIDTH), WIDTH):
        j = 0
        if i + WIDTH <= rows:
            while j + WIDTH <= columns:
                place = pointer(target + 4 * (i * columns + j))
                transpose_square(pointer(source + 4 * (j * source_row + i)), source_row, place, columns)
                j += WIDTH
        for row in range(i, min(rows, i + WIDTH)):
            for column in range(j, columns):
                pointer(target + 4 * row * columns)[column] = pointer(source + 4 * column * source_row)[row]
