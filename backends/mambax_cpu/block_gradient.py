"""The gradient of a Mamba-1 block, :func:`mambax_cpu.block.forward`, by the fused kernels.

The norm, the convolution, x_proj and dt_proj are computed again: together they take a twentieth of the time of the
block, and kept they would take half of its memory.

Dimensions: as of :mod:`mambax_cpu.block`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mambax_cpu import convolution, products, scan
from mambax_cpu.block import Inner, Kept, Parameters, State, inner
from mambax_cpu.buffers import room
from mambax_cpu.chain import Weights
from mambax_cpu.norm import rms_norm
from mambax_cpu.norm_gradient import rms_norm_gradient


class Gradients(NamedTuple):
    """The gradients of a block's arguments, float32. None where the argument is None, or nobody wants it."""

    hidden: np.ndarray
    conv_state: np.ndarray | None
    ssm_state: np.ndarray | None
    norm: np.ndarray
    in_proj: np.ndarray | None
    in_bias: np.ndarray | None
    conv: np.ndarray
    conv_bias: np.ndarray | None
    x_proj: np.ndarray | None
    dt_proj: np.ndarray | None
    dt_bias: np.ndarray | None
    A_log: np.ndarray
    D: np.ndarray | None
    out_proj: np.ndarray | None
    out_bias: np.ndarray | None


_MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")


def backward(
    p: Parameters,
    hidden: np.ndarray,
    state: State,
    kept: Kept,
    dout: np.ndarray,
    after: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    *,
    wanted: tuple[str, ...] = _MATRICES,
    threads: int,
) -> Gradients:
    """The gradient of a block.

    Args:
        p, hidden, state: what :func:`mambax_cpu.block.forward` was given; hidden as it was before.
        kept: what it kept.
        dout: (B, L, M) gradient of its result, float32, contiguous.
        after: the gradients of the state after, conv (B, K-1, D) and ssm (B, D, N); None for zero.
        wanted: the matrices whose gradients are wanted, of in_proj, x_proj, dt_proj and out_proj.
        threads: how many may work; the result is the same whatever their number.
    """
    channels = p.A_log.shape[0]
    drows = dout.reshape(-1, dout.shape[2])
    dxz = room(*kept.xz.shape)
    dx, dz = dxz[..., :channels], dxz[..., channels:]

    between = inner(p, kept.xz, state, threads)
    dy = products.product(drows, _transposed(p.out_proj), threads=threads).reshape(kept.y.shape)
    g = scan.backward(between.scan, kept.saved, dy, after[1], dz=dz, threads=threads)
    du, ddbc, dt_proj = _through_projections(p, between, g, "dt_proj" in wanted, threads)
    x_proj = _of_weight(ddbc.reshape(len(drows), -1), between.u, "x_proj" in wanted, threads)
    of_conv = convolution.backward(between.conv, du, dx=dx, threads=threads)
    if after[0] is not None and after[0].shape[1]:
        dx[:, -after[0].shape[1] :] += after[0]
    del between, dy, du, ddbc

    rows, dxz_rows = hidden.reshape(-1, hidden.shape[2]), dxz.reshape(-1, 2 * channels)
    in_proj = None
    if "in_proj" in wanted:
        in_proj = _of_weight(dxz_rows, rms_norm(rows, p.norm, p.epsilon, threads=threads), True, threads)
    dnormed = products.product(dxz_rows, _transposed(p.in_proj), threads=threads)
    dhidden, norm = rms_norm_gradient(rows, p.norm, p.epsilon, dnormed, threads=threads)
    dhidden += drows
    with np.errstate(over="ignore", invalid="ignore"):  # a loss that is infinite is for the caller to notice
        return Gradients(
            hidden=dhidden.reshape(hidden.shape),
            conv_state=of_conv.initial_state,
            ssm_state=g.initial_state,
            norm=norm,
            in_proj=in_proj,
            in_bias=None if p.in_bias is None else dxz_rows.sum(0),
            conv=of_conv.weight,
            conv_bias=of_conv.bias,
            x_proj=x_proj,
            dt_proj=dt_proj,
            dt_bias=g.delta_bias,
            A_log=g.A * -np.exp(p.A_log),
            D=g.D,
            out_proj=_of_weight(drows, kept.y, "out_proj" in wanted, threads),
            out_bias=None if p.out_bias is None else drows.sum(0),
        )


def _through_projections(
    p: Parameters, between: Inner, g: scan.Gradients, wanted: bool, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The gradients of u (B, L, D), of what x_proj gives (B, L, R + 2 N), and of the weight of dt_proj."""
    rank, states = p.dt_proj.shape[1], p.A_log.shape[1]
    ddbc = room(*between.dbc.shape)
    ddbc[..., rank : rank + states], ddbc[..., rank + states :] = g.B, g.C
    rows, ddt = ddbc.reshape(-1, ddbc.shape[2]), g.delta.reshape(-1, g.delta.shape[2])
    products.product(ddt, p.dt_proj.T, out=rows[:, :rank], threads=threads)
    dt_proj = _of_weight(ddt, between.dbc.reshape(rows.shape)[:, :rank], wanted, threads)
    products.product(rows, _transposed(p.x_proj), out=g.u.reshape(ddt.shape), add=True, threads=threads)
    return g.u, ddbc, dt_proj


def _transposed(weight: np.ndarray | Weights) -> np.ndarray:
    if isinstance(weight, Weights):
        raise ValueError(f"a block with {weight.kind} weights has no gradient here; expected float32 arrays")
    return weight.T


def _of_weight(dy: np.ndarray, x: np.ndarray, wanted: bool, threads: int) -> np.ndarray | None:
    """The gradient of a weight (out, in) from that of the result (rows, out) and x (rows, in) or (B, L, in)."""
    if not wanted:
        return None
    return products.product(dy.T, x.reshape(len(dy), -1).T, threads=threads)
