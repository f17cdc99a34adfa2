"""Mixtures of experts, in MLX: an expert computes the tokens that chose it, and no others.

Weights that lie in one array are gathered by MLX itself. Of experts that are modules of their own, MLX is asked
what the tokens chose, which on a GPU waits for it.

Dimensions: M d_model, E experts, K experts of a token, T tokens.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mambax import experts as definition
from mambax.experts import ExpertWeights
from mambax_mlx import ops, products
from mambax_mlx.host import computable

_SORTED = 64
"""Pairs of a token and an expert from which on MLX gathers faster when they are sorted by expert, as in mlx-lm."""


def mixture(
    parts: definition.Parts, formula: definition.Formula, x: mx.array, chosen: mx.array, ratings: mx.array
) -> mx.array:
    """:func:`mambax.experts.mixture`. Inside ``mx.compile``, where the choice cannot be known, every expert that is
    a module of its own computes every token."""
    chosen = mx.stop_gradient(chosen)
    stacked = {name: part.weight for name, part in parts.items() if isinstance(part, ExpertWeights)}
    if len(stacked) == len(parts) and not (products.by_numpy() and computable(chosen)):
        return gathered(stacked, formula, x, chosen, ratings)
    try:
        mx.eval(chosen)
    except ValueError:  # MLX's answer inside compile and vmap
        return definition.mixture(ops, parts, formula, x, chosen, ratings)
    return by_choice(parts, formula, x, chosen, ratings)


def gathered(
    weights: dict[str, mx.array], formula: definition.Formula, x: mx.array, chosen: mx.array, ratings: mx.array
) -> mx.array:
    """With weights (E, out, in) by name: each pair of a token and an expert by a product of its own."""
    count, flat = chosen.shape[1], chosen.flatten()
    in_order = flat.size >= _SORTED
    order = mx.argsort(flat) if in_order else mx.arange(flat.size)
    flat = flat[order]

    def product(name: str, rows: mx.array) -> mx.array:
        matrices = weights[name].swapaxes(-1, -2)
        return mx.gather_mm(rows, matrices, rhs_indices=flat, sorted_indices=in_order)

    done = formula(product, x[order // count][:, None])[:, 0]  # (T K, M)
    return _summed(done[mx.argsort(order)] if in_order else done, ratings)


def by_choice(
    parts: definition.Parts, formula: definition.Formula, x: mx.array, chosen: mx.array, ratings: mx.array
) -> mx.array:
    """Expert by expert."""
    experts: Any = definition.products_of(ops, parts, products.product)
    order, places = definition.by_expert(np.array(chosen), len(experts))
    rows = order // chosen.shape[1]
    pieces = [
        formula(product, x[mx.array(rows[start:stop])])
        for product, (start, stop) in zip(experts, places, strict=True)
        if start < stop
    ]
    if not pieces:  # there are no tokens
        return mx.zeros_like(x)
    return _summed(mx.concatenate(pieces)[mx.array(np.argsort(order))], ratings)


def _summed(done: mx.array, ratings: mx.array) -> mx.array:
    """(T K, M), what experts gave for the pairs of tokens and experts, to (T, M)."""
    tokens, count = ratings.shape
    return (done.reshape(tokens, count, -1) * ratings[..., None]).sum(1)
