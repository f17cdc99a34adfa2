"""Layers over quantised weights, see :mod:`mambax.quantization`, and a model made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mambax import quantization
from mambax.quantization import Quantized
from mambax_numpy.layers import Embedding, Linear
from mambax_numpy.module import Module, ModuleList


class QuantizedLinear(Module):
    """x (..., in) -> x weight^T + bias (..., out), computed in float32, in the dtype of x.

    Args:
        quantized: (out, in).
        bias: (out,) or None.
    """

    def __init__(self, quantized: Quantized, bias: np.ndarray | None) -> None:
        self.weight, self.scales, self.in_features = quantized
        self.bias = bias

    @property
    def quantized(self) -> Quantized:
        """The weights."""
        return Quantized(self.weight, self.scales, self.in_features)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """(..., in) to (..., out)."""
        from mambax_cpu import linear

        return linear.quantized_linear(x, self.quantized, self.bias).astype(x.dtype, copy=False)


class QuantizedEmbedding(Module):
    """A quantised table (V, D) of vectors, the weight of a tied head as well.

    Args:
        quantized: (V, D).
        dtype: of the vectors that a look-up gives.
    """

    def __init__(self, quantized: Quantized, dtype: np.dtype) -> None:
        self.weight, self.scales, self.in_features = quantized
        self.dtype = dtype

    @property
    def quantized(self) -> Quantized:
        """The table."""
        return Quantized(self.weight, self.scales, self.in_features)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """ids (...) to vectors (..., D)."""
        from mambax_cpu import linear

        return linear.quantized_rows(self.quantized, ids).astype(self.dtype, copy=False)

    def as_linear(self, x: np.ndarray) -> np.ndarray:
        """x (..., D) to scores (..., V)."""
        from mambax_cpu import linear

        return linear.quantized_linear(x, self.quantized).astype(x.dtype, copy=False)


def quantize(model: Any, kind: str, group_size: int = 32) -> Any:
    """Replace the large layers of a model by quantised ones, one after another, in place.

    Args:
        model: any model of this backend. The layers that are named in :data:`mambax.quantization.LAYERS` are
            replaced, and the table of embeddings where it is the head.
        kind: "int8" or "int4".
        group_size: inputs to a scale of "int4", 32 or 64.

    Returns:
        The model.

    Raises:
        ValueError: for another kind or group size, float64, weights that are not finite, and when there is nothing
            to replace. The model is then as it was.
    """
    quantization.check_kind(kind, group_size)
    layers = dict(_layers(model))
    quantization.check_layers({path: getattr(*place).weight for path, place in layers.items()})
    for owner, name in layers.values():
        layer = getattr(owner, name)
        quantized = quantization.quantize(layer.weight, quantization.kind_of(name, kind), group_size)
        if isinstance(layer, Linear):
            setattr(owner, name, QuantizedLinear(quantized, layer.bias))
        else:
            setattr(owner, name, QuantizedEmbedding(quantized, layer.weight.dtype))
    return model


def why_not_quantized(device: str) -> str:
    """See :meth:`mambax.backend.Backend.why_not_quantized`."""
    return ""


def _layers(module: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, str]]]:
    """(dotted path, (owner, name)) of every layer to replace."""
    if getattr(module, "lm_head", module) is None and isinstance(module.backbone.embeddings, Embedding):
        yield f"{prefix}backbone.embeddings", (module.backbone, "embeddings")
    for name, child in vars(module).items():
        if isinstance(child, Linear) and name in quantization.LAYERS:
            yield prefix + name, (module, name)
        elif isinstance(child, Module):
            yield from _layers(child, f"{prefix}{name}.")
        elif isinstance(child, ModuleList):
            for i, item in enumerate(child):
                yield from _layers(item, f"{prefix}{name}.{i}.")
