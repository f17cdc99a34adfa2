"""Low-rank adapters of linear layers and of tables of embeddings (LoRA, Hu et al. 2021).

The layers are definitions like those in :mod:`mambax.blocks`: each backend binds them in its module ``lora``. How
they are put into a model, saved and merged is in :mod:`mambax.adapters`.

Dimensions: B batch, L length, I inputs, O outputs, R rank, V vocabulary, M d_model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from mambax.backend import Array, Backend


@dataclass(frozen=True)
class Lora:
    """What the adapters of a model have in common.

    Args:
        rank: R.
        alpha: the strength: an adapter is scaled by ``alpha / rank``.
        rslora: scale by ``alpha / sqrt(rank)`` instead (Kalajdzievski 2023).
        modules: paths of the layers that have one.
        modules_to_save: paths of modules that are trained whole and saved with the adapters.
        tied: whether an adapter of the table of embeddings counts where the table is the head too.
    """

    rank: int
    alpha: float
    rslora: bool = False
    modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    tied: bool = False

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class LoraLinear:
    """``base_layer(x) + scaling * (x A^T) B^T``, the update computed in the dtype of A.

    Args:
        base_layer: any linear layer of the backend, quantised ones included; (..., I) to (..., O).
        A: (R, I).
        B: (O, R).
        scaling: see :attr:`Lora.scaling`.
    """

    nn: ClassVar[Backend]

    def __init__(self, base_layer: Any, A: np.ndarray, B: np.ndarray, scaling: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = self.nn.Linear(A, None)
        self.lora_B = self.nn.Linear(B, None)
        self.scaling = scaling

    def forward(self, x: Array) -> Array:
        """(..., I) to (..., O), in the dtype that the layer without an adapter gives."""
        y = self.base_layer(x)
        update = self.lora_B(self.lora_A(self.nn.astype(x, self.lora_A.weight.dtype))) * self.scaling
        return y + self.nn.astype(update, y.dtype)

    @property
    def weight(self) -> Array:
        """Of the layer without the adapter, whose dtype and device models look at."""
        return self.base_layer.weight

    @property
    def bias(self) -> Array | None:
        """Of the layer."""
        return self.base_layer.bias

    def delta(self) -> np.ndarray:
        """What the adapter adds to the weight, (O, I), in NumPy."""
        return _product(self.nn, self.lora_B, self.nn.to_numpy(self.lora_A.weight)) * self.scaling


class LoraEmbedding:
    """A table plus ``scaling * (B A)^T``, in look-ups and, where the table is the head, in its scores.

    Args:
        base_layer: any table of the backend, quantised ones included; (V, M).
        A: (R, V).
        B: (M, R).
        scaling: see :attr:`Lora.scaling`.
        tied: whether the scores of the head have the adapter too.
    """

    nn: ClassVar[Backend]

    def __init__(self, base_layer: Any, A: np.ndarray, B: np.ndarray, scaling: float, *, tied: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_embedding_A = self.nn.Embedding(np.ascontiguousarray(A.T))  # as a table of its own, (V, R)
        self.lora_embedding_B = self.nn.Linear(B, None)
        self.scaling = scaling
        self.tied = tied

    def forward(self, ids: Array) -> Array:
        """ids (B, L) to vectors (B, L, M)."""
        y = self.base_layer(ids)
        return y + self.nn.astype(self.lora_embedding_B(self.lora_embedding_A(ids)) * self.scaling, y.dtype)

    def as_linear(self, x: Array) -> Array:
        """x (..., M) to scores (..., V)."""
        y = self.base_layer.as_linear(x)
        if not self.tied:
            return y
        down = self.nn.astype(x, self.lora_embedding_B.weight.dtype) @ self.lora_embedding_B.weight  # (..., R)
        return y + self.nn.astype(self.lora_embedding_A.as_linear(down) * self.scaling, y.dtype)

    @property
    def weight(self) -> Array:
        """Of the table without the adapter."""
        return self.base_layer.weight

    def delta(self) -> np.ndarray:
        """What the adapter adds to the table, (V, M), in NumPy."""
        table = self.nn.to_numpy(self.lora_embedding_A.weight)
        return _product(self.nn, self.lora_embedding_B, table.T).T * self.scaling


def _product(nn: Backend, B: Any, A: np.ndarray) -> np.ndarray:
    """B A in float32 at least, which is what adapters are kept in."""
    return nn.to_numpy(B.weight) @ A


class Adapters(Protocol):
    """What adapters ask of a backend: its module ``lora``."""

    @property
    def LoraLinear(self) -> Any: ...

    @property
    def LoraEmbedding(self) -> Any: ...

    @property
    def LINEAR(self) -> tuple[type, ...]: ...  # the classes of its linear layers

    @property
    def EMBEDDING(self) -> tuple[type, ...]: ...  # of its tables

    @property
    def QUANTIZED(self) -> tuple[type, ...]: ...  # those of both whose weights are packed

    def shape(self, layer: Any) -> tuple[int, int]: ...  # (O, I) of a linear layer, (V, M) of a table

    def possible(self, model: Any) -> Collection[str]: ...  # paths of parameters that could be trained

    def trainable(self, model: Any) -> Collection[str]: ...  # of those that are

    def set_trainable(self, model: Any, names: Collection[str]) -> None: ...  # these, and no others
