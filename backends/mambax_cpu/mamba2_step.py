"""One token through a stack of Mamba-2 blocks in one call: norms, products, convolution, scan step, gate, residual.

Three phases per block (see :mod:`mambax_cpu.ssd_phases`): in_proj with the convolution of x, B and C and the gate,
the recurrence, out_proj with the gated norm before and the residual add after. Between them everything stays in
float32.

Dimensions: B rows, M d_model, D d_inner = H P, H heads, P head_dim, G groups, N d_state, K d_conv,
C channels of the convolution = D + 2 G N.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mambax_cpu import phase_table as field
from mambax_cpu.chain import KERNELS, Weights, prepared_size, product_phase
from mambax_cpu.compilation import KernelFile
from mambax_cpu.ssd_tiles import ssd_step_scratch
from mambax_cpu.state_memory import StateMemory
from mambax_cpu.stepping import Phases, States, Steps, float_bits
from mambax_cpu.tiles import WIDTH

_CHANNELS = 2 * WIDTH
"""Channels of a head that are a task of the recurrence."""

_kernels = KernelFile("mambax_cpu.ssd_phases")


class Mamba2Sizes(NamedTuple):
    """M, H, P, G, N and K."""

    model: int
    heads: int
    head_dim: int
    groups: int
    states: int
    width: int

    @property
    def inner(self) -> int:
        """D."""
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        """C."""
        return self.inner + 2 * self.groups * self.states


class Mamba2Weights(NamedTuple):
    """The weights of a block: matrices, and addresses of contiguous arrays, 0 for one that is absent.

    Those of `A_log`, `D` and `dt_bias` are float32, the others in the narrow precision of the stack.
    """

    norm: int  # (M,)
    epsilon: float
    in_proj: Weights  # (D + C + H, M)
    in_bias: int  # (D + C + H,)
    conv: int  # (C, K)
    conv_bias: int  # (C,)
    dt_bias: int  # (H,)
    A_log: int  # (H,)
    D: int  # (H,)
    gated_norm: int  # (D,), 0 where y is gated alone
    gated_epsilon: float
    out_proj: Weights  # (M, D)
    out_bias: int  # (M,)


def mamba2_supported(narrow: str, blocks: Sequence[Mamba2Weights]) -> bool:
    """Whether there is a kernel for these weights: all products of one kind."""
    kinds = {matrix.kind for block in blocks for matrix in (block.in_proj, block.out_proj)}
    return len(kinds) == 1 and (*kinds, narrow) in KERNELS


class Mamba2Stack:
    """Blocks of one size, for one token at a time. Keeps no weight alive; safe from several threads at once.

    Args:
        sizes: of every block.
        limits: the least and the largest time step.
        narrow: "float32", "bfloat16" or "float16": of the small weights and the convolution's state.
        blocks: :func:`mamba2_supported`.
    """

    def __init__(
        self, sizes: Mamba2Sizes, limits: tuple[float, float], narrow: str, blocks: Sequence[Mamba2Weights]
    ) -> None:
        self.sizes = sizes
        self.narrow = narrow
        self.blocks = blocks
        self.memory = StateMemory()
        held = np.array(limits, np.float32)
        self._steps = Steps(
            kernels=_kernels,
            kernel=KERNELS[blocks[0].in_proj.kind, narrow],
            model=sizes.model,
            per_block=3,
            mix=0,
            recur=1,
            room=partial(_room, sizes, blocks[0]),
            phases=lambda rows, at: [p for block in blocks for p in _phases(sizes, held, block, rows, at)],
            scratch=lambda _: max(ssd_step_scratch(), 2 * WIDTH * sizes.width),
        )

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the convolution's state and the recurrence's of a block, for so many rows."""
        sizes = self.sizes
        return (batch, sizes.width - 1, sizes.convolved), (batch, sizes.heads, sizes.head_dim, sizes.states)

    def advance(self, hidden: np.ndarray, before: States, after: States, threads: int) -> np.ndarray:
        """See :meth:`mambax_cpu.stepping.Steps.advance`."""
        return self._steps.advance(hidden, before, after, threads)


def _room(sizes: Mamba2Sizes, first: Mamba2Weights, rows: int) -> dict[str, int]:
    """The float32 values of what is between the phases."""
    return {
        "hidden": rows * sizes.model,
        "normed": rows * sizes.model,
        "projected": rows * first.in_proj.outputs,
        "mixed": rows * sizes.convolved,
        "y": rows * sizes.inner,
        "out": rows * sizes.model,
        "prepared": max(prepared_size(matrix, rows) for matrix in (first.in_proj, first.out_proj)),
    }


def _phases(sizes: Mamba2Sizes, limits: np.ndarray, block: Mamba2Weights, rows: int, at: dict[str, int]) -> Phases:
    """The phases of a block; `limits` are kept by the caller."""
    mix = product_phase(block.in_proj, rows, at["normed"], at["projected"], WIDTH) | {
        field.OPERATION: field.MIX,
        field.BIAS: block.in_bias,
        field.PREPARED: at["prepared"],
        field.NORM: block.norm,
        field.EPSILON: float_bits(block.epsilon),
        field.HIDDEN: at["hidden"],
        field.PARTS: 1,
        field.CONVOLVED: sizes.inner,
        field.CHANNELS: sizes.convolved,
        field.PLAIN: sizes.inner + sizes.convolved,
        field.CONV_WIDTH: sizes.width,
        field.CONV: block.conv,
        field.CONV_BIAS: block.conv_bias,
        field.U: at["mixed"],
    }
    mix[field.BEFORE] |= field.NORMALISE
    size = min(_CHANNELS, sizes.head_dim)
    recur = {
        field.OPERATION: field.RECUR,
        field.TASKS: sizes.heads * -(-sizes.head_dim // size),
        field.SIZE: size,
        field.ROWS: rows,
        field.OUTPUTS: block.in_proj.outputs,
        field.X: at["projected"],
        field.OUT: at["y"],
        field.CHANNELS: sizes.convolved,
        field.U: at["mixed"],
        field.DT_BIAS: block.dt_bias,
        field.A_LOG: block.A_log,
        field.SKIP: block.D,
        field.STATES: sizes.states,
        field.HEADS: sizes.heads,
        field.HEAD_DIM: sizes.head_dim,
        field.GROUPS: sizes.groups,
        field.LIMITS: limits.__array_interface__["data"][0],
    }
    out = product_phase(block.out_proj, rows, at["y"], at["out"]) | {
        field.BIAS: block.out_bias,
        field.SUM: at["hidden"],
        field.PREPARED: at["prepared"],
    }
    if block.gated_norm:
        out[field.BEFORE] |= field.NORMALISE
        out |= {
            field.NORM: block.gated_norm,
            field.EPSILON: float_bits(block.gated_epsilon),
            field.HIDDEN: at["y"],
            field.PARTS: sizes.groups,
        }
    return [mix, recur, out]
