"""Attention, in NumPy."""

from __future__ import annotations

import numpy as np

from mambax import attention as definition
from mambax_numpy import ops


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """:func:`mambax.attention.attention`."""
    return definition.attention(ops, q, k, v, visible, scale)
