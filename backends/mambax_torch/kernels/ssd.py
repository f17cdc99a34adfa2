"""Mamba-2's scan and its gradient by the Triton kernels, over tensors.

Dimensions: B batch, L length, H heads, P head_dim, G groups, R heads of a group, N d_state, K chunks of T steps, S
segments of whole chunks, I saved intervals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mambax_torch.kernels import ssd_backward, ssd_forward, ssd_plan, ssd_states, ssd_steps
from mambax_torch.kernels.devices import on_device_of
from mambax_torch.kernels.fusion import FUSED
from mambax_torch.kernels.scan import room
from mambax_torch.kernels.sizes import cdiv, next_power_of_2
from mambax_torch.kernels.ssd_plan import Arguments, Plan
from mambax_torch.kernels.tuning import processors

KERNELS: Any = (ssd_steps, ssd_states, ssd_forward, ssd_backward)
STEPS, STATES, FORWARD, BACKWARD = KERNELS  # Any: pyright does not see that constants may be given as numbers

INTERVAL = 512
"""Steps between the states that are saved for the gradient: with N = 128 they take half as much as a bfloat16 x."""

SWEPT: dict[str, Any] = {"num_warps": 8, "num_stages": 2, **FUSED}
APART: dict[str, Any] = {"num_warps": 8, "num_stages": 1, **FUSED}
"""Kernels that go through chunks, whose next tiles are fetched meanwhile; and those that go through heads, where
registers are scarcer than time to wait."""

CARRY: dict[str, Any] = {"ROWS": 8, "BC": 256, "num_warps": 2, **FUSED}


def _strides(x: Tensor) -> tuple[int, int]:
    """Of the batch and of a step, in elements."""
    return x.stride(0), x.stride(1)


def saved_shape(batch: int, length: int, heads: int, width: int, states: int) -> tuple[int, ...]:
    """The shape (B, I, H, P, N) of the states that a scan saves."""
    return batch, (length + INTERVAL - 1) // INTERVAL, heads, width, states


class _Steps(NamedTuple):
    """What :func:`ssd_steps.steps_kernel` makes, (B, H, K T) each."""

    steps: Tensor
    high: Tensor
    low: Tensor
    slopes: Tensor | None


def _steps(given: Arguments, plan: Plan, *, slopes: bool) -> _Steps:
    batch, length, heads, _ = given.sizes
    shape = (batch, heads, plan.chunks * plan.T)
    step, upper, lower = (room(*shape, like=given.x) for _ in range(3))
    slope = room(*shape, like=given.x) if slopes else None
    low, high = given.dt_limit
    block = min(16, next_power_of_2(heads))
    blocks = cdiv(heads, block)
    STEPS.steps_kernel[(batch * plan.chunks * blocks,)](
        given.dt, given.A, given.dt_bias, given.mask, step, upper, lower, slope,
        *_strides(given.dt), length, heads, blocks, plan.chunks, low if low > 0 else -float("inf"), float(high),
        SOFTPLUS=given.dt_softplus, LIMITED=low > 0 or high < float("inf"), T=plan.T, BH=block,
        num_warps=4, **FUSED,
    )  # fmt: skip
    return _Steps(step, upper, lower, slope)


def _sweep(
    given: Arguments,
    plan: Plan,
    found: _Steps,
    values: Tensor,
    segments: int,
    per: int,
    *,
    starts: Tensor | None,
    ends: Tensor | None = None,
    decays: Tensor | None = None,
    kept: Tensor | None = None,
    backwards: bool = False,
) -> None:
    """States through segments of `per` chunks; values are x, or dy when backwards."""
    batch, length, heads, width = given.sizes
    vectors = given.C if backwards else given.B
    blocks = cdiv(width, plan.BP)
    STATES.sweep_kernel[(batch * segments * heads * blocks,)](
        values, vectors, *found[:3], given.mask, given.numbers, starts, ends, decays, kept,
        *_strides(values), *_strides(vectors), length, heads, width, given.states, heads // vectors.shape[2],
        blocks, segments, plan.chunks, per, BACKWARDS=backwards,
        **plan.constants(width, given.states, plan.BP), **SWEPT,
    )  # fmt: skip


def _carried(
    given: Arguments, plan: Plan, found: _Steps, values: Tensor, segments: int, per: int, first: Tensor | None,
    last: Tensor | None, *, backwards: bool,
) -> Tensor | None:  # fmt: skip
    """What each segment starts in, (B, S, H, P, N); first is what the sequence starts in, last gets its end."""
    batch, _, heads, width = given.sizes
    if segments == 1 and last is None:
        return first
    ends = room(batch, segments, heads, width, given.states, like=values)
    decays = room(batch, segments, heads, like=values)
    _sweep(given, plan, found, values, segments, per, starts=None, ends=ends, decays=decays, backwards=backwards)
    cells = width * given.states
    blocks = cdiv(cells, CARRY["BC"])
    STATES.carry_kernel[(batch * heads * blocks,)](
        ends, decays, first, ends, last, heads, cells, blocks, segments, BACKWARDS=backwards, **CARRY
    )
    return ends


def forward(given: Arguments, *, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scan.

    Args:
        given: from :func:`mambax_torch.kernels.ssd_plan.arguments`.
        save: keep the states that :func:`backward` starts from.

    Returns:
        y (B, L, H, P) in the dtype of x, the final state (B, H, P, N) float32, and the saved states or None.
    """
    batch, length, heads, width = given.sizes
    x, states = given.x, given.states
    y = room(batch, length, heads, width, like=x, dtype=x.dtype)
    final = room(batch, heads, width, states, like=x)
    saved = room(*saved_shape(*given.sizes, given.states), like=x) if save else None
    if given.empty:
        final.zero_() if given.initial_state is None else final.copy_(given.initial_state)
        return _skipped(given, y), final, saved
    plan = ssd_plan.plan_of(given)
    blocks = cdiv(width, plan.BP)
    segments, per = ssd_plan.segments_of(batch * heads * blocks, plan.chunks, processors(x.device))
    with on_device_of(x):
        found = _steps(given, plan, slopes=False)
        starts = _carried(given, plan, found, x, segments, per, given.initial_state, None, backwards=False)
        FORWARD.output_kernel[(batch * segments * heads * blocks,)](
            x, given.B, given.C, given.D, *found[:3], given.mask, given.numbers, starts, y, final, saved,
            *_strides(x), *_strides(given.B), *_strides(given.C), length, heads, width, states,
            heads // given.B.shape[2], blocks, segments, plan.chunks, per, cdiv(length, INTERVAL),
            max(1, INTERVAL // plan.T), **plan.constants(width, states, plan.BP), **SWEPT,
        )  # fmt: skip
    return y, final, saved


def _skipped(given: Arguments, y: Tensor) -> Tensor:
    """y where no state reaches it."""
    if given.D is None:
        return y.zero_()
    return y.copy_(given.x * given.D[:, None])


class Gradients(NamedTuple):
    """The gradients of a scan, shaped as its arguments; None where an argument is None."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None


def _none(given: Arguments, dy: Tensor, dfinal: Tensor) -> Gradients:
    """The gradients where no state reaches y."""

    def zeros(x: Any) -> Any:
        return None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)

    dx, dskip = zeros(given.x), None
    if given.D is not None:
        dx = (dy.float() * given.D[:, None]).to(dy.dtype)
        dskip = (dy.float() * given.x.float()).sum((0, 1, 3))
    return Gradients(
        x=dx, dt=zeros(given.dt), A=zeros(given.A), B=zeros(given.B), C=zeros(given.C), D=dskip,
        dt_bias=zeros(given.dt_bias), initial_state=None if given.initial_state is None else dfinal.clone(),
    )  # fmt: skip


def backward(given: Arguments, saved: Tensor, dy: Tensor, dfinal: Tensor) -> Gradients:
    """The gradient of the scan.

    Args:
        given: what :func:`forward` was given.
        saved: the states it saved.
        dy: (B, L, H, P) gradient of its first result.
        dfinal: (B, H, P, N) gradient of its second result.

    Returns:
        The gradients, those of x and dt in their dtypes, the others in float32; the same bits every time.
    """
    if given.empty:
        return _none(given, dy, dfinal)
    batch, length, heads, width = given.sizes
    x, states, groups = given.x, given.states, given.B.shape[2]
    plan, dy, dfinal = ssd_plan.plan_of(given), ssd_plan.inner(dy), dfinal.float().contiguous()
    initial = None if given.initial_state is None else room(batch, heads, width, states, like=x)
    kept = torch.bfloat16 if plan.work == tl.bfloat16 else torch.float32  # as the products take them
    befores, afters = (room(batch, plan.chunks, heads, width, states, like=x, dtype=kept) for _ in range(2))
    programs = processors(x.device)
    segments, per = ssd_plan.segments_of(batch * heads * cdiv(width, plan.BP), plan.chunks, programs)
    shares, each = ssd_plan.shares_of(heads // groups, batch * plan.chunks * groups, programs)
    dx, ddt = (room(*like.shape, like=x, dtype=like.dtype) for like in (x, given.dt))
    dB, dC = (room(shares, batch, length, groups, states, like=x) for _ in range(2))
    dA, dskip, dbias = (room(batch, plan.chunks, heads, like=x) for _ in range(3))
    with on_device_of(x):
        found = _steps(given, plan, slopes=True)
        _sweep(given, plan, found, x, saved.shape[1], max(1, INTERVAL // plan.T), starts=saved, kept=befores)
        ends = _carried(given, plan, found, dy, segments, per, dfinal, initial, backwards=True)
        _sweep(given, plan, found, dy, segments, per, starts=ends, kept=afters, backwards=True)
        block = max(16, next_power_of_2(width))
        common = (*_strides(dy), *_strides(x), *_strides(given.B), *_strides(given.C), length, heads, width, states)
        BACKWARD.inputs_kernel[(batch * plan.chunks * groups * shares,)](
            dy, x, given.B, given.C, given.A, given.D, *found, given.mask, given.numbers, befores, afters,
            dx, ddt, dA, dskip, dbias, *common, heads // groups, shares, each, plan.chunks,
            **plan.constants(width, states, block), **APART,
        )  # fmt: skip
        part = plan._replace(BN=min(plan.BN, 128))
        blocks = cdiv(states, part.BN)
        BACKWARD.vectors_kernel[(batch * plan.chunks * groups * shares * blocks,)](
            dy, x, given.B, given.C, *found[:3], given.mask, given.numbers, befores, afters, dB, dC,
            *common, heads // groups, blocks, shares, each, plan.chunks, batch,
            **part.constants(width, states, block), **APART,
        )  # fmt: skip
    return Gradients(
        x=dx, dt=ddt, A=dA.sum((0, 1)), B=dB.sum(0), C=dC.sum(0),
        D=None if given.D is None else dskip.sum((0, 1)),
        dt_bias=None if given.dt_bias is None else dbias.sum((0, 1)), initial_state=initial,
    )  # fmt: skip
