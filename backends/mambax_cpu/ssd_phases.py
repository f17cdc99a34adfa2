"""The kernels for a chain of phases whose recurrences are those of Mamba-2; see :mod:`mambax_cpu.phase_work`.

There is one for each combination of ways of storing weights. They are apart from :mod:`mambax_cpu.phases` so that
nobody compiles the one recurrence for models that have the other.
"""

from __future__ import annotations

from mambax_cpu import phase_table as field
from mambax_cpu.compilation import kernel, spliced
from mambax_cpu.linear_products import product
from mambax_cpu.linear_tiles import bfloat16_at, float16_at, int8_at, words_at
from mambax_cpu.phase_steps import convolve_and_gate, finish_product
from mambax_cpu.phase_work import work
from mambax_cpu.simd import pointer
from mambax_cpu.ssd_phase_steps import recur


@spliced
def _perform(stored, narrow, views, task, slots, scratch):  # pragma: no cover
    """One task of a phase."""
    if views[field.OPERATION] == field.RECUR:
        recur(views, task, scratch)
        return
    first = task * views[field.SIZE]
    last = min(first + views[field.SIZE], views[field.OUTPUTS])
    product(stored, views, first, last)
    if views[field.OPERATION] == field.MIX:
        convolve_and_gate(narrow, views, first, last, scratch)
    else:
        finish_product(narrow, views, first, last)


@kernel
def float32(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`mambax_cpu.phases.float32`."""
    return work(_perform, pointer(0), pointer(0), table, phases, control, slots, slot, scratch)


@kernel
def bfloat16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights and narrow values are bfloat16."""
    return work(_perform, bfloat16_at(0), bfloat16_at(0), table, phases, control, slots, slot, scratch)


@kernel
def float16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights and narrow values are float16."""
    return work(_perform, float16_at(0), float16_at(0), table, phases, control, slots, slot, scratch)


@kernel
def int8_float32(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are int8, narrow values float32."""
    return work(_perform, int8_at(0), pointer(0), table, phases, control, slots, slot, scratch)


@kernel
def int4_float32(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are of four bits, narrow values float32."""
    return work(_perform, words_at(0), pointer(0), table, phases, control, slots, slot, scratch)


@kernel
def int8_bfloat16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are int8, narrow values bfloat16."""
    return work(_perform, int8_at(0), bfloat16_at(0), table, phases, control, slots, slot, scratch)


@kernel
def int4_bfloat16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are of four bits, narrow values bfloat16."""
    return work(_perform, words_at(0), bfloat16_at(0), table, phases, control, slots, slot, scratch)


@kernel
def int8_float16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are int8, narrow values float16."""
    return work(_perform, int8_at(0), float16_at(0), table, phases, control, slots, slot, scratch)


@kernel
def int4_float16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are of four bits, narrow values float16."""
    return work(_perform, words_at(0), float16_at(0), table, phases, control, slots, slot, scratch)
