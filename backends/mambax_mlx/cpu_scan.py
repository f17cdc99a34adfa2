"""The fused CPU scan on MLX arrays in host memory, differentiable.

The kernels run when they are called, so the arguments are computed then, which MLX does not allow inside
``mx.compile`` and ``mx.vmap``: there it raises.

Dimensions: B batch, L length, D d_inner, N d_state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mambax_cpu import scan

from mambax_mlx.host import differentiable_once, values

_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
"""The arguments that have a gradient, in the order of :class:`mambax_cpu.scan.Gradients`."""


def selective_scan(
    u: mx.array,  # (B, L, D)
    delta: mx.array,  # (B, L, D)
    A: mx.array,  # (D, N)
    B: mx.array,  # (B, L, N)
    C: mx.array,  # (B, L, N)
    D: mx.array | None = None,  # (D,)
    *,
    z: mx.array | None = None,  # (B, L, D)
    delta_bias: mx.array | None = None,  # (D,)
    delta_softplus: bool = False,
    initial_state: mx.array | None = None,  # (B, D, N)
    mask: mx.array | None = None,  # (B, L) bool
    boundaries: mx.array | None = None,  # (B, L) bool
) -> tuple[mx.array, mx.array]:
    """:func:`mambax.scan.selective_scan` by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, and for a mask together with boundaries.
    """
    named: dict[str, Any] = dict(zip(_NAMES, (u, delta, A, B, C, D, z, delta_bias, initial_state), strict=True))
    flags: dict[str, Any] = {"mask": mask, "boundaries": boundaries}
    flags = {name: values(flag) for name, flag in flags.items() if flag is not None}
    present = [name for name, array in named.items() if array is not None]

    def given(arrays: Sequence[mx.array]) -> scan.Arguments:
        held: dict[str, Any] = {name: values(array) for name, array in zip(present, arrays, strict=True)}
        return scan.arguments(**held, **flags, delta_softplus=delta_softplus)

    def run(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        y, final, _ = scan.forward(given(arrays))
        return mx.array(y).astype(u.dtype), mx.array(final)

    def gradient(*arrays_and_cotangents: mx.array) -> tuple[mx.array, ...]:
        *arrays, dy, dfinal = arrays_and_cotangents
        arguments = given(arrays)
        saved = scan.forward(arguments, save=True)[2]  # computed again: MLX has no place to keep it
        gradients = scan.backward(arguments, saved, values(dy), values(dfinal))._asdict()
        return tuple(mx.array(gradients[name]).astype(x.dtype) for name, x in zip(present, arrays, strict=True))

    fused = differentiable_once(run, gradient, "use the implementation 'pscan'")
    return fused(*(named[name] for name in present))
