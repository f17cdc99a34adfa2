"""The kernels for a chain of phases: products of a few rows, and the steps of Mamba-1 between them.

There is one for each combination of ways of storing weights. How threads share the work says
:mod:`mambax_cpu.phase_work`.
"""

from __future__ import annotations

from mambax_cpu import phase_table as field
from mambax_cpu.compilation import kernel, spliced
from mambax_cpu.linear_products import product
from mambax_cpu.linear_tiles import bfloat16_at, float16_at, int8_at, words_at
from mambax_cpu.phase_steps import convolve_and_gate, finish_product, recur
from mambax_cpu.phase_work import work
from mambax_cpu.simd import pointer


@spliced
def _perform(stored, narrow, views, task, slots, scratch):  # pragma: no cover
    """One task of a phase."""
    first = task * views[field.SIZE]
    last = first + views[field.SIZE]
    if views[field.OPERATION] == field.RECUR:
        recur(narrow, views, first, min(last, views[field.CHANNELS]), slots, scratch)
        return
    last = min(last, views[field.OUTPUTS])
    product(stored, views, first, last)
    if views[field.OPERATION] == field.MIX:
        convolve_and_gate(narrow, views, first, last, scratch)
    else:
        finish_product(narrow, views, first, last)


@kernel
def float32(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """Work until all phases are done (1), or until too long nothing could be done (0; then call again).

    Weights and narrow values are float32.

    Args:
        table: the address of (`phases`, FIELDS) int64.
        control: the address of what the threads share, of :func:`mambax_cpu.phase_table.control_size`. At first -1
            throughout. The thread with slot 0 is the one that begins.
        slots: the number of threads that may take part.
        slot: which of them this is.
        scratch: the address of this slot's own memory, of :func:`mambax_cpu.phase_table.scratch_size`.
    """
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
    """As :func:`float32`; weights are of four bits (int8 where SECOND is set), narrow values float32."""
    return work(_perform, words_at(0), pointer(0), table, phases, control, slots, slot, scratch)


@kernel
def int8_bfloat16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are int8, narrow values bfloat16."""
    return work(_perform, int8_at(0), bfloat16_at(0), table, phases, control, slots, slot, scratch)


@kernel
def int4_bfloat16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are of four bits (int8 where SECOND is set), narrow values bfloat16."""
    return work(_perform, words_at(0), bfloat16_at(0), table, phases, control, slots, slot, scratch)


@kernel
def int8_float16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are int8, narrow values float16."""
    return work(_perform, int8_at(0), float16_at(0), table, phases, control, slots, slot, scratch)


@kernel
def int4_float16(table, phases, control, slots, slot, scratch):  # pragma: no cover
    """As :func:`float32`; weights are of four bits (int8 where SECOND is set), narrow values float16."""
    return work(_perform, words_at(0), float16_at(0), table, phases, control, slots, slot, scratch)
