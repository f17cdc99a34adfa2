"""The fused CPU kernels by themselves: what the tests of the ops, which run them too, do not reach.

Dimensions: B batch, L length, D channels, N d_state, K width of the convolution.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from harness import TORCH
from kernel_cases import of_lanes
from mambax_cpu import convolution, scan
from mambax_cpu.tiles import SCAN_GROUP as GROUP
from mambax_cpu.tiles import SCAN_TILE as TILE
from mambax_cpu.tiles import WIDTH
from tolerances import GRADIENT, assert_close, relative_error

SPAN = GROUP * WIDTH
SIZES = [  # (B, L, D, N): borders of tiles, of blocks of channels and of groups of blocks
    (1, 1, 1, 1),
    (2, 1, WIDTH + 1, 17),
    (1, TILE - 1, WIDTH - 1, 3),
    (2, TILE, WIDTH, 16),
    (1, TILE + 1, 2 * SPAN, 5),
    (2, 3 * TILE + 5, SPAN + WIDTH + 3, 4),
    (3, 2 * TILE + 1, 5, 33),
]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def scan_values(batch: int, length: int, channels: int, n: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "u": normal(rng, batch, length, channels),
        "delta": normal(rng, batch, length, channels) - 2,
        "A": -np.exp(normal(rng, channels, n)),
        "B": normal(rng, batch, length, n),
        "C": normal(rng, batch, length, n),
        "D": normal(rng, channels),
        "z": normal(rng, batch, length, channels),
        "delta_bias": normal(rng, channels),
        "initial_state": normal(rng, batch, channels, n),
    }


def conv_values(batch: int, length: int, channels: int, width: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "x": normal(rng, batch, length, channels),
        "weight": normal(rng, channels, 1, width),
        "bias": normal(rng, channels),
        "initial_state": normal(rng, batch, width - 1, channels),
    }


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is to write holds NaN before: nothing can be left out, or read before it is written."""

    def poison(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    for module in (scan, convolution):
        monkeypatch.setattr(module, "room", poison)


# --- functions of sixteen lanes ----------------------------------------------------------------------------------


def functions(x: np.ndarray) -> dict[str, np.ndarray]:
    padded = np.zeros(-(-x.size // WIDTH) * WIDTH, np.float32)
    padded[: x.size] = x
    results = np.full((4, padded.size), np.nan, np.float32)
    of_lanes(padded, results, padded.size)
    return dict(zip(("exp2", "exp", "softplus", "sigmoid"), results[:, : x.size], strict=True))


def test_functions_are_accurate_to_units_of_the_last_place():
    x = np.concatenate([np.linspace(-86, 86, 200_001), np.linspace(-1, 1, 100_001), -np.logspace(-30, 0, 1001)])
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    want = {
        "exp2": np.exp2(wide),
        "exp": np.exp(wide),
        "softplus": np.logaddexp(wide, 0),
        "sigmoid": 1 / (1 + np.exp(-wide)),
    }
    limits = {"exp2": 1.5, "exp": 2, "softplus": 4, "sigmoid": 3}
    for name, got in functions(x).items():
        ulps = np.abs(got - want[name]) / np.spacing(want[name].astype(np.float32))
        assert ulps.max() < limits[name], name


def test_functions_at_their_ends():
    x = np.array([-np.inf, -1e30, -50_000, -130, -0.0, 0, 130, 1e30, np.inf, np.nan], np.float32)
    got = functions(x)
    inf, nan = np.inf, np.nan
    np.testing.assert_array_equal(got["exp2"], np.float32([0, 0, 0, 0, 1, 1, inf, inf, inf, nan]))
    np.testing.assert_array_equal(got["exp"], np.float32([0, 0, 0, 0, 1, 1, inf, inf, inf, nan]))
    np.testing.assert_array_equal(got["sigmoid"], np.float32([0, 0, 0, 0, 0.5, 0.5, 1, 1, 1, nan]))
    two = np.float32(np.log(2))
    np.testing.assert_array_equal(got["softplus"], np.float32([0, 0, 0, 0, two, two, 130, 1e30, inf, nan]))


# --- forward -----------------------------------------------------------------------------------------------------


def mask_of(batch: int, length: int) -> np.ndarray:
    mask = np.random.default_rng(length).random((batch, length)) < 0.7
    mask[0, : length // 3] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_scan(sizes, masked):
    values = scan_values(*sizes)
    mask = mask_of(*sizes[:2]) if masked else None
    y, final = scan.selective_scan(**values, delta_softplus=True, mask=mask)
    want_y, want_final = reference.scan(**values, delta_softplus=True, mask=mask)
    real = np.ones(sizes[:2], bool) if mask is None else mask
    assert np.isfinite(y).all()
    assert_close(y[real], want_y[real], what="y")
    assert_close(final, want_final, what="final state")


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize(("length", "channels"), [(1, 1), (2, WIDTH + 1), (65, WIDTH), (200, 3 * WIDTH - 1)])
def test_convolution(length, channels, width):
    values = conv_values(2, length, channels, width)
    y, final = convolution.causal_conv1d(**values)
    want_y, want_final = reference.convolution(**values)
    assert_close(y, want_y)
    np.testing.assert_array_equal(final, want_final)


def views_of(array: np.ndarray) -> list[np.ndarray]:
    """The same values in every layout that NumPy can give them."""
    reversed_twice = np.ascontiguousarray(array[::-1])[::-1]
    last_axis_far = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    holes = np.repeat(array, 2, axis=-1)[..., ::2]
    wide = np.full((*array.shape[:-1], array.shape[-1] + 3), np.nan, np.float32)
    wide[..., 1:-2] = array
    raw = np.zeros(array.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(array.shape)
    unaligned[...] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    wider = array.astype(np.float64).astype(">f4")
    return [reversed_twice, np.moveaxis(last_axis_far, 0, -1), holes, wide[..., 1:-2], unaligned, read_only, wider]


@pytest.mark.parametrize("layout", range(7))
def test_any_memory_layout_gives_the_same_bits(layout):
    values = scan_values(2, TILE + 3, WIDTH + 3, 5)
    want = scan.selective_scan(**values, delta_softplus=True)
    got = scan.selective_scan(**{name: views_of(v)[layout] for name, v in values.items()}, delta_softplus=True)
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), want[0])
    np.testing.assert_array_equal(got[1], want[1])
    values = conv_values(2, 9, WIDTH + 3, 4)
    want = convolution.causal_conv1d(**values)
    got = convolution.causal_conv1d(**{name: views_of(v)[layout] for name, v in values.items()})
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), want[0])
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_values_are_read_and_written_as_they_are(dtype):
    values = scan_values(2, TILE + 3, WIDTH + 3, 5)
    wide = np.zeros((2, TILE + 3, 2 * (WIDTH + 3)), dtype)
    wide[..., ::2], wide[..., 1::2] = values["u"], values["z"]
    narrow = values | {"u": wide[..., : WIDTH + 3], "z": wide[..., WIDTH + 3 :]}
    same = values | {name: narrow[name].astype(np.float32) for name in ("u", "z")}
    for length in (TILE + 3, 1):
        cut = {n: v[:, :length] if n in ("u", "delta", "B", "C", "z") else v for n, v in narrow.items()}
        want = scan.selective_scan(**{n: np.float32(v) for n, v in cut.items()}, delta_softplus=True)
        got = scan.selective_scan(**cut, delta_softplus=True)
        assert scan.arguments(**cut).u.dtype == dtype
        np.testing.assert_array_equal(got[0], want[0].astype(dtype))
        np.testing.assert_array_equal(got[1], want[1])
    given, wide_given = scan.arguments(**narrow), scan.arguments(**same)
    saved = scan.forward(given, save=True)[2]
    for name, gradient in scan.backward(given, saved, values["z"])._asdict().items():
        np.testing.assert_array_equal(gradient, getattr(scan.backward(wide_given, saved, values["z"]), name))
    inputs = {name: v.astype(dtype) for name, v in conv_values(2, 70, WIDTH + 3, 4).items()}
    want = convolution.causal_conv1d(**{name: v.astype(np.float32) for name, v in inputs.items()})
    got = convolution.causal_conv1d(**inputs)
    assert convolution.arguments(**inputs).x.dtype == dtype
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other.astype(dtype))


