"""Layers over quantised weights on the CPU, see :mod:`mambax.quantization`, and a model made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambax import quantization
from mambax.quantization import Quantized
from mambax_torch import ops
from mambax_torch.layers import Embedding, Linear
from mambax_torch.module import Module


class _QuantizedLayer(Module):
    """What both layers share: the weights as buffers, which keep their dtypes when the model changes its own."""

    weight: Tensor
    scales: Tensor

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.register_buffer("weight", _tensor(quantized.weight))
        self.register_buffer("scales", _tensor(quantized.scales))

    # the dtype of the scales is part of the format
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != before.dtype:
            self.scales = before.to(self.scales.device)
        return self

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) to (..., out)."""
        if x.device.type != "cpu":
            raise ValueError(
                f"quantised layers run on the CPU, found values on {x.device}; move the model to 'cpu'"
            )
        from mambax_torch import linear_ops

        return linear_ops.quantized_linear(x, self.weight, self.scales, bias, self.in_features)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        kind = "int8" if self.weight.dtype == torch.int8 else "int4"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


def _array(x: Tensor) -> np.ndarray:
    """The values; of a tensor on the meta device, a placeholder."""
    return np.broadcast_to(np.float32(np.nan), x.shape) if x.is_meta else ops.to_numpy(x)


def _tensor(array: np.ndarray) -> Tensor:
    """The values; of a placeholder, a tensor on the meta device."""
    if quantization.is_placeholder(array):
        return torch.empty(array.shape, dtype=ops.dtype(array.dtype.name), device="meta")
    return ops.from_numpy(array)


class QuantizedLinear(_QuantizedLayer):
    """x (..., in) -> x weight^T + bias (..., out), computed in float32, in the dtype of x. On the CPU.

    Args:
        quantized: (out, in).
        bias: (out,) or None.
    """

    bias: torch.nn.Parameter | None

    def __init__(self, quantized: Quantized, bias: torch.nn.Parameter | None) -> None:
        super().__init__(quantized)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.product(x, self.bias)


class QuantizedEmbedding(_QuantizedLayer):
    """A quantised table (V, D) of vectors, the weight of a tied head as well. On the CPU.

    Args:
        quantized: (V, D).
        dtype: of the vectors that a look-up gives.
    """

    def __init__(self, quantized: Quantized, dtype: torch.dtype) -> None:
        super().__init__(quantized)
        self.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to vectors (..., D)."""
        from mambax_torch import linear_ops

        return linear_ops.rows(self.weight, self.scales, ids, self.in_features).to(self.dtype)

    def as_linear(self, x: Tensor) -> Tensor:
        """x (..., D) to scores (..., V)."""
        return self.product(x, None)


def quantize(model: Any, kind: str, group_size: int = 32) -> Any:
    """Replace the large layers of a model on the CPU by quantised ones, one after another, in place.

    Args:
        model: any model of this backend. The layers that are named in :data:`mambax.quantization.LAYERS` are
            replaced, and the table of embeddings where it is the head.
        kind: "int8" or "int4".
        group_size: inputs to a scale of "int4", 32 or 64.

    Returns:
        The model.

    Raises:
        ValueError: for another kind or group size, another device, float64, weights that are not finite, and when
            there is nothing to replace. The model is then as it was.
    """
    quantization.check_kind(kind, group_size)
    layers = _layers(model)
    for path, (owner, name) in layers.items():
        if (device := getattr(owner, name).weight.device).type not in ("cpu", "meta"):
            raise ValueError(
                f"quantize: {path} is on {device}; quantised layers run on the CPU, use model.to('cpu')"
            )
    quantization.check_layers({path: _array(getattr(*place).weight) for path, place in layers.items()})
    for owner, name in layers.values():
        layer = getattr(owner, name)
        values = _array(layer.weight)
        quantized = quantization.quantize(values, quantization.kind_of(name, kind), group_size)
        if isinstance(layer, Linear):
            setattr(owner, name, QuantizedLinear(quantized, layer.bias))
        else:
            setattr(owner, name, QuantizedEmbedding(quantized, layer.weight.dtype))
    return model


def _layers(model: Module) -> dict[str, tuple[Any, str]]:
    """Dotted path -> (owner, name) of every layer to replace."""
    found: dict[str, tuple[Any, str]] = {}
    for path, owner in model.named_modules():
        prefix = f"{path}." if path else ""
        tied: Any = owner if getattr(owner, "lm_head", owner) is None else None
        if tied is not None and isinstance(tied.backbone.embeddings, Embedding):
            found[f"{prefix}backbone.embeddings"] = tied.backbone, "embeddings"
        for name, child in owner.named_children():
            if isinstance(child, Linear) and name in quantization.LAYERS:
                found[prefix + name] = owner, name
    return found
