"""The kernels that read a prompt through a chain of phases: norms, products, convolutions, recurrences.

How threads share the work says :mod:`mambax_cpu.phase_work`.
"""

from __future__ import annotations

from mambax_cpu import prompt_table as field
from mambax_cpu.compilation import kernel, spliced
from mambax_cpu.linear_tiles import bfloat16_at, moved
from mambax_cpu.norm_kernels import normalise_row
from mambax_cpu.phase_work import work
from mambax_cpu.precision import like
from mambax_cpu.product_kernels import tile_of_all
from mambax_cpu.prompt_steps import convolve, multiply, recur, tile_of_pairs
from mambax_cpu.simd import pointer


@spliced
def _floats(stored, narrow, views, task, slots, scratch):  # pragma: no cover
    _task(narrow, tile_of_all, views, task, scratch)


@spliced
def _pairs(stored, narrow, views, task, slots, scratch):  # pragma: no cover
    _task(narrow, tile_of_pairs, views, task, scratch)


@spliced
def _task(narrow, whole, views, task, scratch):  # pragma: no cover
    """One task of a phase; the tile is that for words of narrow values."""
    operation = views[field.OPERATION]
    if operation == field.PRODUCT:
        multiply(
            narrow, whole, views[field.X], views[field.X_ROW], views[field.WEIGHT], views[field.OUT],
            views[field.OUT_ROW], views[field.BIAS], views[field.FORM], views[field.ROWS], views[field.OUTPUTS],
            views[field.INPUTS], views[field.SIZE], views[field.SPLITS], task, scratch,
        )  # fmt: skip
    elif operation == field.RECUR:
        recur(
            narrow, whole, views[field.U], views[field.Z], views[field.Z_ROW], views[field.X], views[field.X_ROW],
            views[field.WEIGHT], views[field.BIAS], views[field.A_LOG], views[field.B], views[field.C],
            views[field.BC_ROW], views[field.SKIP], views[field.STATE], views[field.NEW_STATE], views[field.OUT],
            views[field.LENGTH], views[field.CHANNELS], views[field.STATES], views[field.INPUTS], task, scratch,
        )  # fmt: skip
    elif operation == field.CONVOLVE:
        convolve(
            narrow, views[field.X], views[field.X_ROW], views[field.STATE], views[field.NEW_STATE],
            views[field.CONV], views[field.OUT], views[field.LENGTH], views[field.CHANNELS], task,
        )  # fmt: skip
    else:
        _normalise(narrow, views, task)


@spliced
def _normalise(narrow, views, task):  # pragma: no cover
    size, count = views[field.SIZE], views[field.INPUTS]
    for r in range(task * size, min(views[field.ROWS], (task + 1) * size)):
        weight, out = like(narrow, views[field.WEIGHT]), moved(like(narrow, views[field.OUT]), r * count)
        x, epsilon = pointer(views[field.X] + 4 * r * count), pointer(views[field.EPSILON])[0]
        normalise_row(x, weight, out, count, epsilon)


@kernel
def float32(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """Work until all phases of a :mod:`mambax_cpu.prompt_table` are done; see :func:`mambax_cpu.phases.float32`."""
    return work(_floats, pointer(0), pointer(0), table, phases, control, slots, slot, scratch)


@kernel
def bfloat16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; what is narrow is bfloat16, for processors that multiply such pairs."""
    return work(_pairs, bfloat16_at(0), bfloat16_at(0), table, phases, control, slots, slot, scratch)
