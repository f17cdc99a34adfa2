"""The fused selective scan and its gradient over NumPy arrays.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mambax_cpu.buffers import narrow_room, room
from mambax_cpu.compilation import KernelFile
from mambax_cpu.operands import check_shape, flags, kernel_of, kernel_ready, narrow_ready, refuse_float64, table
from mambax_cpu.threads import default_threads, run
from mambax_cpu.tiles import SCAN_GROUP, SCAN_TILE, WIDTH, scan_backward_scratch, scan_scratch

_forward, _backward = KernelFile("mambax_cpu.scan_forward"), KernelFile("mambax_cpu.scan_backward")

_SMALL = 1 << 18
"""Updates of a state (B L D N) below which waking another thread costs more than it saves."""


class Arguments(NamedTuple):
    """What a scan is given, ready for the kernels; made by :func:`arguments`."""

    u: np.ndarray  # (B, L, D), float32 or narrower
    delta: np.ndarray  # (B, L, D), float32 as what follows
    A: np.ndarray  # (D, N)
    B: np.ndarray  # (B, L, N)
    C: np.ndarray  # (B, L, N)
    D: np.ndarray | None  # (D,)
    z: np.ndarray | None  # (B, L, D), of the dtype of u
    delta_bias: np.ndarray | None  # (D,)
    delta_softplus: bool
    initial_state: np.ndarray | None  # (B, D, N)
    flags: np.ndarray | None  # (B, L) uint8, of mask or boundaries

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, L, D, N."""
        batch, length, channels = self.u.shape
        return batch, length, channels, self.A.shape[1]

    def rows(self, saved: np.ndarray | None) -> list[np.ndarray | None]:
        """The operands that both kernels share, in the order of their tables."""
        first = [self.u, self.delta, self.z, self.B, self.C, self.flags, self.A, self.D]
        return [*first, self.delta_bias, self.initial_state, saved]


class Gradients(NamedTuple):
    """The gradients of a scan, float32, shaped as its arguments; None where an argument is None."""

    u: np.ndarray
    delta: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray | None
    z: np.ndarray | None
    delta_bias: np.ndarray | None
    initial_state: np.ndarray | None


def arguments(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    *,
    z: np.ndarray | None = None,
    delta_bias: np.ndarray | None = None,
    delta_softplus: bool = False,
    initial_state: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    boundaries: np.ndarray | None = None,
) -> Arguments:
    """The arguments of :func:`mambax.scan.selective_scan`, checked and ready for the kernels.

    Raises:
        ValueError: for a shape that does not fit, a mask together with boundaries, and float64, which the kernels
            would round.
    """
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"selective_scan: u must be (B, L, D) and A (D, N), found {u.shape} and {A.shape}")
    batch, length, channels = u.shape
    states = A.shape[1]
    expected = {
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, length, states)),
        "C": (C, (batch, length, states)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
        "mask": (mask, (batch, length)),
        "boundaries": (boundaries, (batch, length)),
    }
    for name, (array, shape) in expected.items():
        check_shape("selective_scan", name, array, shape)
    refuse_float64("selective_scan", u)
    if mask is not None:  # the kernels read B and C at every step, and zero times what stands there must be zero
        mask = np.asarray(mask, np.bool_)
        B, C = (np.where(mask[..., None], array, array.dtype.type(0)) for array in (B, C))
    narrow: Any = narrow_ready(u, z)
    return Arguments(
        u=narrow[0],
        delta=kernel_ready(delta),
        A=kernel_ready(A),
        B=kernel_ready(B),
        C=kernel_ready(C),
        D=kernel_ready(D),
        z=narrow[1],
        delta_bias=kernel_ready(delta_bias),
        delta_softplus=delta_softplus,
        initial_state=kernel_ready(initial_state),
        flags=kernel_ready(flags("selective_scan", mask, boundaries)),
    )


