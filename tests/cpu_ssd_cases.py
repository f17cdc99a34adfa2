"""Inputs of the scan of Mamba-2 for the tests of its CPU kernels, and what must come out.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mambax_cpu import ssd as fused
from mambax_cpu.ssd_tiles import CHUNK, PARTS

from mambax import get_backend

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
LIMITS = (0.1, 0.6)
SIZES = [  # (B, L, H, P, G, N): borders of chunks, of rows of tiles, of vectors, of parts of a group
    (1, 1, 1, 1, 1, 1),
    (2, 1, 4, 17, 2, 5),
    (1, 7, 2, 16, 1, 16),
    (1, CHUNK, 3, 33, 3, 32),
    (2, 2 * CHUNK + 9, 6, 9, 3, 21),
    (1, CHUNK + 1, 2 * PARTS + 1, 3, 1, 17),
    (1, 3 * CHUNK + 5, 3, 64, 1, 128),
]


def values_of(
    batch: int, length: int, heads: int, width: int, groups: int, states: int, seed: int = 0
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads) - 1,
        "A": -np.exp(normal(heads)),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, width, states),
    }


def flags_of(kind: str, batch: int, length: int) -> dict[str, np.ndarray]:
    """A mask that leaves a whole chunk out, or beginnings of sequences, one at the very first position."""
    rng = np.random.default_rng(length)
    if kind == "mask":
        mask = rng.random((batch, length)) < 0.7
        mask[0, : length // 2] = False
        return {"mask": mask}
    if kind == "boundaries":
        boundaries = rng.random((batch, length)) < 0.06
        boundaries[-1, 0] = True
        return {"boundaries": boundaries}
    return {}


def reference(values: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The sequential form in float64."""
    wide = {name: np.float64(value) for name, value in values.items()}
    return get_backend("numpy").ssd(**wide, dt_softplus=True, impl="sequential", **options)


def as_arrays(nn: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {name: nn.from_numpy(value.copy()) for name, value in values.items()}


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is to write holds NaN before: nothing can be left out, or read before it is written."""

    def poison(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    monkeypatch.setattr(fused, "room", poison)
