"""Low-rank adapters as MLX modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import mlx.nn
from mlx.utils import tree_flatten

import mambax_mlx
from mambax import lora
from mambax.adapters.paths import at
from mambax.backend import Backend
from mambax_mlx.layers import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from mambax_mlx.module import Module, parameters


class LoraLinear(lora.LoraLinear, Module):
    nn: ClassVar[Backend] = mambax_mlx


class LoraEmbedding(lora.LoraEmbedding, Module):
    nn: ClassVar[Backend] = mambax_mlx


LINEAR = (Linear, QuantizedLinear)
EMBEDDING = (Embedding, QuantizedEmbedding)
QUANTIZED = (QuantizedLinear, QuantizedEmbedding)


def shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, (V, M) of a table."""
    rows, columns = layer.weight.shape
    return rows, columns * 32 // layer.bits if isinstance(layer, QUANTIZED) else columns


def possible(model: mlx.nn.Module) -> set[str]:
    """Paths of all parameters but those of quantised layers, which MLX keeps frozen."""
    return {name for name in parameters(model) if not isinstance(at(model, name.rpartition(".")[0]), QUANTIZED)}


def trainable(model: mlx.nn.Module) -> set[str]:
    """Paths of the parameters that are not frozen."""
    flat: Any = tree_flatten(model.trainable_parameters())
    return {name for name, _ in flat}


def set_trainable(model: mlx.nn.Module, names: Collection[str]) -> None:
    """Freeze everything but these parameters."""
    model.freeze()
    for name in names:
        owner, _, key = name.rpartition(".")
        at(model, owner).unfreeze(keys=[key], recurse=False)
