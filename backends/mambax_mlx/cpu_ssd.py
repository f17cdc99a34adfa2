"""The fused CPU kernels of Mamba-2 on MLX arrays in host memory, differentiable. See :mod:`mambax_mlx.cpu_scan`.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mambax_cpu import gated_norm
from mambax_cpu import ssd as fused

from mambax import mamba2
from mambax_mlx import ops
from mambax_mlx.host import differentiable_once, values

_NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
"""The arguments that have a gradient, in the order of :class:`mambax_cpu.ssd.Gradients`."""


def ssd(
    x: mx.array,  # (B, L, H, P)
    dt: mx.array,  # (B, L, H)
    A: mx.array,  # (H,)
    B: mx.array,  # (B, L, G, N)
    C: mx.array,  # (B, L, G, N)
    D: mx.array | None = None,  # (H,)
    *,
    dt_bias: mx.array | None = None,  # (H,)
    initial_state: mx.array | None = None,  # (B, H, P, N)
    mask: mx.array | None = None,  # (B, L) bool
    boundaries: mx.array | None = None,  # (B, L) bool
    **options: Any,
) -> tuple[mx.array, mx.array]:
    """:func:`mambax.ssd.ssd` by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, and for a mask together with boundaries.
    """
    named: dict[str, Any] = dict(zip(_NAMES, (x, dt, A, B, C, D, dt_bias, initial_state), strict=True))
    flags: dict[str, Any] = {"mask": mask, "boundaries": boundaries}
    flags = {name: values(flag) for name, flag in flags.items() if flag is not None}
    present = [name for name, array in named.items() if array is not None]

    def given(arrays: Sequence[mx.array]) -> fused.Arguments:
        held: dict[str, Any] = {name: values(array) for name, array in zip(present, arrays, strict=True)}
        return fused.arguments(**held, **flags, **options)

    def run(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        y, final, _ = fused.forward(given(arrays))
        return mx.array(y).astype(x.dtype), mx.array(final)

    def gradient(*arrays_and_cotangents: mx.array) -> tuple[mx.array, ...]:
        *arrays, dy, dfinal = arrays_and_cotangents
        arguments = given(arrays)
        saved = fused.forward(arguments, save=True)[2]  # computed again: MLX has no place to keep it
        gradients = fused.backward(arguments, saved, values(dy), values(dfinal))._asdict()
        return tuple(mx.array(gradients[name]).astype(a.dtype) for name, a in zip(present, arrays, strict=True))

    return differentiable_once(run, gradient, "differentiate inside mx.compile")(*(named[name] for name in present))


def gated_rms_norm(y: mx.array, z: mx.array, weight: mx.array, groups: int, eps: float) -> mx.array:
    """:func:`mambax.mamba2.gated_rms_norm`, the gate first; its derivatives by MLX's own operations."""

    def plain(y: mx.array, z: mx.array, weight: mx.array) -> mx.array:
        return mamba2.gated_rms_norm(ops, y, z, weight, groups, eps)

    def run(y: mx.array, z: mx.array, weight: mx.array) -> mx.array:
        out = gated_norm.gated_rms_norm(values(y), values(z), values(weight), groups, eps)
        return mx.array(out).astype(weight.dtype)

    def tangent(arrays: Any, tangents: Any) -> mx.array:
        known = [mx.zeros_like(a) if t is None else t for a, t in zip(arrays, tangents, strict=True)]
        return mx.jvp(plain, list(arrays), known)[1][0]

    differentiable: Any = mx.custom_function(run)
    differentiable.vjp(lambda arrays, dy, _: mx.vjp(plain, list(arrays), [dy])[1])
    differentiable.jvp(tangent)
    return differentiable(y, z, weight)
