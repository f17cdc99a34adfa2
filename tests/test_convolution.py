"""The causal convolution of every backend against a float64 list of inputs, one at a time.

Dimensions: B batch, L length, D channels, K width of the convolution.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from tolerances import assert_close

WIDTHS = pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
LENGTHS = pytest.mark.parametrize("length", [1, 2, 3, 5, 64])


def arguments(length: int, width: int, *, batch: int = 3, channels: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(10 * length + width)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "x": normal(batch, length, channels),
        "weight": normal(channels, 1, width),
        "bias": normal(channels),
        "initial_state": normal(batch, width - 1, channels),
    }


def call(nn: Any, values: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = {name: None if value is None else nn.from_numpy(value) for name, value in values.items()}
    y, final = nn.causal_conv1d(**arrays, **options)
    assert y.dtype == arrays["x"].dtype
    assert final.dtype == arrays["x"].dtype
    return nn.to_numpy(y), nn.to_numpy(final)


def check(nn: Any, values: dict[str, Any], dtype: str = "float32", **options: Any) -> None:
    y, final = call(nn, values, **options)
    want_y, want_final = reference.convolution(**values, **options)
    real = np.ones(y.shape[:2], bool) if values.get("mask") is None else values["mask"]
    assert_close(np.float64(y)[real], want_y[real], dtype, what="y")
    np.testing.assert_array_equal(np.float64(final), want_final)  # inputs, passed on: exact


@WIDTHS
@LENGTHS
def test_convolution(nn, width, length):
    values = arguments(length, width)
    check(nn, values)
    check(nn, values | {"bias": None}, activation=None)
    check(nn, values | {"initial_state": None})


@WIDTHS
@LENGTHS
def test_masked_positions_do_not_exist(nn, width, length):
    values = arguments(length, width)
    mask = np.random.default_rng(length).random((3, length)) < 0.6
    mask[0] = False
    mask[1, : length // 2] = False
    check(nn, values | {"mask": mask})
    want = call(nn, values | {"mask": mask})
    poisoned = np.where(mask[..., None], values["x"], np.float32(np.nan))
    got = call(nn, values | {"mask": mask, "x": poisoned})
    np.testing.assert_array_equal(got[0][mask], want[0][mask])
    np.testing.assert_array_equal(got[1], want[1])


@WIDTHS
def test_any_split_is_one_call(nn, width):
    values = arguments(23, width)
    whole, end = call(nn, values)
    state, parts = values["initial_state"], []
    for part in (slice(0, 1), slice(1, 2), slice(2, 9), slice(9, 23)):
        y, state = call(nn, values | {"x": values["x"][:, part], "initial_state": state})
        parts.append(y)
    assert_close(np.concatenate(parts, 1), whole)
    np.testing.assert_array_equal(state, end)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs_are_summed_in_float32(nn, dtype):
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    values = {name: value.astype(narrow) for name, value in arguments(50, 4).items()}
    check(nn, values, dtype)


def test_another_activation_is_refused(nn):
    with pytest.raises(ValueError, match=r"'relu'.*'silu' or None"):
        call(nn, arguments(3, 4), activation="relu")


def test_a_flipped_kernel_is_caught(nn):
    values = arguments(20, 4)
    y, _ = call(nn, values | {"weight": np.ascontiguousarray(values["weight"][..., ::-1])})
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(y, reference.convolution(**values)[0])
