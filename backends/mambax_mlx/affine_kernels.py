"""Products with weights as ``mlx.core.quantize`` packs them, in 4 and in 8 bits: the kernels.

Weight i of a row is ``q[i] scale[g] + bias[g]`` with g = i // group size. Its bits are bits ``b (i % V)`` and on of
word ``i // V``, where b is the number of bits and V = 32 / b. Sixteen words are one vector; x is laid out to match,
all inputs of place k of a word together.

Dimensions: R rows of x, O outputs, W words of a row of weights, G groups, V weights to a word.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from mambax_cpu import kernel_types as types
from mambax_cpu.compilation import inlined, intrinsic, kernel, spliced
from mambax_cpu.linear_emit import FLOATS, INTEGERS, STORED, Emitter, Stored
from mambax_cpu.linear_tiles import moved, words_at
from mambax_cpu.precision import read
from mambax_cpu.simd import WIDTH, floats, lanes, multiply_add, pointer, splat, total

_WORDS = Stored("i32", INTEGERS, 4)


@kernel
def product4(packed, scales, biases, x, sums, rows, words, shift, out, outputs, first, last):  # pragma: no cover
    """Outputs `first` to `last` - 1 of x weight^T, weights of 4 bits.

    Args:
        packed: (O, W) uint32.
        scales, biases: (O, G) float32.
        x, sums: (R, V, W) and (R, W) float32, of :func:`mambax_mlx.cpu_affine.arranged`.
        rows, words: R, W.
        shift: log2 of the words of a group, at least 2.
        out: (R, O) float32, which is written.
        outputs: O.
        first, last: of the outputs.
    """
    _by_group(4, packed, scales, biases, x, sums, rows, words, shift, out, outputs, first, last)


@kernel
def product8(packed, scales, biases, x, sums, rows, words, shift, out, outputs, first, last):  # pragma: no cover
    """As :func:`product4`, weights of 8 bits."""
    _by_group(8, packed, scales, biases, x, sums, rows, words, shift, out, outputs, first, last)


@spliced
def _by_group(
    bits, packed, scales, biases, x, sums, rows, words, shift, out, outputs, first, last
):  # pragma: no cover
    """The body of the kernels: a loop of its own for each number of groups that a vector of words has part in."""
    if shift == 2:
        _product(bits, 2, packed, scales, biases, x, sums, rows, words, out, outputs, first, last)
    elif shift == 3:
        _product(bits, 3, packed, scales, biases, x, sums, rows, words, out, outputs, first, last)
    else:
        _product(bits, shift, packed, scales, biases, x, sums, rows, words, out, outputs, first, last)


@spliced
def _product(
    bits, shift, packed, scales, biases, x, sums, rows, words, out, outputs, first, last
):  # pragma: no cover
    """The loop of :func:`_by_group`."""
    groups, whole = words >> shift, words // WIDTH * WIDTH
    for row in range(rows):
        inputs = moved(pointer(x.ctypes.data), row * words * (32 // bits))
        word_sums = moved(pointer(sums.ctypes.data), row * words)
        for o in range(first, last):
            weights = moved(words_at(packed.ctypes.data), o * words)
            factors = moved(pointer(scales.ctypes.data), o * groups)
            offsets = moved(pointer(biases.ctypes.data), o * groups)
            sum_ = splat(0.0)
            for w in range(0, whole, WIDTH):
                sum_ = _added(bits, shift, weights, factors, offsets, inputs, word_sums, words, w, WIDTH, sum_)
            if whole < words:
                count = words - whole
                sum_ = _added(bits, shift, weights, factors, offsets, inputs, word_sums, words, whole, count, sum_)
            pointer(out.ctypes.data)[row * outputs + o] = total(sum_)


@inlined
def _added(bits, shift, weights, factors, offsets, inputs, sums, words, index, count, sum_):  # pragma: no cover
    """sum_ and the words from `index` on: of each word, scale (q . inputs) + bias (sum of inputs).

    Both at once, as they cancel each other where the weights are centred.
    """
    offset = multiply_add(_of_groups(shift, offsets, index, count), read(sums, index, count), sum_)
    return multiply_add(
        _of_groups(shift, factors, index, count), _dot(bits, weights, inputs, words, index, count), offset
    )


def _load(emit: Emitter, base: Any, index: Any, count: Any, stored: Stored = STORED[types.float32]) -> Any:
    """The elements from base[index] on, up to sixteen of a count; zero in the other lanes, which are not read."""
    if isinstance(count, ir.Constant):
        return emit.load(base, index, stored)
    return emit.load_some(base, index, emit.present(count), stored)


@intrinsic
def _dot(typing_context: Any, bits: Any, weights: Any, inputs: Any, words: Any, index: Any, count: Any) -> Any:
    """For each word from `index` on, the sum of its q times their inputs; zero in lanes beyond the last word.

    Args:
        bits: 4 or 8, known while compiling.
        weights, inputs: the addresses of (W,) and of (V, W).
        words, index: W; the first of sixteen words.
        count: of words from there; the constant WIDTH where there are sixteen or more.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, weights, inputs, words, index, count = args
        emit, size = Emitter(builder), bits.literal_value
        stored = _load(emit, weights, index, count, _WORDS)
        dot = ir.Constant(FLOATS, [0.0] * WIDTH)
        for place in range(32 // size):
            q = builder.and_(builder.lshr(stored, emit.bits(size * place)), emit.bits((1 << size) - 1))
            values = _load(emit, inputs, builder.add(emit.times(words, place), index), count)
            dot = emit.multiply_add(builder.sitofp(q, FLOATS), values, dot)
        return dot

    number = types.int64
    return lanes(bits, weights, floats, number, number, number), generate


@intrinsic
def _of_groups(typing_context: Any, shift: Any, values: Any, index: Any, count: Any) -> Any:
    """For each word from `index` on, the value of its group.

    Args:
        shift: log2 of the words of a group; below 4 known while compiling.
        values: the address of (G,) float32.
        index, count: as of :func:`_dot`; index is a multiple of sixteen.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shift, values, index, count = args
        emit, first = Emitter(builder), builder.lshr(index, shift)
        if not isinstance(shift, ir.Constant):
            return emit.spread(builder.load(builder.gep(values, [first])))
        size = 1 << shift.constant
        if isinstance(count, ir.Constant):
            few = ir.VectorType(ir.FloatType(), WIDTH // size)
            found = builder.load(emit.address(values, first, few), align=4)
        else:
            found = _load(emit, values, first, builder.lshr(count, shift))
        order = ir.Constant(INTEGERS, [lane // size for lane in range(WIDTH)])
        return builder.shuffle_vector(found, found, order)

    return lanes(shift, values, types.int64, types.int64), generate
