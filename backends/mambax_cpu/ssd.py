"""The fused scan of Mamba-2 and its gradient over NumPy arrays.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mambax_cpu.buffers import narrow_room, room
from mambax_cpu.compilation import KernelFile
from mambax_cpu.operands import check_shape, flags, kernel_of, kernel_ready, narrow_ready, refuse_float64, table
from mambax_cpu.ssd_tiles import (
    CHUNK,
    shared_heads,
    ssd_backward_scratch,
    ssd_scratch,
    ssd_step_scratch,
    whole,
)
from mambax_cpu.threads import default_threads, run

_forward, _backward = KernelFile("mambax_cpu.ssd_forward"), KernelFile("mambax_cpu.ssd_backward")
_step = KernelFile("mambax_cpu.ssd_step")

_SMALL = 1 << 18
"""Updates of a state (B L H P N) below which waking another thread costs more than it saves."""


class Sizes(NamedTuple):
    """B, L, H, P, G and N."""

    batch: int
    length: int
    heads: int
    width: int
    groups: int
    states: int

    @property
    def shared(self) -> int:
        """Heads of a task."""
        return shared_heads(self.heads, self.groups)

    @property
    def parts(self) -> int:
        """Tasks for each group and row."""
        return -(-(self.heads // self.groups) // self.shared)


class Arguments(NamedTuple):
    """What a scan is given, ready for the kernels; made by :func:`arguments`."""

    sizes: Sizes
    x: np.ndarray  # (B, L, H P), float32 or narrower
    dt: np.ndarray  # (B, L, H), float32 as what follows
    A: np.ndarray  # (H,)
    B: np.ndarray  # (B, L, G N)
    C: np.ndarray  # (B, L, G N)
    D: np.ndarray | None  # (H,)
    dt_bias: np.ndarray | None  # (H,)
    dt_softplus: bool
    dt_limit: tuple[float, float]
    initial_state: np.ndarray | None  # (B, H, P N)
    flags: np.ndarray | None  # (B, L) uint8, of mask or boundaries

    def rows(self, saved: np.ndarray | None) -> list[np.ndarray | None]:
        """The operands that the kernels share, in the order of their tables."""
        first = [self.x, self.dt, self.B, self.C, self.flags, self.A, self.D, self.dt_bias]
        return [*first, self.initial_state, saved]


class Gradients(NamedTuple):
    """The gradients of a scan, float32, shaped as its arguments; None where an argument is None."""

    x: np.ndarray
    dt: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray | None
    dt_bias: np.ndarray | None
    initial_state: np.ndarray | None


def arguments(
    x: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    *,
    dt_bias: np.ndarray | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    boundaries: np.ndarray | None = None,
) -> Arguments:
    """The arguments of :func:`mambax.ssd.ssd`, checked and ready for the kernels.

    Raises:
        ValueError: for a shape that does not fit, a mask together with boundaries, and float64, which the kernels
            would round.
    """
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(f"ssd: x must be (B, L, H, P) and B (B, L, G, N), found {x.shape} and {B.shape}")
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"ssd: {heads} heads cannot be shared by {groups} groups; expected a divisor of the heads")
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, states)),
        "C": (C, (batch, length, groups, states)),
        "D": (D, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
        "initial_state": (initial_state, (batch, heads, width, states)),
        "mask": (mask, (batch, length)),
        "boundaries": (boundaries, (batch, length)),
    }
    for name, (array, shape) in expected.items():
        check_shape("ssd", name, array, shape)
    refuse_float64("ssd", x)
    if initial_state is not None:
        initial_state = kernel_ready(initial_state).reshape(batch, heads, width * states)
    low, high = (float(np.float32(limit)) for limit in dt_limit)  # which time steps are compared with
    narrow: Any = narrow_ready(x.reshape(batch, length, heads * width))
    return Arguments(
        sizes=Sizes(batch, length, heads, width, groups, states),
        x=narrow[0],
        dt=kernel_ready(dt),
        A=kernel_ready(A),
        B=kernel_ready(B.reshape(batch, length, groups * states)),
        C=kernel_ready(C.reshape(batch, length, groups * states)),
        D=kernel_ready(D),
        dt_bias=kernel_ready(dt_bias),
        dt_softplus=dt_softplus,
        dt_limit=(low if low > 0 else -float("inf"), high),
        initial_state=kernel_ready(initial_state),
        flags=kernel_ready(flags("ssd", mask, boundaries)),
    )


def saved_shape(batch: int, length: int, heads: int, width: int, states: int) -> tuple[int, ...]:
    """The shape of the states that a scan saves: one per head and chunk."""
    return batch * heads, -(-length // CHUNK), whole(states) * whole(width)


def forward(
    given: Arguments, *, save: bool = False, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The scan.

    Args:
        given: from :func:`arguments`.
        save: keep the states that :func:`backward` starts from.
        threads: how many may work; as many as :func:`mambax_cpu.threads.default_threads` says when None.

    Returns:
        y (B, L, H, P) in the dtype of ``given.x``, the final state (B, H, P, N) float32, and the saved states or
        None.
    """
    batch, length, heads, width, groups, states = sizes = given.sizes
    y = narrow_room(given.x.dtype, batch, length, heads * width)
    final = room(batch, heads, width * states)
    saved = room(*saved_shape(batch, length, heads, width, states)) if save else None
    views = table([*given.rows(saved), y, final])
    settings = given.dt_softplus, *given.dt_limit
    if length == 1 and not save:
        kernel = kernel_of(_step, "step", given.x.dtype)

        def work(first: int, last: int) -> None:
            kernel(views, heads, width, groups, states, *settings, first, last, room(ssd_step_scratch()))

        run(work, batch * heads, _threads(given, threads))
    else:
        kernel = kernel_of(_forward, "forward", given.x.dtype)
        scratch = ssd_scratch(width, states, sizes.shared)

        def work(first: int, last: int) -> None:
            kernel(views, length, heads, width, groups, states, sizes.shared, *settings, first, last, room(scratch))

        run(work, batch * groups * sizes.parts, _threads(given, threads))
    return y.reshape(batch, length, heads, width), final.reshape(batch, heads, width, states), saved


