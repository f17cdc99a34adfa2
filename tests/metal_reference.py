"""The scan and the convolution with their gradients in float64 NumPy, step by step, with masks and boundaries.

:func:`scan` and :func:`convolution` take the arguments of the ops and return (y, final state) and a function that
turns their gradients into those of the arguments, by name. Outputs at masked steps are zero.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from reference import sigmoid, silu, softplus

Gradients = dict[str, np.ndarray]
Result = tuple[np.ndarray, np.ndarray, Callable[[np.ndarray, np.ndarray], Gradients]]


def slope(x: np.ndarray) -> np.ndarray:
    """The derivative of silu."""
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def scan(
    u, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, initial_state=None, mask=None,
    boundaries=None,
) -> Result:  # fmt: skip
    """The selective scan."""
    batch, length, channels = u.shape
    states = A.shape[1]

    def wide(x: Any, *shape: int) -> np.ndarray:
        return np.zeros(shape) if x is None else np.float64(x)

    exists = np.ones((batch, length), bool) if mask is None else mask
    begins = np.zeros((batch, length), bool) if boundaries is None else boundaries
    real = exists[..., None]
    u, delta, A = wide(u), wide(delta), wide(A)
    B, C = (np.where(real, wide(x), 0) for x in (B, C))
    skip, bias = wide(D, channels), wide(delta_bias, channels)
    u, raw = np.where(real, u, 0), np.where(real, delta + bias, 0)
    dt = np.where(real, softplus(raw) if delta_softplus else raw, 0)
    before = np.zeros((length, batch, channels, states))
    after = np.zeros((length, batch, channels, states))
    h = wide(initial_state, batch, channels, states)
    for t in range(length):
        before[t] = np.where(begins[:, t, None, None], 0, h)
        after[t] = h = np.exp(dt[:, t, :, None] * A) * before[t] + (dt * u)[:, t, :, None] * B[:, t, None]
    plain = np.einsum("tbdn,btn->btd", after, C) + skip * u
    gate = np.ones_like(u) if z is None else np.where(real, silu(np.where(real, wide(z), 0)), 0)
    y = np.where(real, plain * gate, 0)

    def gradients(dy: np.ndarray, dfinal: np.ndarray) -> Gradients:
        dy, later = np.where(real, np.float64(dy), 0), np.float64(dfinal).copy()
        g = dy * gate
        found = {"u": skip * g, "delta": np.zeros_like(u), "A": np.zeros_like(A), "D": (g * u).sum((0, 1))}
        found |= {"B": np.zeros_like(B), "C": np.einsum("tbdn,btd->btn", after, g)}
        for t in reversed(range(length)):
            here = later + g[:, t, :, None] * C[:, t, None]
            found["u"][:, t] += dt[:, t] * np.einsum("bdn,bn->bd", here, B[:, t])
            found["B"][:, t] = np.einsum("bdn,bd->bn", here, (dt * u)[:, t])
            decay = np.exp(dt[:, t, :, None] * A)
            exponent = decay * here * before[t]
            found["A"] += (exponent * dt[:, t, :, None]).sum(0)
            found["delta"][:, t] = u[:, t] * np.einsum("bdn,bn->bd", here, B[:, t]) + (exponent * A).sum(-1)
            later = np.where(begins[:, t, None, None], 0, decay * here)
        if delta_softplus:
            found["delta"] *= sigmoid(raw)
        for name in ("u", "delta", "B", "C"):
            found[name] = np.where(real, found[name], 0)
        found |= {"delta_bias": found["delta"].sum((0, 1)), "initial_state": later}
        if z is not None:
            found["z"] = dy * plain * slope(np.where(real, wide(z), 0))
        return found

    return y, h, gradients


def convolution(
    x, weight, bias=None, *, initial_state=None, mask=None, boundaries=None, activation="silu"
) -> Result:  # fmt: skip
    """The causal convolution."""
    batch, length, channels = x.shape
    taps = np.float64(weight)[:, 0].T  # (K, D)
    past = len(taps) - 1
    state = np.zeros((batch, past, channels)) if initial_state is None else np.float64(initial_state)
    full = np.concatenate([state, np.float64(x)], 1)
    shift = np.zeros(channels) if bias is None else np.float64(bias)
    y, final, sources = np.zeros(x.shape), np.zeros((batch, past, channels)), {}
    plain = np.zeros(x.shape)
    for row in range(batch):
        seen: list[int | None] = list(range(past))  # of `full`; None where there is nothing
        for t in range(length):
            if mask is not None and not mask[row, t]:
                continue
            if boundaries is not None and boundaries[row, t]:
                seen = [None] * past
            seen.append(past + t)
            sources[row, t] = seen = seen[-past - 1 :]
            plain[row, t] = shift + sum(taps[k] * full[row, s] for k, s in enumerate(seen) if s is not None)
            y[row, t] = silu(plain[row, t]) if activation else plain[row, t]
            seen = seen[1:]
        sources[row, "end"] = seen
        for k, s in enumerate(seen):
            final[row, k] = 0 if s is None else full[row, s]

    def gradients(dy: np.ndarray, dfinal: np.ndarray) -> Gradients:
        dfull, dtaps, dbias = np.zeros_like(full), np.zeros_like(taps), np.zeros(channels)
        for (row, t), seen in sources.items():
            if t == "end":
                for k, s in enumerate(seen):
                    if s is not None:
                        dfull[row, s] += dfinal[row, k]
                continue
            d = np.float64(dy[row, t]) * (slope(plain[row, t]) if activation else 1)
            dbias += d
            for k, s in enumerate(seen):
                if s is not None:
                    dfull[row, s] += d * taps[k]
                    dtaps[k] += d * full[row, s]
        return {
            "x": dfull[:, past:], "initial_state": dfull[:, :past], "weight": dtaps.T[:, None], "bias": dbias,
        }  # fmt: skip

    return y, final, gradients
