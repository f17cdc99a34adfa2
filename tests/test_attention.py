"""Attention as an op of every backend, and the parts in which NumPy computes it.

Dimensions: B batch, L length, H heads of queries, G heads of keys and values, P head_dim, T positions so far.
"""

from __future__ import annotations

import tracemalloc
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from harness import backend_params
from mambax_numpy import ops
from tolerances import assert_close

import mambax
from mambax import attention as definition

in_numpy = import_module("mambax_numpy.attention")  # the package has the function under this name
B, L, H, G, P, T = 2, 7, 6, 2, 5, 11


def arguments(dtype: Any = np.float32, *, length: int = L, positions: int = T) -> list[Any]:
    """q, k, v and which positions each query sees: those before it, less a few."""
    rng = np.random.default_rng(0)
    shapes = (B, H, length, P), (B, G, positions, P), (B, G, positions, P)
    past = positions - length
    visible = np.arange(positions) <= past + np.arange(length)[:, None]  # (L, T)
    visible = np.repeat(visible[None], B, axis=0)
    visible[1, :, :2] = False
    return [*(rng.normal(size=shape).astype(dtype) for shape in shapes), visible]


@pytest.mark.parametrize("backend", backend_params())
def test_every_backend_against_the_definition(backend):
    nn, given = mambax.get_backend(backend), arguments()
    want = definition.attention(ops, *arguments(np.float64), 0.3)
    with nn.no_grad():
        got = nn.attention(*map(nn.from_numpy, given), 0.3)
    assert_close(nn.to_numpy(got), want)


@pytest.mark.parametrize("scores", [1, 3 * B * H * T, L * B * H * T])  # a query, three, and all of them at a time
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_gives_the_same_in_any_parts(dtype, scores, monkeypatch):
    monkeypatch.setattr(in_numpy, "SCORES", scores)
    got = in_numpy.attention(*arguments(dtype), 0.3)
    want = definition.attention(ops, *(x.astype(np.float64) for x in arguments(dtype)[:3]), arguments()[3], 0.3)
    assert got.dtype == dtype
    assert_close(got, want, tolerance={2: 1e-3, 4: 1e-6, 8: 1e-14}[np.dtype(dtype).itemsize])


def test_the_memory_of_numpy_does_not_grow_with_queries_times_positions():
    given = arguments(length=256, positions=16384)
    tracemalloc.start()
    in_numpy.attention(*given, 0.3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 4 * in_numpy.SCORES < 4 * B * H * 256 * 16384
