"""Several sequences in one row: packed is separate, in every scan and convolution, forward and backward.

Dimensions: B batch, L length, D d_inner, N d_state, K width of the convolution.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
import test_convolution as conv
import test_scan as scans
from harness import (
    WITH_GRADIENTS,
    assert_states_close,
    backend_params,
    build,
    config_of,
    run,
    scan_params,
    state_arrays,
    token_ids,
    weights_of,
)
from test_gradients import central_differences
from tolerances import GRADIENT, assert_close, relative_error

from mambax import get_backend
from mambax.inputs import segment_ids_from_lengths

ROWS = ("u", "delta", "B", "C", "z", "x")
"""Arguments that have one row of numbers for each step."""

CONFIG = config_of()
WEIGHTS = weights_of(CONFIG)
LENGTHS = (1, 5, 2, 40)
"""Of the texts of a packed row: one shorter than the convolution, one of a single token, none of equal length."""


def boundaries_of(batch: int, length: int) -> np.ndarray:
    """(B, L): anywhere in row 0, next to each other in row 1, at the very first step in row 2, nowhere in row 3."""
    begins = np.random.default_rng(length).random((batch, length)) < 0.2
    begins[1] = False
    begins[1, length // 2 : length // 2 + 3] = True
    begins[2, 0] = True
    begins[3:] = False
    return begins


def separately(
    op: Any, values: dict[str, Any], begins: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """A reference op on each sequence by itself, put together again; the final state is the last sequence's."""
    outputs, finals = [], []
    for row in range(begins.shape[0]):
        cuts = [0, *(np.flatnonzero(begins[row, 1:]) + 1), begins.shape[1]]
        parts = []
        for start, stop in itertools.pairwise(cuts):
            piece = {name: v[row : row + 1, start:stop] if name in ROWS else v for name, v in values.items()}
            fresh = start > 0 or begins[row, 0]
            kept = values["initial_state"][row : row + 1]
            y, final = op(**(piece | {"initial_state": np.zeros_like(kept) if fresh else kept}), **options)
            parts.append(y)
        outputs.append(np.concatenate(parts, 1))
        finals.append(final)
    return np.concatenate(outputs), np.concatenate(finals)


@scans.SCANS
@pytest.mark.parametrize("length", [1, 7, 300])
def test_a_packed_scan_is_separate_scans(backend, impl, length):
    values, begins = scans.arguments(length, batch=4), boundaries_of(4, length)
    got = scans.call(backend, impl, values | {"boundaries": begins}, delta_softplus=True)
    want = separately(reference.scan, values, begins, delta_softplus=True)
    assert_close(got[0], want[0], what="y")
    assert_close(got[1], want[1], what="final state")


@scans.SCANS
def test_a_boundary_forgets_what_never_decays(backend, impl):
    """With steps that keep everything, a reset by a strong decay would leave something behind."""
    values, begins = scans.arguments(70, batch=4), boundaries_of(4, 70)
    values |= {"A": np.full((5, 3), -1e-6, np.float32), "initial_state": np.full((4, 5, 3), 1e4, np.float32)}
    got = scans.call(backend, impl, values | {"boundaries": begins}, delta_softplus=True)
    want = separately(reference.scan, values, begins, delta_softplus=True)
    for row in range(4):
        assert_close(got[0][row], want[0][row], tolerance=1e-4 if impl == "logcumsumexp" else 0.0)


@conv.WIDTHS
@conv.LENGTHS
def test_a_packed_convolution_is_separate_convolutions(nn, width, length):
    values = conv.arguments(length, width, batch=4)
    begins = boundaries_of(4, length)
    y, final = conv.call(nn, values | {"boundaries": begins})
    want = separately(reference.convolution, values, begins)
    assert_close(y, want[0], what="y")
    np.testing.assert_array_equal(final, want[1])


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_a_mask_and_boundaries_together_are_refused(nn, op):
    values = scans.arguments(4) if op == "selective_scan" else conv.arguments(4, 3, batch=2)
    both = {"mask": np.ones((2, 4), bool), "boundaries": np.zeros((2, 4), bool)}
    arrays = {name: nn.from_numpy(value) for name, value in {**values, **both}.items()}
    with pytest.raises(ValueError, match=f"{op}: found a mask and boundaries; expected one of them"):
        getattr(nn, op)(**arrays)


@cache
def expected_gradients(
    op: str,
) -> tuple[dict[str, np.ndarray], np.ndarray, list[np.ndarray], dict[str, np.ndarray]]:
    """(values, boundaries, probes, gradients) of a packed op, by central differences of the separate reference."""
    begins = boundaries_of(3, 9)
    if op == "selective_scan":
        values, function = scans.arguments(9, batch=3, channels=2, n=2), reference.scan
        options = {"delta_softplus": True}
    else:
        values, function, options = conv.arguments(9, 4, batch=3, channels=2), reference.convolution, {}
    wide = {name: np.float64(value) for name, value in values.items()}
    rng = np.random.default_rng(0)
    shapes = [array.shape for array in separately(function, wide, begins, **options)]
    probes = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def loss() -> float:
        results = separately(function, wide, begins, **options)
        return sum(float((a * p).sum()) for a, p in zip(results, probes, strict=True))

    return values, begins, probes, {name: central_differences(loss, wide[name]) for name in wide}


