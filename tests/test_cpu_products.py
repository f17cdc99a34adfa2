"""Products of many rows by the fused CPU kernels, against float64.

Dimensions: M rows, N columns, K inner.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mambax_cpu import linear, products
from mambax_cpu.tiles import BLOCK, STRIP
from tolerances import assert_close, relative_error

from mambax import quantization

SIZES = [  # (M, K, N): borders of tiles, of strips, of squares that are transposed, and of blocks of the sum
    (1, 1, 1),
    (7, 15, 17),
    (8, 16, STRIP),
    (37, 33, STRIP + 1),
    (130, 1, STRIP - 1),
    (64, 48, 3 * STRIP + 16),
    (17, BLOCK, 20),
    (9, 2 * BLOCK + 3, STRIP + 5),
    (300, 70, 200),
]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is to write holds NaN before."""
    monkeypatch.setattr(products, "room", lambda *shape: np.full(shape, np.nan, np.float32))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_product(sizes, with_bias):
    rows, inner, columns = sizes
    a, b = normal(rows, inner), normal(columns, inner, seed=1)
    bias = normal(columns, seed=2) if with_bias else None
    want = a.astype(np.float64) @ b.astype(np.float64).T + (0 if bias is None else bias)
    got = products.product(a, b, bias, threads=1)
    assert_close(got, want, tolerance=2e-6)
    for threads in (2, 3):
        np.testing.assert_array_equal(products.product(a, b, bias, threads=threads), got)


@pytest.mark.parametrize("sizes", SIZES)
def test_any_memory_layout_gives_the_same_bits(sizes):
    rows, inner, columns = sizes
    a, b = normal(rows, inner), normal(columns, inner, seed=1)
    want = products.product(a, b)

    def layouts(x: np.ndarray) -> list[np.ndarray]:
        wide = np.full((x.shape[0], x.shape[1] + 3), np.nan, np.float32)
        wide[:, 1:-2] = x
        holes = np.repeat(x, 2, axis=1)[:, ::2]
        unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
        unaligned[...] = x
        return [x, np.asfortranarray(x), wide[:, 1:-2], wide.T[1:-2].T, holes, x[::-1].copy()[::-1], unaligned]

    for one in layouts(a):
        np.testing.assert_array_equal(products.product(one, b), want)
    for one in layouts(b):
        np.testing.assert_array_equal(products.product(a, one), want)


def test_the_result_goes_where_it_is_told_to_and_nowhere_else():
    a, b = normal(50, 40), normal(STRIP + 9, 40)
    place = np.full((52, STRIP + 12), np.nan, np.float32)
    result = products.product(a, b, out=place[1:-1, 1:-2])
    np.testing.assert_array_equal(result, products.product(a, b))
    place[1:-1, 1:-2] = np.nan
    assert np.isnan(place).all()


def test_nothing_to_do():
    assert products.product(normal(0, 5), normal(3, 5)).shape == (0, 3)
    assert products.product(normal(4, 5), normal(0, 5)).shape == (4, 0)
    np.testing.assert_array_equal(products.product(normal(4, 0), normal(3, 0)), np.zeros((4, 3)))
    np.testing.assert_array_equal(products.product(normal(2, 0), normal(1, 0), np.ones(1, np.float32)), [[1], [1]])


def test_long_sums_are_as_exact_as_short_ones():
    inner = 50_000
    a, b = normal(8, inner) + 1, normal(STRIP, inner, seed=1) + 1  # hardly anything cancels
    assert relative_error(products.product(a, b), a.astype(np.float64) @ b.astype(np.float64).T) < 1e-5


def test_narrow_values_are_widened():
    a, b = normal(40, 30).astype(np.float16), normal(50, 30, seed=1).astype(np.float16)
    assert_close(products.product(a, b), a.astype(np.float64) @ b.astype(np.float64).T)


def test_what_does_not_fit_is_refused():
    a, b = normal(4, 5), normal(3, 5)
    for wrong, message in (
        ({"b": normal(3, 6)}, r"b must be of shape \(3, 5\)"),
        ({"bias": normal(4)}, r"bias must be of shape \(3,\)"),
        ({"out": normal(4, 4)}, r"out must be of shape \(4, 3\)"),
        ({"out": np.zeros((4, 3))}, "out must be float32 with contiguous rows"),
        ({"out": normal(3, 4).T}, "out must be float32 with contiguous rows"),
        ({"a": np.zeros((4, 5))}, "float64"),
        ({"a": normal(2, 4, 5)}, r"a must be \(M, K\)"),
    ):
        values: dict[str, Any] = {"a": a, "b": b, **wrong}
        with pytest.raises(ValueError, match=message):
            products.product(**values)


@pytest.mark.parametrize("ours", [False, True])
def test_linear_layers_use_the_faster_one(monkeypatch, ours):
    monkeypatch.setattr(products, "_LARGE", 0)
    monkeypatch.setattr(products, "is_fast", lambda: ours)
    called = []
    product = products.product
    monkeypatch.setattr(products, "product", lambda *args, **kw: (called.append(1), product(*args, **kw))[1])
    x, weight, bias = normal(3, 20, 96), normal(80, 96, seed=1), normal(80)
    want = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    assert_close(linear.linear(x, weight, bias), want)
    assert_close(linear.linear(x, weight.astype(np.float16), bias), want, "float16")
    assert bool(called) is ours
    quantized = quantization.quantize(weight, "int8", 32)
    assert_close(linear.quantized_linear(x, quantized, bias), want, tolerance=0.02)


def test_which_is_faster_is_found_out():
    products.is_fast.cache_clear()
    assert products.is_fast() in (False, True)


@pytest.mark.parametrize("sizes", SIZES)
def test_added_to_what_is_there(sizes):
    rows, inner, columns = sizes
    a, b, before = normal(rows, inner), normal(columns, inner, seed=1), normal(rows, columns, seed=2)
    want = a.astype(np.float64) @ b.astype(np.float64).T + before
    for threads in (1, 2):
        out = before.copy()
        assert products.product(a, b, out=out, add=True, threads=threads) is out
        assert_close(out, want, tolerance=2e-6)


def test_adding_needs_something_to_add_to():
    a, b = normal(4, 3), normal(5, 3)
    for options in ({}, {"out": np.zeros((4, 5), np.float32), "bias": np.zeros(5, np.float32)}):
        with pytest.raises(ValueError, match="add=True needs an out"):
            products.product(a, b, add=True, **options)
