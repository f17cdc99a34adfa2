"""Vectors of float32, bfloat16 or float16 values in memory, in kernels written once for all three.

What lies at an address is said by its type while they are compiled, as in :mod:`mambax_cpu.linear_tiles`.
"""

from __future__ import annotations

from typing import Any

from mambax_cpu import kernel_types as types
from mambax_cpu.compilation import inlined, intrinsic
from mambax_cpu.linear_emit import STORED, Emitter
from mambax_cpu.simd import WIDTH, floats, lanes, splat


@intrinsic
def like(typing_context: Any, base: Any, address: Any) -> Any:
    """An int64 address as one of the type of `base`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(base))

    return base(base, types.int64), generate


@intrinsic
def number_of(typing_context: Any, base: Any) -> Any:
    """An address as an int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], types.int64.llvm)

    return types.int64(base), generate


@intrinsic
def _load(typing_context: Any, base: Any, index: Any) -> Any:
    """The sixteen values from base[index] on, widened."""
    element = base.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder)
        base, index = args
        return emit.widened(emit.load(base, index, STORED[element]), element)

    return lanes(base, types.int64), generate


@intrinsic
def _load_first(typing_context: Any, base: Any, index: Any, count: Any) -> Any:
    """The first `count` lanes from base[index] on, widened; zero in the others, which are not read."""
    element = base.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder)
        base, index, count = args
        return emit.widened(emit.load_some(base, index, emit.present(count), STORED[element]), element)

    return lanes(base, types.int64, types.int64), generate


@intrinsic
def _store(typing_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Sixteen values to base[index] and on, rounded to what lies there."""
    element = base.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder)
        base, index, value = args
        stored = STORED[element]
        builder.store(emit.narrowed(value, element), emit.address(base, index, stored.vector), align=stored.size)
        return context.get_dummy_value()

    return types.void(base, types.int64, lanes), generate


@intrinsic
def _store_first(typing_context: Any, base: Any, index: Any, value: Any, count: Any) -> Any:
    """The first `count` lanes to base[index] and on, rounded to what lies there; nothing else is written."""
    element = base.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder)
        base, index, value, count = args
        emit.store_some(emit.narrowed(value, element), base, index, emit.present(count), STORED[element])
        return context.get_dummy_value()

    return types.void(base, types.int64, lanes, types.int64), generate


@intrinsic
def sums_of_rows(typing_context: Any, base: Any) -> Any:
    """Of sixteen float32 vectors that lie one after another, the sum of the lanes of each; always in one order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder)
        return emit.lanes_added([emit.load(args[0], emit.index(WIDTH * i)) for i in range(WIDTH)])

    return lanes(floats), generate


@inlined
def read(base, index, count):  # pragma: no cover
    """The values from base[index] on, up to sixteen of `count`; zero in the other lanes."""
    return _load(base, index) if count >= WIDTH else _load_first(base, index, count)


@inlined
def read_or_zero(base, address, index, count):  # pragma: no cover
    """As :func:`read`, at an address where values of the type of `base` lie; zero where it is 0."""
    return splat(0.0) if address == 0 else read(like(base, address), index, count)


@inlined
def write(base, index, value, count):  # pragma: no cover
    """The first lanes to base[index] and on, up to sixteen of `count`, rounded to what lies there."""
    if count >= WIDTH:
        _store(base, index, value)
    else:
        _store_first(base, index, value, count)
