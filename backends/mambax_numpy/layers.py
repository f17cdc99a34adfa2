"""Layers over NumPy arrays, with the parameter names and shapes of Hugging Face checkpoints.

Weights narrower than float32 are widened for the arithmetic and the result is rounded to their dtype, as a
framework with native bfloat16 does.
"""

from __future__ import annotations

import numpy as np

from mambax.init import Initial
from mambax.scan import at_least_float32
from mambax_numpy import ops
from mambax_numpy.fused import causal_conv1d
from mambax_numpy.module import Module, Parameter

_SMALL = 1 << 15
"""Weights below which a float32 product is too short for a choice of implementation to matter."""


def _linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    if bias is not None and x.dtype == weight.dtype == bias.dtype == np.float32 and x.size > x.shape[-1]:
        from mambax_cpu import linear

        return linear.linear(x, weight, bias)
    y = ops.astype(_product(x, weight), weight.dtype)
    if bias is None:
        return y
    wide = at_least_float32(ops, y) + at_least_float32(ops, bias)
    return ops.astype(wide, np.result_type(weight.dtype, bias.dtype))


def _product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x weight^T in float32 at least.

    NumPy's own product is as fast as memory for one float32 row, slow for a few, and for many as good as its
    library knows the processor; it has none for narrower dtypes.
    """
    if np.float64 not in (x.dtype, weight.dtype):
        from mambax_cpu import linear

        if weight.dtype != np.float32 or weight.size >= _SMALL:
            return linear.linear(x, weight)
    return at_least_float32(ops, x) @ at_least_float32(ops, weight).T


class Linear(Module):
    """x (..., in) -> x weight^T + bias (..., out).

    Args:
        weight: (out, in).
        bias: (out,) or None. A float32 bias over narrower weights makes the output float32.
    """

    def __init__(self, weight: Initial, bias: Initial | None) -> None:
        self.weight = Parameter(weight)
        self.bias = None if bias is None else Parameter(bias)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """(..., in) to (..., out)."""
        return _linear(x, self.weight, self.bias)


class Embedding(Module):
    """A table (V, D) of vectors.

    Args:
        weight: (V, D).
    """

    def __init__(self, weight: Initial) -> None:
        self.weight = Parameter(weight)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """ids (...) to vectors (..., D)."""
        return self.weight[ids]

    def as_linear(self, x: np.ndarray) -> np.ndarray:
        """x (..., D) to scores (..., V): the table as the weight of a tied head."""
        return _linear(x, self.weight, None)


class RMSNorm(Module):
    """x / rms(x) * weight, statistics in float32, output in the dtype of the weight.

    Args:
        weight: (D,).
        eps: added to the mean square.
    """

    def __init__(self, weight: Initial, eps: float) -> None:
        self.weight = Parameter(weight)
        self.eps = eps

    def forward(self, x: np.ndarray) -> np.ndarray:
        """(..., D) to (..., D)."""
        if np.float64 not in (x.dtype, self.weight.dtype):
            from mambax_cpu import norm

            return norm.rms_norm(x, self.weight, self.eps)
        x = at_least_float32(ops, x)
        scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return ops.astype(x * scale * at_least_float32(ops, self.weight), self.weight.dtype)


class CausalConv1d(Module):
    """Causal depthwise convolution with SiLU.

    Args:
        weight: (D, 1, K).
        bias: (D,) or None.
    """

    def __init__(self, weight: Initial, bias: Initial | None) -> None:
        self.weight = Parameter(weight)
        self.bias = None if bias is None else Parameter(bias)

    def forward(
        self,
        x: np.ndarray,
        state: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        boundaries: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B, L, D) to (B, L, D) and the last K-1 inputs; see :func:`mambax.convolution.causal_conv1d`."""
        return causal_conv1d(x, self.weight, self.bias, initial_state=state, mask=mask, boundaries=boundaries)
