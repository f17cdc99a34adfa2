"""One token through a stack of Mamba-2 blocks at once: the same as block by block, in every backend.

Dimensions: B batch, H heads, P head_dim, G groups, N d_state, K d_conv.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from decode_steps import (
    FUSED,
    assert_same,
    at_once,
    given,
    mamba2_config,
    mamba2_model,
    one_by_one,
    poison,
    values,
)
from harness import assert_states_close, config_of, run, token_ids
from tolerances import FORWARD, assert_close

from mambax import get_backend
from mambax.options import Mamba2Options

SHAPES: list[dict[str, Any]] = [
    {},
    {"use_bias": True, "use_conv_bias": False, "dt_limit": (0.5, 0.7), "n_groups": 6, "norm_epsilon": 0.3},
    {"n_heads": 3, "head_dim": 37, "d_state": 33, "n_groups": 1, "d_conv": 1, "gated_norm": "none"},
    {"n_heads": 2, "head_dim": 64, "d_state": 128, "n_groups": 2, "d_conv": 4, "use_out_bias": True},
]


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Any:
    """Each backend that has kernels for the step."""
    return get_backend(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_against_blocks_one_by_one_and_float64(fused, shape, batch, monkeypatch):
    poison(monkeypatch)
    model, exact = mamba2_model(fused, **shape), mamba2_model(get_backend("numpy"), "float64", **shape)
    hidden, states = given(fused, model, batch)
    got = at_once(fused, model.backbone.layers, hidden, states)
    assert got is not None
    assert_same(fused, got, one_by_one(fused, model.backbone.layers, hidden, states), FORWARD["float32"])
    numpy = get_backend("numpy")
    wide = [type(s)(*(np.float64(fused.to_numpy(array)) for array in s)) for s in states]
    want = one_by_one(numpy, exact.backbone.layers, np.float64(fused.to_numpy(hidden)), wide)
    for a, b in zip(values(fused, got), values(numpy, want), strict=True):
        assert_close(a, b, tolerance=2e-6)


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [("float32", "int8"), ("bfloat16", None), ("bfloat16", "int4"), ("float16", None), ("float16", "int8")],
)
def test_kinds_of_weights(fused, dtype, quantize):
    model = mamba2_model(fused, dtype, d_model=80, n_heads=5, head_dim=24, n_groups=1)
    if quantize is not None:
        fused.quantize(model, quantize)
    for batch in (1, 5):
        hidden, states = given(fused, model, batch)
        got = at_once(fused, model.backbone.layers, hidden, states)
        assert got is not None
        assert_same(fused, got, one_by_one(fused, model.backbone.layers, hidden, states), FORWARD[dtype])


def test_every_backend_has_it_or_says_no(nn):
    model = mamba2_model(nn)
    hidden, states = given(nn, model)
    got = at_once(nn, model.backbone.layers, hidden, states)
    if got is not None:
        assert_same(nn, got, one_by_one(nn, model.backbone.layers, hidden, states), FORWARD["float32"])


@pytest.mark.parametrize("kind", [4, "int4"])
def test_weights_that_mlx_packs(kind):
    pytest.importorskip("mlx.core")
    nn = get_backend("mlx")
    model = nn.quantize(mamba2_model(nn, d_model=64, n_heads=4, head_dim=32), kind)
    hidden, states = given(nn, model)
    got = at_once(nn, model.backbone.layers, hidden, states)
    if got is not None:
        assert_same(nn, got, one_by_one(nn, model.backbone.layers, hidden, states), FORWARD["float32"])


def test_one_call_is_token_by_token(nn):
    model, ids = mamba2_model(nn), token_ids(2, 9)
    want, after = run(model, ids)
    logits, state = [], None
    for i in range(9):
        step, state = run(model, ids[:, i : i + 1], state)
        logits.append(step)
    assert_close(np.concatenate(logits, 1), want)
    assert_states_close(state, after)


def test_threads_change_no_bit(monkeypatch):
    nn = get_backend("numpy")
    model = mamba2_model(nn, d_model=200)
    hidden, states = given(nn, model, 3)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        results += [values(nn, at_once(nn, model.backbone.layers, hidden, states)) for _ in range(5)]
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_memory_is_used_again_when_nobody_holds_it(fused):
    """Whoever keeps an earlier state keeps its values; whoever does not pays for no new memory."""
    from mambax_cpu import state_memory

    model = mamba2_model(fused)
    hidden, states = given(fused, model)
    layers = model.backbone.layers
    places: list[int] = []
    for _ in range(6):
        _, states = at_once(fused, layers, hidden, states)
        places.append(fused.to_numpy(states[0].ssm).__array_interface__["data"][0])
    assert len(set(places)) == (2 if state_memory._COUNTS else 6)
    kept = [fused.to_numpy(state.ssm).copy() for state in states]
    held = [state.ssm[:1] for state in states]  # parts of them alone
    for _ in range(4):
        _, states = at_once(fused, layers, hidden, states)
    for part, was in zip(held, kept, strict=True):
        np.testing.assert_array_equal(fused.to_numpy(part), was[:1])


def test_extreme_values(fused):
    """A step that forgets everything, one that forgets nothing, and NaN in one row alone."""
    model = mamba2_model(fused)
    layers = model.backbone.layers
    with fused.no_grad():
        layers[0].mixer.dt_bias[...] = -200.0
        layers[1].mixer.dt_bias[...] = 150.0
    hidden, states = given(fused, model, 3)
    got = at_once(fused, layers, hidden, states)
    assert_same(fused, got, one_by_one(fused, layers, hidden, states), FORWARD["float32"])
    with fused.no_grad():
        spoilt = fused.from_numpy(fused.to_numpy(hidden).copy())
        spoilt[1] = float("nan")
    after = at_once(fused, layers, spoilt, states)
    for a, b in zip(values(fused, after), values(fused, got), strict=True):
        assert np.isnan(a[1]).any()
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])


# --- where the blocks have to be called ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"gated_norm": "norm_first"}, {"part_multipliers": (1.0, 1.0, 0.5, 1.0, 1.0)}, {"mixed": True}]
)
def test_what_the_kernels_do_not_know(fused, options):
    config = mamba2_config(**({} if "mixed" in options else options))
    if "mixed" in options:
        config = config_of(layer_types=("mamba2", "mamba", "mamba2"), mamba2=config.mamba2)
    model = mamba2_model(fused, config=config)
    hidden, states = given(fused, model)
    assert at_once(fused, model.backbone.layers, hidden, states) is None
    run(model, token_ids(2, 1), model(token_ids(2, 4)).state)  # which works all the same


def test_other_options_of_one_block(fused):
    """Of the same shapes: twice the groups of half the states."""
    model, other = (mamba2_model(fused, n_groups=g, d_state=n) for g, n in ((1, 12), (2, 6)))
    hidden, states = given(fused, model)
    layers = model.backbone.layers
    layers[1].mixer = other.backbone.layers[1].mixer
    assert at_once(fused, layers, hidden, states) is None


def test_changed_options_are_seen(nn):
    model = mamba2_model(nn)
    hidden, states = given(nn, model)
    layers = model.backbone.layers

    def check() -> None:
        got = at_once(nn, layers, hidden, states)
        assert got is not None or nn.name == "mlx"  # which has no such step on every machine
        if got is not None:
            assert_same(nn, got, one_by_one(nn, layers, hidden, states), FORWARD["float32"])

    for changes in ({}, {"dt_limit": (0.6, 0.7)}, {"norm_epsilon": 0.4}, {"gated_norm": "none"}):
        for layer in layers:
            layer.mixer.options = dataclasses.replace(layer.mixer.options, **changes)
        check()
    layers[1].norm.eps = 0.5
    check()


def test_many_tokens_and_gradients_are_left_to_the_blocks(fused):
    model = mamba2_model(fused)
    hidden, states = given(fused, model)
    many = fused.concat([hidden] * 40, axis=1)
    assert at_once(fused, model.backbone.layers, many, states) is None
    if fused.name == "torch":
        assert fused.decode_step(model.backbone.layers, hidden, states) is None
        assert fused.decode_step(model.backbone.layers, many, states) is None


def test_float64_goes_block_by_block():
    nn = get_backend("numpy")
    model = mamba2_model(nn, "float64")
    hidden, states = given(nn, model)
    assert at_once(nn, model.backbone.layers, hidden, states) is None


def test_who_adds_an_option_looks_here():
    """As ``test_who_adds_a_field_to_the_configuration_looks_here`` says, of what makes a Mamba-2 block."""
    known = {
        "n_heads", "head_dim", "d_state", "n_groups", "d_conv", "dt_limit", "use_bias", "use_out_bias",
        "use_conv_bias", "norm_epsilon", "gated_norm", "part_multipliers",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(Mamba2Options)} == known
