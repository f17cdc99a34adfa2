"""The sizes on which kernels and their callers agree: tiles, and what a thread needs for scratch.

Scratch sizes are in float32 values.

Dimensions: D channels, N d_state, K width of the convolution or inner index of a product.
"""

from __future__ import annotations

from collections.abc import Iterable

WIDTH = 16
"""Lanes of a value of :mod:`mambax_cpu.simd`."""

# --- the scan ------------------------------------------------------------------------------------------------

SCAN_TILE = 32
"""Steps of a tile; the state is saved once per tile for the backward pass."""

SCAN_GROUP = 4
"""Blocks of sixteen channels of a task of the backward kernel, which adds up their shares in the gradients of B and
C."""

BACKWARD_VECTORS = 9 * (SCAN_TILE + 5) + 2
"""Vectors of the backward kernel's buffers that do not depend on N."""


def scan_scratch(states: int) -> int:
    """Of the forward kernel for N."""
    return WIDTH * (3 * SCAN_TILE + 1 + 2 * states)


def scan_backward_scratch(states: int) -> int:
    """Of the backward kernel for N."""
    return WIDTH * (BACKWARD_VECTORS + 2 * SCAN_TILE * states + SCAN_GROUP * (3 * states + 2))


# --- the convolution -----------------------------------------------------------------------------------------

CONV_TILE = 64
"""Steps of a tile of the backward kernel."""


def _vectors(integers: int) -> int:
    """How many vectors of float32 hold that many int64."""
    return -(-2 * integers // WIDTH)


def conv_scratch(channels: int, width: int) -> int:
    """Of the forward kernel for D and K."""
    return WIDTH * (-(-channels // WIDTH) * width + 1 + _vectors(width))


def conv_backward_scratch(width: int) -> int:
    """Of the backward kernel for K."""
    return WIDTH * (CONV_TILE + 4 * width + 1 + 2 * _vectors(CONV_TILE + 2 * width))


# --- products ------------------------------------------------------------------------------------------------

STRIP = 48
"""Columns of a strip of the result: whole tiles of registers on every processor."""

BLOCK = 1024
"""Inner indices that are summed before the sums go to memory, at most."""

EDGE = 8 * STRIP
"""Values of a tile that reaches beyond the last column."""


def product_scratch(group: int, inner: int) -> int:
    """For strips in groups of that many, and K."""
    return WIDTH + EDGE + group * STRIP * (1 + min(BLOCK, inner))


# --- whole prompts -------------------------------------------------------------------------------------------

CONV_STEPS = 4
"""Steps that the convolution makes at a time."""


WIDE, ADDED, NARROW = range(3)
"""What becomes of the sums of a product: float32, added to float32, or rounded to what is narrow."""


def prompt_scratch(states: int, rank: int, products: Iterable[tuple[int, int]]) -> int:
    """For N, and R in words, and products: the strips of each in a group, and its inputs in words."""
    recurrence = STRIP * (2 + 3 * SCAN_TILE + 2 * states + rank)
    return WIDTH + max(recurrence, *(EDGE + group * STRIP * (1 + inputs) for group, inputs in products))


# --- RMSNorm -------------------------------------------------------------------------------------------------

NORM_ROWS = 64
"""Rows of a task of the backward kernel, which adds up their shares in the gradient of the weight."""


def norm_scratch(count: int) -> int:
    """Of the backward kernel for so many values in a row."""
    return WIDTH * (1 + -(-count // WIDTH))
