"""A chain of phases by several threads in one call: what is the same whatever the phases do.

The phases of :mod:`mambax_cpu.phase_table` follow one another; the tasks of one are independent. Each thread that
enters has a slot, with its share of the tasks of every phase: neighbours, so that the weights it reads lie in one
piece. A thread that is done with its own takes tasks from the others' shares. So a thread that comes late, or not
at all, or is held up, costs its speed and nothing else. Which thread does a task changes nothing in the result.

The thread that ends the last task of a phase opens the next one. The memory they share: the number of the open
phase; how many of its tasks are done; and for each slot the phase and how many tasks of its share are taken,
in one value, so that nobody who has fallen behind takes a task of another phase.
"""

from __future__ import annotations

from mambax_cpu import phase_table as field
from mambax_cpu.atomics import add, exchange_if, load_acquire, pause, store_release
from mambax_cpu.compilation import spliced
from mambax_cpu.linear_products import prepare
from mambax_cpu.phase_steps import normalise
from mambax_cpu.simd import integers_at, pointer, prefetch

_PATIENCE = 3000
"""Looks at what the others are doing before a thread gives its processor back: some hundred microseconds."""

_FETCHED = 1024
"""Cache lines of the next phase's weights that a thread has fetched while it waits, at most."""

_TAKEN = 32
"""The bit from which on a slot's value holds the phase."""


@spliced
def _open(narrow, table, control, slots, phase):  # pragma: no cover
    """Do what comes before the tasks of a phase, and let the threads at them."""
    row = table + 8 * field.FIELDS * phase
    views = integers_at(row)
    if views[field.BEFORE] & field.NORMALISE:
        normalise(narrow, views, pointer(row + 8 * field.EPSILON)[0])
    if views[field.BEFORE] & field.PREPARE:
        prepare(views)
    for slot in range(slots):
        control[field.LINE * (2 + slot)] = phase << _TAKEN
    control[field.LINE] = 0
    store_release(control, 0, phase)


@spliced
def _take(control, phase, tasks, slots, slot):  # pragma: no cover
    """A task of the phase: of the own share, then of the others'; -1 when all are taken."""
    for i in range(slots):
        owner = (slot + i) % slots
        first, last = tasks * owner // slots, tasks * (owner + 1) // slots
        place = field.LINE * (2 + owner)
        while True:
            value = load_acquire(control, place)
            task = first + (value & ((1 << _TAKEN) - 1))
            if value >> _TAKEN != phase or task >= last:
                break
            if exchange_if(control, place, value, value + 1):
                return task
    return -1


@spliced
def _fetch_next(table, phase, phases, slots, slot, line):  # pragma: no cover
    """Have a cache line of this slot's weights of the next phase fetched."""
    if phase + 1 < phases and line < _FETCHED:
        views = integers_at(table + 8 * field.FIELDS * (phase + 1))
        share = views[field.NBYTES] // slots
        if 64 * line < share:
            prefetch(pointer(views[field.WEIGHT] + share * slot + 64 * line), 0)


@spliced
def work(perform, stored, narrow, table, phases, control, slots, slot, scratch):  # pragma: no cover
    """The body of the kernels.

    Args:
        perform: does a task of a phase: of `stored`, `narrow`, the phase's row, the task, `slots` and `scratch`.
        stored, narrow: addresses; their types say how weights are stored, and what narrow values are.
        table, phases, control, slots, slot, scratch: as of the kernels.
    """
    shared, waited = integers_at(control), 0
    if slot == 0 and load_acquire(shared, 0) < 0:
        _open(narrow, table, shared, slots, 0)
    while waited < _PATIENCE:
        phase = load_acquire(shared, 0)
        if phase >= phases:
            return 1
        views = integers_at(table + 8 * field.FIELDS * max(0, phase))
        task = -1
        if phase >= 0:
            task = _take(shared, phase, views[field.TASKS], slots, slot)
        if task < 0:
            _fetch_next(table, phase, phases, slots, slot, waited)
            pause()
            waited += 1
            continue
        waited = 0
        perform(stored, narrow, views, task, slots, scratch)
        if add(shared, field.LINE, 1) + 1 == views[field.TASKS]:
            if phase + 1 == phases:
                store_release(shared, 0, phases)
            else:
                _open(narrow, table, shared, slots, phase + 1)
    return 0
