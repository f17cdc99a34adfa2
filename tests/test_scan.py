"""The selective scan of every backend, by every implementation that runs here, against a float64 recurrence.

Dimensions: B batch, L length, D d_inner, N d_state.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from harness import device_of, scan_params
from tolerances import FORWARD, assert_close, relative_error

from mambax import get_backend, scan

SCANS = pytest.mark.parametrize(("backend", "impl"), scan_params(gpu=True))
ALGORITHMS = pytest.mark.parametrize("impl", sorted(scan.ALGORITHMS))
EXACT = ("auto", "sequential", "pscan", "cpu", "triton")
"""Implementations that keep their digits whatever the decay; ``logcumsumexp`` is for study and does not."""


def arguments(length: int, *, batch: int = 2, channels: int = 5, n: int = 3) -> dict[str, np.ndarray]:
    """Every argument of the scan, (B, L, D) and (B, L, N), in float32; states live for tens of steps."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels) - 3,
        "A": -np.exp(normal(channels, n)),
        "B": normal(batch, length, n),
        "C": normal(batch, length, n),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels),
        "initial_state": normal(batch, channels, n),
    }


def call(backend: str, impl: str, values: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The op of a backend on NumPy values; y and the final state as float64."""
    nn = get_backend(backend)
    device = device_of(impl)
    arrays = {
        name: None if value is None else nn.from_numpy(value, device=device) for name, value in values.items()
    }
    y, final = nn.selective_scan(**arrays, impl=impl, **options)
    assert y.dtype == arrays["u"].dtype
    assert final.dtype == (nn.float64 if arrays["u"].dtype == nn.float64 else nn.float32)
    return np.asarray(nn.to_numpy(y), np.float64), np.asarray(nn.to_numpy(final), np.float64)


def check(backend: str, impl: str, values: dict[str, Any], dtype: str = "float32", **options: Any) -> None:
    got = call(backend, impl, values, **options)
    want = reference.scan(**values, **options)
    real = values.get("mask")
    if real is not None:
        got, want = (got[0][real], got[1]), (want[0][real], want[1])
    assert_close(got[0], want[0], dtype, what="y")
    # The state stays in float32 whatever the inputs are, and the inputs are the same ones: no rounding enters.
    assert_close(got[1], want[1], "float64" if dtype == "float64" else "float32", what="final state")


@SCANS
@pytest.mark.parametrize("length", [1, 2, 3, 31, 33, 64, 255, 256, 257, 600])
def test_scan_at_every_kind_of_length(backend, impl, length):
    check(backend, impl, arguments(length), delta_softplus=True)


@SCANS
def test_scan_without_any_optional_argument(backend, impl):
    values = arguments(40)
    values["delta"] = np.abs(values["delta"]) * 0.1
    check(backend, impl, {name: values[name] for name in ("u", "delta", "A", "B", "C")})


@SCANS
@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias", "initial_state"])
def test_scan_without_one_optional_argument(backend, impl, left_out):
    check(backend, impl, arguments(13) | {left_out: None}, delta_softplus=True)


@SCANS
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 4), (1, 7, 1)])
def test_scan_of_single_channels_and_states(backend, impl, sizes):
    batch, channels, n = sizes
    for length in (1, 9):
        check(backend, impl, arguments(length, batch=batch, channels=channels, n=n), delta_softplus=True)


@SCANS
def test_scan_resumed_from_its_own_state(backend, impl):
    values = arguments(300)
    whole, end = call(backend, impl, values, delta_softplus=True)
    state, parts = values["initial_state"], []
    for part in (slice(0, 1), slice(1, 8), slice(8, 290), slice(290, 300)):
        piece = values | {name: values[name][:, part] for name in ("u", "delta", "B", "C", "z")}
        y, state = call(backend, impl, piece | {"initial_state": np.float32(state)}, delta_softplus=True)
        parts.append(y)
    assert_close(np.concatenate(parts, 1), whole)
    assert_close(state, end)


def mask_of(batch: int, length: int) -> np.ndarray:
    """Holes anywhere; row 0 padded on the right, row 1 on the left, row 2 nothing at all."""
    mask = np.random.default_rng(length).random((batch, length)) < 0.6
    mask[0, -length // 3 :] = False
    mask[1, : length // 3] = False
    mask[2] = False
    return mask


@SCANS
@pytest.mark.parametrize("length", [1, 7, 300])
def test_masked_steps_do_not_exist(backend, impl, length):
    values = arguments(length, batch=4) | {"mask": mask_of(4, length)}
    check(backend, impl, values, delta_softplus=True)
    _, final = call(backend, impl, values, delta_softplus=True)
    assert_close(final[2], values["initial_state"][2], what="the state of a row without any step")


@SCANS
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word on the planted NaN
def test_what_stands_at_masked_steps_is_never_read(backend, impl):
    values = arguments(22, batch=4) | {"mask": mask_of(4, 22)}
    want = call(backend, impl, values, delta_softplus=True)
    for name in ("u", "delta", "B", "C", "z"):
        values[name] = np.where(values["mask"][..., None], values[name], np.float32(np.nan))
    y, final = call(backend, impl, values, delta_softplus=True)
    np.testing.assert_array_equal(y[values["mask"]], want[0][values["mask"]])
    np.testing.assert_array_equal(final, want[1])


@SCANS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs_are_computed_in_float32(backend, impl, dtype):
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    values = arguments(300)
    values |= {name: values[name].astype(narrow) for name in ("u", "delta", "B", "C", "z")}
    check(backend, impl, values, dtype, delta_softplus=True)


@SCANS
def test_float64_inputs_are_computed_in_float64(backend, impl):
    if backend == "mlx":
        pytest.skip("MLX computes float64 on the CPU alone and only in part; its backend refuses it")
    if impl == "logcumsumexp":
        pytest.skip("bounded by its own table below")
    values = {name: np.float64(value) for name, value in arguments(300).items()}
    if impl in ("cpu", "triton"):
        with pytest.raises(ValueError, match=rf"'{impl}' cannot run here: .* float64"):
            call(backend, impl, values, delta_softplus=True)
        return
    check(backend, impl, values, "float64", delta_softplus=True)


@SCANS
@pytest.mark.parametrize(("step", "decay"), [(50, 1000), (1e-6, 1e-6), (50, 1e-3), (1e-3, 1000), (0, 5)])
def test_extreme_steps_and_decays(backend, impl, step, decay):
    values = arguments(70)
    rng = np.random.default_rng(1)
    values |= {"delta_bias": None, "A": np.float32(-decay * rng.uniform(0.5, 1, values["A"].shape))}
    values["delta"] = np.float32(step * rng.uniform(0.5, 1, values["delta"].shape))
    if impl in EXACT:
        check(backend, impl, values)
    else:  # finite, at the least, and never larger than the recurrence can be
        y, final = call(backend, impl, values)
        want = reference.scan(**values)
        assert np.isfinite(y).all()
        assert np.isfinite(final).all()
        assert relative_error(y, want[0]) < 2e-2


@SCANS
def test_steps_that_forget_everything_beside_steps_that_keep_everything(backend, impl):
    """Resets inside a chunk: differences of running sums lose the digits here, products do not."""
    values = arguments(256) | {"delta_bias": None}
    values["delta"] = np.full_like(values["delta"], 1e-3)
    values["delta"][:, ::37] = 50.0
    values["A"] = -np.exp(np.random.default_rng(3).uniform(-3, 6, values["A"].shape)).astype(np.float32)
    if impl in EXACT:
        check(backend, impl, values)
    else:
        assert relative_error(call(backend, impl, values)[0], reference.scan(**values)[0]) < 2e-2


@SCANS
def test_softplus_of_very_negative_and_very_large_steps(backend, impl):
    values = arguments(20) | {"D": None}
    values["delta"] = np.linspace(-60, 60, values["delta"].size, dtype=np.float32).reshape(values["delta"].shape)
    if impl in EXACT:
        check(backend, impl, values, delta_softplus=True)
    tiny = arguments(20) | {"D": None, "initial_state": None, "delta_bias": None}
    tiny["delta"] = np.full_like(tiny["delta"], -30.0)  # log(1 + exp(-30)) is 0 where 1 + exp(-30) rounds to 1
    check(backend, impl, tiny, delta_softplus=True)


ERRORS = {
    # implementation: the most that it may be off by, at (length, delta): measured, with a factor of about three
    "sequential": {(64, 0.01): 1e-6, (1024, 0.01): 1e-6, (64, 1.0): 1e-6, (1024, 1.0): 1e-6, (1024, 20.0): 1e-6},
    "pscan": {(64, 0.01): 1e-6, (1024, 0.01): 1e-6, (64, 1.0): 1e-6, (1024, 1.0): 1e-6, (1024, 20.0): 1e-6},
    "logcumsumexp": {(64, 0.01): 3e-6, (1024, 0.01): 3e-6, (64, 1.0): 1e-5, (1024, 1.0): 1e-5, (1024, 20.0): 3e-4},
}


@ALGORITHMS
def test_error_as_length_and_delta_grow(nn, impl):
    for (length, step), limit in ERRORS[impl].items():
        values = arguments(length, batch=1) | {"delta_bias": None}
        rng = np.random.default_rng(length)
        values["delta"] = np.float32(step * rng.uniform(0.5, 1.5, values["delta"].shape))
        got, want = call(nn.name, impl, values), reference.scan(**values)
        assert_close(got[0], want[0], tolerance=limit, what=f"y at length {length}, delta {step}")
        assert_close(got[1], want[1], tolerance=10 * limit, what=f"state at length {length}, delta {step}")


@SCANS
def test_the_result_is_in_range_for_inputs_of_any_sign_and_zero(backend, impl):
    values = arguments(33) | {"D": None, "z": None}
    values["u"][:, ::3] = 0
    values["B"][..., 0] = 0
    values["initial_state"][:] = 0
    check(backend, impl, values, delta_softplus=True)


@pytest.mark.parametrize("plant", ["decay", "state", "mask", "gate"])
def test_planted_errors_are_caught(nn, plant):
    """One per cent in one place, or one step out of place, is far outside the tolerance."""
    values = arguments(64, batch=4) | {"mask": mask_of(4, 64)}
    want = reference.scan(**values, delta_softplus=True)[0]
    wrong = dict(values)
    if plant == "decay":
        wrong["A"] = values["A"] * np.float32(1.01)
    if plant == "state":
        wrong["initial_state"] = np.roll(values["initial_state"], 1, axis=0)
    if plant == "mask":
        wrong["mask"] = np.ones_like(values["mask"])
    if plant == "gate":
        wrong["z"] = np.roll(values["z"], 1, axis=1)
    got = call(nn.name, "auto", wrong, delta_softplus=True)[0]
    error = relative_error(got[values["mask"]], want[values["mask"]])
    assert error > 30 * FORWARD["float32"]
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(got[values["mask"]], want[values["mask"]])


@pytest.mark.parametrize("op", ["selective_scan", "ssd"])
def test_an_unknown_algorithm_is_refused_with_those_there_are(op):
    from mambax_numpy import ops

    from mambax import ssd

    one = np.ones((1, 1, 1), np.float32)
    if op == "ssd":
        function, given = ssd.ssd, (one[..., None], one, np.ones(1), one[..., None], one[..., None])
    else:
        function, given = scan.selective_scan, (one, one, one[0], one, one)
    with pytest.raises(ValueError, match=rf"{op}: unknown algorithm 'quick'; expected one of 'sequential', '"):
        function(ops, *given, algorithm="quick")
