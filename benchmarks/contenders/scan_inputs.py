"""Inputs of the scan, the same for every contender, and the float64 recurrence that gives their errors.

Channels are independent of each other, so a few of them suffice for the error at any length.

Dimensions: B batch (1), L length, D channels, N d_state, S channels that are checked.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CHECKED = 8
"""Channels, from the first on, whose error is measured."""


class Inputs(NamedTuple):
    """float32 arguments of a selective scan with everything: bias, softplus, skip, gate."""

    u: np.ndarray  # (1, L, D)
    delta: np.ndarray  # (1, L, D) before bias and softplus
    A: np.ndarray  # (D, N)
    B: np.ndarray  # (1, L, N)
    C: np.ndarray  # (1, L, N)
    D: np.ndarray  # (D,)
    z: np.ndarray  # (1, L, D)
    delta_bias: np.ndarray  # (D,)
    dy: np.ndarray  # (1, L, D) the gradient of the result; of no elements where none is needed


def inputs(length: int, channels: int, states: int, *, backward: bool) -> Inputs:
    """Random values of the size they have in a trained model: delta from about 0.001 to 0.1, A from -1 to -N."""
    rng = np.random.default_rng(length + channels + states)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    step = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), channels))
    return Inputs(
        u=normal(1, length, channels),
        delta=0.5 * normal(1, length, channels),
        A=np.tile(-np.arange(1, states + 1, dtype=np.float32), (channels, 1)),
        B=normal(1, length, states),
        C=normal(1, length, states),
        D=np.ones(channels, np.float32),
        z=normal(1, length, channels),
        delta_bias=(step + np.log(-np.expm1(-step))).astype(np.float32),
        dy=normal(1, length, channels) if backward else np.empty((1, 0, channels), np.float32),
    )


def reference(given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """y and, with dy, the gradient of u: the first S channels by the recurrence in float64, each (L, S).

    The gradient runs the adjoint recurrence backwards: g[t] = C[t] dy'[t] + exp(delta[t+1] A) g[t+1].
    """
    first = slice(0, CHECKED)
    u, delta, z = (x[0, :, first].astype(np.float64) for x in (given.u, given.delta, given.z))
    A, skip, bias = (x[first].astype(np.float64) for x in (given.A, given.D, given.delta_bias))
    B, C = given.B[0].astype(np.float64), given.C[0].astype(np.float64)
    delta = np.logaddexp(delta + bias, 0)
    gate = z / (1 + np.exp(-z))
    h = np.zeros_like(A)
    y = np.empty_like(u)
    for t in range(len(u)):
        h = np.exp(delta[t, :, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
        y[t] = h @ C[t]
    y = (y + skip * u) * gate
    if not given.dy.shape[1]:
        return y, np.empty((0, A.shape[0]))
    dy = given.dy[0, :, first].astype(np.float64) * gate
    g = np.zeros_like(A)
    du = np.empty_like(u)
    for t in reversed(range(len(u))):
        g = g + dy[t, :, None] * C[t]
        du[t] = delta[t] * (g @ B[t]) + skip * dy[t]
        g = np.exp(delta[t, :, None] * A) * g
    return y, du


def errors(given: Inputs, y: np.ndarray, du: np.ndarray | None) -> dict[str, float]:
    """norm(got - want) / norm(want) of y (1, L, D) and of the gradient of u (1, L, D), if there is one."""
    want_y, want_du = reference(given)
    found = {"error": _distance(y, want_y)}
    return found if du is None else found | {"gradient_error": _distance(du, want_du)}


def _distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got[0, :, :CHECKED] - want) / np.linalg.norm(want))
