"""Models with adapters that the tests of adapters share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import BACKENDS, WITH_GRADIENTS, backend_params, build, config_of

from mambax import get_backend
from mambax.adapters import add_lora
from mambax.adapters.adding import own_names
from mambax.adapters.binding import bound

PROJECTIONS = ["in_proj", "x_proj", "dt_proj", "out_proj"]
EVERYWHERE = pytest.mark.parametrize("backend", backend_params(BACKENDS))
TRAINED = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
PEFT_WARNS = pytest.mark.filterwarnings("ignore")  # of torch's and its own deprecated names


def model_of(backend: str, dtype: str = "float32", **changes: Any) -> Any:
    return build(get_backend(backend), config_of(**changes), dtype=dtype)


def arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: model.nn.to_numpy(array).copy() for name, array in model.nn.parameters(model).items()}


def scrambled(model: Any, size: float = 0.1) -> Any:
    """The model with random adapters, as if they had been trained."""
    nn, held, rng = model.nn, model.nn.parameters(model), np.random.default_rng(7)
    layers, trained = bound(model), bound(model).trainable(model)
    values = {
        name: nn.from_numpy((rng.standard_normal(held[name].shape) * size).astype(nn.to_numpy(held[name]).dtype))
        for name in sorted(own_names(model))
    }
    nn.set_parameters(model, values)
    layers.set_trainable(model, trained)
    return model


def adapted(backend: str, dtype: str = "float32", **changes: Any) -> Any:
    model = add_lora(
        model_of(backend, dtype, **changes), [*PROJECTIONS, "embeddings"], rank=3, **tied_option(changes)
    )
    return scrambled(model)


def tied_option(changes: dict[str, Any]) -> dict[str, Any]:
    return {"tied_embeddings": True} if changes.get("tie_embeddings") else {}


def gradients(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Of the mean loss over ids as their own labels, of what is trained."""
    if model.nn.name == "torch":
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    import mlx.nn
    from mlx.utils import tree_flatten

    _, tree = mlx.nn.value_and_grad(model, lambda: model(ids, labels=ids).loss)()
    return {name: np.array(array) for name, array in tree_flatten(tree)}
