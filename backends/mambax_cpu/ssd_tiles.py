"""The sizes on which the kernels of the scan of Mamba-2 and their callers agree. Loads no LLVM.

Scratch sizes are in float32 values.

Dimensions: P head_dim, N d_state, T steps of a chunk.
"""

from __future__ import annotations

from mambax_cpu.tiles import WIDTH

CHUNK = 64
"""T. The state before each is saved for the backward pass. The products inside a chunk cost T for each channel of a
step, those with the state 2 N; a shorter chunk reads and writes the state more often, and saves it more often."""

PARTS = 8
"""Tasks into which the heads of a group are divided, at most. The heads of a task share what depends on B and C
alone; the backward kernel writes gradients of B and C once per task."""

ALIGNED = WIDTH
"""Values by which scratch may begin later, so that vectors do not straddle lines of the cache."""


def whole(count: int) -> int:
    """The values of that many, in whole vectors."""
    return -(-count // WIDTH) * WIDTH


def shared_heads(heads: int, groups: int) -> int:
    """How many heads of one group a task takes."""
    return -(-(heads // groups) // PARTS)


def ssd_scratch(width: int, states: int, shared: int) -> int:
    """Of the forward kernel for P, N and the heads of a task."""
    width, states = whole(width), whole(states)
    return ALIGNED + CHUNK * (3 * states + 2 * width + 2 * CHUNK + 6) + shared * width * states


def ssd_backward_scratch(width: int, states: int, shared: int) -> int:
    """Of the backward kernel for P, N and the heads of a task."""
    width, states = whole(width), whole(states)
    return ALIGNED + CHUNK * (6 * states + 5 * width + 3 * CHUNK + 11) + (shared + 2) * width * states


def ssd_step_scratch() -> int:
    """Of the kernel for one step."""
    return ALIGNED + WIDTH * (WIDTH + 1)
