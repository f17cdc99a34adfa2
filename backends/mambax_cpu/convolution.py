"""The fused causal convolution and its gradient over NumPy arrays.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mambax_cpu.buffers import narrow_room, room
from mambax_cpu.compilation import KernelFile
from mambax_cpu.operands import check_shape, flags, kernel_of, kernel_ready, narrow_ready, refuse_float64, table
from mambax_cpu.threads import default_threads, run
from mambax_cpu.tiles import WIDTH, conv_backward_scratch, conv_scratch

_kernels = KernelFile("mambax_cpu.conv_kernels")

_SMALL = 1 << 18
"""Products (B L D K) below which waking another thread costs more than it saves."""


class Arguments(NamedTuple):
    """What a convolution is given, ready for the kernels; made by :func:`arguments`."""

    x: np.ndarray  # (B, L, D), float32 or narrower
    weight: np.ndarray  # (D, K) float32
    bias: np.ndarray | None  # (D,) float32
    initial_state: np.ndarray | None  # (B, K-1, D), of the dtype of x
    silu: bool
    flags: np.ndarray | None  # (B, L) uint8, of mask or boundaries

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, L, D, K."""
        batch, length, channels = self.x.shape
        return batch, length, channels, self.weight.shape[1]

    def rows(self) -> list[np.ndarray | None]:
        """The operands that both kernels share, in the order of their tables."""
        return [self.x, self.weight, self.bias, self.initial_state, self.flags]


class Gradients(NamedTuple):
    """The gradients of a convolution, float32, shaped as its arguments; None where an argument is None."""

    x: np.ndarray
    weight: np.ndarray  # (D, 1, K)
    bias: np.ndarray | None
    initial_state: np.ndarray | None


def arguments(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    initial_state: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    boundaries: np.ndarray | None = None,
    activation: str | None = "silu",
) -> Arguments:
    """The arguments of :func:`mambax.convolution.causal_conv1d`, checked and ready.

    Raises:
        ValueError: for a shape that does not fit, another activation, a mask together with boundaries, and float64,
            which the kernels would round.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is {activation!r}; expected 'silu' or None")
    if x.ndim != 3 or weight.ndim != 3:
        raise ValueError(
            f"causal_conv1d: x must be (B, L, D) and weight (D, 1, K), found {x.shape}, {weight.shape}"
        )
    batch, length, channels = x.shape
    width = weight.shape[2]
    check_shape("causal_conv1d", "weight", weight, (channels, 1, width))
    check_shape("causal_conv1d", "bias", bias, (channels,))
    check_shape("causal_conv1d", "initial_state", initial_state, (batch, width - 1, channels))
    check_shape("causal_conv1d", "mask", mask, (batch, length))
    check_shape("causal_conv1d", "boundaries", boundaries, (batch, length))
    refuse_float64("causal_conv1d", x)
    narrow: Any = narrow_ready(x, initial_state)
    return Arguments(
        x=narrow[0],
        weight=kernel_ready(weight[:, 0]),
        bias=kernel_ready(bias),
        initial_state=narrow[1],
        silu=activation == "silu",
        flags=kernel_ready(flags("causal_conv1d", mask, boundaries)),
    )


def forward(given: Arguments, *, threads: int | None = None) -> np.ndarray:
    """y (B, L, D) in the dtype of ``given.x``.

    Args:
        given: from :func:`arguments`.
        threads: how many may work; as many as :func:`mambax_cpu.threads.default_threads` says when None.
    """
    batch, length, channels, width = given.sizes
    y = narrow_room(given.x.dtype, batch, length, channels)
    views = table([*given.rows(), y])
    kernel = kernel_of(_kernels, "forward", given.x.dtype)

    def work(first: int, last: int) -> None:
        scratch = room(conv_scratch(channels, width))
        kernel(views, length, channels, width, given.silu, first, last, scratch)

    run(work, batch * length, _threads(given, threads))
    return y


def backward(
    given: Arguments, dy: np.ndarray, *, dx: np.ndarray | None = None, threads: int | None = None
) -> Gradients:
    """The gradient of :func:`forward`, the same bits whatever the number of threads.

    Args:
        given: what :func:`forward` was given.
        dy: (B, L, D) gradient of its result.
        dx: (B, L, D) float32, last axis contiguous, where the gradient of x goes; a new array when None.
        threads: as in :func:`forward`.
    """
    batch, length, channels, width = given.sizes
    check_shape("causal_conv1d", "the gradient of y", dy, (batch, length, channels))
    given = given._replace(x=kernel_ready(given.x), initial_state=kernel_ready(given.initial_state))
    dy = kernel_ready(dy)
    dx = room(batch, length, channels) if dx is None else dx
    dweight = room(batch, channels, width)
    dbias = room(batch, channels)
    dinitial = None if given.initial_state is None else room(batch, width - 1, channels)
    views = table([*given.rows(), None, dy, dx, dweight, dbias, dinitial])

    def work(first: int, last: int) -> None:
        scratch = room(conv_backward_scratch(width))
        _kernels.backward(views, length, channels, width, given.silu, first, last, scratch)

    run(work, batch * -(-channels // WIDTH), _threads(given, threads))
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is infinite is for the caller to notice
        return Gradients(dx, dweight.sum(0)[:, None], None if given.bias is None else dbias.sum(0), dinitial)


def last_inputs(
    x: np.ndarray,
    initial_state: np.ndarray | None,
    count: int,
    mask: np.ndarray | None = None,
    boundaries: np.ndarray | None = None,
) -> np.ndarray:
    """The last `count` (K-1) inputs that exist, (B, count, D): the state after x, in the dtype of x."""
    batch, length, channels = x.shape
    if mask is None and length >= count:
        last = x[:, length - count :].copy()
    else:
        if initial_state is None:
            initial_state = np.zeros((batch, count, channels), x.dtype)
        before = initial_state.astype(x.dtype, copy=False)
        if mask is None:
            last = np.concatenate([before[:, length:], x], axis=1)
        else:
            real = [np.flatnonzero(row)[max(0, row.sum() - count) :] for row in np.asarray(mask, np.bool_)]
            rows = [np.concatenate([before[b, len(i) :], x[b, i]]) for b, i in enumerate(real)]
            last = np.stack(rows) if rows else np.empty((0, count, channels), x.dtype)
    if boundaries is not None and length:
        back = np.asarray(boundaries, np.bool_)[:, ::-1]
        kept = np.where(back.any(1), back.argmax(1) + 1, length + count)  # inputs since the last beginning
        last[np.arange(count)[::-1] >= kept[:, None]] = 0
    return last


def causal_conv1d(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    initial_state: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    boundaries: np.ndarray | None = None,
    activation: str | None = "silu",
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`mambax.convolution.causal_conv1d` over NumPy arrays of float32 or narrower.

    Raises:
        ValueError: for a shape that does not fit, another activation, a mask together with boundaries, and float64.
    """
    given = arguments(
        x, weight, bias, initial_state=initial_state, mask=mask, boundaries=boundaries, activation=activation
    )
    final = last_inputs(x, initial_state, weight.shape[2] - 1, mask, boundaries)
    return forward(given).astype(x.dtype, copy=False), final


def _threads(given: Arguments, threads: int | None) -> int:
    batch, length, channels, width = given.sizes
    if batch * length * channels * width < _SMALL:
        return 1
    return default_threads() if threads is None else threads