def saved_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """The shape of the states that a scan saves: one per block of channels and tile."""
    return batch, -(-channels // WIDTH), -(-length // SCAN_TILE), states, WIDTH


def forward(
    given: Arguments, *, save: bool = False, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The scan.

    Args:
        given: from :func:`arguments`.
        save: keep the states that :func:`backward` starts from.
        threads: how many may work; as many as :func:`mambax_cpu.threads.default_threads` says when None.

    Returns:
        y (B, L, D) in the dtype of ``given.u``, the final state (B, D, N) float32, and the saved states or None.
    """
    batch, length, channels, states = given.sizes
    blocks = -(-channels // WIDTH)
    saved = room(*saved_shape(*given.sizes)) if save else None
    y = narrow_room(given.u.dtype, batch, length, channels)
    final = room(batch, channels, states)
    views = table([*given.rows(saved), y, final])
    kernel = kernel_of(_forward, "forward", given.u.dtype)

    def work(first: int, last: int) -> None:
        scratch = room(scan_scratch(states))
        kernel(views, length, channels, states, given.delta_softplus, first, last, scratch)

    run(work, batch * blocks, _threads(given, threads))
    return y, final, saved


def backward(
    given: Arguments,
    saved: np.ndarray | None,
    dy: np.ndarray,
    dfinal: np.ndarray | None = None,
    *,
    dz: np.ndarray | None = None,
    threads: int | None = None,
) -> Gradients:
    """The gradient of the scan.

    Args:
        given: what :func:`forward` was given.
        saved: the states it saved; float32, contiguous.
        dy: (B, L, D) gradient of its first result.
        dfinal: (B, D, N) gradient of its second result; zero when None.
        dz: (B, L, D) float32, last axis contiguous, where the gradient of z goes; a new array when None.
        threads: as in :func:`forward`.

    Returns:
        The gradients, the same bits whatever the number of threads.

    Raises:
        ValueError: for a shape that does not fit, and when no states were saved.
    """
    batch, length, channels, states = given.sizes
    groups = -(-channels // (WIDTH * SCAN_GROUP))
    if saved is None:
        raise ValueError("selective_scan: the backward pass needs the saved states; call forward with save=True")
    check_shape("selective_scan", "saved", saved, saved_shape(*given.sizes))
    check_shape("selective_scan", "the gradient of y", dy, (batch, length, channels))
    check_shape("selective_scan", "the gradient of the final state", dfinal, (batch, channels, states))
    given = given._replace(u=kernel_ready(given.u), z=kernel_ready(given.z))
    dy, dfinal = kernel_ready(dy), kernel_ready(dfinal)
    du, ddelta = (room(batch, length, channels) for _ in range(2))
    if given.z is None:
        dz = None
    elif dz is None:
        dz = room(batch, length, channels)
    db, dc = (room(groups, batch * length, states) for _ in range(2))
    da, dinitial = (room(batch, channels, states) for _ in range(2))
    dskip, dbias = (room(batch, channels) for _ in range(2))
    views = table([*given.rows(saved), None, None, dy, dfinal, du, ddelta, dz, db, dc, da, dskip, dbias, dinitial])

    def work(first: int, last: int) -> None:
        scratch = room(scan_backward_scratch(states))
        _backward.backward(views, length, channels, states, given.delta_softplus, first, last, scratch)

    run(work, batch * groups, _threads(given, threads))
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is infinite is for the caller to notice
        return Gradients(
            u=du,
            delta=ddelta,
            A=da.sum(0),
            B=db.sum(0).reshape(batch, length, states),
            C=dc.sum(0).reshape(batch, length, states),
            D=None if given.D is None else dskip.sum(0),
            z=dz,
            delta_bias=None if given.delta_bias is None else dbias.sum(0),
            initial_state=None if given.initial_state is None else dinitial,
        )


def selective_scan(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray | None = None,
    *,
    z: np.ndarray | None = None,
    delta_bias: np.ndarray | None = None,
    delta_softplus: bool = False,
    initial_state: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    boundaries: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`mambax.scan.selective_scan` in one pass over NumPy arrays of float32 or narrower.

    Raises:
        ValueError: for a shape that does not fit, a mask together with boundaries, and float64.
    """
    given = arguments(
        u, delta, A, B, C, D,
        z=z, delta_bias=delta_bias, delta_softplus=delta_softplus, initial_state=initial_state, mask=mask,
        boundaries=boundaries,
    )  # fmt: skip
    y, final, _ = forward(given)
    return y.astype(u.dtype, copy=False), final


def _threads(given: Arguments, threads: int | None) -> int:
    batch, length, channels, states = given.sizes
    if batch * length * channels * states < _SMALL:
        return 1
    return default_threads() if threads is None else threads
