"""Chains of phases over addresses: their tables, and the threads that work through them.

Dimensions: as of :mod:`mambax_cpu.phase_table`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mambax.quantization import BLOCK
from mambax_cpu import phase_table as field
from mambax_cpu.compilation import KernelFile
from mambax_cpu.threads import together

_TASK = 32 << 10
"""Bytes of weights of a task, about."""

_TASKS = 16
"""Tasks that a phase has at least, where it has the outputs for them."""

_REST = (0.0, 2e-5, 1e-4, 1e-3)
"""Seconds for which a thread sleeps that has waited in vain, time after time."""

_WAIT = 5e-3
"""Seconds that waiting in vain takes at most, with the sleep after it; a thread that took longer found tasks."""

_kernels = KernelFile("mambax_cpu.phases")

KERNELS = {
    ("float32", "float32"): "float32",
    ("bfloat16", "bfloat16"): "bfloat16",
    ("float16", "float16"): "float16",
    ("int8", "float32"): "int8_float32",
    ("int8", "bfloat16"): "int8_bfloat16",
    ("int8", "float16"): "int8_float16",
    ("int4", "float32"): "int4_float32",
    ("int4", "bfloat16"): "int4_bfloat16",
    ("int4", "float16"): "int4_float16",
}
"""The kernel of :mod:`mambax_cpu.phases` for weights of a kind and narrow values of a kind. That of "int4" takes
"int8" weights as well."""


class Weights(NamedTuple):
    """A matrix (out, in) as the kernels take it. It keeps no array alive: make one per call, or keep the array too.

    Attributes:
        kind: "float32", "bfloat16", "float16", "int8" or "int4".
        outputs, inputs: its size.
        address: of the first row; rows follow one another.
        scales: the address of what goes with "int8" and "int4" (see :mod:`mambax.quantization`), else 0.
        shift: log2 of the size of a group of "int4" divided by 32.
    """

    kind: str
    outputs: int
    inputs: int
    address: int
    scales: int = 0
    shift: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes of the weights alone."""
        return self.outputs * int(self.inputs * _BYTES[self.kind])


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}


def prepared_size(weights: Weights, rows: int) -> int:
    """float32 values of scratch for x as the weights take it."""
    return rows * -(-weights.inputs // BLOCK) * (BLOCK + BLOCK // 2) if weights.kind == "int4" else 0


def product_phase(weights: Weights, rows: int, x: int, out: int, multiple: int = 4) -> dict[int, int]:
    """The fields of a phase out = x weights^T, its tasks a multiple of so many outputs."""
    row = max(1, weights.nbytes // weights.outputs)
    size = max(1, min(_TASK // (row * multiple), -(-weights.outputs // (multiple * _TASKS)))) * multiple
    return {
        field.OPERATION: field.PRODUCT,
        field.TASKS: -(-weights.outputs // size),
        field.SIZE: size,
        field.BEFORE: field.PREPARE if weights.kind == "int4" else 0,
        field.ROWS: rows,
        field.WEIGHT: weights.address,
        field.NBYTES: weights.nbytes,
        field.SCALES: weights.scales,
        field.SHIFT: weights.shift,
        field.INPUTS: weights.inputs,
        field.OUTPUTS: weights.outputs,
        field.X: x,
        field.OUT: out,
    }


def table_of(rows: Sequence[Mapping[int, int]]) -> np.ndarray:
    """Phases as the kernels take them, (P, FIELDS) int64; fields that are not named are 0."""
    table = np.zeros((len(rows), field.FIELDS), np.int64)
    for i, row in enumerate(rows):
        table[i, list(row)] = list(row.values())
    return table


def perform(kernel: str, table: np.ndarray, threads: int, scratch: int, kernels: KernelFile = _kernels) -> None:
    """Work through the phases of a table.

    Args:
        kernel: its name, of :data:`KERNELS`.
        table: of :func:`table_of`, each phase with a task at least. What its addresses lead to has to be kept until
            this returns, the table itself is kept for helpers that come late.
        threads: how many may take part.
        scratch: float32 values that each needs, see :func:`mambax_cpu.phase_table.scratch_size`.
        kernels: the file with the kernels.
    """
    control = np.full(field.control_size(threads), -1, np.int64)
    room = np.empty((threads, scratch), np.float32)
    function = getattr(kernels, kernel)
    places = tuple(array.__array_interface__["data"][0] for array in (table, control, room))

    def work(slot: int, held: Any = (table, control, room)) -> None:
        own = places[2] + 4 * scratch * slot
        tries, since = 0, time.perf_counter()
        while not function(places[0], len(table), places[1], threads, slot, own):
            time.sleep(_REST[min(tries, len(_REST) - 1)])
            now = time.perf_counter()
            tries, since = tries + 1 if now - since < _WAIT else 0, now

    if threads == 1:
        work(0)
    else:
        together(work, threads)
