"""The selective scan and its gradient by the Triton kernels, over tensors.

Dimensions: B batch, L length, D channels, N d_state, S segments, I intervals, G groups of channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambax_torch.kernels import scan_adjoint, scan_backward, scan_carry, scan_forward, tuning
from mambax_torch.kernels.devices import on_device_of
from mambax_torch.kernels.fusion import FUSED
from mambax_torch.kernels.sizes import cdiv, next_power_of_2
from mambax_torch.operands import ScanOperands

KERNELS: Any = (scan_forward, scan_carry, scan_adjoint, scan_backward)
FORWARD, CARRY, ADJOINT, BACKWARD = KERNELS  # Any: pyright does not see that constants may be given as numbers

ROWS = 16
"""Segments that a program of the carry kernel reads at once."""

LANES = 32
"""Threads of a program."""

LAUNCH: dict[str, Any] = {"num_warps": 1, **FUSED}
"""Single warps throughout."""

REGISTERS = 168
"""Of a thread of the output kernel: room for twelve programs on a processor. With d_state above 32 a few addresses
that are needed where a state is saved go to memory for that."""


class Arguments(NamedTuple):
    """What a scan is given, ready for the kernels; made by :func:`arguments`."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D)
    A: Tensor  # (D, N) float32
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)
    D: Tensor | None  # (D,) float32
    z: Tensor | None  # (B, L, D)
    delta_bias: Tensor | None  # (D,) float32
    delta_softplus: bool
    initial_state: Tensor | None  # (B, D, N)
    mask: Tensor | None  # (B, L) uint8
    boundaries: Tensor | None  # (B, L) uint8

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, L, D, N."""
        batch, length, channels = self.u.shape
        return batch, length, channels, self.A.shape[1]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not all(self.sizes)


def _rows(x: Tensor) -> Tensor:
    """The tensor with a contiguous last axis; a copy only where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def flags(x: Tensor | None) -> Tensor | None:
    """Truth values as bytes, side by side."""
    return None if x is None else x.to(torch.bool).contiguous().view(torch.uint8)


def arguments(given: ScanOperands) -> Arguments:
    """The arguments of :func:`mambax.scan.selective_scan`, their shapes already checked, ready for the kernels."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, boundaries = given
    u, delta, B, C = map(_rows, (u, delta, B, C))
    return Arguments(
        u, delta, A.float().contiguous(), B, C, None if D is None else D.float().contiguous(),
        None if z is None else _rows(z), None if delta_bias is None else delta_bias.float().contiguous(),
        delta_softplus, initial_state, flags(mask), flags(boundaries),
    )  # fmt: skip


def interval_of(batch: int, length: int, channels: int, states: int) -> int:
    """Steps between the states that are saved for the gradient, a power of two.

    The states take 4 N / interval bytes for each value of u, twice; the sums of the gradients of B and C take more
    the fewer intervals there are. The longer an interval, the more of its states are computed once more.
    """
    values = batch * length * channels
    if states <= 32:
        return 64 if values < 1 << 23 else 128
    return 128 if values < 1 << 26 else 256 if values < 1 << 27 else 512


def saved_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, int, int, int]:
    """The shape (B, I, N, D) of the states that a scan saves."""
    interval = interval_of(batch, length, channels, states)
    return batch, (length + interval - 1) // interval, states, channels


def room(*shape: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that a kernel will write, on the device of a tensor."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Of the batch and of a step, in elements."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _sizes_of_block(block: int, states: int) -> dict[str, Any]:
    padded = next_power_of_2(states)
    return {"EVEN_N": padded == states, "BD": block, "BN": padded, **LAUNCH}


def _side(block: int, channels: int) -> dict[str, Any]:
    """How many channels of a block a thread reads at once, so that it may hold the same ones side by side."""
    each = max(1, block // LANES)
    return {"SIDE": each if channels % each == 0 else 1}


def _carry(
    ends: Tensor, sums: Tensor, A: Tensor, first: Tensor | None, last: Tensor | None, *, backwards: bool
) -> None:
    """States from segment to segment: what each ended in, when it started from zero, becomes what it starts in.

    ends (B, S, N, D), in place; sums (B, S, D); A (N, D); first (B, D, N) or None; last (B, N, D) or None.
    """
    batch, segments, states, channels = ends.shape
    block = min(32, next_power_of_2(channels))
    blocks = cdiv(channels, block)
    strides = (0, 0, 0) if first is None else (first.stride(0), first.stride(2), first.stride(1))
    CARRY.carry_kernel[(batch * states * blocks,)](
        ends, sums, A, first, ends, last, *strides, channels, channels, states, blocks, segments,
        BACKWARDS=backwards, ROWS=ROWS, BD=block, **LAUNCH,
    )  # fmt: skip


def forward(
    given: Arguments, *, save: bool, layout: tuning.Layout | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scan.

    Args:
        given: from :func:`arguments`.
        save: keep the states that :func:`backward` starts from.
        layout: how to lay the work out; chosen by :mod:`mambax_torch.kernels.tuning` when None.

    Returns:
        y (B, L, D) in the dtype of u, the final state (B, D, N) float32, and the saved states or None.
    """
    batch, length, channels, states = given.sizes
    u, first = given.u, given.initial_state
    y = room(batch, length, channels, like=u, dtype=u.dtype)
    final = room(batch, channels, states, like=u)
    saved = room(*saved_shape(*given.sizes), like=u) if save else None
    if given.empty:
        final.zero_() if first is None else final.copy_(first)
        return y, final, saved
    interval = interval_of(*given.sizes)
    layout = layout or tuning.layout_of(u.device, *given.sizes)
    block, segments, steps = tuning.segments_of(layout, *given.sizes, tuning.processors(u.device))
    blocks, shape = cdiv(channels, block), _sizes_of_block(block, states) | _side(block, channels)
    shape["SOFTPLUS"] = given.delta_softplus
    A = given.A.t().contiguous()
    marks = (given.mask, given.boundaries)
    with on_device_of(u):
        if segments > 1:
            starts = room(batch, segments, states, channels, like=u)
            sums = room(batch, segments, channels, like=u)
            FORWARD.advance_kernel[(batch * (segments - 1) * blocks,)](
                u, given.delta, A, given.B, given.delta_bias, *marks, starts, sums,
                *_strides(u), *_strides(given.delta), *_strides(given.B), channels, channels,
                length, channels, states, blocks, segments, steps, **shape,
            )  # fmt: skip
            _carry(starts, sums, A, first, None, backwards=False)
        else:
            starts = None if first is None else first.float().transpose(1, 2).contiguous()
        FORWARD.output_kernel[(batch * segments * blocks,)](
            u, given.delta, A, given.B, given.C, given.D, given.z, given.delta_bias, *marks,
            starts, y, final, saved,
            *_strides(u), *_strides(given.delta), *_strides(given.B), *_strides(given.C), *_strides(given.z),
            channels, channels, length, channels, states, blocks, segments, steps, INTERVAL=interval,
            maxnreg=REGISTERS, **shape,
        )  # fmt: skip
    return y, final, saved


