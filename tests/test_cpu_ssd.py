"""The fused CPU kernels of the scan of Mamba-2 by themselves.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

import concurrent.futures
import tracemalloc

import numpy as np
import pytest
from cpu_ssd_cases import LIMITS, SIZES, flags_of, poison_memory, reference, values_of
from mambax_cpu import ssd as fused
from mambax_cpu.ssd_tiles import CHUNK
from tolerances import assert_close

from mambax import get_backend


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


@pytest.mark.parametrize("kind", ["plain", "mask", "boundaries"])
@pytest.mark.parametrize("sizes", SIZES)
def test_forward(sizes, kind):
    values, flags = values_of(*sizes), flags_of(kind, *sizes[:2])
    for limit in ((0.0, float("inf")), LIMITS):
        options = {"dt_limit": limit, **flags}
        y, final = fused.ssd(**values, dt_softplus=True, **options)
        want_y, want_final = reference(values, **options)
        real = flags.get("mask", np.ones(sizes[:2], bool))
        assert np.isfinite(y).all()
        if real.any():
            assert_close(y[real], want_y[real], what="y")
        assert_close(final, want_final, what="final state")


@pytest.mark.parametrize("length", [1, CHUNK + 3])
def test_what_is_left_out(length):
    """Without D, bias, softplus and initial state."""
    values = values_of(2, length, 4, 5, 2, 3)
    plain = {name: values[name] for name in ("x", "dt", "A", "B", "C")} | {"dt": np.abs(values["dt"])}
    got = fused.ssd(**plain)
    wide = {name: np.float64(value) for name, value in plain.items()}
    for array, want in zip(got, get_backend("numpy").ssd(**wide, impl="sequential"), strict=True):
        assert_close(array, want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("length", [1, CHUNK + 3])
def test_narrow_inputs_are_widened_as_they_are(length, dtype):
    import ml_dtypes

    narrow = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    values = {name: value.astype(narrow) for name, value in values_of(2, length, 4, 17, 2, 19).items()}
    y, final = fused.ssd(**values, dt_softplus=True)
    want_y, want_final = reference(values)
    assert (y.dtype, final.dtype) == (narrow, np.float32)
    assert_close(final, want_final, what="final state")  # the state is not rounded
    assert_close(y, want_y, dtype, what="y")


def test_inputs_that_lie_apart_in_memory():
    values = values_of(2, CHUNK + 9, 4, 6, 2, 5)
    want = fused.ssd(**values, dt_softplus=True)
    batch, length = values["x"].shape[:2]
    joined = np.concatenate([values[name].reshape(batch, length, -1) for name in ("x", "B", "C", "dt")], axis=2)
    x, B, C, dt = np.split(joined, np.cumsum([24, 10, 10]), axis=2)  # views, as a layer takes them of one product
    apart = {"x": x.reshape(batch, length, 4, 6), "B": B.reshape(batch, length, 2, 5),
             "C": C.reshape(batch, length, 2, 5), "dt": dt}  # fmt: skip
    assert x.base is not None
    turned = {"x": np.asfortranarray(values["x"]), "initial_state": np.asfortranarray(values["initial_state"])}
    for other in (apart, turned):
        for got, array in zip(fused.ssd(**(values | other), dt_softplus=True), want, strict=True):
            np.testing.assert_array_equal(got, array)


def everything(threads: int) -> list[np.ndarray]:
    given = fused.arguments(**values_of(2, 2 * CHUNK + 9, 6, 64, 3, 128), dt_softplus=True, dt_limit=LIMITS)
    y, final, saved = fused.forward(given, save=True, threads=threads)
    return [y, final, *fused.backward(given, saved, np.cos(y), np.sin(final), threads=threads)]


def test_the_same_bits_for_any_number_of_threads():
    want = everything(1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # of callers at once, too
        for results in pool.map(everything, [2, 3, 5, 8]):
            for got, array in zip(results, want, strict=True):
                np.testing.assert_array_equal(got, array)


def test_nothing_that_a_mask_leaves_out_is_read_and_nothing_crosses_a_boundary():
    sizes = (1, 2 * CHUNK + 9, 4, 5, 2, 3)
    values = values_of(*sizes)
    mask = flags_of("mask", *sizes[:2])["mask"]
    want = fused.ssd(**values, dt_softplus=True, mask=mask)
    spoiled = {name: values[name].copy() for name in ("x", "dt", "B", "C")}
    for array in spoiled.values():
        array[~mask] = np.nan
    got = fused.ssd(**(values | spoiled), dt_softplus=True, mask=mask)
    np.testing.assert_array_equal(got[0][mask], want[0][mask])
    np.testing.assert_array_equal(got[1], want[1])

    for at in (1, 9, CHUNK, CHUNK + 5):
        boundaries = np.arange(sizes[1])[None] == at
        spoiled = {name: values[name].copy() for name in ("x", "dt", "B", "C")}
        for array in spoiled.values():
            array[:, :at] = np.inf
        got = fused.ssd(**(values | spoiled), dt_softplus=True, boundaries=boundaries)
        alone = {name: values[name][:, at:] for name in spoiled} | {"initial_state": None}
        want = fused.ssd(**(values | alone), dt_softplus=True)
        assert_close(got[0][:, at:], want[0])
        assert_close(got[1], want[1])


def test_strong_decays():
    values = values_of(1, 2 * CHUNK + 9, 2, 5, 1, 7)
    values["A"] = np.float32([-1000, -1e-4])
    values["dt"] = np.random.default_rng(1).choice(np.float32([-40, -3, 0, 50]), values["dt"].shape)
    for got, want in zip(fused.ssd(**values, dt_softplus=True), reference(values), strict=True):
        assert_close(got, want)
    given = fused.arguments(**values, dt_softplus=True)
    y, final, saved = fused.forward(given, save=True)
    gradients = fused.backward(given, saved, y, final)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_no_memory_grows_with_length_times_d_state():
    """What a backward pass holds, besides results, is a state for each chunk."""
    sizes = (1, 16 * CHUNK, 4, 16, 1, 128)
    given = fused.arguments(**values_of(*sizes), dt_softplus=True)
    tracemalloc.start()
    y, final, saved = fused.forward(given, save=True, threads=1)
    fused.backward(given, saved, y, final, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expanded = 4 * sizes[1] * sizes[2] * sizes[3] * sizes[5]
    assert saved.nbytes * CHUNK == expanded
    assert peak < expanded / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dt": np.zeros((2, 9, 3), np.float32)}, r"dt must be of shape \(2, 9, 4\)"),
        ({"C": np.zeros((2, 9, 1, 3), np.float32)}, r"C must be of shape \(2, 9, 2, 3\)"),
        ({"initial_state": np.zeros((2, 4, 3, 5), np.float32)}, r"initial_state must be of shape \(2, 4, 5, 3\)"),
        ({"B": np.zeros((2, 9, 3, 3), np.float32)}, "4 heads cannot be shared by 3 groups"),
        ({"x": np.zeros((2, 9, 20), np.float32)}, r"x must be \(B, L, H, P\)"),
        ({"x": np.zeros((2, 9, 4, 5))}, "found float64 values"),
        ({"mask": np.ones((2, 9), bool), "boundaries": np.zeros((2, 9), bool)}, "mask"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        fused.ssd(**(values_of(2, 9, 4, 5, 2, 3) | changes))


def test_backward_says_what_it_lacks():
    given = fused.arguments(**values_of(2, 9, 4, 5, 2, 3))
    y, _, saved = fused.forward(given, save=True)
    with pytest.raises(ValueError, match="save=True"):
        fused.backward(given, None, y)
    with pytest.raises(ValueError, match="the gradient of y must be of shape"):
        fused.backward(given, saved, y[:, 1:])
