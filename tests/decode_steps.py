"""What the tests of the fused step of one token share: small models of both kinds, and the step in two ways.

Dimensions: B batch, M d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from harness import assign, backend_params, build, config_of, rounded, token_ids
from tolerances import assert_close

from mambax import MambaLMConfig, get_backend
from mambax.options import Mamba2Options

FUSED = backend_params(("numpy", "torch"))


def mamba2_config(d_model: int = 40, n_layer: int = 3, **options: Any) -> MambaLMConfig:
    """A small configuration of odd sizes, with these of the mixers' options."""
    sizes: dict[str, Any] = {"n_heads": 6, "head_dim": 10, "d_state": 12, "n_groups": 2, "d_conv": 3}
    kinds = ("mamba2",) * n_layer
    return config_of(d_model=d_model, n_layer=n_layer, layer_types=kinds, mamba2=Mamba2Options(**sizes | options))


def mamba2_weights(config: MambaLMConfig) -> dict[str, np.ndarray]:
    """Random float64 weights: a bias of zeros, or a norm of ones, would hide what is missing."""
    numpy, rng = get_backend("numpy"), np.random.default_rng(3)
    initial = numpy.parameters(numpy.MambaForCausalLM(config))
    return {name: array + 0.2 * rng.standard_normal(array.shape) for name, array in initial.items()}


def mamba2_model(nn: Any, dtype: str = "float32", config: MambaLMConfig | None = None, **options: Any) -> Any:
    """A causal language model of Mamba-2 with known weights, in the dtypes in which a checkpoint is loaded."""
    config = config or mamba2_config(**options)
    weights = mamba2_weights(config)
    wide = np.float64 if dtype == "float64" else np.float32
    biases = {name: array.astype(wide) for name, array in weights.items() if name.endswith(".dt_bias")}
    return assign(nn, nn.MambaForCausalLM(config), rounded(weights, dtype) | biases)


MODELS: dict[str, Callable[[Any], Any]] = {"mamba": lambda nn: build(nn, config_of()), "mamba2": mamba2_model}
"""Kind of the blocks -> a model of them for a backend."""


def given(nn: Any, model: Any, batch: int = 2) -> tuple[Any, Any]:
    """Hidden states (B, 1, M) of a next token, and the states before it."""
    ids = token_ids(batch, 5)
    with nn.no_grad():
        state = model(ids[:, :4]).state
        hidden = model.backbone.embeddings(nn.from_numpy(ids[:, 4:]))
    return hidden, state.layers


def one_by_one(nn: Any, layers: Any, hidden: Any, states: Any) -> tuple[Any, list[Any]]:
    """What the step is to give."""
    after = []
    with nn.no_grad():
        for layer, state in zip(layers, states, strict=True):
            hidden, state = layer(hidden, state)
            after.append(state)
    return hidden, after


def at_once(nn: Any, layers: Any, hidden: Any, states: Any) -> Any:
    with nn.no_grad():
        return nn.decode_step(layers, hidden, states)


def assert_same(nn: Any, got: Any, want: Any, tolerance: float) -> None:
    """Hidden states and states, each layer by itself, of the same dtypes."""
    pairs = [(got[0], want[0])]
    for ours, theirs in zip(got[1], want[1], strict=True):
        pairs += list(zip(ours, theirs, strict=True))
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert_close(nn.to_numpy(a), nn.to_numpy(b), tolerance=tolerance)


def values(nn: Any, result: Any) -> list[np.ndarray]:
    """All arrays of a step's result, copied."""
    return [nn.to_numpy(a).copy() for a in (result[0], *(array for state in result[1] for array in state))]


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new memory hold NaN."""
    empty = np.empty

    def poisoned(shape: Any, dtype: Any = float, **options: Any) -> np.ndarray:
        array = empty(shape, dtype, **options)
        if array.dtype.kind in "fV":
            array[...] = np.nan
        return array

    monkeypatch.setattr(np, "empty", poisoned)