class Gradients(NamedTuple):
    """The gradients of a scan, shaped as its arguments; None where an argument is None."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None


def _none(given: Arguments, dfinal: Tensor) -> Gradients:
    """The gradients where there is nothing to compute."""

    def zeros(x: Any) -> Any:
        return None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)

    return Gradients(
        *map(zeros, (given.u, given.delta, given.A, given.B, given.C, given.D, given.z, given.delta_bias)),
        initial_state=None if given.initial_state is None else dfinal.clone(),
    )


def backward(
    given: Arguments, saved: Tensor, dy: Tensor, dfinal: Tensor, *, layout: tuning.Layout | None = None
) -> Gradients:
    """The gradient of the scan.

    Args:
        given: what :func:`forward` was given.
        saved: the states it saved.
        dy: (B, L, D) gradient of its first result.
        dfinal: (B, D, N) gradient of its second result.
        layout: as in :func:`forward`.

    Returns:
        The gradients, those of u, delta and z in their dtypes, the others in float32; the same bits every time.
    """
    batch, length, channels, states = given.sizes
    if given.empty:
        return _none(given, dfinal)
    u, delta, z, dy = given.u, given.delta, given.z, _rows(dy)
    intervals, interval = saved.shape[1], interval_of(*given.sizes)
    A = given.A.t().contiguous()
    marks = (given.mask, given.boundaries)
    adjoints = room(*saved.shape, like=u)
    sums = room(batch, intervals, channels, like=u)
    initial = None if given.initial_state is None else room(batch, states, channels, like=u)
    du, ddelta = (room(batch, length, channels, like=u, dtype=x.dtype) for x in (u, delta))
    dz = None if z is None else room(batch, length, channels, like=u, dtype=z.dtype)
    layout = layout or tuning.layout_of(u.device, *given.sizes)
    block = tuning.block_of(1024, channels, states)
    blocks = cdiv(channels, block)
    softplus: dict[str, Any] = {"SOFTPLUS": given.delta_softplus}
    with on_device_of(u):
        ADJOINT.adjoint_kernel[(batch * intervals * blocks,)](
            dy, delta, A, given.C, z, given.delta_bias, *marks, adjoints, sums,
            *_strides(dy), *_strides(delta), *_strides(given.C), *_strides(z), channels, channels,
            length, channels, states, blocks, intervals, interval,
            **softplus, **_sizes_of_block(block, states), **_side(block, channels),
        )  # fmt: skip
        _carry(adjoints, sums, A, dfinal, initial, backwards=True)
        block = tuning.block_of(512, channels, states)
        blocks = cdiv(channels, block)
        programs = layout.resident * tuning.processors(u.device)
        groups = tuning.groups_of(batch * intervals, blocks, programs)
        items = batch * intervals * groups
        programs = cdiv(items, cdiv(items, programs))  # each has a working place: no more than take as many rounds
        dB, dC = (room(groups, batch, length, states, like=u) for _ in range(2))
        dskip, dbias = (room(batch, intervals, channels, like=u) for _ in range(2))
        kept = interval // BACKWARD.WINDOW.value + BACKWARD.WINDOW.value // BACKWARD.TILE.value
        scratch = room(programs, kept, block, next_power_of_2(states), like=u)
        BACKWARD.gradient_kernel[(programs,)](
            dy, u, delta, given.A, given.B, given.C, given.D, z, given.delta_bias, *marks, saved, adjoints, scratch,
            du, ddelta, dz, dB, dC, dskip, dbias,
            *_strides(dy), *_strides(u), *_strides(delta), *_strides(given.B), *_strides(given.C), *_strides(z),
            length, channels, states, blocks, groups, intervals, batch, programs,
            INTERVAL=interval, EVEN_T=length % BACKWARD.TILE.value == 0, ONCE=groups == blocks,
            **softplus, **_sizes_of_block(block, states),
        )  # fmt: skip
    return Gradients(
        u=du, delta=ddelta, A=adjoints.sum((0, 1)).t().contiguous(), B=dB.sum(0), C=dC.sum(0),
        D=None if given.D is None else dskip.sum((0, 1)), z=dz,
        delta_bias=None if given.delta_bias is None else dbias.sum((0, 1)),
        initial_state=None if initial is None else initial.transpose(1, 2).contiguous(),
    )  # fmt: skip
