"""The fused step of one token keeps up with models and states: copies, changes, threads, and what is let go of."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from decode_steps import FUSED, MODELS, assert_same, at_once, given, one_by_one, values
from tolerances import FORWARD

from mambax import get_backend


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Any:
    """Each backend that has kernels for the step."""
    return get_backend(request.param)


@pytest.mark.parametrize("kind", MODELS)
def test_states_are_values(fused, kind):
    """What was given is not written to, and what was returned holds on its own."""
    model = MODELS[kind](fused)
    hidden, states = given(fused, model)
    before = [fused.to_numpy(array).copy() for state in states for array in state]
    first = at_once(fused, model.backbone.layers, hidden, states)
    kept = values(fused, first)
    second = at_once(fused, model.backbone.layers, hidden, first[1])
    again = at_once(fused, model.backbone.layers, hidden, states)
    for array, was in zip([array for state in states for array in state], before, strict=True):
        np.testing.assert_array_equal(fused.to_numpy(array), was)
    for result in (first, again):
        for a, b in zip(values(fused, result), kept, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(values(fused, second)[2], kept[2])
    mixed = [first[1][0], *states[1:]]  # some of the last step's, some not
    assert_same(
        fused,
        at_once(fused, model.backbone.layers, hidden, mixed),
        one_by_one(fused, model.backbone.layers, hidden, mixed),
        FORWARD["float32"],
    )


@pytest.mark.parametrize("kind", MODELS)
def test_changed_weights_are_seen(fused, kind):
    model = MODELS[kind](fused)
    hidden, states = given(fused, model)
    layers = model.backbone.layers
    at_once(fused, layers, hidden, states)

    def check() -> None:
        got = at_once(fused, layers, hidden, states)
        assert got is not None
        assert_same(fused, got, one_by_one(fused, layers, hidden, states), FORWARD["float32"])

    with fused.no_grad():
        layers[1].mixer.A_log[...] = layers[1].mixer.A_log * 1.5  # in place
    check()
    path = "backbone.layers.1.mixer.in_proj.weight"
    new = np.random.default_rng(5).standard_normal(tuple(layers[1].mixer.in_proj.weight.shape))
    fused.set_parameters(model, {path: fused.from_numpy(new.astype(np.float32))})
    check()
    layers[0].mixer, layers[2].mixer = layers[2].mixer, layers[0].mixer
    check()
    layers[0].norm.eps = 0.5
    check()
    fused.quantize(model, "int8")
    check()


@pytest.mark.parametrize("kind", MODELS)
def test_copies_and_pickles_of_a_model_are_their_own(fused, kind):
    model = MODELS[kind](fused)
    hidden, states = given(fused, model)
    want = values(fused, at_once(fused, model.backbone.layers, hidden, states))
    twin, stored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with fused.no_grad():
        model.backbone.layers[0].mixer.D[...] = 7.0
    for other in (twin, stored):
        for a, b in zip(values(fused, at_once(fused, other.backbone.layers, hidden, states)), want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_kept_alive(fused, kind):
    model = MODELS[kind](fused)
    hidden, states = given(fused, model)
    result = at_once(fused, model.backbone.layers, hidden, states)
    state = weakref.ref(result[1][0].ssm)
    del result
    gc.collect()
    assert state() is None
    mixer = model.backbone.layers[1].mixer
    replaced, new = weakref.ref(mixer.D), fused.from_numpy(np.ones(tuple(mixer.D.shape), np.float32))
    fused.set_parameters(mixer, {"D": new})
    del mixer
    gc.collect()
    assert replaced() is None
    block, weight = (weakref.ref(x) for x in (model.backbone.layers[0], model.backbone.layers[0].mixer.D))
    del model
    gc.collect()
    assert block() is None
    assert weight() is None


@pytest.mark.parametrize("kind", MODELS)
def test_many_threads_with_one_model(fused, kind):
    model = MODELS[kind](fused)
    cases = [(*given(fused, model, 1 + i % 3),) for i in range(6)]
    wants = [values(fused, at_once(fused, model.backbone.layers, *case)) for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            got = values(fused, at_once(fused, model.backbone.layers, *cases[i]))
            if not all(map(np.array_equal, got, wants[i])):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
