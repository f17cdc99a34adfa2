"""One token through a stack of blocks in one call of a kernel, whatever the blocks are.

Dimensions: B rows, M d_model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mambax_cpu import phase_table
from mambax_cpu.chain import perform, table_of
from mambax_cpu.compilation import KernelFile
from mambax_cpu.tiles import WIDTH

Phases = list[dict[int, int]]
"""Phases, each with its fields as of :mod:`mambax_cpu.phase_table`."""


def float_bits(value: float) -> int:
    """A float32 as a field holds it."""
    return int(np.float32(value).view(np.int32))


class States(NamedTuple):
    """The addresses of the states of all blocks, one after another, each contiguous.

    Attributes:
        conv: of (B, K-1, channels), narrow.
        ssm: of (B, ...) float32.
    """

    conv: Sequence[int] | np.ndarray
    ssm: Sequence[int] | np.ndarray


class _Workspace(NamedTuple):
    """The table for a number of rows and the memory its addresses lead to."""

    table: np.ndarray
    hidden: np.ndarray  # (B, M)
    values: np.ndarray


@dataclass(frozen=True)
class Steps:
    """What one token takes. Safe from several threads at once.

    Attributes:
        kernels, kernel: the file and the name of the kernel.
        model: M.
        per_block: phases of a block.
        mix, recur: which of them have the states of the convolution and of the recurrence.
        room: of B, the float32 values of each piece of memory between the phases, by name; ``hidden`` is one.
        phases: of B and the addresses of these pieces, the phases of all blocks.
        scratch: of B, the float32 values that each thread needs.
    """

    kernels: KernelFile
    kernel: str
    model: int
    per_block: int
    mix: int
    recur: int
    room: Callable[[int], dict[str, int]]
    phases: Callable[[int, dict[str, int]], Phases]
    scratch: Callable[[int], int]
    _spaces: dict[int, deque[_Workspace]] = field(default_factory=dict)

    def advance(self, hidden: np.ndarray, before: States, after: States, threads: int) -> np.ndarray:
        """Read one token.

        Args:
            hidden: (B, M), B up to :data:`mambax_cpu.linear.FEW_ROWS`; float32 or narrower.
            before: the states.
            after: where the states after the token are to be written; none of those read.
            threads: how many may work; the result is the same whatever their number.

        Returns:
            (B, M) float32, its own memory.
        """
        rows, each = len(hidden), self.per_block
        spaces = self._spaces.setdefault(rows, deque())
        try:
            space = spaces.pop()
        except IndexError:
            space = self._workspace(rows)
        space.hidden[...] = hidden
        table = space.table
        table[self.mix :: each, phase_table.CONV_STATE] = before.conv
        table[self.mix :: each, phase_table.NEW_CONV_STATE] = after.conv
        table[self.recur :: each, phase_table.STATE] = before.ssm
        table[self.recur :: each, phase_table.NEW_STATE] = after.ssm
        perform(self.kernel, table, threads, self.scratch(rows), self.kernels)
        result = space.hidden.copy()
        spaces.append(space)
        return result

    def _workspace(self, rows: int) -> _Workspace:
        wanted = {name: -(-count // WIDTH) * WIDTH for name, count in self.room(rows).items()}
        values = np.empty(sum(wanted.values()), np.float32)
        begins = np.cumsum([0, *wanted.values()])
        base = values.__array_interface__["data"][0]
        places = {name: base + 4 * int(begin) for name, begin in zip(wanted, begins, strict=False)}
        begin = (places["hidden"] - base) // 4
        hidden = values[begin : begin + rows * self.model].reshape(rows, self.model)
        return _Workspace(table_of(self.phases(rows, places)), hidden, values)