def backward(
    given: Arguments,
    saved: np.ndarray | None,
    dy: np.ndarray,
    dfinal: np.ndarray | None = None,
    *,
    threads: int | None = None,
) -> Gradients:
    """The gradient of the scan.

    Args:
        given: what :func:`forward` was given.
        saved: the states it saved; float32, contiguous.
        dy: (B, L, H, P) gradient of its first result.
        dfinal: (B, H, P, N) gradient of its second result; zero when None.
        threads: as in :func:`forward`.

    Returns:
        The gradients, the same bits whatever the number of threads. A time step at one of its limits has none.

    Raises:
        ValueError: for a shape that does not fit, and when no states were saved.
    """
    batch, length, heads, width, groups, states = sizes = given.sizes
    if saved is None:
        raise ValueError("ssd: the backward pass needs the saved states; call forward with save=True")
    check_shape("ssd", "saved", saved, saved_shape(batch, length, heads, width, states))
    check_shape("ssd", "the gradient of y", dy, (batch, length, heads, width))
    check_shape("ssd", "the gradient of the final state", dfinal, (batch, heads, width, states))
    given = given._replace(x=kernel_ready(given.x))
    dy = kernel_ready(dy.reshape(batch, length, heads * width))
    if dfinal is not None:
        dfinal = kernel_ready(dfinal).reshape(batch, heads, width * states)
    dx, ddt = room(batch, length, heads * width), room(batch, length, heads)
    db, dc = (room(sizes.parts, batch * length, groups * states) for _ in range(2))
    da, dskip, dbias = (room(batch, heads) for _ in range(3))
    dinitial = room(batch, heads, width * states)
    views = table([*given.rows(saved), None, None, dy, dfinal, dx, ddt, db, dc, da, dskip, dbias, dinitial])
    scratch = ssd_backward_scratch(width, states, sizes.shared)

    def work(first: int, last: int) -> None:
        _backward.backward(
            views, length, heads, width, groups, states, sizes.shared, given.dt_softplus, *given.dt_limit,
            first, last, room(scratch),
        )  # fmt: skip

    run(work, batch * groups * sizes.parts, _threads(given, threads))
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is infinite is for the caller to notice
        return Gradients(
            x=dx.reshape(batch, length, heads, width),
            dt=ddt,
            A=da.sum(0),
            B=db.sum(0).reshape(batch, length, groups, states),
            C=dc.sum(0).reshape(batch, length, groups, states),
            D=None if given.D is None else dskip.sum(0),
            dt_bias=None if given.dt_bias is None else dbias.sum(0),
            initial_state=None if given.initial_state is None else dinitial.reshape(batch, heads, width, states),
        )


def ssd(
    x: np.ndarray,
    dt: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`mambax.ssd.ssd` in one pass over NumPy arrays of float32 or narrower.

    Raises:
        ValueError: for a shape that does not fit, a mask together with boundaries, and float64.
    """
    y, final, _ = forward(arguments(x, dt, A, B, C, D, **options))
    return y.astype(x.dtype, copy=False), final


def _threads(given: Arguments, threads: int | None) -> int:
    batch, length, heads, width, _, states = given.sizes
    if batch * length * heads * width * states < _SMALL:
        return 1
    return default_threads() if threads is None else threads