def gradients_of(nn: Any, op: str, begins: np.ndarray | None, **options: Any) -> dict[str, np.ndarray]:
    values, _, probes, _ = expected_gradients(op)
    if op == "selective_scan":
        options["delta_softplus"] = True
    if begins is not None:
        options["boundaries"] = nn.from_numpy(begins)

    def loss(arrays: dict[str, Any]) -> Any:
        results = getattr(nn, op)(**arrays, **options)
        return sum((a * nn.from_numpy(p)).sum() for a, p in zip(results, probes, strict=True))

    if nn.name == "torch":
        arrays = {name: nn.from_numpy(value).requires_grad_() for name, value in values.items()}
        loss(arrays).backward()
        return {name: array.grad.numpy() for name, array in arrays.items()}
    import mlx.core as mx

    found = mx.grad(loss)({name: nn.from_numpy(value) for name, value in values.items()})
    return {name: np.array(array) for name, array in found.items()}


@pytest.mark.parametrize(("backend", "impl"), scan_params(WITH_GRADIENTS))
def test_gradients_of_a_packed_scan(backend, impl):
    _, begins, _, want = expected_gradients("selective_scan")
    got = gradients_of(get_backend(backend), "selective_scan", begins, impl=impl)
    for name in want:
        assert_close(got[name], want[name], what=name, tolerance=GRADIENT["float32"])


@pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
def test_gradients_of_a_packed_convolution(backend):
    _, begins, _, want = expected_gradients("causal_conv1d")
    got = gradients_of(get_backend(backend), "causal_conv1d", begins)
    for name in want:
        assert_close(got[name], want[name], what=name, tolerance=GRADIENT["float32"])


@pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_a_forgotten_or_shifted_boundary_is_caught(backend, op):
    _, begins, _, want = expected_gradients(op)
    name = "u" if op == "selective_scan" else "x"
    for wrong in (None, np.roll(begins, 1, axis=1)):
        got = gradients_of(get_backend(backend), op, wrong)
        assert relative_error(got[name], want[name]) > 30 * GRADIENT["float32"]


# --- whole models ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(nn: Any) -> Any:
    return build(nn, CONFIG, WEIGHTS)


def test_a_packed_row_is_its_texts_one_by_one(model):
    ids = token_ids(2, sum(LENGTHS))
    segments = np.repeat(segment_ids_from_lengths(LENGTHS), 2, axis=0)
    logits, state = run(model, ids, segment_ids=segments)
    start = 0
    for length in LENGTHS:
        part = ids[:, start : start + length]
        alone, end = run(model, part)
        assert_close(logits[:, start : start + length], alone)
        assert_close(alone, reference.logits(WEIGHTS, part))
        start += length
    assert_states_close(state, end)


def test_rows_packed_differently(model):
    ids = token_ids(2, 20)
    segments = np.array([[7] * 3 + [2] * 17, [0] * 20])
    logits, state = run(model, ids, segment_ids=segments.tolist())
    for row, start in ((0, 3), (1, 0)):
        alone, end = run(model, ids[row : row + 1, start:])
        assert_close(logits[row, start:], alone[0])
        for name, array in state_arrays(end).items():
            assert_close(state_arrays(state)[name][row], array[0], what=name)


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 11])
def test_windows_into_packed_rows_are_the_whole_rows(model, cut):
    """Truncated windows: the first text of a window goes on, unless the window begins with a text."""
    ids, begins = token_ids(2, 12), np.zeros((2, 12), bool)
    begins[:, 5] = begins[1, 9] = True
    whole, end = run(model, ids, boundaries=begins)
    first, state = run(model, ids[:, :cut], boundaries=begins[:, :cut])
    second, state = run(model, ids[:, cut:], state, boundaries=begins[:, cut:])
    assert_close(np.concatenate([first, second], 1), whole)
    assert_states_close(state, end)


def test_segment_ids_continue_the_state_at_the_first_position(model):
    ids = token_ids(1, 10)
    whole, _ = run(model, ids)
    _, state = run(model, ids[:, :6])
    logits, _ = run(model, ids[:, 6:], state, segment_ids=[[3, 3, 3, 3]])
    assert_close(logits, whole[:, 6:])


BAD = {
    "two of them": ({"segment_ids": [[0, 1]], "boundaries": [[False, True]]}, "found segment_ids and boundaries"),
    "with a mask": ({"segment_ids": [[0, 1]], "mask": [[True, True]]}, "found segment_ids and mask"),
    "shape": ({"segment_ids": [[0, 1, 2]]}, r"segment_ids: expected \(batch, length\) = \(1, 2\), found \(1, 3\)"),
    "fractions": ({"segment_ids": [[0.5, 1.0]]}, "expected whole numbers, found float64"),
    "numbers for truths": ({"boundaries": [[0, 1]]}, "expected True and False, found int64"),
    "shape of boundaries": ({"boundaries": [[True]]}, r"boundaries: expected \(batch, length\) = \(1, 2\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(model, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        model([[1, 2]], **options)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_lengths_that_no_row_can_have(lengths):
    with pytest.raises(ValueError, match="expected at least one, each 1 or more"):
        segment_ids_from_lengths(lengths)
