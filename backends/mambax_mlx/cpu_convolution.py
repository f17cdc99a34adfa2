"""The fused CPU convolution on MLX arrays in host memory, differentiable.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mambax_cpu import convolution as fused

from mambax import convolution
from mambax_mlx import ops
from mambax_mlx.host import differentiable_once, values


def causal_conv1d(
    x: mx.array,  # (B, L, D)
    weight: mx.array,  # (D, 1, K)
    bias: mx.array | None = None,  # (D,)
    *,
    initial_state: mx.array | None = None,  # (B, K-1, D)
    mask: mx.array | None = None,  # (B, L) bool
    boundaries: mx.array | None = None,  # (B, L) bool
    activation: str | None = "silu",
) -> tuple[mx.array, mx.array]:
    """:func:`mambax.convolution.causal_conv1d` by the fused kernels, differentiable (once).

    Raises:
        ValueError: for a shape that does not fit, another activation, and a mask together with boundaries.
    """
    if initial_state is not None:
        initial_state = initial_state.astype(x.dtype)
    flags: dict[str, Any] = {"mask": mask, "boundaries": boundaries}
    flags = {name: None if flag is None else values(flag) for name, flag in flags.items()}
    optional = {"bias": bias, "initial_state": initial_state}
    present = {name: array for name, array in optional.items() if array is not None}
    names = ["x", "weight", *present]

    def given(arrays: Any) -> fused.Arguments:
        named: dict[str, Any] = {name: values(array) for name, array in zip(names, arrays, strict=True)}
        return fused.arguments(**named, **flags, activation=activation)

    def run(*arrays: mx.array) -> mx.array:
        return mx.array(fused.forward(given(arrays))).astype(x.dtype)

    def gradient(*arrays_and_dy: mx.array) -> tuple[mx.array, ...]:
        *arrays, dy = arrays_and_dy
        gradients = fused.backward(given(arrays), values(dy.astype(mx.float32)))._asdict()
        return tuple(mx.array(gradients[name]).astype(a.dtype) for name, a in zip(names, arrays, strict=True))

    y = differentiable_once(run, gradient, "differentiate inside mx.compile")(x, weight, *present.values())
    past = weight.shape[2] - 1
    if mask is None and boundaries is None and x.shape[1] >= past:
        return y, mx.contiguous(x[:, x.shape[1] - past :])  # the slice alone would keep all of x in memory
    flags = {"mask": mask, "boundaries": boundaries}
    return y, convolution.causal_conv1d(ops, x, weight, initial_state=initial_state, **flags)[1]
