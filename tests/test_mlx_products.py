"""What MLX on the CPU leaves to NumPy and to the fused kernels: products, convolution, exponentials.

Dimensions: B batch, L length, D channels, K d_conv.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tolerances import GRADIENT, assert_close

from mambax import convolution, get_backend, mamba2

pytest.importorskip("mlx.core")

import mlx.core as mx
from mambax_mlx import cpu_convolution, cpu_ssd, host, ops, products
from mlx_cases import normal

nn = get_backend("mlx")
pytestmark = pytest.mark.skipif(host.default_device() != "cpu", reason="MLX's default device is not the CPU")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products(dtype, rows):
    x, weight = (normal(*shape).astype(nn.dtype(dtype)) for shape in ((2, rows, 24), (17, 24)))
    want = np.float64(np.array(x.astype(mx.float32))) @ np.float64(np.array(weight.astype(mx.float32))).T
    for path in (products.product, mx.compile(products.product)):
        got = path(x, weight)
        assert got.dtype == x.dtype
        assert_close(got.astype(mx.float32), want, dtype)
    assert products.product(x.astype(mx.float32), weight).dtype == mx.float32


def test_gradients_of_products_of_every_order():
    x, weight, probe = normal(3, 5, 8), normal(6, 8, seed=1), normal(3, 5, 6, seed=2)

    def plain(x: Any, weight: Any) -> Any:
        return x @ weight.T

    def first(product: Any) -> Any:
        return mx.grad(lambda x, w: (product(x, w) ** 2 * probe).sum(), argnums=(0, 1))(x, weight)

    def second(product: Any) -> Any:
        def inner(x: Any) -> Any:
            return (mx.grad(lambda w: (product(x, w) ** 3).sum())(weight) ** 2).sum()

        return (mx.grad(inner)(x),)

    def forward(product: Any) -> Any:
        return mx.jvp(product, (x, weight), (x * 2, weight + 1))[1]

    for derivative in (first, second, forward):
        for got, want in zip(derivative(products.product), derivative(plain), strict=True):
            assert_close(got, want, tolerance=1e-5)
    assert_close(mx.vmap(lambda x: products.product(x, weight))(x), plain(x, weight))


def test_exponentials():
    x = mx.array([-200.0, -1.5, 0.0, 3.0, 200.0])
    np.testing.assert_array_equal(np.array(host.exp(x))[[0, 2, 4]], [0, 1, np.inf])
    small = x[1:4]
    for derivative in (
        lambda f: mx.grad(lambda x: (f(x) * x).sum())(small),
        lambda f: mx.grad(lambda x: (mx.grad(lambda x: f(x).sum())(x) ** 2).sum())(small),
        lambda f: mx.jvp(f, (small,), (small,))[1][0],
    ):
        assert_close(derivative(host.exp), derivative(mx.exp), tolerance=1e-6)


@pytest.mark.parametrize("varied", [(0,), (1,), (0, 1)])
def test_tangents_of_a_product(varied):
    operands = normal(3, 8), normal(5, 8)

    def tangent(function: Any) -> Any:
        def full(*some: Any) -> Any:
            return function(*(some[varied.index(i)] if i in varied else operands[i] for i in range(2)))

        given = [operands[i] for i in varied]
        return mx.jvp(full, given, given)[1][0]

    assert_close(tangent(products.product), tangent(lambda x, weight: x @ weight.T))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("rows", [3, 40])
def test_tangents_of_a_quantised_product(bits, rows):
    x, packed = normal(rows, 64), mx.quantize(normal(5, 64), 32, bits)

    def tangent(function: Any) -> Any:
        return mx.jvp(function, [x], [x + 1])[1][0]

    ours = tangent(lambda x: products.quantized_product(x, *packed, group_size=32, bits=bits))
    assert_close(ours, tangent(lambda x: mx.quantized_matmul(x, *packed, group_size=32, bits=bits)))


@pytest.mark.parametrize("varied", [(0,), (0, 1, 2)])
def test_tangents_of_the_gated_norm(varied):
    operands = normal(2, 3, 8), normal(2, 3, 8), normal(8)

    def tangent(function: Any) -> Any:
        given = [operands[i] for i in varied]
        return mx.jvp(lambda *some: function(*some, *operands[len(some) :], 2, 1e-5), given, given)[1][0]

    ours = tangent(cpu_ssd.gated_rms_norm)
    assert_close(ours, tangent(lambda *arrays: mamba2.gated_rms_norm(ops, *arrays)))


FLAGS = {
    "none": {},
    "mask": {"mask": mx.array([[0, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1]]).astype(mx.bool_)},
    "boundaries": {"boundaries": mx.array([[0, 1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]]).astype(mx.bool_)},
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_the_convolution_and_its_gradients(flags, length):
    x, weight, bias, state = normal(2, length, 8), normal(8, 1, 4), normal(8), normal(2, 3, 8)
    options = {name: flag[:, :length] for name, flag in FLAGS[flags].items()}
    real = options.get("mask", mx.ones((2, length), mx.bool_))[..., None]

    def loss(function: Any) -> Any:
        def of(x: Any, weight: Any, bias: Any, state: Any) -> Any:
            y, after = function(x, weight, bias, initial_state=state, **options)
            return (mx.where(real, y, 0.0) ** 2).sum() + (after**3).sum()

        return mx.value_and_grad(of, argnums=(0, 1, 2, 3))(x, weight, bias, state)

    value, gradients = loss(cpu_convolution.causal_conv1d)
    want, expected = loss(lambda *args, **named: convolution.causal_conv1d(ops, *args, **named))
    assert_close(value, want)
    for got, known in zip(gradients, expected, strict=True):
        assert_close(got, known, tolerance=GRADIENT["float32"])
