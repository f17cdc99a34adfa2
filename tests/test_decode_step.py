"""One token through a stack of Mamba-1 blocks at once: the same as block by block, whatever stands in the stack.

Dimensions: B batch, D d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decode_steps import FUSED, assert_same, at_once, given, one_by_one, poison, values
from harness import build, config_of, weights_of
from tolerances import FORWARD, assert_close

from mambax import get_backend

SHAPES: list[dict[str, Any]] = [
    {},
    {"d_conv": 1, "d_state": 33, "dt_rank": 17, "use_conv_bias": False, "use_bias": False},
    {"d_model": 72, "d_state": 16, "d_conv": 4, "dt_rank": 48, "residual_in_fp32": False},
]


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Any:
    """Each backend that has kernels for the step."""
    return get_backend(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_against_blocks_one_by_one_and_float64(fused, shape, batch, monkeypatch):
    poison(monkeypatch)
    config = config_of(**shape)
    weights = weights_of(config)
    model, exact = build(fused, config, weights), build(get_backend("numpy"), config, weights, "float64")
    hidden, states = given(fused, model, batch)
    got = at_once(fused, model.backbone.layers, hidden, states)
    assert got is not None
    want = one_by_one(fused, model.backbone.layers, hidden, states)
    assert_same(fused, got, want, FORWARD["float32"])
    numpy = get_backend("numpy")
    wide = [type(s)(*(np.float64(fused.to_numpy(array)) for array in s)) for s in states]
    want = one_by_one(numpy, exact.backbone.layers, np.float64(fused.to_numpy(hidden)), wide)
    for a, b in zip(values(fused, got), values(numpy, want), strict=True):
        assert_close(a, b, tolerance=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_every_kind_of_weights(fused, dtype, quantize):
    model = build(fused, config_of(d_model=80, d_state=16, dt_rank=20), dtype=dtype)
    if quantize is not None:
        fused.quantize(model, quantize)
    for batch in (1, 5):
        hidden, states = given(fused, model, batch)
        got = at_once(fused, model.backbone.layers, hidden, states)
        assert got is not None
        assert_same(fused, got, one_by_one(fused, model.backbone.layers, hidden, states), FORWARD[dtype])


def test_every_backend_has_it_or_says_no(nn):
    model = build(nn, config_of())
    hidden, states = given(nn, model)
    got = at_once(nn, model.backbone.layers, hidden, states)
    if got is not None:
        assert_same(nn, got, one_by_one(nn, model.backbone.layers, hidden, states), FORWARD["float32"])


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_threads_change_no_bit(quantize, monkeypatch):
    nn = get_backend("numpy")
    model = build(nn, config_of(d_model=200, dt_rank=12))
    if quantize is not None:
        nn.quantize(model, quantize)
    hidden, states = given(nn, model, 3)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        results += [values(nn, at_once(nn, model.backbone.layers, hidden, states)) for _ in range(5)]
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_helpers_that_never_come(monkeypatch):
    from mambax_cpu import threads

    nn = get_backend("numpy")
    model = build(nn, config_of())
    hidden, states = given(nn, model)
    want = values(nn, at_once(nn, model.backbone.layers, hidden, states))
    monkeypatch.setattr(threads, "_helper", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    for a, b in zip(values(nn, at_once(nn, model.backbone.layers, hidden, states)), want, strict=True):
        np.testing.assert_array_equal(a, b)
