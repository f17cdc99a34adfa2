"""Low-rank adapters over NumPy arrays, to run what was trained elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import mambax_numpy
from mambax import lora
from mambax.backend import Backend
from mambax_numpy.layers import Embedding, Linear
from mambax_numpy.module import Module
from mambax_numpy.quantized import QuantizedEmbedding, QuantizedLinear


class LoraLinear(lora.LoraLinear, Module):
    nn: ClassVar[Backend] = mambax_numpy


class LoraEmbedding(lora.LoraEmbedding, Module):
    nn: ClassVar[Backend] = mambax_numpy


LINEAR = (Linear, QuantizedLinear)
EMBEDDING = (Embedding, QuantizedEmbedding)
QUANTIZED = (QuantizedLinear, QuantizedEmbedding)


def shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, (V, M) of a table."""
    return layer.quantized.shape if isinstance(layer, QUANTIZED) else layer.weight.shape


def possible(model: Any) -> set[str]:
    """Nothing: NumPy has no gradients."""
    return set()


def trainable(model: Any) -> set[str]:
    """Nothing: NumPy has no gradients."""
    return set()


def set_trainable(model: Any, names: Collection[str]) -> None:
    """Nothing is to be remembered where nothing can be trained."""
