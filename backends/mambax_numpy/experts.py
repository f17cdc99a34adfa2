"""Mixtures of experts, in NumPy: an expert computes the tokens that chose it, and no others.

Dimensions: M d_model, E experts, K experts of a token, T tokens.
"""

from __future__ import annotations

import numpy as np

from mambax import experts as definition
from mambax_numpy import ops
from mambax_numpy.layers import _linear as linear


def mixture(
    parts: definition.Parts, formula: definition.Formula, x: np.ndarray, chosen: np.ndarray, ratings: np.ndarray
) -> np.ndarray:
    """:func:`mambax.experts.mixture`."""
    products = definition.products_of(ops, parts, lambda x, weight: linear(x, weight, None))
    tokens, count = chosen.shape
    order, places = definition.by_expert(chosen, len(products))
    pieces = [
        formula(product, x[order[start:stop] // count])
        for product, (start, stop) in zip(products, places, strict=True)
        if start < stop
    ]
    if not pieces:  # there are no tokens
        return np.zeros_like(x)
    done = np.concatenate(pieces)[np.argsort(order)].reshape(tokens, count, -1)  # (T, K, M)
    return (done * ratings[..., None]).sum(1)
