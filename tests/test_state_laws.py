"""The four laws of the state, on every backend.

1. One call is token by token is any split into chunks.
2. A row in a ragged batch, padded anywhere, is that row alone.
3. A state moved to another backend continues the same text.
4. Fork and restore give back exactly what was saved; memory does not grow with the tokens: test_state_value.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from harness import (
    BACKENDS,
    assert_states_close,
    assert_states_equal,
    build,
    config_of,
    installed,
    run,
    state_arrays,
    token_ids,
    weights_of,
)
from tolerances import assert_close

from mambax import get_backend
from mambax.blocks import LayerState

CONFIG = config_of()
WEIGHTS = weights_of(CONFIG)
ALL_INSTALLED = pytest.mark.skipif(installed() != list(BACKENDS), reason="needs torch and mlx")


@pytest.fixture
def model(nn: Any) -> Any:
    return build(nn, CONFIG, WEIGHTS)


# --- law 1 -------------------------------------------------------------------------------------------------------


def in_pieces(model: Any, ids: np.ndarray, cuts: list[int], mask: Any = None) -> tuple[np.ndarray, Any]:
    """Logits of all pieces, and the state after the last."""
    state, parts = None, []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = None if mask is None else mask[:, start:stop]
        logits, state = run(model, ids[:, start:stop], state, part)
        parts.append(logits)
    return np.concatenate(parts, 1), state


@pytest.mark.parametrize("length", [2, 37, 300])
def test_one_call_is_token_by_token(model, length):
    ids = token_ids(2, length)
    whole, end = run(model, ids)
    logits, state = in_pieces(model, ids, list(range(1, length)))
    assert_close(logits, whole)
    assert_states_close(state, end)


@pytest.mark.parametrize("seed", range(8))
def test_one_call_is_any_split(model, seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(5, 600))
    ids = token_ids(2, length, seed=seed)
    cuts = sorted(set(rng.integers(1, length, rng.integers(1, 7)).tolist()))
    whole, end = run(model, ids)
    logits, state = in_pieces(model, ids, cuts)
    assert_close(logits, whole, what=f"cut at {cuts} of {length}")
    assert_states_close(state, end)
    assert_close(whole, reference.logits(WEIGHTS, ids))


@pytest.mark.parametrize("d_conv", [1, 2, 5])
def test_splits_shorter_than_the_convolution(nn, d_conv):
    model = build(nn, config_of(d_conv=d_conv))
    ids = token_ids(2, 9)
    whole, end = run(model, ids)
    for cuts in ([1, 2, 3], [2], [1, 8], [4, 5]):
        logits, state = in_pieces(model, ids, cuts)
        assert_close(logits, whole)
        assert_states_close(state, end)


def test_no_state_is_the_initial_state(model):
    ids = token_ids(2, 5)
    assert_close(run(model, ids, model.init_state(2))[0], run(model, ids)[0])
    info = model.init_state(2).get_cache_info()
    assert (info.layers, info.batch, info.tokens_seen) == (3, 2, (0, 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_keep_the_first_two_laws(nn, dtype):
    """To the rounding of the dtype; the state stays in float32 all along."""
    model = build(nn, CONFIG, WEIGHTS, dtype)
    ids, mask = token_ids(2, 60), np.ones((2, 60), bool)
    mask[1, 20:] = False
    whole, end = run(model, ids, mask=mask)
    for cuts in ([1, 2, 30], list(range(1, 60))):
        logits, state = in_pieces(model, ids, cuts, mask)
        assert_close(logits[mask], whole[mask], dtype)
        for name, array in state_arrays(state).items():
            assert array.dtype == state_arrays(end)[name].dtype
            assert_close(array, state_arrays(end)[name], dtype, what=name)
    alone, _ = run(model, ids[1:, :20])
    assert_close(whole[1, :20], alone[0], dtype)


# --- law 2 -------------------------------------------------------------------------------------------------------

LENGTHS = (9, 4, 1, 7, 2)


def ragged(padding: str) -> np.ndarray:
    """Where the tokens of five rows of different lengths stand, (5, 12) bool."""
    mask = np.zeros((5, 12), bool)
    rng = np.random.default_rng(3)
    for row, length in enumerate(LENGTHS):
        places = {
            "left": np.arange(12 - length, 12),
            "right": np.arange(length),
            "holes": rng.permutation(12)[:length],
        }[padding]
        mask[row, places] = True
    return mask


PADDINGS = pytest.mark.parametrize("padding", ["left", "right", "holes"])


def padded(mask: np.ndarray, filler: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ids of the batch, with ``filler`` where nothing stands, and of each row by itself."""
    rows = [token_ids(1, 20, seed=7 + i)[0, :length] for i, length in enumerate(mask.sum(1))]
    ids = np.full(mask.shape, filler)
    ids[mask] = np.concatenate(rows)
    return ids, rows


