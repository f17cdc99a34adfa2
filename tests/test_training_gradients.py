"""The gradient of a run's loss, through packed texts and windows, against differences of the float64 recurrence.

Dimensions: B batch, L length.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
from harness import WITH_GRADIENTS, backend_params, build, config_of, weights_of
from tolerances import GRADIENT, relative_error
from training_runs import config

from mambax import get_backend
from mambax.training import Batch
from mambax.training.engine import make_engine

CONFIG = config_of(d_model=6, n_layer=2, d_state=3, d_conv=3, dt_rank=2, vocab_size=11)
WEIGHTS = weights_of(CONFIG)
LENGTH, CUT = 12, 6
BEGINS = ((0, 5, 8), (0, 7))  # of the texts in each row; the cut is inside one, and just before another begins
RNG = np.random.default_rng(3)
IDS = RNG.integers(0, 11, (2, LENGTH))
BOUNDARIES = np.array([[place in begins for place in range(LENGTH)] for begins in BEGINS])
TARGETS = np.where(np.roll(BOUNDARIES, -1, 1), -100, np.roll(IDS, -1, 1))  # no text predicts the next one
ITEMS = int((TARGETS != -100).sum())
F32 = GRADIENT["float32"]
DIRECTIONS = {name: RNG.standard_normal((4, *array.shape)) for name, array in WEIGHTS.items()}


def texts() -> list[tuple[int, int, int]]:
    """(row, first, end) of each."""
    return [
        (row, first, end)
        for row, begins in enumerate(BEGINS)
        for first, end in zip(begins, (*begins[1:], LENGTH), strict=True)
    ]


def loss(values: reference.Weights, at_the_cut: dict[int, Any] | None = None) -> float:
    """Of each text alone; with states at the cut, as if they did not depend on the weights."""
    total = 0.0
    for row, first, end in texts():
        logits, _ = reference.logits_row(values, IDS[row, first:end])
        if at_the_cut is not None and first < CUT < end:
            before, _ = reference.logits_row(values, IDS[row, first:CUT])
            after, _ = reference.logits_row(values, IDS[row, CUT:end], at_the_cut[row])
            logits = np.concatenate([before, after])
        likely = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        total -= likely[np.arange(end - first - 1), IDS[row, first + 1 : end]].sum()
    return total / ITEMS


@cache
def expected(truncated: bool) -> dict[str, np.ndarray]:
    """Derivatives along four directions for each parameter, by central differences."""
    values = {name: np.array(array, np.float64) for name, array in WEIGHTS.items()}
    cut = None
    if truncated:
        over = [text for text in texts() if text[1] < CUT < text[2]]
        cut = {row: reference.logits_row(values, IDS[row, first:CUT])[1] for row, first, _ in over}

    def along(name: str, direction: np.ndarray, step: float = 1e-5) -> float:
        kept = values[name]
        ends = []
        for sign in (1, -1):
            values[name] = kept + sign * step * direction
            ends.append(loss(values, cut))
        values[name] = kept
        return (ends[0] - ends[1]) / (2 * step)

    return {name: np.array([along(name, d) for d in directions]) for name, directions in DIRECTIONS.items()}


def derivatives(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.array([(array * d).sum() for d in DIRECTIONS[name]]) for name, array in gradients.items()}


def check(gradients: dict[str, np.ndarray], truncated: bool, tolerance: float) -> None:
    found, want = derivatives(gradients), expected(truncated)
    assert found.keys() == want.keys()
    for name in want:
        assert relative_error(found[name], want[name]) < tolerance, name


def windows() -> list[dict[str, np.ndarray]]:
    whole = {"input_ids": IDS, "shift_labels": TARGETS, "boundaries": BOUNDARIES}
    return [{name: array[:, cut] for name, array in whole.items()} for cut in (slice(0, CUT), slice(CUT, None))]


# differences of float64 lose digits where the derivative is small
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", F32)])
def test_through_the_loss_packed_texts_and_the_state_between_windows(dtype, tolerance):
    torch = pytest.importorskip("torch")
    model = build(get_backend("torch"), CONFIG, WEIGHTS, dtype=dtype)
    total, state = 0.0, None
    for window in windows():
        output = model(**window, state=state, num_items_in_batch=ITEMS)
        total, state = total + output.loss, output.state
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters)
    assert float(total.detach()) == pytest.approx(loss(WEIGHTS), rel=1e-6)
    check({name: array.numpy() for name, array in zip(names, found, strict=True)}, False, tolerance)


def test_the_same_in_mlx():
    mlx = pytest.importorskip("mlx.nn")
    from mlx.utils import tree_flatten

    model = build(get_backend("mlx"), CONFIG, WEIGHTS)

    def total() -> Any:
        state, found = None, 0.0
        for window in windows():
            output = model(**window, state=state, num_items_in_batch=ITEMS)
            found, state = found + output.loss, output.state
        return found

    _, tree = mlx.value_and_grad(model, total)()
    check({name: np.array(array) for name, array in tree_flatten(tree)}, False, F32)


@pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
def test_truncated_between_the_windows_of_a_step(backend):
    """What training with micro_length accumulates: the whole loss, and no gradient through the state at the cut."""
    model = build(get_backend(backend), CONFIG, WEIGHTS)
    engine = make_engine(model, config(steps=2, warmup_steps=0))
    batch = Batch(input_ids=IDS, shift_labels=TARGETS, boundaries=BOUNDARIES)
    total, state = 0.0, None
    for place in (0, CUT):
        part = engine.accumulate(batch.window(place, place + CUT), ITEMS, state)
        total, state = total + part.loss, part.state
    assert total == pytest.approx(loss(WEIGHTS), rel=1e-6)
    held: Any = engine
    gradients = (
        {name: p.grad.numpy() for name, p in model.named_parameters()}
        if backend == "torch"
        else {name: np.array(array) for name, array in held.gradients.items()}
    )
    check(gradients, True, F32)
    with pytest.raises(AssertionError):
        check(gradients, False, F32)
