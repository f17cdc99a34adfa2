"""How the selective scan is laid out over the threads of a GPU, and what its kernels can take.

Dimensions: B batch, L length, D d_inner, N d_state.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
MOST_STATES = 256
MOST_CHUNKS = 65535
"""Threadgroups in the second and third directions of a CUDA grid."""


class Layout(NamedTuple):
    """How the work is laid out over threads, by the number of states.

    Attributes:
        lanes: threads of a channel. held: states of a thread. tile: steps between barriers.
        threads: of a threadgroup, forward. backward: of one of the backward kernel.
    """

    lanes: int
    held: int
    tile: int
    threads: int
    backward: int

    @property
    def chunk(self) -> int:
        """Steps of a chunk. On the way back the states before each of its tiles stand in registers."""
        return 64 if self.held <= 4 else 32


def layout(states: int) -> Layout:
    """The layout for N states: four to a thread where there are so many, and at most 32 threads to a channel."""
    wide = 1 << (states - 1).bit_length()
    held = 8 if wide > 128 else min(wide, 4)
    lanes = wide // held
    tile = 8
    groups = max(1, min(8, 4096 // (2 * tile * wide)))  # 16 KiB of threadgroup memory for their shares
    return Layout(lanes, held, tile, min(128, 32 * lanes), 32 * groups)


def refusal(u: mx.array, A: mx.array, *others: mx.array | None) -> str:
    """Why the kernels cannot take these arguments of the scan; "" if they can."""
    if u.ndim != 3 or A.ndim != 2:
        return f"u is {u.shape} and A is {A.shape}; the GPU kernels expect (B, L, D) and (D, N)"
    if A.shape[1] > MOST_STATES:
        return f"d_state is {A.shape[1]}; the GPU kernels hold at most {MOST_STATES}"
    if 0 in u.shape or 0 in A.shape:
        return f"u is {u.shape} and A is {A.shape}; the GPU kernels expect no size to be zero"
    steps = MOST_CHUNKS * layout(A.shape[1]).chunk
    if u.shape[1] > steps or u.shape[0] > MOST_CHUNKS:
        return f"u is {u.shape}; the GPU kernels take at most {MOST_CHUNKS} rows of {steps} steps in one call"
    for x in (u, A, *others):
        if x is not None and x.dtype not in FLOATS:
            return f"found an array of {x.dtype}; the GPU kernels expect float32, float16 or bfloat16"
    return ""
