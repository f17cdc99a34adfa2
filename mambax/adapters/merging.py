"""Merging adapters into the weights, and taking them out again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mambax.adapters.adding import has_tied_head
from mambax.adapters.binding import bound
from mambax.adapters.paths import at, put
from mambax.backend import Array
from mambax.checkpoint.tensors import is_finite
from mambax.lora import Lora


@dataclass(frozen=True)
class Merged:
    """A model whose adapters are part of its weights, and what is needed to take them out again.

    Attributes:
        model: it.
        lora: what the adapters have in common.
        adapted: the layers with adapters, by path.
        weights: the weights before, by path of the layer; not copies.
        trainable: paths of the parameters that were trained.
    """

    model: Any
    lora: Lora
    adapted: Mapping[str, Any]
    weights: Mapping[str, Array]
    trainable: Collection[str]

    def unmerge(self) -> Any:
        """Put the adapters and the weights back as they were, to the last bit.

        Returns:
            The model.

        Raises:
            ValueError: when the model has other adapters by now. It is then as it was.
        """
        model, nn = self.model, self.model.nn
        if model.adapter is not None:
            raise ValueError("unmerge: the model has adapters; they were taken out already, or others were added")
        for path, layer in self.adapted.items():
            nn.set_parameters(layer.base_layer, {"weight": self.weights[path]})
            put(model, path, layer)
        model.adapter = self.lora
        bound(model).set_trainable(model, self.trainable)
        return model


def merge_adapter(model: Any) -> Merged:
    """Add the adapters of a model to its weights, in place. It is then as fast as without, and can be saved.

    The sum is computed in float32 at least and rounded to the dtype of the weights.

    Returns:
        What can take them out again. The weights before stay in memory for as long as it is kept.

    Raises:
        ValueError: for a model without adapters, adapters on quantised weights, on a table that they count for in
            look-ups alone although it is the head too, and sums that are not finite. The model is then as it was.
    """
    nn, layers = model.nn, bound(model)
    lora: Lora | None = model.adapter
    if lora is None:
        raise ValueError("merge_adapter: the model has no adapters")
    adapted = {path: at(model, path) for path in lora.modules}
    for path, layer in adapted.items():
        if isinstance(layer.base_layer, layers.QUANTIZED):
            raise ValueError(
                f"merge_adapter: the weights of {path} are quantised, and would have to be rounded again; load the "
                "model without quantize and the adapter onto it, merge, save and quantise that"
            )
        if not lora.tied and isinstance(layer, layers.LoraEmbedding) and has_tied_head(model):
            raise ValueError(
                f"merge_adapter: the adapter of {path} is for look-ups alone, but the table is the head too; one "
                "table cannot be both"
            )
    before = {path: layer.base_layer.weight for path, layer in adapted.items()}
    after = {path: nn.from_numpy(_sum(nn, path, layer), like=before[path]) for path, layer in adapted.items()}
    trained = layers.trainable(model)
    for path, layer in adapted.items():
        nn.set_parameters(layer.base_layer, {"weight": after[path]})
        put(model, path, layer.base_layer)
    model.adapter = None
    layers.set_trainable(model, set(trained) & set(layers.possible(model)))
    return Merged(model, lora, adapted, before, trained)


def _sum(nn: Any, path: str, layer: Any) -> np.ndarray:
    """The weight with the adapter, in the dtype of the weight."""
    weight, update = nn.to_numpy(layer.base_layer.weight), layer.delta()
    with np.errstate(over="ignore", invalid="ignore"):
        merged = (weight.astype(np.result_type(np.float32, update.dtype)) + update).astype(weight.dtype)
    if not is_finite(merged):
        raise ValueError(
            f"merge_adapter: {path} would have weights that are NaN or infinite in {weight.dtype.name}; load the "
            "model with dtype='float32'"
        )
    return merged
