"""What Mamba-2's Triton scan is given, and how its work is laid out over a GPU.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state, K chunks of T steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mambax_torch.kernels.devices import interpreted
from mambax_torch.kernels.scan import flags
from mambax_torch.kernels.sizes import cdiv, next_power_of_2
from mambax_torch.operands import SSDOperands

FILL = 4
"""Programs per processor that cutting time into segments aims at."""


class Arguments(NamedTuple):
    """What a scan is given, ready for the kernels; made by :func:`arguments`."""

    x: Tensor  # (B, L, H, P)
    dt: Tensor  # (B, L, H)
    A: Tensor  # (H,) float32
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor | None  # (H,) float32
    dt_bias: Tensor | None  # (H,) float32
    dt_softplus: bool
    dt_limit: tuple[float, float]
    initial_state: Tensor | None  # (B, H, P, N) float32
    mask: Tensor | None  # (B, L) uint8
    numbers: Tensor | None  # (B, L) int32, which sequence of its row each step belongs to

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, L, H, P."""
        batch, length, heads, width = self.x.shape
        return batch, length, heads, width

    @property
    def states(self) -> int:
        """N."""
        return self.B.shape[3]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.x.numel() and self.B.numel())


def inner(x: Tensor) -> Tensor:
    """The tensor with its last two axes side by side in memory; a copy only where they are not."""
    rows, columns = x.shape[-2:]
    beside = (x.stride(-1) == 1 or columns == 1) and (x.stride(-2) == columns or rows == 1)
    return x if beside else x.contiguous()


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def arguments(given: SSDOperands) -> Arguments:
    """The arguments of :func:`mambax.ssd.ssd`, their shapes already checked, ready for the kernels."""
    dt, boundaries = given.dt, given.boundaries
    return Arguments(
        inner(given.x), dt if dt.stride(-1) == 1 or dt.shape[-1] == 1 else dt.contiguous(),
        given.A.float().contiguous(), inner(given.B), inner(given.C), _float(given.D), _float(given.dt_bias),
        given.dt_softplus, (given.dt_min, given.dt_max), _float(given.initial_state), flags(given.mask),
        None if boundaries is None else boundaries.to(torch.bool).cumsum(1, dtype=torch.int32),
    )  # fmt: skip


def precision_of(x: Tensor, B: Tensor, C: Tensor) -> tuple[Any, str]:
    """The dtype of what the tensor cores multiply, and how they do it; they add up in float32.

    bfloat16 stays what it is. float16 is multiplied as TF32, which holds every float16 value and cannot overflow
    where a state does not fit. float32 is multiplied in three TF32 products, which leaves an error of about 1e-6;
    one product would leave 5e-4, and "ieee" would do without the tensor cores: it is for the interpreter.
    """
    dtypes = {x.dtype, B.dtype, C.dtype}
    precision = "tf32x3" if torch.float32 in dtypes else "tf32"
    work = tl.bfloat16 if dtypes == {torch.bfloat16} else tl.float32
    return work, "ieee" if interpreted() else precision


def chunk_of(width: int, states: int, work: Any) -> int:
    """T: steps of a chunk; fewer for large states and float32, or registers would be spilled all the time."""
    small = next_power_of_2(width) * next_power_of_2(states) <= 8192
    return (64 if small else 32) if work == tl.bfloat16 else (32 if small else 16)


class Plan(NamedTuple):
    """How the work on some arguments is laid out."""

    T: int
    chunks: int  # K
    BP: int  # of a program that holds one state
    BN: int
    work: Any
    precision: str

    def constants(self, width: int, states: int, block: int) -> dict[str, Any]:
        """What the kernels with tiles of `block` x BN are compiled for.

        maxnreg: ptxas would else take 32 registers where it sees that 255 are too few, and spill nearly everything.
        """
        return {
            "EVEN_P": width % block == 0, "EVEN_N": states % self.BN == 0, "T": self.T, "BP": block, "BN": self.BN,
            "WORK": self.work, "PRECISION": self.precision,
            **({} if self.work == tl.bfloat16 else {"maxnreg": 248}),
        }  # fmt: skip


def plan_of(given: Arguments) -> Plan:
    """The layout for these arguments."""
    work, precision = precision_of(given.x, given.B, given.C)
    T = chunk_of(given.sizes[3], given.states, work)
    BN = max(16, next_power_of_2(given.states))
    BP = max(16, min(next_power_of_2(given.sizes[3]), (8192 if work == tl.bfloat16 else 4096) // BN, 64))
    return Plan(T, cdiv(given.sizes[1], T), BP, BN, work, precision)


def segments_of(programs: int, chunks: int, processors: int) -> tuple[int, int]:
    """Segments, and chunks of each, so that `programs` for each segment fill a GPU."""
    wanted = 1 if programs >= 2 * processors else cdiv(FILL * processors, programs)
    per = max(2, cdiv(chunks, wanted))
    return cdiv(chunks, per), per


def shares_of(heads: int, programs: int, processors: int) -> tuple[int, int]:
    """Shares of a group's heads, and heads of each, so that `programs` for each share fill a GPU."""
    each = cdiv(heads, min(heads, cdiv(FILL * processors, programs)))
    return cdiv(heads, each), each