def test_broadcast_arguments():
    values = scan_values(1, 40, 5, 3)
    batched = {n: np.broadcast_to(v, (3, *v.shape[1:])) if v.ndim == 3 else v for n, v in values.items()}
    want = scan.selective_scan(**values, delta_softplus=True)
    got = scan.selective_scan(**batched, delta_softplus=True)
    for row in range(3):
        np.testing.assert_array_equal(got[0][row], want[0][0])
        np.testing.assert_array_equal(got[1][row], want[1][0])


def test_nothing_to_do():
    values = scan_values(2, 3, 5, 3)
    empty = values | {name: values[name][:, :0] for name in ("u", "delta", "B", "C", "z")}
    y, final = scan.selective_scan(**empty, delta_softplus=True)
    assert y.shape == (2, 0, 5)
    np.testing.assert_array_equal(final, values["initial_state"])
    none = {name: v[:0] if v.ndim == 3 else v for name, v in values.items()}
    assert scan.selective_scan(**none)[0].shape == (0, 3, 5)
    convolved = conv_values(2, 0, 5, 4)
    y, final = convolution.causal_conv1d(**convolved)
    assert y.shape == (2, 0, 5)
    np.testing.assert_array_equal(final, convolved["initial_state"])


def test_one_step_is_the_first_step_of_many_and_needs_no_thread(monkeypatch):
    values = scan_values(2, 2, 1000, 16)
    whole = scan.selective_scan(**values, delta_softplus=True)
    asked = []
    monkeypatch.setattr(scan, "run", lambda work, count, threads: (asked.append(threads), work(0, count)))
    state, parts = values["initial_state"], []
    for t in range(2):
        step = values | {name: values[name][:, t : t + 1] for name in ("u", "delta", "B", "C", "z")}
        y, state = scan.selective_scan(**step | {"initial_state": state}, delta_softplus=True)
        parts.append(y)
    assert asked == [1, 1]
    assert_close(np.concatenate(parts, 1), whole[0])
    assert_close(state, whole[1])


