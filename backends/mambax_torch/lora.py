"""Low-rank adapters as PyTorch modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch

import mambax_torch
from mambax import lora
from mambax.backend import Backend
from mambax_torch.layers import Embedding, Linear
from mambax_torch.module import Module
from mambax_torch.quantized import QuantizedEmbedding, QuantizedLinear


class LoraLinear(lora.LoraLinear, Module):
    nn: ClassVar[Backend] = mambax_torch


class LoraEmbedding(lora.LoraEmbedding, Module):
    nn: ClassVar[Backend] = mambax_torch


LINEAR = (Linear, QuantizedLinear)
EMBEDDING = (Embedding, QuantizedEmbedding)
QUANTIZED = (QuantizedLinear, QuantizedEmbedding)


def shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, (V, M) of a table."""
    if isinstance(layer, Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features


def possible(model: torch.nn.Module) -> set[str]:
    """Paths of all parameters; the arrays of quantised layers are buffers."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def trainable(model: torch.nn.Module) -> set[str]:
    """Paths of the parameters that require a gradient."""
    return {name for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}


def set_trainable(model: torch.nn.Module, names: Collection[str]) -> None:
    """Let these parameters require a gradient, and no others."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in names)
