"""Layers as MLX modules, with the parameter names and shapes of Hugging Face checkpoints."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn

from mambax.init import Initial
from mambax.scan import at_least_float32
from mambax_mlx import ops
from mambax_mlx.fused import causal_conv1d
from mambax_mlx.module import Module, Parameter


class Linear(mlx.nn.Linear):
    """x (..., in) -> x weight^T + bias (..., out).

    Args:
        weight: (out, in).
        bias: (out,) or None. A float32 bias over narrower weights makes the output float32.
    """

    def __init__(self, weight: Initial, bias: Initial | None) -> None:
        mlx.nn.Module.__init__(self)
        self.weight = Parameter(weight)
        if bias is not None:
            self.bias = Parameter(bias)

    def __call__(self, x: mx.array) -> mx.array:
        if "bias" in self and self.bias.dtype != self.weight.dtype:
            return x @ self.weight.T + self.bias
        return super().__call__(x)

    def to_quantized(self, group_size: int | None = None, *args: Any, **options: Any) -> Any:
        """The layer that ``mlx.nn.quantize`` puts here: this one, where the group does not divide its width.

        In the public models that is dt_proj, which is among the layers that quantisation hurts most.
        """
        if self.weight.shape[1] % (group_size or 64):
            return self
        return super().to_quantized(group_size, *args, **options)


class Embedding(mlx.nn.Embedding):
    """A table (V, D) of vectors. An id outside it gives NaN, where MLX by itself would read some other row.

    Args:
        weight: (V, D).
    """

    def __init__(self, weight: Initial) -> None:
        mlx.nn.Module.__init__(self)
        self.weight = Parameter(weight)

    def __call__(self, ids: mx.array) -> mx.array:
        valid = (ids >= 0) & (ids < self.weight.shape[0])
        rows = super().__call__(mx.where(valid, ids, 0))
        return mx.where(valid[..., None], rows, mx.array(float("nan"), rows.dtype))


class RMSNorm(Module):
    """x / rms(x) * weight, statistics in float32, output in the dtype of the weight.

    Args:
        weight: (D,).
        eps: added to the mean square.
    """

    def __init__(self, weight: Initial, eps: float) -> None:
        super().__init__()
        self.weight = Parameter(weight)
        self.eps = eps

    def forward(self, x: mx.array) -> mx.array:
        """(..., D) to (..., D)."""
        weight = at_least_float32(ops, self.weight)
        return mx.fast.rms_norm(at_least_float32(ops, x), weight, self.eps).astype(self.weight.dtype)


class CausalConv1d(Module):
    """Causal depthwise convolution with SiLU.

    Args:
        weight: (D, 1, K), as in PyTorch; MLX's own convolutions keep (D, K, 1).
        bias: (D,) or None.
    """

    def __init__(self, weight: Initial, bias: Initial | None) -> None:
        super().__init__()
        self.weight = Parameter(weight)
        if bias is not None:
            self.bias = Parameter(bias)

    def forward(
        self, x: mx.array, state: mx.array | None = None, mask: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """(B, L, D) to (B, L, D) and the last K-1 inputs; see :func:`mambax.convolution.causal_conv1d`."""
        return causal_conv1d(x, self.weight, self.get("bias"), initial_state=state, mask=mask)
