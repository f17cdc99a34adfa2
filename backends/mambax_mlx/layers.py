"""Layers as MLX modules, with the parameter names and shapes of Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn

from mambax.init import Initial
from mambax.scan import at_least_float32
from mambax_mlx import ops, products
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
        bias = self.get("bias")
        if bias is None:
            return products.product(x, self.weight)
        if products.by_numpy() or bias.dtype != self.weight.dtype:
            return products.product(x, self.weight) + bias
        return mx.addmm(bias, x, self.weight.T)

    def to_quantized(self, group_size: int | None = None, *args: Any, **options: Any) -> Any:
        """The layer that ``mlx.nn.quantize`` puts here: this one, where the group does not divide its width.

        In the public models that is dt_proj, which is among the layers that quantisation hurts most.
        """
        if self.weight.shape[1] % (group_size or 64):
            return self
        quantized = super().to_quantized(group_size, *args, **options)
        return QuantizedLinear.over(quantized) if type(quantized) is mlx.nn.QuantizedLinear else quantized


class QuantizedLinear(mlx.nn.QuantizedLinear):
    """x (..., in) -> x weight^T + bias (..., out), weights as ``mlx.core.quantize`` packs them.

    The same parameters as ``mlx.nn.QuantizedLinear``; on the CPU of Linux by faster products.
    """

    def __init__(
        self,
        weight: mx.array,  # (out, in bits / 32) uint32
        scales: mx.array,  # (out, in / group size)
        biases: mx.array | None,
        bias: mx.array | None,  # (out,)
        format_: dict[str, Any],  # group_size, bits, mode
    ) -> None:
        mlx.nn.Module.__init__(self)
        self.group_size, self.bits, self.mode = format_["group_size"], format_["bits"], format_["mode"]
        self.weight, self.scales, self.biases = weight, scales, biases
        if bias is not None:
            self.bias = bias
        self.freeze()

    @classmethod
    def over(cls, layer: mlx.nn.QuantizedLinear) -> QuantizedLinear:
        """The same layer."""
        return cls(layer.weight, layer.scales, layer.biases, layer.get("bias"), _format_of(layer))

    def __call__(self, x: mx.array) -> mx.array:
        y = products.quantized_product(x, self.weight, self.scales, self.biases, **_format_of(self))
        return y if "bias" not in self else y + self.bias


def _format_of(layer: Any) -> dict[str, Any]:
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def _looked_up(table: Callable[[mx.array], mx.array], ids: mx.array, count: int) -> mx.array:
    """The vectors of ids (...), (..., D); of ids outside of ``count`` rows, NaN."""
    valid = (ids >= 0) & (ids < count)
    rows = table(mx.where(valid, ids, 0))
    return mx.where(valid[..., None], rows, mx.array(float("nan"), rows.dtype))


class Embedding(mlx.nn.Embedding):
    """A table (V, D) of vectors. An id outside it gives NaN, where MLX by itself would read some other row.

    Args:
        weight: (V, D).
    """

    def __init__(self, weight: Initial) -> None:
        mlx.nn.Module.__init__(self)
        self.weight = Parameter(weight)

    def __call__(self, ids: mx.array) -> mx.array:
        return _looked_up(super().__call__, ids, self.weight.shape[0])

    def as_linear(self, x: mx.array) -> mx.array:
        """x (..., D) to scores (..., V): the table as the weight of a tied head."""
        return products.product(x, self.weight)

    def to_quantized(self, group_size: int | None = None, *args: Any, **options: Any) -> Any:
        """The layer that ``mlx.nn.quantize`` puts here: this one, where the group does not divide its width."""
        if self.weight.shape[1] % (group_size or 64):
            return self
        quantized = super().to_quantized(group_size, *args, **options)
        return QuantizedEmbedding(quantized.weight, quantized.scales, quantized.biases, _format_of(quantized))


class QuantizedEmbedding(mlx.nn.QuantizedEmbedding):
    """A quantised table (V, D) of vectors, with the parameters of ``mlx.nn.QuantizedEmbedding``.

    An id outside it gives NaN.
    """

    def __init__(
        self,
        weight: mx.array,  # (V, D bits / 32) uint32
        scales: mx.array,  # (V, D / group size)
        biases: mx.array | None,
        format_: dict[str, Any],  # group_size, bits, mode
    ) -> None:
        mlx.nn.Module.__init__(self)
        self.group_size, self.bits, self.mode = format_["group_size"], format_["bits"], format_["mode"]
        self.weight, self.scales, self.biases = weight, scales, biases
        self.num_embeddings, self.dims = weight.shape[0], weight.shape[1] * 32 // self.bits
        self.freeze()

    def __call__(self, ids: mx.array) -> mx.array:
        return _looked_up(super().__call__, ids, self.num_embeddings)

    def as_linear(self, x: mx.array) -> mx.array:
        """x (..., D) to scores (..., V): the table as the weight of a tied head."""
        return products.quantized_product(x, self.weight, self.scales, self.biases, **_format_of(self))


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
        self,
        x: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        boundaries: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """(B, L, D) to (B, L, D) and the last K-1 inputs; see :func:`mambax.convolution.causal_conv1d`."""
        return causal_conv1d(
            x, self.weight, self.get("bias"), initial_state=state, mask=mask, boundaries=boundaries
        )
