"""Layers over quantised weights, see :mod:`mambax.quantization`, and a model made of them; on the CPU and CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambax import quantization
from mambax.quantization import Quantized
from mambax_torch import ops, quantized_ops
from mambax_torch.layers import Embedding, Linear
from mambax_torch.module import Module


class _QuantizedLayer(Module):
    """What both layers share: the weights as buffers, which keep their dtypes when the model changes its own."""

    weight: Tensor
    scales: Tensor

    def __init__(self, quantized: Quantized, device: torch.device | None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.register_buffer("weight", _tensor(quantized.weight, device))
        self.register_buffer("scales", _tensor(quantized.scales, device))

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Refuse what would move the layer where it cannot run.

        Args:
            fn: what a module applies to its tensors in ``.to()`` and the like.

        Raises:
            ValueError: with the reason.
        """
        quantized_ops.check_device(fn(self.weight.new_empty(0)).device)

    # the dtype of the scales is part of the format
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.check_move(fn)
        before = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != before.dtype:
            self.scales = before.to(self.scales.device)
        return self

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) to (..., out)."""
        return quantized_ops.linear(x, self.weight, self.scales, bias, self.in_features)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        kind = "int8" if self.weight.dtype == torch.int8 else "int4"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


class MovedWhole(Module):
    """A model that asks its quantised layers before it moves a tensor, so that a refusal leaves it where it was."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for layer in self.modules():
            if isinstance(layer, _QuantizedLayer):
                layer.check_move(fn)
        return super()._apply(fn, recurse)


def _array(x: Tensor) -> np.ndarray:
    """The values; of a tensor on the meta device, a placeholder."""
    return np.broadcast_to(np.float32(np.nan), x.shape) if x.is_meta else ops.to_numpy(x)


def _tensor(array: np.ndarray, device: torch.device | None) -> Tensor:
    """The values on a device, the CPU when None; of a placeholder, a tensor on the meta device."""
    if quantization.is_placeholder(array):
        return torch.empty(array.shape, dtype=ops.dtype(array.dtype.name), device="meta")
    tensor = ops.from_numpy(array)
    return tensor if device is None else tensor.to(device)


class QuantizedLinear(_QuantizedLayer):
    """x (..., in) -> x weight^T + bias (..., out), as :func:`mambax_torch.quantized_ops.linear` computes it.

    Args:
        quantized: (out, in).
        bias: (out,) or None.
        device: of the weights; the CPU when None.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self, quantized: Quantized, bias: torch.nn.Parameter | None, device: torch.device | None = None
    ) -> None:
        super().__init__(quantized, device)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.product(x, self.bias)


class QuantizedEmbedding(_QuantizedLayer):
    """A quantised table (V, D) of vectors, the weight of a tied head as well.

    Args:
        quantized: (V, D).
        dtype: of the vectors that a look-up gives.
        device: of the weights; the CPU when None.
    """

    def __init__(self, quantized: Quantized, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__(quantized, device)
        self.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.check_move(fn)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to vectors (..., D)."""
        return quantized_ops.rows(self.weight, self.scales, ids, self.in_features, self.dtype)

    def as_linear(self, x: Tensor) -> Tensor:
        """x (..., D) to scores (..., V)."""
        return self.product(x, None)


def quantize(model: Any, kind: str, group_size: int = 32) -> Any:
    """Replace the large layers of a model by quantised ones where they are, one after another, in place.

    The numbers are chosen on the CPU, and are the same on every device.

    Args:
        model: any model of this backend. The layers that are named in :data:`mambax.quantization.LAYERS` are
            replaced, and the table of embeddings where it is the head.
        kind: "int8" or "int4".
        group_size: inputs to a scale of "int4", 32 or 64.

    Returns:
        The model.

    Raises:
        ValueError: for another kind or group size, a device that quantised layers cannot run on, float64, weights
            that are not finite, and when there is nothing to replace. The model is then as it was.
    """
    quantization.check_kind(kind, group_size)
    layers = _layers(model)
    for owner, name in layers.values():
        quantized_ops.check_device(getattr(owner, name).weight.device)
    quantization.check_layers({path: _array(getattr(*place).weight) for path, place in layers.items()})
    for owner, name in layers.values():
        layer = getattr(owner, name)
        values = _array(layer.weight)
        quantized = quantization.quantize(values, quantization.kind_of(name, kind), group_size)
        if isinstance(layer, Linear):
            setattr(owner, name, QuantizedLinear(quantized, layer.bias, layer.weight.device))
        else:
            setattr(owner, name, QuantizedEmbedding(quantized, layer.weight.dtype, layer.weight.device))
    return model


def why_not_quantized(device: str) -> str:
    """See :meth:`mambax.backend.Backend.why_not_quantized`."""
    return quantized_ops.why_not(torch.device(device))


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
