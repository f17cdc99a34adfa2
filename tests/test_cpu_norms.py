"""RMSNorm by the fused CPU kernels, as layers of NumPy and PyTorch, against float64.

Dimensions: M channels of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import TORCH, TORCH_COMPILES
from mambax_cpu import norm, norm_gradient
from mambax_cpu.tiles import NORM_ROWS
from tolerances import FORWARD, GRADIENT, assert_close, relative_error

from mambax import get_backend

SHAPES = [(1, 1), (3, 5), (2, 7, 16), (NORM_ROWS, 33), (2, NORM_ROWS + 1, 100), (1000, 48), (5, 768)]
EPS = 1e-5


def values_of(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, weight and dy."""
    rng = np.random.default_rng(seed + sum(shape))
    x, weight, dy = (rng.standard_normal(size).astype(np.float32) for size in (shape, shape[-1:], shape))
    return x * 3, weight + 1, dy


def reference(x: Any, weight: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is to write holds NaN before."""
    monkeypatch.setattr(norm_gradient, "room", lambda *shape: np.full(shape, np.nan, np.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape):
    x, weight, _ = values_of(shape)
    got = norm.rms_norm(x, weight, EPS, threads=1)
    assert_close(got, reference(x, weight), tolerance=1e-6)
    np.testing.assert_array_equal(norm.rms_norm(x, weight, EPS, threads=3), got)


@TORCH
@pytest.mark.parametrize("shape", SHAPES[1:])  # of a single value the gradient is what eps leaves of a difference
def test_gradients(shape):
    import torch

    x, weight, dy = values_of(shape)
    got = norm_gradient.rms_norm_gradient(x, weight, EPS, dy, threads=1)
    wide = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (x, weight)]
    y = wide[0] * torch.rsqrt(wide[0].square().mean(-1, keepdim=True) + EPS) * wide[1]
    y.backward(torch.from_numpy(dy).double())
    again = norm_gradient.rms_norm_gradient(x, weight, EPS, dy, threads=3)
    for gradient, same, leaf in zip(got, again, wide, strict=True):
        assert_close(gradient, leaf.grad, tolerance=GRADIENT["float32"])
        np.testing.assert_array_equal(gradient, same)


def test_any_layout_and_nothing_to_do():
    x, weight, dy = values_of((40, 50))
    want, gradients = norm.rms_norm(x, weight, EPS), norm_gradient.rms_norm_gradient(x, weight, EPS, dy)
    for layout in (np.asfortranarray, lambda a: np.repeat(a, 2, -1)[..., ::2]):
        np.testing.assert_array_equal(norm.rms_norm(layout(x), layout(weight), EPS), want)
        for got, expected in zip(
            norm_gradient.rms_norm_gradient(layout(x), weight, EPS, layout(dy)), gradients, strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    assert norm.rms_norm(x[:0], weight, EPS).shape == (0, 50)
    assert (norm_gradient.rms_norm_gradient(x[:0], weight, EPS, dy[:0])[1] == 0).all()


def test_what_does_not_fit_is_refused():
    x, weight, dy = values_of((4, 5))
    with pytest.raises(ValueError, match=r"weight must be of shape \(5,\)"):
        norm.rms_norm(x, weight[:4], EPS)
    with pytest.raises(ValueError, match="float64"):
        norm.rms_norm(np.float64(x), weight, EPS)
    with pytest.raises(ValueError, match="the gradient of y must be"):
        norm_gradient.rms_norm_gradient(x, weight, EPS, dy[:3])


@TORCH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_layer_by_the_kernel_and_without(monkeypatch, dtype):
    from mambax_torch import layers

    nn = get_backend("torch")
    x, weight, _ = values_of((2, 30, 50))
    called = []
    run = norm.run
    monkeypatch.setattr(norm, "_SMALL", 0)
    monkeypatch.setattr(norm, "run", lambda *args: (called.append(1), run(*args)))
    results = []
    for threshold in (0, 1 << 30):
        monkeypatch.setattr(layers, "_LARGE_NORM", threshold)
        layer = nn.RMSNorm(weight, EPS)
        nn.set_parameters(layer, {"weight": nn.astype(nn.from_numpy(weight), nn.dtype(dtype))})
        with nn.no_grad():
            y = layer(nn.from_numpy(x))
        assert y.dtype == nn.dtype(dtype)
        results.append(np.float64(nn.to_numpy(nn.astype(y, nn.float32))))
    assert len(called) == 1
    assert_close(results[0], results[1], dtype)
    assert_close(results[0], reference(x, weight), dtype)


@TORCH
@TORCH_COMPILES
def test_the_operator_compiled_and_twice_differentiable(monkeypatch):
    import torch
    from mambax_torch import norm_ops

    x, weight, _ = (torch.tensor(value, requires_grad=True) for value in values_of((3, 20, 40)))
    torch.library.opcheck(torch.ops.mambax.cpu_rms_norm.default, (x, weight, EPS))

    def loss(x: Any, weight: Any) -> Any:
        return norm_ops.rms_norm(x, weight, EPS).sin().sum()

    def loss_by_torch(x: Any, weight: Any) -> Any:
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight).sin().sum()

    want = torch.autograd.grad(loss_by_torch(x, weight), (x, weight))
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        for got, expected in zip(torch.autograd.grad(function(x, weight), (x, weight)), want, strict=True):
            assert_close(got, expected, tolerance=GRADIENT["float32"])
    second = []
    for function in (loss, loss_by_torch):
        gradients = torch.autograd.grad(function(x, weight), (x, weight), create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, weight)))
    for got, expected in zip(*second, strict=True):
        assert_close(got, expected, tolerance=GRADIENT["float32"])
    narrow = [t.detach().bfloat16().requires_grad_() for t in (x, weight)]
    norm_ops.rms_norm(*narrow, EPS).float().sin().sum().backward()
    for leaf, expected in zip(narrow, want, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        assert relative_error(leaf.grad.float(), expected) < 5 * FORWARD["bfloat16"]