@PADDINGS
def test_a_ragged_row_is_that_row_alone(model, padding):
    mask = ragged(padding)
    ids, rows = padded(mask, filler=0)
    logits, state = run(model, ids, mask=mask)
    assert state.get_cache_info().tokens_seen == LENGTHS
    more = token_ids(5, 4, seed=9)
    after, _ = run(model, more, state)
    for i, row in enumerate(rows):
        alone, own = run(model, row[None])
        assert_close(logits[i][mask[i]], alone[0], what=f"row {i}")
        assert_states_close(state.select(i), own)
        assert_close(after[i], run(model, more[i : i + 1], own)[0][0], what=f"row {i}, continued")
        assert_close(alone[0], reference.logits_row(WEIGHTS, row)[0])


@PADDINGS
def test_padding_ids_are_never_read(model, padding):
    mask = ragged(padding)
    first, second = (run(model, padded(mask, filler)[0], mask=mask) for filler in (0, 100))
    np.testing.assert_array_equal(first[0][mask], second[0][mask])
    assert_states_equal(first[1], second[1])


@PADDINGS
def test_ragged_rows_in_pieces(model, padding):
    """Law 1 and law 2 at once; some rows have nothing at all in some pieces."""
    mask = ragged(padding)
    ids, _ = padded(mask, filler=5)
    whole, end = run(model, ids, mask=mask)
    for cuts in ([6], [1, 2, 3], [4, 11], list(range(1, 12))):
        logits, state = in_pieces(model, ids, cuts, mask)
        assert_close(logits[mask], whole[mask])
        assert_states_close(state, end)


@PADDINGS
def test_a_mask_holds_for_a_batch_of_one(model, padding):
    mask = ragged(padding)[1:2]
    ids, rows = padded(mask, filler=0)
    logits, state = run(model, ids, mask=mask)
    alone, own = run(model, rows[0][None])
    assert_close(logits[mask], alone[0])
    assert_states_close(state, own)


def test_a_row_with_nothing_in_it_keeps_its_state(model):
    _, before = run(model, token_ids(3, 6))
    mask = np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0]], bool)
    for state in (before, model.init_state(3)):
        _, after = run(model, token_ids(3, 3), state, mask)
        assert_states_equal(after.select(1), state.select(1))
        assert after.get_cache_info().tokens_seen[1] == state.get_cache_info().tokens_seen[1]


def test_a_full_mask_is_no_mask(model):
    ids = token_ids(2, 20)
    whole, end = run(model, ids)
    full = np.ones((2, 20), bool)
    for mask in (full, full.astype(int).tolist(), model.nn.from_numpy(full)):
        logits, state = run(model, ids, mask=mask)
        assert_close(logits, whole)
        assert_states_close(state, end)


# --- law 3 -------------------------------------------------------------------------------------------------------


def moved(state: Any, nn: Any) -> Any:
    """The state in another backend, through host memory."""
    arrays = {name: nn.from_numpy(array.copy()) for name, array in state_arrays(state).items()}
    layers = [LayerState(arrays[f"layers.{i}.conv_state"], arrays[f"layers.{i}.ssm_state"]) for i in range(3)]
    return nn.InferenceParams(tuple(layers), arrays["tokens_seen"])


@ALL_INSTALLED
@pytest.mark.parametrize("by_file", [False, True])
def test_a_state_moves_from_torch_to_mlx_to_numpy(by_file, tmp_path):
    """The same next 64 greedy tokens, whoever read the text and whoever writes on."""
    models = {name: build(get_backend(name), CONFIG, WEIGHTS) for name in BACKENDS}
    _, state = run(models["torch"], token_ids(3, 50))
    want = None
    for name in ("torch", "mlx", "numpy", "torch"):
        if by_file:
            state.save(tmp_path / "state.safetensors")
            state = models[name].load_state(tmp_path / "state.safetensors")
        else:
            state = moved(state, models[name].nn)
        tokens = [g.tokens for g in models[name].generate([[5], [6], [7]], state=state, max_new_tokens=64)]
        assert all(len(set(row)) > 10 for row in tokens), "the text repeats itself: this test would prove nothing"
        want = want or tokens
        assert tokens == want, name


@ALL_INSTALLED
def test_every_backend_reaches_the_same_state():
    states = {name: run(build(get_backend(name), CONFIG, WEIGHTS), token_ids(2, 300))[1] for name in BACKENDS}
    assert_states_close(states["torch"], states["numpy"])
    assert_states_close(states["mlx"], states["numpy"])
