"""What the ops reach on this machine's MLX device, in the units of :mod:`mambax_mlx.kernels.estimate`.

Whatever runs the op there is timed: on the CPU that is none of the kernels of a GPU.

Dimensions: B batch, L length, D channels, N d_state, H heads, P head_dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mambax_mlx.duality import ssd
from mambax_mlx.fused import causal_conv1d, selective_scan
from mambax_mlx.kernels.estimate import CHANNELS, DUAL_STATES, HEADS, STATES, WIDTH

LENGTH, ROWS = 512, 8
"""Tokens of a row, and rows that are enough for the kernels to go through whole rows."""


class Work(NamedTuple):
    """An op with its arguments, and whether its gradients are wanted in place of its results."""

    op: Callable[..., Any]
    arguments: tuple[mx.array, ...]
    backward: bool = False

    def run(self) -> None:
        """Compute it."""
        if not self.backward:
            mx.eval(self.op(*self.arguments))
            return
        y, final = self.op(*self.arguments)
        cotangents = [mx.ones_like(y), mx.zeros_like(final)]
        mx.eval(mx.vjp(lambda *given: list(self.op(*given)), list(self.arguments), cotangents)[1])


def rates(seconds: float = 0.3) -> dict[str, float]:
    """Tokens times channels per second of each kernel of the estimate, by its name.

    Args:
        seconds: for each, after one run that is not counted; the median of the runs counts.
    """
    found = {}
    for name, (work, tokens) in _works().items():
        work.run()
        times: list[float] = []
        while not times or sum(times) < seconds:
            start = time.perf_counter()
            work.run()
            times.append(time.perf_counter() - start)
        found[name] = tokens * CHANNELS / sorted(times)[len(times) // 2]
    return found


def _works() -> dict[str, tuple[Work, int]]:
    """What is timed under each name, and its tokens."""
    found: dict[str, tuple[Work, int]] = {}
    for name, batch, length in (("whole rows", ROWS, LENGTH), ("by chunks", 1, LENGTH), ("one token", 1, 1)):
        found[f"scan, {name}"] = Work(_scan, _scan_arguments(batch, length)), batch * length
        found[f"ssd, {name}"] = Work(_ssd, _ssd_arguments(batch, length)), batch * length
    found["scan, backward"] = Work(_scan, _scan_arguments(1, LENGTH), True), LENGTH
    found["ssd, backward"] = Work(_ssd, _ssd_arguments(1, LENGTH), True), LENGTH
    rows = _numbers(1, LENGTH, CHANNELS), _numbers(CHANNELS, 1, 4), mx.zeros((CHANNELS,))
    found["convolution"] = Work(causal_conv1d, rows), LENGTH
    found["convolution, backward"] = Work(causal_conv1d, rows, True), LENGTH
    return found


def _scan(u: mx.array, delta: mx.array, A: mx.array, B: mx.array, C: mx.array, D: mx.array, z: mx.array) -> Any:
    return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=D, delta_softplus=True)


def _ssd(x: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, D: mx.array) -> Any:
    return ssd(x, dt, A, B, C, D, dt_bias=D, dt_softplus=True)


def _scan_arguments(batch: int, length: int) -> tuple[mx.array, ...]:
    row, vector = (batch, length, CHANNELS), (batch, length, STATES)
    A, D = -mx.ones((CHANNELS, STATES)), mx.ones((CHANNELS,))
    return _numbers(*row), _numbers(*row), A, _numbers(*vector), _numbers(*vector), D, _numbers(*row)


def _ssd_arguments(batch: int, length: int) -> tuple[mx.array, ...]:
    vector, A = (batch, length, 1, DUAL_STATES), -mx.ones((HEADS,))
    x, dt = _numbers(batch, length, HEADS, WIDTH), _numbers(batch, length, HEADS)
    return x, dt, A, _numbers(*vector), _numbers(*vector), mx.ones((HEADS,))


def _numbers(*shape: int) -> mx.array:
    """Normal numbers in bfloat16, of a key of their own that leaves the state of ``mx.random`` alone."""
    array = mx.random.normal(shape, key=mx.random.key(0)).astype(mx.bfloat16)
    mx.eval(array)
    return array
