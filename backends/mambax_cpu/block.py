"""A Mamba-1 block for many tokens, hidden + mixer(norm(hidden)): the fused kernels of this package in a row.

Nothing of a framework runs between them, whose own threads would keep the processors busy: PyTorch's wait in a loop
for milliseconds after each operation, which halves the speed of every other thread. The residual is added by the
last product. For the gradient (:mod:`mambax_cpu.block_gradient`) only what is expensive is kept.

Dimensions: B rows, L length, M d_model, D d_inner, N d_state, K d_conv, R dt_rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mambax_cpu import convolution, linear, products, scan
from mambax_cpu.buffers import room
from mambax_cpu.chain import Weights
from mambax_cpu.norm import rms_norm


class Parameters(NamedTuple):
    """The parameters of a block, float32 and contiguous; matrices may be quantised. None for one that is absent."""

    epsilon: float
    norm: np.ndarray  # (M,)
    in_proj: np.ndarray | Weights  # (2 D, M)
    in_bias: np.ndarray | None  # (2 D,)
    conv: np.ndarray  # (D, 1, K)
    conv_bias: np.ndarray | None  # (D,)
    x_proj: np.ndarray | Weights  # (R + 2 N, D)
    dt_proj: np.ndarray  # (D, R)
    dt_bias: np.ndarray | None  # (D,)
    A_log: np.ndarray  # (D, N)
    D: np.ndarray  # (D,)
    out_proj: np.ndarray | Weights  # (M, D)
    out_bias: np.ndarray | None  # (M,)


class State(NamedTuple):
    """The state of a block."""

    conv: np.ndarray  # (B, K-1, D)
    ssm: np.ndarray  # (B, D, N)


class Kept(NamedTuple):
    """What the gradient starts from, beside hidden, the state and the parameters."""

    xz: np.ndarray  # (B, L, 2 D)
    y: np.ndarray  # (B, L, D), after the gate
    saved: np.ndarray  # of the scan


class Inner(NamedTuple):
    """What lies between the convolution and the recurrence."""

    conv: convolution.Arguments
    u: np.ndarray  # (B, L, D)
    dbc: np.ndarray  # (B, L, R + 2 N)
    scan: scan.Arguments


def forward(
    p: Parameters, hidden: np.ndarray, state: State, *, keep: bool = False, threads: int
) -> tuple[State, Kept | None]:
    """Add the mixer's result to hidden (B, L, M), in place.

    Args:
        p: the parameters.
        hidden: float32, contiguous; L at least K-1 where the gradient is wanted.
        state: before the tokens.
        keep: whether the gradient is wanted; matrices are then not quantised.
        threads: how many may work; the result is the same whatever their number.

    Returns:
        The state after the tokens, and with `keep` what the gradient starts from.
    """
    batch, length, model = hidden.shape
    rows = hidden.reshape(batch * length, model)
    normed = rms_norm(rows, p.norm, p.epsilon, threads=threads)
    xz = product(normed, p.in_proj, p.in_bias, threads).reshape(batch, length, -1)
    del normed
    channels = xz.shape[2] // 2
    conv = convolution.last_inputs(xz[..., :channels], state.conv, state.conv.shape[1])
    y, ssm, saved = scan.forward(inner(p, xz, state, threads).scan, save=keep, threads=threads)
    if p.out_bias is not None:
        rows += p.out_bias
    flat = y.reshape(-1, channels)
    if isinstance(p.out_proj, Weights):
        rows += linear.apply(p.out_proj, flat, threads=threads)
    else:
        products.product(flat, p.out_proj, out=rows, add=True, threads=threads)
    return State(conv, ssm), None if saved is None else Kept(xz, y, saved)


def inner(p: Parameters, xz: np.ndarray, state: State, threads: int) -> Inner:
    """What the scan is given, from what in_proj gives (B, L, 2 D)."""
    batch, length, channels = *xz.shape[:2], xz.shape[2] // 2
    rank, states = p.dt_proj.shape[1], p.A_log.shape[1]
    conv = convolution.arguments(xz[..., :channels], p.conv, p.conv_bias, initial_state=state.conv)
    u = convolution.forward(conv, threads=threads)
    dbc = product(u.reshape(-1, channels), p.x_proj, None, threads)
    dt = products.product(dbc[:, :rank], p.dt_proj, threads=threads).reshape(batch, length, channels)
    dbc = dbc.reshape(batch, length, rank + 2 * states)
    given = scan.arguments(
        u, dt, -np.exp(p.A_log), dbc[..., rank : rank + states], dbc[..., rank + states :], p.D,
        z=xz[..., channels:], delta_bias=p.dt_bias, delta_softplus=True, initial_state=state.ssm,
    )  # fmt: skip
    return Inner(conv, u, dbc, given)


def product(x: np.ndarray, weight: np.ndarray | Weights, bias: np.ndarray | None, threads: int) -> np.ndarray:
    """x (rows, in) weight^T + bias, (rows, out)."""
    if isinstance(weight, Weights):
        return linear.apply(weight, x, bias, threads=threads)
    return products.product(x, weight, bias, threads=threads)


def copied(hidden: np.ndarray) -> np.ndarray:
    """The values in float32 memory of their own, which :func:`forward` may write to."""
    result = room(*hidden.shape)
    result[...] = hidden
    return result
