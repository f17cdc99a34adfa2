"""How kernels read and write operands: addresses from the operand table, ragged channel blocks, transposed states.

Everything here is called from within kernels. `views` is the table of :mod:`mambax_cpu.operands`, `which` one of
its rows.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from mambax_cpu import kernel_types as types
from mambax_cpu.compilation import inlined, intrinsic, part
from mambax_cpu.simd import WIDTH, bytes_at, load, pointer, splat, store


@intrinsic
def element_at(typing_context, kind, views, which, row, step):
    """The address of [row, step, 0] of an operand whose values are those to which `kind`, any address, points."""

    def generate(context, builder, signature, args):
        _, views, which, row, step = args
        first = builder.mul(which, ir.Constant(which.type, 3))
        address, row_stride, step_stride = (
            builder.load(builder.gep(views, [builder.add(first, ir.Constant(which.type, i))])) for i in range(3)
        )
        for value in (address, row_stride, step_stride):  # no kernel writes to its table
            value.set_metadata("invariant.load", builder.module.add_metadata([]))
        elements = builder.add(builder.mul(row, row_stride), builder.mul(step, step_stride))
        return builder.gep(builder.inttoptr(address, context.get_value_type(kind)), [elements])

    return kind(kind, types.CPointer(types.int64), types.int64, types.int64, types.int64), generate


@inlined
def at(views, which, row, step):  # pragma: no cover
    """The address of [row, step, 0] of a float32 operand."""
    return element_at(pointer(0), views, which, row, step)


@inlined
def _flags(views, which, row, step):  # pragma: no cover
    return bytes_at(views[3 * which])[row * views[3 * which + 1] + step * views[3 * which + 2]]


@inlined
def exists(views, which, row, step):  # pragma: no cover
    """Whether the flags (B, L) of :func:`mambax_cpu.operands.flags` let this position exist; so without flags."""
    return views[3 * which] == 0 or _flags(views, which, row, step) & 1 != 0


@inlined
def begins(views, which, row, step):  # pragma: no cover
    """Whether a sequence begins at this position, by the same flags."""
    return views[3 * which] != 0 and _flags(views, which, row, step) & 2 != 0


@part
def zero(base, count):  # pragma: no cover
    """Zero to `count` times sixteen values."""
    for i in range(count):
        store(base, i * WIDTH, splat(0.0))


@inlined
def load_some(base, index, width, spare):  # pragma: no cover
    """The `width` values from base[index] on; zero in the other lanes. `spare` is room for sixteen."""
    if width == WIDTH:
        return load(base, index)
    store(spare, 0, splat(0.0))
    for lane in range(width):
        spare[lane] = base[index + lane]
    return load(spare, 0)


@inlined
def store_some(base, index, width, value, spare):  # pragma: no cover
    """The first `width` lanes to base[index] and on."""
    if width == WIDTH:
        store(base, index, value)
        return
    store(spare, 0, value)
    for lane in range(width):
        base[index + lane] = spare[lane]


@inlined
def load_vector(views, which, channel, width, spare):  # pragma: no cover
    """Sixteen values of a (D,) operand from `channel` on; zero where it is absent."""
    if views[3 * which] == 0:
        return splat(0.0)
    return load_some(pointer(views[3 * which]), channel, width, spare)


@part
def load_columns(rows, stride, width, count, columns, factor):  # pragma: no cover
    """columns[n][lane] = factor * rows[lane][n] for n below `count`; zero in lanes from `width` on."""
    zero(columns, count)
    for lane in range(width):
        for n in range(count):
            columns[n * WIDTH + lane] = rows[lane * stride + n] * np.float32(factor)


@part
def store_columns(columns, count, width, rows, stride):  # pragma: no cover
    """rows[lane][n] = columns[n][lane]."""
    for lane in range(width):
        for n in range(count):
            rows[lane * stride + n] = columns[n * WIDTH + lane]


@part
def load_state(views, which, row, channel, width, states, columns):  # pragma: no cover
    """Sixteen channels of a (B, D, N) operand as (N, 16); zero where it is absent."""
    if views[3 * which] == 0:
        zero(columns, states)
    else:
        load_columns(at(views, which, row, channel), views[3 * which + 2], width, states, columns, 1.0)
