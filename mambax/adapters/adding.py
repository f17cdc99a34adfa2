"""Putting low-rank adapters into a model.

Dimensions: I inputs, O outputs, R rank, V vocabulary, M d_model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mambax.adapters.binding import bound
from mambax.adapters.paths import at, owners, put
from mambax.init import Initializer, check_seed
from mambax.lora import Adapters, Lora

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the head."""

HEADS = ("lm_head", "score")


def add_lora(
    model: Any,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    rank: int = 8,
    alpha: float = 16,
    rslora: bool = False,
    modules_to_save: Sequence[str] = (),
    tied_embeddings: bool | None = None,
    seed: int = 0,
) -> Any:
    """Freeze a model and give some of its layers low-rank adapters to train, in place.

    The adapters change nothing at first: B is zero and A random, as in PEFT (of a table, A zero and B random). They
    are in float32 whatever the weights are, and there is no dropout.

    Args:
        model: a causal language model, classifier or feature extractor of any backend, quantised or not.
        target_modules: as PEFT has it: ``"all-linear"``, a list of names (the last part of a path, several last
            parts or all of it), or a regular expression of whole paths. Linear layers and the table of embeddings
            can have an adapter.
        rank: R, columns of the adapters.
        alpha: their strength, over the rank.
        rslora: over the square root of the rank instead.
        modules_to_save: names of modules that are trained whole and saved with the adapters, ``["score"]`` for the
            head of a new classifier.
        tied_embeddings: of an adapter on a table that is the head too: True for both, so that it can be merged;
            False for look-ups alone, as PEFT computes it.
        seed: of the initial values, the same on every backend.

    Returns:
        The model.

    Raises:
        ValueError: for a name that matches no such layer, with those that there are; for a model that has adapters
            already; for a rank, alpha or seed out of range, and a tied table without ``tied_embeddings``. The model
            is then as it was.
    """
    _check(model, rank, alpha)
    check_seed(seed)
    layers = adaptable(model)
    chosen = _chosen(model, target_modules, layers)
    saved = _whole(model, modules_to_save, chosen)
    tied = check_tied(model, chosen, tied_embeddings)
    lora = Lora(rank, float(alpha), rslora, tuple(chosen), tuple(saved), tied)
    init = Initializer(seed)
    return install(model, lora, {path: _initial(bound(model), layers[path], rank, init) for path in chosen})


def _check(model: Any, rank: Any, alpha: Any) -> None:
    if model.adapter is not None:
        raise ValueError(
            "the model has adapters already; merge them with mambax.adapters.merge_adapter, or load it anew"
        )
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}; expected a whole number from 1")
    real = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not real or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha!r}; expected a number above 0")


def adaptable(model: Any) -> dict[str, Any]:
    """The layers that can have an adapter, by path."""
    kinds = (*bound(model).LINEAR, *bound(model).EMBEDDING)
    found = ((path, at(model, path)) for path in owners(model))
    return {path: layer for path, layer in found if isinstance(layer, kinds)}


def has_tied_head(model: Any) -> bool:
    """Whether the table of embeddings is the head too."""
    return getattr(model, "lm_head", model) is None


def check_tied(model: Any, chosen: Sequence[str], tied: bool | None) -> bool:
    """Whether an adapter of the table counts in the head; False for models where that has no meaning."""
    if not has_tied_head(model) or "backbone.embeddings" not in chosen:
        return False
    if tied is None:
        raise ValueError(
            "target_modules: the table of embeddings is the head of this model too; pass tied_embeddings=True for "
            "an adapter that counts in both, or False for one that counts in look-ups alone, as PEFT computes it, "
            "and cannot be merged"
        )
    return tied


