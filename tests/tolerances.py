"""The one table of tolerances, and the one way of comparing numbers, of the whole suite.

Numbers are compared by ``norm(got - want) / norm(want)`` in float64. A test that needs another bound than its
dtype's says why beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FORWARD = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}
"""Outputs, logits and states, by the dtype of the weights or inputs."""

GRADIENT = {"float64": 1e-7, "float32": 1e-4}
"""Gradients, each parameter by itself, by the dtype in which they were computed."""


def relative_error(got: Any, want: Any) -> float:
    """``norm(got - want) / norm(want)``; infinite where got is not finite or has another shape."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    difference, size = float(np.linalg.norm(got - want)), float(np.linalg.norm(want))
    return difference / size if size else difference


def assert_close(got: Any, want: Any, dtype: str = "float32", *, what: str = "", tolerance: float = 0.0) -> None:
    """Fail unless got is within the tolerance of its dtype, or within ``tolerance`` when that is given."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert np.isfinite(want.astype(np.float64)).all(), f"{what}: the expected values are not finite"
    assert np.isfinite(got.astype(np.float64)).all(), f"{what}: NaN or infinity in the result"
    error, limit = relative_error(got, want), tolerance or FORWARD[dtype]
    assert error <= limit, f"{what}: relative error {error:.3g}, allowed {limit:.3g}"
