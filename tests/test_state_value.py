"""A state is a value: exact to keep, fork, select and go back to, differentiable, and no larger than it says."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
from harness import (
    assert_states_close,
    assert_states_equal,
    build,
    config_of,
    frozen,
    run,
    scan_params,
    state_arrays,
    token_ids,
    weights_of,
)
from tolerances import FORWARD, assert_close, relative_error

from mambax import get_backend
from mambax.blocks import LayerState
from mambax.options import AttentionOptions, Mamba2Options, MLPOptions

CONFIG = config_of()
WEIGHTS = weights_of(CONFIG)


@pytest.fixture
def model(nn: Any) -> Any:
    return build(nn, CONFIG, WEIGHTS)


def test_a_state_is_a_value(model):
    """Reading on changes nothing that anyone holds."""
    ids = token_ids(2, 6)
    _, state = run(model, ids)
    fork, copied, kept = state.fork(), copy.deepcopy(state), frozen(state)
    first, after = run(model, ids, state)
    run(model, ids, after)
    for held in (state, fork, copied):
        assert_states_equal(held, kept)
        again, after_again = run(model, ids, held)
        np.testing.assert_array_equal(again, first)
        assert_states_equal(after_again, after)


def test_reset_is_the_initial_state_and_spares_forks(model):
    _, state = run(model, token_ids(2, 6))
    fork, kept = state.fork(), frozen(state)
    assert state.reset_cache() is state
    assert_states_equal(state, model.init_state(2))
    assert_states_equal(fork, kept)
    np.testing.assert_array_equal(run(model, token_ids(2, 4), state)[0], run(model, token_ids(2, 4))[0])


def test_select_picks_and_repeats_rows(model):
    _, state = run(model, token_ids(3, 6))
    held = state_arrays(state)
    for rows in ([2, 0], [1, 1, 1, 1], [0, 1, 2], 2, (0,), range(1, 3)):
        want = {name: array[[rows] if isinstance(rows, int) else list(rows)] for name, array in held.items()}
        assert_states_equal(state.select(rows), want)
    for rows in ([], [3], [-1], 3, [0, 7]):
        with pytest.raises(ValueError, match="from 0 to 2"):
            state.select(rows)


def test_where_takes_rows_from_either_state(model):
    _, one = run(model, token_ids(3, 6))
    _, two = run(model, token_ids(3, 8))
    mixed = one.where(model.nn.from_numpy(np.array([True, False, True])), two)
    assert_states_equal(mixed.select([0, 2]), one.select([0, 2]))
    assert_states_equal(mixed.select(1), two.select(1))


ATTENTION: dict[str, dict[str, Any]] = {
    "mha": {"n_layer": 2, "layer_types": ("mha", "mlp"), "attention": {"d_conv": 3}},
    "parallel": {"n_layer": 1, "layer_types": ("parallel",), "mamba2": Mamba2Options(n_heads=5, head_dim=6)},
}


@pytest.fixture(params=sorted(ATTENTION))
def attending(nn: Any, request: pytest.FixtureRequest) -> Any:
    """A model whose state has positions that grow, next to those of a convolution."""
    fields = ATTENTION[request.param]
    sizes = {"n_heads": 4, "head_dim": 10, "n_kv_heads": 2, "rope_theta": 1e4} | fields.get("attention", {})
    options = {"attention": AttentionOptions(**sizes), "mlp": MLPOptions(d_intermediate=24)}
    return nn.MambaForCausalLM(config_of(**fields | options))


def test_reset_forgets_the_positions_of_attention(attending):
    state = run(attending, token_ids(2, 6))[1]
    state.reset_cache()
    assert_states_equal(state, attending.init_state(2))
    np.testing.assert_array_equal(run(attending, token_ids(2, 4), state)[0], run(attending, token_ids(2, 4))[0])


@pytest.mark.parametrize("length", [0, 1, 6, 9])
def test_where_takes_rows_from_states_of_other_lengths(attending, length):
    """One of attention is longer than the other; what its rows say next is what they would have said."""
    ids, mask = token_ids(3, 14), np.ones((3, length), bool)
    mask[0, : length // 2] = False
    one = run(attending, ids[:, :length], mask=mask)[1] if length else attending.init_state(3)
    two = run(attending, ids[:, :6])[1]
    mixed = one.where(attending.nn.from_numpy(np.array([True, False, True])), two)
    logits, after = run(attending, ids[:, 9:], mixed)
    want_one, after_one = run(attending, ids[:, 9:], one)
    want_two, _ = run(attending, ids[:, 9:], two)
    assert_close(logits[[0, 2]], want_one[[0, 2]])
    assert_close(logits[1], want_two[1])
    seen = after.get_cache_info().tokens_seen
    assert seen == (after_one.get_cache_info().tokens_seen[0], 11, length + 5)


def test_where_refuses_a_state_of_other_rows(model):
    one, two = model.init_state(2), model.init_state(3)
    with pytest.raises(ValueError, match="3 row"):
        one.where(model.nn.from_numpy(np.array([True, False])), two)


def test_memory_does_not_grow_with_the_tokens_seen(model):
    state = model.init_state(2)
    size = state.get_cache_info().bytes
    assert size == 3 * 2 * (80 * 8 * 4 + 80 * 2 * 4) + 2 * 8  # layers, rows, ssm and conv in float32, a counter
    for length in (1, 100, 700):
        _, state = run(model, token_ids(2, length), state)
        assert state.get_cache_info().bytes == size
    assert state.get_cache_info().tokens_seen == (801, 801)


def memory_behind(arrays: Any) -> int:
    """Bytes of the buffers that some arrays keep alive: more than their own where they are views, unless they share
    a buffer among themselves."""
    buffers: dict[int, int] = {}
    for array in arrays:
        if hasattr(array, "untyped_storage"):
            buffers[array.untyped_storage().data_ptr()] = array.untyped_storage().nbytes()
            continue
        while isinstance(array.base, np.ndarray):
            array = array.base
        buffers[array.__array_interface__["data"][0]] = array.nbytes
    return sum(buffers.values())


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(("backend", "impl"), scan_params())
def test_a_state_keeps_nothing_but_itself_in_memory(backend, impl, padding):
    """Not the inputs that it was computed from, of which it could be a view."""
    nn = get_backend(backend)
    model = build(nn, config_of(scan=impl), WEIGHTS)
    mask = np.arange(600) >= 5 if padding else None
    if backend == "mlx":
        import mlx.core as mx

        gc.collect()
        before = mx.get_active_memory()
        _, state = run(model, token_ids(1, 600), mask=mask[None] if padding else None)
        nn.evaluate(*state.arrays().values(), wait=True)
        gc.collect()
        assert mx.get_active_memory() - before < 2 * state.get_cache_info().bytes
    else:
        _, state = run(model, token_ids(1, 600), mask=mask[None] if padding else None)
        assert memory_behind(state.arrays().values()) == state.get_cache_info().bytes
        _, state = run(model, token_ids(1, 1), state)
        assert memory_behind(state.arrays().values()) == state.get_cache_info().bytes


# --- gradients through the state, and refusals -------------------------------------------------------------------


def test_gradients_flow_in_and_out_of_the_state():
    torch = pytest.importorskip("torch")
    model = build(get_backend("torch"), CONFIG, WEIGHTS)
    ids = token_ids(2, 12)
    table = model.backbone.layers[0].mixer.in_proj.weight

    def gradient(cut: bool, detach: bool = False) -> np.ndarray:
        model.zero_grad()
        if cut:
            state = model(ids[:, :5]).state
            loss = model(ids[:, 5:], state.detach() if detach else state).logits.square().sum()
        else:
            loss = model(ids).logits[:, 5:].square().sum()
        loss.backward()
        return table.grad.numpy().copy()

    assert_close(gradient(cut=True), gradient(cut=False), tolerance=1e-5)
    assert relative_error(gradient(cut=True, detach=True), gradient(cut=False)) > 1e-2
    start = model.init_state(2)
    ssm = torch.zeros_like(start.layers[0].ssm, requires_grad=True)
    start.layers = (LayerState(start.layers[0].conv, ssm), *start.layers[1:])
    model(ids, start).logits.sum().backward()
    assert ssm.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("other", "batch"),
    [({"d_state": 9}, 2), ({"n_layer": 2}, 2), ({"d_conv": 4}, 2), ({"d_model": 20}, 2), ({}, 3)],
)
def test_a_state_of_another_model_or_batch_is_refused(model, other, batch):
    state = model.nn.MambaForCausalLM(config_of(**other)).init_state(batch)
    with pytest.raises(ValueError, match=r"state: .*this model and input need"):
        model(token_ids(2, 3), state)


def test_a_mask_of_another_shape_is_refused(model):
    for mask in (np.ones((2, 4), bool), np.ones((1, 3), bool), np.ones(3, bool)):
        with pytest.raises(ValueError, match=r"mask: expected \(batch, length\) = \(2, 3\)"):
            model(token_ids(2, 3), mask=mask)


# --- planted errors ----------------------------------------------------------------------------------------------


def test_planted_errors_in_the_state_and_the_mask_are_caught(model):
    ids = token_ids(2, 40)
    whole, end = run(model, ids)
    _, state = run(model, ids[:, :20])
    late = LayerState(*(model.nn.concat([a[:, 1:], a[:, :1]], axis=1) for a in state.layers[1]))
    off_by_one = type(state)((state.layers[0], late, state.layers[2]), state.tokens_seen)
    assert relative_error(run(model, ids[:, 20:], off_by_one)[0], whole[:, 20:]) > 100 * FORWARD["float32"]
    empty = LayerState(state.layers[0].conv, state.layers[0].ssm * 0)
    lost = type(state)((empty, *state.layers[1:]), state.tokens_seen)
    assert relative_error(run(model, ids[:, 20:], lost)[0], whole[:, 20:]) > 100 * FORWARD["float32"]
    mask = np.ones((2, 40), bool)
    mask[:, :3] = False
    with pytest.raises(AssertionError, match=r"tokens_seen|Arrays are not equal|relative error"):
        assert_states_close(run(model, ids, mask=mask)[1], end)
    assert relative_error(run(model, ids, mask=mask)[0][:, 3:], whole[:, 3:]) > 100 * FORWARD["float32"]