def _chosen(model: Any, targets: str | Sequence[str], layers: Mapping[str, Any]) -> list[str]:
    """The paths that are targeted, in order."""
    names = sorted({path.rpartition(".")[2] for path in layers})
    if targets == ALL_LINEAR:
        linear = bound(model).LINEAR
        return [p for p, layer in layers.items() if isinstance(layer, linear) and p not in HEADS]
    if isinstance(targets, str):
        try:
            found = [path for path in layers if re.fullmatch(targets, path)]
        except re.error as error:
            raise ValueError(f"target_modules: {targets!r} is not a regular expression: {error}") from error
        if not found:
            raise ValueError(
                f"target_modules: the expression {targets!r} matches no layer that can have an adapter; paths are "
                f"such as {next(iter(layers))}, and end in {', '.join(names)}. To name layers, pass a list"
            )
        return found
    if not targets:
        raise ValueError(f"target_modules is empty; expected some of {', '.join(names)}")
    for target in targets:
        if not any(_is_at(path, target) for path in layers):
            others = [path for path in owners(model) if _is_at(path, target)]
            kind = f"is a {type(at(model, others[0])).__name__}" if others else "is not in this model"
            raise ValueError(
                f"target_modules: {target!r} {kind}; the layers that can have an adapter are {', '.join(names)}"
            )
    return [path for path in layers if any(_is_at(path, target) for target in targets)]


def _is_at(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _whole(model: Any, names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The paths of the modules to train whole."""
    found = []
    if isinstance(names, str):
        raise ValueError(f"modules_to_save is {names!r}; expected a list of names")
    for name in names:
        matched = [path for path in owners(model) if _is_at(path, name)]
        if not matched:
            known = sorted({path.rpartition(".")[2] for path in owners(model)})
            raise ValueError(f"modules_to_save: {name!r} is not in this model; expected some of {', '.join(known)}")
        if both := sorted(set(matched) & set(chosen)):
            raise ValueError(f"modules_to_save: {both[0]} is a target of the adapters too; name it in one of them")
        if any(isinstance(at(model, path), bound(model).QUANTIZED) for path in matched):
            raise ValueError(f"modules_to_save: {name!r} is quantised, so that it cannot be trained")
        found += [path for path in matched if path not in found]
    return found


def _initial(layers: Adapters, layer: Any, rank: int, init: Initializer) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a new adapter, as ``LoraLayer.reset_lora_parameters`` of PEFT draws them."""
    rows, columns = layers.shape(layer)
    if isinstance(layer, layers.EMBEDDING):
        A, B = init.full((rank, rows), 0.0), init.normal((columns, rank), 1.0)
    else:
        A, B = init.linear(rank, columns), init.full((rows, rank), 0.0)
    return np.asarray(A), np.asarray(B)


def install(model: Any, lora: Lora, values: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """Put adapters with these A and B in their places; they and ``lora.modules_to_save`` are all that trains then.

    Args:
        model: without adapters.
        lora: what they have in common.
        values: A and B by path.
    """
    nn, layers = model.nn, bound(model)
    for path, pair in values.items():
        base = at(model, path)
        dtype = np.float64 if base.weight.dtype == nn.float64 else np.float32
        A, B = (np.array(array, dtype) for array in pair)
        if isinstance(base, layers.EMBEDDING):
            adapted = layers.LoraEmbedding(base, A, B, lora.scaling, tied=lora.tied)
        else:
            adapted = layers.LoraLinear(base, A, B, lora.scaling)
        own = {n: a for n, a in nn.parameters(adapted).items() if n.startswith("lora_")}
        nn.set_parameters(adapted, {n: nn.from_numpy(nn.to_numpy(a), like=base.weight) for n, a in own.items()})
        put(model, path, adapted)
    model.adapter = lora
    layers.set_trainable(model, set(own_names(model)) & set(layers.possible(model)))
    return model


def own_names(model: Any) -> list[str]:
    """The paths of the parameters that belong to the adapters of a model, whole modules included."""
    lora: Lora = model.adapter
    parts = [f"{path}." for path in lora.modules_to_save]
    adapters = [f"{path}.lora_" for path in lora.modules]
    return [name for name in model.nn.parameters(model) if name.startswith((*parts, *adapters))]
