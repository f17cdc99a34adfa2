"""Kernels that do what kernels can do, and functions that do what they cannot; for tests/test_cpu_translation.py.

Dimensions: none.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np
from llvmlite import ir
from mambax_cpu import kernel_types
from mambax_cpu.compilation import inlined, intrinsic, kernel, part, selection
from mambax_cpu.linear_tiles import bfloat16_at
from mambax_cpu.simd import bytes_at, exp, exp2, integers_at, load, pointer, sigmoid, softplus, splat, store
from mambax_cpu.tiles import WIDTH

OFFSET = 5
Pair = namedtuple("Pair", "low high")


@kernel
def whole_numbers(a, b, which):
    if which == 0:
        return a + b * 3 - -a
    if which == 1:
        return a // b if b != 0 else 0
    if which == 2:
        return a % b if b != 0 else 0
    if which == 3:
        return a // 8 + a % 8 * 1000 + a // 3 * 7 + a % -3
    if which == 4:
        return (a & b) + (a | b) * 3 + (a ^ b) * 5 + ~a
    if which == 5:
        return (a << 3) + (a >> 1)
    if which == 6:
        return min(a, b, OFFSET) * 100 + max(a, b)
    return 10 + (a < b) + 2 * (a <= b) + 4 * (a == b) + 8 * (a != b) + 16 * (a > b) + 32 * (a >= b)


@kernel
def divided_by_zero(a, b):
    return 10 * (a // b) + a % b


@kernel
def loops(start, stop, step):
    found, seen = 0, 0
    for i in range(start, stop, step):
        if i == 3:
            continue
        if i > 9:
            break
        for j in range(i):
            if j == 2:
                break
            found += j + 1
        found = found * 7 % 1000 + i
        i += 100
        seen = i
    for k in range(stop, start, -2):
        found += k
    for k in range(3):
        seen -= k
    return found * 1000 + seen


@kernel
def until(stop):
    n, found = 0, 0
    while True:
        n += 1
        if n % 3 == 0:
            continue
        if n > stop:
            break
        found += n
        while n < stop and n % 5 != 0:
            n += 2
            if n == 12:
                return -found
    return found


@inlined
def _checked(log, value):
    log[0] = log[0] * 10 + 1
    return value > 0


@kernel
def logic(a, b, c, which, place):
    log = integers_at(place)
    if which == 0:
        return 1 if _checked(log, a) and _checked(log, b) and not _checked(log, c) else 2
    if which == 1:
        return 1 if _checked(log, a) or (_checked(log, b) and _checked(log, c)) else 2
    over = _checked(log, a) or b == c
    over = over and not (a == b or _checked(log, c))
    if over:
        return 3
    elif not over and (a or b):
        return 4
    else:
        return 5


@part
def _swapped(pair, add):
    if pair.low > pair.high:
        return Pair(pair.high, pair.low), add
    return pair, add + 1


@part
def _count_down(place, n):
    """Nothing given back; leaves early."""
    while True:
        if n == 0:
            return
        place[n % 4] += n
        n -= 1


@inlined
def _applied(function, a, b):
    return function(a, b)


@part
def _difference(a, b):
    return a - b


@kernel
def calls(a, b, place):
    pair, more = Pair(a, b), 10
    pair, more = _swapped(pair, more)
    low, high = pair
    values = integers_at(place)
    for i in range(4):
        values[i] = i
    _count_down(values, 6)
    _count_down(values, 3)
    return _applied(_difference, high, low) * 100 + more + pair.low * 10000


@part
def _of_floats(kind, place):
    pointer(place)[0] = 1


@part
def _of_others(kind, place):
    pointer(place)[0] = 2


@part
def _set(place, value):
    place[0] = value


@kernel
def of_both_types(array, number):
    _set(pointer(array.ctypes.data), 1.5)
    _set(integers_at(array.ctypes.data + 8), number)
    _set(pointer(array.ctypes.data + 4), number)


@selection
def _by_type(kind, place):
    return _of_floats if kind.dtype is kernel_types.float32 else _of_others


@kernel
def selected(place):
    _by_type(pointer(0), place)
    _by_type(bfloat16_at(0), place + 4)


@kernel
def floats(array, number, count):
    a = pointer(array.ctypes.data)
    x = a[0]
    a[1] = x * x + x / a[2]
    a[3] = np.float32(count) / np.float32(3)
    a[4] = count / 3
    a[5] = x + number
    a[6] = -x if x > number else 0.0
    a[7] = np.sqrt(a[2])
    a[8] = np.sqrt(np.float32(1) / a[2] + np.float32(number))
    a[9] = a[2] * (count + 16777216)  # more digits than a float32 has
    a[10] = max(count, 1) / 7
    a[11] += 0.1
    a[12] = 1 if x != x else 2
    total = np.float32(0)
    for i in range(count):
        total += a[i]
    a[13] = total
    a[14] = float(count) * 0.1


@kernel
def bytes_and_words(source, target):
    values, out = bytes_at(source.ctypes.data), integers_at(target.ctypes.data)
    for i in range(3):
        out[i] = values[i] - 1
    out[3] = values[2] & 7 != 0
    words = bfloat16_at(source.ctypes.data)
    out[4] = words[2]
    words[2] = 65536 + 5


@kernel
def of_lanes(x, results, count):
    source, target = pointer(x.ctypes.data), pointer(results.ctypes.data)
    for i in range(0, count, WIDTH):
        value = load(source, i)
        store(target, i, exp2(value))
        store(target, count + i, exp(value))
        store(target, 2 * count + i, softplus(value))
        store(target, 3 * count + i, sigmoid(value))


# --- what kernels cannot do -------------------------------------------------------------------------------------


def refused_string(a):
    return "text"


def refused_list(a):
    return [a][0]


def refused_chain(a):
    return 0 < a < 3


def refused_other_type(a):
    b = 1
    b = 1.5
    return a + b


def refused_no_value(a):
    return a + b  # noqa: F821


def refused_for_else(a):
    for _ in range(a):
        pass
    else:
        a = 2
    return a


def refused_not_a_range(a):
    for i in (1, 2):
        a += i
    return a


def refused_named(a):
    return max(a, b=3)


def refused_foreign_function(a):
    return math.floor(a)


def refused_lanes_and_number(a):
    x = splat(np.float32(1)) + a
    return a if x else 0


def refused_numbers_joined(a):
    return a or 3


def refused_sometimes(a):  # noqa: RET503
    if a > 0:
        return 1


def refused_too_few(a):
    return _difference(a)


def refused_subscript_of_number(a):
    return a[0]


def refused_with(a):
    with a:
        return 1


def refused_float_in_integers(a):
    integers_at(a)[0] = 1.5


@intrinsic
def _outside(context):
    """A call of a function that no process has."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(kernel_types.int64.llvm, [])
        return builder.call(kernel_types.declared(builder.module, "mambax_nowhere", kind), [])

    return kernel_types.int64(), generate


def missing():
    return _outside()


def allocates(count):
    return np.zeros(count).size


def defaults(a, b=1):
    return a + b
