"""One token through a stack of Mamba-1 blocks in one call: norms, products, convolution, scan step, gate, residual.

Four phases per block (see :mod:`mambax_cpu.phases`): in_proj with the convolution and the gate, x_proj, the
recurrence with dt_proj, out_proj with the residual add. Between them everything stays in float32.

Dimensions: B rows, M d_model, D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mambax_cpu import phase_table as field
from mambax_cpu.chain import KERNELS, Weights, prepared_size, product_phase
from mambax_cpu.compilation import KernelFile
from mambax_cpu.state_memory import StateMemory
from mambax_cpu.stepping import Phases, States, Steps, float_bits
from mambax_cpu.tiles import WIDTH

_CHANNELS = 64
"""Channels of a task of the recurrence."""

_FETCHED = 768 << 10
"""Bytes of out_proj that are fetched during the recurrence, at most: what the second-level caches can keep."""

_kernels = KernelFile("mambax_cpu.phases")


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
        self.memory = StateMemory()
        self._steps = Steps(
            kernels=_kernels,
            kernel=KERNELS[blocks[0].in_proj.kind, narrow],
            model=sizes.model,
            per_block=4,
            mix=0,
            recur=2,
            room=partial(_room, sizes, blocks[0]),
            phases=lambda rows, at: [phase for block in blocks for phase in _phases(sizes, block, rows, at)],
            scratch=lambda rows: field.scratch_size(rows, sizes.width),
        )

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the convolution's state and the recurrence's of a block, for so many rows."""
        return (batch, self.sizes.width - 1, self.sizes.channels), (batch, self.sizes.channels, self.sizes.states)

    def advance(self, hidden: np.ndarray, before: States, after: States, threads: int) -> np.ndarray:
        """See :meth:`mambax_cpu.stepping.Steps.advance`."""
        return self._steps.advance(hidden, before, after, threads)


def _room(sizes: Sizes, first: BlockWeights, rows: int) -> dict[str, int]:
    """The float32 values of what is between the phases."""
    model, channels = rows * sizes.model, rows * sizes.channels
    return {
        "hidden": model,
        "normed": model,
        "xz": 2 * channels,
        "u": channels,
        "dbc": rows * (sizes.rank + 2 * sizes.states),
        "y": channels,
        "out": model,
        "prepared": max(prepared_size(matrix, rows) for matrix in (first.in_proj, first.out_proj)),
    }


def _phases(sizes: Sizes, block: BlockWeights, rows: int, at: dict[str, int]) -> Phases:
    """The phases of a block."""
    mix = product_phase(block.in_proj, rows, at["normed"], at["xz"], WIDTH) | {
        field.OPERATION: field.MIX,
        field.BIAS: block.in_bias,
        field.PREPARED: at["prepared"],
        field.NORM: block.norm,
        field.EPSILON: float_bits(block.epsilon),
        field.HIDDEN: at["hidden"],
        field.PARTS: 1,
        field.CHANNELS: sizes.channels,
        field.PLAIN: 2 * sizes.channels,
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
