"""The fused CPU kernels on MLX arrays in host memory, differentiable.

The kernels run when they are called, so the arguments are computed then, which MLX does not allow inside
``mx.compile`` and ``mx.vmap``: there it raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mambax_cpu import scan

_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
"""The arguments that have a gradient, in the order of :class:`mambax_cpu.scan.Gradients`."""


def _array(x: mx.array) -> np.ndarray:
    """The values as a NumPy array, shared where NumPy has the dtype."""
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, copy=False)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "the fused CPU scan has first gradients in reverse mode only; use the implementation 'pscan' for others"
    )


def selective_scan(
    u: mx.array,
    delta: mx.array,
    A: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array | None = None,
    *,
    z: mx.array | None = None,
    delta_bias: mx.array | None = None,
    delta_softplus: bool = False,
    initial_state: mx.array | None = None,
    mask: mx.array | None = None,
    boundaries: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """:func:`mambax.scan.selective_scan` by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, and for a mask together with boundaries.
    """
    values: dict[str, Any] = dict(zip(_NAMES, (u, delta, A, B, C, D, z, delta_bias, initial_state), strict=True))
    flags: dict[str, Any] = {"mask": mask, "boundaries": boundaries}
    present = [name for name, value in values.items() if value is not None]

    def given(arrays: Sequence[mx.array]) -> scan.Arguments:
        named: dict[str, Any] = {name: _array(x) for name, x in zip(present, arrays, strict=True)}
        named |= {name: _array(x) for name, x in flags.items() if x is not None}
        return scan.arguments(**named, delta_softplus=delta_softplus)

    def run(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        y, final, _ = scan.forward(given(arrays))
        return mx.array(y).astype(u.dtype), mx.array(final)

    def gradient(*arrays_and_cotangents: mx.array) -> tuple[mx.array, ...]:
        *arrays, dy, dfinal = arrays_and_cotangents
        arguments = given(arrays)
        saved = scan.forward(arguments, save=True)[2]  # computed again: MLX has no place to keep it
        gradients = scan.backward(arguments, saved, _array(dy), _array(dfinal))._asdict()
        return tuple(mx.array(gradients[name]).astype(x.dtype) for name, x in zip(present, arrays, strict=True))

    differentiable: Any = mx.custom_function(run)
    differentiable_once: Any = mx.custom_function(gradient)
    differentiable.vjp(lambda arrays, cotangents, _: differentiable_once(*arrays, *cotangents))
    for function in (differentiable.jvp, differentiable_once.jvp, differentiable_once.vjp):
        function(_refuse)
    return differentiable(*(values[name] for name in present))
