"""How the scan of Mamba-2 is laid out over the threads of a GPU, and what its kernels can take.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mambax_mlx.kernels.layout import FLOATS, MOST_CHUNKS, MOST_STATES

CHUNK, GRADIENT_CHUNK = 256, 64
"""Steps of a chunk. Backward, ``ssd_decay`` adds up rounding errors from the end of a chunk to its beginning."""


class Plan(NamedTuple):
    """How the work is laid out over threads.

    Attributes:
        lanes: threads that share the states of a channel. channels: of a thread. held: states of each.
        tile: steps between barriers. threads: of a threadgroup.
    """

    lanes: int
    channels: int
    held: int
    tile: int
    threads: int

    @property
    def block(self) -> int:
        """Channels of a threadgroup."""
        return self.threads // self.lanes * self.channels

    @property
    def template(self) -> dict[str, int]:
        return {
            "LANES": self.lanes, "RP": self.channels, "RN": self.held, "TILE": self.tile, "THREADS": self.threads,
        }  # fmt: skip


def plan(width: int, states: int, length: int = 0, *, gradient: bool = False) -> Plan:
    """The plan for heads of a width: four channels of four states to a thread, where there are so many.

    A threadgroup has at most 128 channels, and in the kernels of the gradient 16 KiB of sums over channels.
    """
    wide = _power(states)
    held = 8 if wide > 128 else min(wide, 4)
    lanes, channels = wide // held, min(4, _power(width))
    tile = 1 if length == 1 else 8 if wide < 128 or not gradient else 4
    threads = min(256, lanes * min(32, _power(ceil(width, channels))))
    if gradient:
        threads = min(threads, 32 * 4096 // (tile * wide))
    return Plan(lanes, channels, held, tile, max(32, threads))


def refusal(x: mx.array, B: mx.array, *others: mx.array | None) -> str:
    """Why the kernels cannot take these arguments; "" if they can."""
    if x.ndim != 4 or B.ndim != 4:
        return f"x is {x.shape} and B is {B.shape}; the GPU kernels expect (B, L, H, P) and (B, L, G, N)"
    if B.shape[3] > MOST_STATES:
        return f"d_state is {B.shape[3]}; the GPU kernels hold at most {MOST_STATES}"
    if 0 in x.shape or 0 in B.shape:
        return f"x is {x.shape} and B is {B.shape}; the GPU kernels expect no size to be zero"
    steps = MOST_CHUNKS * GRADIENT_CHUNK
    if x.shape[1] > steps or x.shape[0] > MOST_CHUNKS:
        return f"x is {x.shape}; the GPU kernels take at most {MOST_CHUNKS} rows of {steps} steps in one call"
    for array in (x, B, *others):
        if array is not None and array.dtype not in FLOATS:
            return f"found an array of {array.dtype}; the GPU kernels expect float32, float16 or bfloat16"
    return ""


def ceil(size: int, part: int) -> int:
    """The parts of a size, the last of which may be smaller."""
    return -(-size // part)


def _power(size: int) -> int:
    """The smallest power of two of at least this."""
    return 1 << (size - 1).bit_length()
