"""One token through a stack of Mamba-1 blocks in one call: norms, products, convolution, scan step, gate, residual.

Four phases per block (see :mod:`mambax_cpu.phases`): in_proj with the convolution and the gate, x_proj, the
recurrence with dt_proj, out_proj with the residual add. Between them everything stays in float32.

Dimensions: B rows, M d_model, D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mambax_cpu import phase_table as field
from mambax_cpu.chain import KERNELS, Weights, perform, prepared_size, product_phase, table_of

_CHANNELS = 64
"""Channels of a task of the recurrence."""

_FETCHED = 768 << 10
"""Bytes of out_proj that are fetched during the recurrence, at most: what the second-level caches can keep."""

_VECTOR = 16

_PHASES = 4
"""Phases of a block."""


class Sizes(NamedTuple):
    """M, D, N, K and R."""

    model: int
    channels: int
    states: int
    width: int
    rank: int


class BlockWeights(NamedTuple):
    """The weights of a block: matrices, and addresses of contiguous arrays, 0 for one that is absent.

    Those of `A_log`, `D` and `dt_bias` are float32, the others in the narrow precision of the stack.
    """

    norm: int  # (M,)
    epsilon: float
    in_proj: Weights  # (2 D, M)
    in_bias: int  # (2 D,)
    conv: int  # (D, K)
    conv_bias: int  # (D,)
    x_proj: Weights  # (R + 2 N, D)
    dt_proj: int  # (D, R)
    dt_bias: int  # (D,)
    A_log: int  # (D, N)
    D: int  # (D,)
    out_proj: Weights  # (M, D)
    out_bias: int  # (M,)


class States(NamedTuple):
    """The addresses of the states of all blocks, one after another.

    Attributes:
        conv: of (B, K-1, D), narrow.
        ssm: of (B, D, N) float32.
    """

    conv: Sequence[int] | np.ndarray
    ssm: Sequence[int] | np.ndarray


class _Workspace(NamedTuple):
    """The table for a number of rows and the memory its addresses lead to."""

    table: np.ndarray
    hidden: np.ndarray  # (B, M)
    values: np.ndarray


def supported(narrow: str, blocks: Sequence[BlockWeights]) -> bool:
    """Whether there is a kernel for these weights: all products of one kind, or of "int4" with an "int8" x_proj."""
    kinds = {matrix.kind for block in blocks for matrix in (block.in_proj, block.out_proj)}
    if len(kinds) != 1 or (*kinds, narrow) not in KERNELS:
        return False
    allowed = kinds | {"int8"} if kinds == {"int4"} else kinds
    return all(block.x_proj.kind in allowed for block in blocks)


class Stack:
    """Blocks of one size, for one token at a time. Keeps no weight alive; safe from several threads at once.

    Args:
        sizes: of every block.
        narrow: "float32", "bfloat16" or "float16": of the small weights and the convolution's state.
        blocks: :func:`supported`.
    """

    def __init__(self, sizes: Sizes, narrow: str, blocks: Sequence[BlockWeights]) -> None:
        self.sizes = sizes
        self.narrow = narrow
        self.blocks = blocks
        self._kernel = KERNELS[blocks[0].in_proj.kind, narrow]
        self._spaces: dict[int, deque[_Workspace]] = {}

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
        rows = len(hidden)
        spaces = self._spaces.setdefault(rows, deque())
        try:
            space = spaces.pop()
        except IndexError:
            space = self._workspace(rows)
        space.hidden[...] = hidden
        table = space.table
        table[0::_PHASES, field.CONV_STATE] = before.conv
        table[0::_PHASES, field.NEW_CONV_STATE] = after.conv
        table[2::_PHASES, field.STATE] = before.ssm
        table[2::_PHASES, field.NEW_STATE] = after.ssm
        perform(self._kernel, table, threads, field.scratch_size(rows, self.sizes.width))
        result = space.hidden.copy()
        spaces.append(space)
        return result

    def _workspace(self, rows: int) -> _Workspace:
        sizes, first = self.sizes, self.blocks[0]
        prepared = max(prepared_size(matrix, rows) for matrix in (first.in_proj, first.out_proj))
        model, channels = rows * sizes.model, rows * sizes.channels
        wanted = {
            "hidden": model,
            "normed": model,
            "xz": 2 * channels,
            "u": channels,
            "dbc": rows * (sizes.rank + 2 * sizes.states),
            "y": channels,
            "out": model,
            "prepared": prepared,
        }
        padded = {name: -(-count // _VECTOR) * _VECTOR for name, count in wanted.items()}
        values = np.empty(sum(padded.values()), np.float32)
        base, places = values.__array_interface__["data"][0], {}
        for name, count in padded.items():
            places[name] = base
            base += 4 * count
        phases = [phase for block in self.blocks for phase in self._phases(block, rows, places)]
        hidden = values[:model].reshape(rows, sizes.model)
        return _Workspace(table_of(phases), hidden, values)

    def _phases(self, block: BlockWeights, rows: int, at: dict[str, int]) -> list[dict[int, int]]:
        sizes = self.sizes
        mix = product_phase(block.in_proj, rows, at["normed"], at["xz"], _VECTOR) | {
            field.OPERATION: field.MIX,
            field.BIAS: block.in_bias,
            field.PREPARED: at["prepared"],
            field.NORM: block.norm,
            field.EPSILON: int(np.float32(block.epsilon).view(np.int32)),
            field.HIDDEN: at["hidden"],
            field.CHANNELS: sizes.channels,
            field.CONV_WIDTH: sizes.width,
            field.CONV: block.conv,
            field.CONV_BIAS: block.conv_bias,
            field.U: at["u"],
        }
        mix[field.BEFORE] |= field.NORMALISE
        select = product_phase(block.x_proj, rows, at["u"], at["dbc"]) | {
            field.SECOND: int(block.x_proj.kind != block.in_proj.kind),
            field.PREPARED: at["prepared"],
        }
        recur = {
            field.OPERATION: field.RECUR,
            field.TASKS: math.ceil(sizes.channels / _CHANNELS),
            field.SIZE: _CHANNELS,
            field.ROWS: rows,
            field.INPUTS: sizes.rank,
            field.X: at["dbc"],
            field.OUT: at["y"],
            field.CHANNELS: sizes.channels,
            field.U: at["u"],
            field.DT: block.dt_proj,
            field.DT_BIAS: block.dt_bias,
            field.A_LOG: block.A_log,
            field.SKIP: block.D,
            field.STATES: sizes.states,
            field.GATE: at["xz"],
            field.FETCHED: min(_FETCHED, block.out_proj.nbytes) // (64 * sizes.channels),
        }
        out = product_phase(block.out_proj, rows, at["y"], at["out"]) | {
            field.BIAS: block.out_bias,
            field.SUM: at["hidden"],
            field.PREPARED: at["prepared"],
        }
        return [mix, select, recur, out]
