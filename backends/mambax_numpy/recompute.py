"""NumPy has no gradients, so that nothing is ever kept for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def recomputed(module: Any) -> Callable[..., Any]:
    """The module itself."""
    return module


def summed_over_chunks(
    module: Any, function: Callable[..., tuple[Any, ...]], arrays: Sequence[np.ndarray], rows: int
) -> tuple[Any, ...]:
    """The sum of ``function(*chunk)`` over chunks of rows, one chunk in memory at a time."""
    if len(arrays[0]) == 0:
        raise ValueError("summed_over_chunks: the arrays have no rows; expected at least one")
    starts = range(0, len(arrays[0]), rows)
    parts = (function(*(array[start : start + rows] for array in arrays)) for start in starts)
    totals = next(parts)
    for part in parts:
        totals = tuple(total + value for total, value in zip(totals, part, strict=True))
    return totals
