"""Linear layers for a few rows on the CPU against float64 products; quantised weights against what they stand for.

Dimensions: R rows of x, I inputs, O outputs.
"""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mambax_cpu import linear
from mambax_cpu.linear import FEW_ROWS, Weights, address_of
from tolerances import assert_close

from mambax import quantization

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
QUANTIZED = pytest.mark.parametrize(("kind", "group_size"), [("int8", 32), ("int4", 32), ("int4", 64)])
SIZES = [(1, 1), (3, 15), (4, 16), (5, 17), (9, 127), (13, 128), (30, 129), (2, 300), (67, 768)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, FEW_ROWS, FEW_ROWS + 1]
KERNEL = 1e-6
"""float32 sums of weights that are exact in float32: the tolerance of the kernels."""
QUANTIZED_KERNEL = 5e-6
"""The same where sums start with an offset, as those of four bits do."""


def dtype_of(name: str) -> np.dtype:
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def exact(x: Any, weight: Any, bias: Any = None) -> np.ndarray:
    y = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    return y if bias is None else y + np.asarray(bias, np.float64)


def into_poison(weights: Weights, x: np.ndarray, bias: np.ndarray | None, threads: int) -> np.ndarray:
    """The product written over NaN, with a row of NaN on both sides that has to stay."""
    rows = len(x)
    room = np.full((rows + 2, weights.outputs), np.nan, np.float32)
    linear.product(weights, address_of(x), rows, address_of(room[1:]), address_of(bias), threads=threads)
    assert np.isnan(room[0]).all()
    assert np.isnan(room[-1]).all()
    return room[1:-1]


@DTYPES
@pytest.mark.parametrize("rows", ROWS)
def test_product(dtype, rows):
    for outputs, inputs in SIZES:
        weight, x = normal(outputs, inputs).astype(dtype_of(dtype)), normal(rows, inputs, seed=1)
        bias = normal(outputs, seed=2)
        assert_close(linear.linear(x, weight), exact(x, weight), tolerance=KERNEL)
        assert_close(linear.linear(x, weight, bias), exact(x, weight, bias), tolerance=KERNEL)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_output_is_written_and_nothing_else(threads, monkeypatch):
    monkeypatch.setattr(linear, "_SMALL", 0)
    x = normal(5, 129, seed=1)
    for dtype in ("float32", "bfloat16", "float16"):
        weight = normal(31, 129).astype(dtype_of(dtype))
        weights = Weights(dtype, 31, 129, address_of(weight))
        assert_close(into_poison(weights, x, None, threads), exact(x, weight), tolerance=KERNEL)
    for kind, group_size in (("int8", 32), ("int4", 32), ("int4", 64)):
        quantized = quantization.quantize(normal(31, 129), kind, group_size)
        want, bias = quantization.dequantize(quantized), normal(31)
        y = into_poison(linear.quantized(quantized), x, bias, threads)
        assert_close(y, exact(x, want, bias), tolerance=QUANTIZED_KERNEL)
        wide = np.full((12, 129), np.nan, np.float32)
        linear.widen(linear.quantized(quantized), address_of(wide[1:]), 7, 17, threads=threads)
        np.testing.assert_array_equal(wide[1:11], want[7:17])
        assert np.isnan(wide[[0, 11]]).all()


@DTYPES
def test_threads_do_not_change_a_bit(dtype):
    weight, x = normal(700, 900).astype(dtype_of(dtype)), normal(3, 900, seed=1)
    want = linear.linear(x, weight, threads=1)
    for threads in (2, 3, 5):
        np.testing.assert_array_equal(linear.linear(x, weight, threads=threads), want)


@DTYPES
def test_arrays_that_are_not_contiguous_or_not_writable(dtype):
    weight, x = normal(10, 37).astype(dtype_of(dtype)), normal(2, 3, 37, seed=1)
    want = linear.linear(x, weight)
    apart = np.empty((2, 6, 74), np.float32)[:, ::2, ::2]
    apart[...] = x
    np.testing.assert_array_equal(linear.linear(apart, weight), want)
    np.testing.assert_array_equal(linear.linear(x, np.asfortranarray(weight)), want)
    moved = np.frombuffer(b"\0" + weight.tobytes(), weight.dtype, offset=1).reshape(weight.shape)  # odd address
    x.flags.writeable = False
    np.testing.assert_array_equal(linear.linear(x, moved), want)
    narrow = x.astype(BFLOAT16)
    assert_close(linear.linear(narrow, weight), exact(narrow, weight), tolerance=KERNEL)


def test_every_float16_and_bfloat16():
    """One by one, subnormals, infinities and NaN among them."""
    bits = np.arange(2**16, dtype=np.uint16)
    for dtype in (np.dtype(np.float16), BFLOAT16):
        weight = bits.view(dtype).reshape(-1, 1)
        wide = np.empty((2**16, 1), np.float32)
        kind = linear._FLOATS[dtype]
        linear.widen(Weights(kind, 2**16, 1, address_of(weight)), address_of(wide), 0, 2**16)
        np.testing.assert_array_equal(wide, weight.astype(np.float32))
        np.testing.assert_array_equal(
            linear.linear(np.ones((1, 1), np.float32), weight)[0], weight[:, 0].astype(np.float32)
        )


@DTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 18, 36])
def test_values_that_are_not_finite_come_through(dtype, bad, place):
    weight, x = np.abs(normal(6, 37)).astype(dtype_of(dtype)), normal(3, 37, seed=1)
    x[1, place] = bad
    y = linear.linear(x, weight)
    np.testing.assert_array_equal(y[1], np.full(6, bad, np.float32))
    assert np.isfinite(y[[0, 2]]).all()
    weight[4, place] = bad
    y = linear.linear(np.abs(normal(3, 37, seed=1)), weight)
    np.testing.assert_array_equal(y[:, 4], np.full(3, bad, np.float32))
    assert np.isfinite(np.delete(y, 4, 1)).all()


@QUANTIZED
@pytest.mark.parametrize("place", [0, 36, 129])
def test_quantized_weights_hide_nothing(kind, group_size, place):
    quantized, x = quantization.quantize(normal(6, 130), kind, group_size), normal(3, 130, seed=1)
    for bad in (np.nan, np.inf):
        x[1, place] = bad
        y = linear.quantized_linear(x, quantized)
        touched = quantization.dequantize(quantized)[:, place] != 0
        assert touched.any()
        assert not np.isfinite(y[1, touched]).any()
        assert np.isfinite(y[[0, 2]]).all()


@QUANTIZED
@pytest.mark.parametrize("rows", ROWS)
def test_quantized_product(kind, group_size, rows):
    for outputs, inputs in SIZES:
        quantized = quantization.quantize(normal(outputs, inputs), kind, group_size)
        want, x = quantization.dequantize(quantized), normal(rows, inputs, seed=1)
        assert_close(linear.quantized_linear(x, quantized), exact(x, want), tolerance=QUANTIZED_KERNEL)


@QUANTIZED
def test_quantize_is_the_nearest(kind, group_size):
    """No weight is further from its value than half a step, and the steps are those of the largest in reach."""
    weight = normal(40, 300) * np.exp(normal(40, 300, seed=3))
    quantized = quantization.quantize(weight, kind, group_size)
    for name, (shape, dtype) in quantization.layout(kind, 40, 300, group_size).items():
        assert getattr(quantized, name).shape == shape
        assert getattr(quantized, name).dtype == dtype
    assert (quantized.kind, quantized.shape) == (kind, (40, 300))
    scales = np.abs(np.float64(quantized.scales))
    if kind == "int8":
        steps = scales[:, None]
        np.testing.assert_allclose(scales, np.abs(weight).max(1) / 127, rtol=1e-6)
        limit = steps / 2
    else:
        assert quantized.group_size == group_size
        steps = np.repeat(scales, group_size, 1)[:, :300]
        limit = np.maximum(steps / 2, np.abs(weight) - 7 * steps)  # those beyond the grid are cut to its end
    error = np.abs(quantization.dequantize(quantized) - np.float64(weight))
    assert (error <= limit * (1 + 1e-5)).all()


def test_errors_of_quantisation():
    """Measured for normal weights; a scale chosen badly, or numbers packed in another order, is far above."""
    weight = normal(64, 768)
    for kind, group_size, limit in (("int8", 32, 0.008), ("int4", 32, 0.085), ("int4", 64, 0.095)):
        got = quantization.dequantize(quantization.quantize(weight, kind, group_size))
        assert_close(got, weight, tolerance=limit)


@QUANTIZED
def test_zeros_and_tiny_weights(kind, group_size):
    weight = np.zeros((5, 70), np.float32)
    weight[1] = 1e-44
    weight[2, 3] = 1.0
    got = quantization.dequantize(quantization.quantize(weight, kind, group_size))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, weight, atol=1e-3)
    np.testing.assert_array_equal(got[[0, 3, 4]], 0)


@QUANTIZED
def test_rows(kind, group_size):
    quantized = quantization.quantize(normal(40, 70), kind, group_size)
    ids = np.array([[3, 39, 0], [3, 3, 7]])
    np.testing.assert_array_equal(linear.quantized_rows(quantized, ids), quantization.dequantize(quantized)[ids])
    with pytest.raises(IndexError):
        linear.quantized_rows(quantized, np.array([40]))


def test_many_threads_at_once():
    """Each of them with its own numbers, all through the one pool."""
    cases = []
    for i in range(8):
        weight, x = normal(800, 700, seed=i), normal(1 + i, 700, seed=100 + i)
        layers = (weight, weight.astype(BFLOAT16), quantization.quantize(weight, "int4"))
        cases.append([(layer, x, result(layer, x)) for layer in layers])
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            for layer, x, want in cases[i]:
                if not np.array_equal(result(layer, x), want):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def result(layer: Any, x: np.ndarray) -> np.ndarray:
    if isinstance(layer, quantization.Quantized):
        return linear.quantized_linear(x, layer, threads=2)
    return linear.linear(x, layer, threads=2)


def test_bad_input():
    weight, x = normal(4, 8), normal(2, 8)
    with pytest.raises(ValueError, match=r"x must be of shape \(2, 8\) .* found \(2, 7\)"):
        linear.linear(x[:, :7], weight)
    with pytest.raises(ValueError, match="bias must be of shape"):
        linear.linear(x, weight, normal(5))
    with pytest.raises(ValueError, match="float64"):
        linear.linear(x.astype(np.float64), weight)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, found float64 of shape \(4, 8\)"):
        linear.linear(x, weight.astype(np.float64))
    with pytest.raises(ValueError, match="expected one of 'int8', 'int4'"):
        quantization.quantize(weight, "int3")
    with pytest.raises(ValueError, match="group_size is 16; expected one of 32, 64"):
        quantization.quantize(weight, "int4", 16)
    with pytest.raises(ValueError, match=r"must be \(out, in\), found \(8,\)"):
        quantization.quantize(weight[0], "int8")
    weight[1, 1] = np.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantization.quantize(weight, "int8")
