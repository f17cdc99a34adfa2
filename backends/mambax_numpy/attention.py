"""Attention, in NumPy.

Dimensions: B batch, L length, H heads of queries, G heads of keys and values, P head_dim, T positions so far.
"""

from __future__ import annotations

import numpy as np

from mambax import attention as definition
from mambax.scan import at_least_float32
from mambax_numpy import ops

SCORES = 1 << 22
"""How many products of queries and keys are in memory at once; those of one query of every head at least."""


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """:func:`mambax.attention.attention`, some queries at a time: after a long text, the products of a few hundred
    queries with all its keys would take more memory than the model."""
    batch, heads, length, _ = q.shape
    rows = max(1, SCORES // max(1, batch * heads * k.shape[2]))
    if rows >= length:
        return definition.attention(ops, q, k, v, visible, scale)
    k, v = at_least_float32(ops, k), at_least_float32(ops, v)  # once, and not for every part
    parts = [slice(start, start + rows) for start in range(0, length, rows)]
    done = [definition.attention(ops, q[:, :, part], k, v, visible[:, part], scale) for part in parts]
    return np.concatenate(done, axis=2)