# --- backward ----------------------------------------------------------------------------------------------------


def torch_leaves(values: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in values.items()}


@TORCH
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_of_the_scan(sizes, masked):
    import torch
    from mambax_torch import ops

    from mambax import scan as algorithms

    values = scan_values(*sizes)
    mask = mask_of(*sizes[:2]) if masked else None
    rng = np.random.default_rng(1)
    dy, dfinal = normal(rng, *sizes[:3]), normal(rng, sizes[0], *sizes[2:])
    given = scan.arguments(**values, delta_softplus=True, mask=mask)
    got = scan.backward(given, scan.forward(given, save=True)[2], dy, dfinal)

    leaves = torch_leaves(values)
    real = torch.ones(sizes[:2], dtype=torch.bool) if mask is None else torch.from_numpy(mask)
    y, final = algorithms.selective_scan(ops, **leaves, delta_softplus=True, mask=real)
    ((y * real[..., None] * torch.from_numpy(dy)).sum() + (final * torch.from_numpy(dfinal)).sum()).backward()
    for name, gradient in got._asdict().items():
        assert_close(gradient, leaves[name].grad.numpy(), what=name, tolerance=GRADIENT["float32"])


@TORCH
@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias", "initial_state"])
def test_gradients_of_the_scan_without_one_argument(left_out):
    import torch
    from mambax_torch import ops

    from mambax import scan as algorithms

    values = scan_values(2, TILE + 3, 7, 3)
    values |= {"delta": np.abs(values["delta"]), "delta_bias": np.abs(values["delta_bias"])}  # no softplus here
    del values[left_out]
    dy = normal(np.random.default_rng(1), 2, TILE + 3, 7)
    given = scan.arguments(**values)
    got = scan.backward(given, scan.forward(given, save=True)[2], dy)._asdict()
    assert got.pop(left_out) is None
    leaves = torch_leaves(values)
    (algorithms.selective_scan(ops, **leaves)[0] * torch.from_numpy(dy)).sum().backward()
    for name, gradient in got.items():
        assert_close(gradient, leaves[name].grad.numpy(), what=name, tolerance=GRADIENT["float32"])


@TORCH
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize(("length", "channels"), [(1, 1), (2, WIDTH + 1), (65, WIDTH), (200, 3 * WIDTH - 1)])
def test_gradients_of_the_convolution(length, channels, width, with_state, activation):
    import torch
    from mambax_torch import ops

    from mambax.convolution import causal_conv1d

    values = conv_values(2, length, channels, width)
    if not with_state:
        del values["initial_state"]
    dy = normal(np.random.default_rng(1), 2, length, channels)
    got = convolution.backward(convolution.arguments(**values, activation=activation), dy)._asdict()
    leaves = torch_leaves(values)
    y, _ = causal_conv1d(ops, **leaves, activation=activation)
    (y * torch.from_numpy(dy)).sum().backward()
    for name, leaf in leaves.items():
        want = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        assert_close(got[name], want, what=name, tolerance=GRADIENT["float32"])


def test_gradients_at_extremes_are_finite():
    values = scan_values(1, TILE + 1, 20, 4) | {"A": np.full((20, 4), -1000, np.float32)}
    for delta in (50.0, -50.0, 1e30, -1e30):
        values["delta"] = np.full_like(values["delta"], delta)
        if delta == 1e30:  # delta u is out of range there, whatever computes it
            values["u"] = np.zeros_like(values["u"])
        given = scan.arguments(**values, delta_softplus=True)
        y, final, saved = scan.forward(given, save=True)
        assert np.isfinite(y).all()
        assert np.isfinite(final).all()
        if delta != 1e30:
            for name, gradient in scan.backward(given, saved, np.ones_like(y), final)._asdict().items():
                assert np.isfinite(gradient).all(), name


def test_what_the_backward_pass_keeps_is_a_fraction_of_all_states():
    batch, length, channels, states = 2, 4096, 768, 16
    kept = np.prod(scan.saved_shape(batch, length, channels, states))
    assert kept * TILE == batch * length * channels * states
    assert kept < batch * length * channels


# --- planted errors ----------------------------------------------------------------------------------------------


def test_planted_errors_are_caught():
    values = scan_values(2, TILE + 9, 20, 4)
    want = reference.scan(**values, delta_softplus=True)[0]
    for name, wrong in {
        "A": values["A"] * np.float32(1.01),
        "B": np.roll(values["B"], 1, axis=1),
        "initial_state": np.zeros_like(values["initial_state"]),
    }.items():
        got = scan.selective_scan(**values | {name: wrong}, delta_softplus=True)[0]
        assert relative_error(got, want) > 1e-4, name
    given = scan.arguments(**values)
    y, _, saved = scan.forward(given, save=True)
    assert saved is not None
    right, lost = scan.backward(given, saved, y), scan.backward(given, np.zeros_like(saved), y)
    assert relative_error(lost.A, right.A) > 30 * GRADIENT["float32"]
