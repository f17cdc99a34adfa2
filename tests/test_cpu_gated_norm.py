"""The fused CPU kernel of the gated RMSNorm of Mamba-2, by itself and as an op of every backend.

Dimensions: B batch, L length, D channels, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import BACKENDS, TORCH, WITH_GRADIENTS, backend_params
from tolerances import GRADIENT, assert_close

from mambax import get_backend


def gated_values(dtype: str = "float32") -> tuple[np.ndarray, ...]:
    import ml_dtypes

    rng = np.random.default_rng(0)
    projected = rng.standard_normal((2, 9, 110)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    y = rng.standard_normal((2, 9, 51)).astype(projected.dtype)
    projected *= 3
    return y, projected[..., 7:58], rng.standard_normal(51).astype(projected.dtype)  # z lies apart in memory


def wanted_norm(y: np.ndarray, z: np.ndarray, weight: np.ndarray, groups: int) -> np.ndarray:
    y, z, weight = (np.float64(array) for array in (y, z, weight))
    gated = (y * z / (1 + np.exp(-z))).reshape(*y.shape[:2], groups, -1)
    scale = 1 / np.sqrt((gated**2).mean(-1, keepdims=True) + 1e-5)
    return (gated * scale).reshape(y.shape) * weight


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", backend_params(BACKENDS))
def test_gated_norm(backend, dtype, groups):
    nn = get_backend(backend)
    values = gated_values(dtype)
    with nn.no_grad():
        got = nn.gated_rms_norm(*map(nn.from_numpy, values), groups, 1e-5)
    assert got.dtype == nn.from_numpy(values[2]).dtype
    assert_close(nn.to_numpy(got), wanted_norm(*values, groups), dtype)


def test_operands_of_the_gated_norm_are_kept_until_it_is_done(monkeypatch):
    """The kernels see addresses: a weight that is widened for them has to outlive the making of their table."""
    from mambax_cpu import gated_norm

    y, z, weight = gated_values("bfloat16")
    y, z = (np.tile(array, (1, 40, 1)) for array in (y, z))
    original = gated_norm.run

    def later(work: Any, count: int, threads: int) -> None:
        _rubbish = [np.full(weight.shape, np.nan, np.float32) for _ in range(100)]
        original(work, count, threads)

    monkeypatch.setattr(gated_norm, "run", later)
    assert_close(gated_norm.gated_rms_norm(y, z, weight, 3, 1e-5), wanted_norm(y, z, weight, 3), "bfloat16")


def test_gated_norm_has_the_same_bits_for_any_number_of_threads():
    from mambax_cpu.gated_norm import gated_rms_norm

    y, z, weight = (np.tile(array, (1, 40, 1)) if array.ndim == 3 else array for array in gated_values())
    want = gated_rms_norm(y, z, weight, 3, 1e-5, threads=1)
    for threads in (2, 5):
        np.testing.assert_array_equal(gated_rms_norm(y, z, weight, 3, 1e-5, threads=threads), want)
    for changes, message in ((4, "51 channels do not divide into 4"), (0, "into 0 equal groups")):
        with pytest.raises(ValueError, match=message):
            gated_rms_norm(y, z, weight, changes, 1e-5)
    with pytest.raises(ValueError, match="z must be of shape"):
        gated_rms_norm(y, z[:, 1:], weight, 3, 1e-5)


@pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
@TORCH
def test_gradients_of_the_gated_norm(backend):
    import torch

    def torch_gradient(arrays: Any) -> list[np.ndarray]:
        leaves = [torch.tensor(array, requires_grad=True) for array in arrays]
        (get_backend("torch").gated_rms_norm(*leaves, 3, 1e-5) ** 3).sum().backward()
        return [leaf.grad.numpy() for leaf in leaves]

    def mlx_gradient(arrays: Any) -> list[np.ndarray]:
        import mlx.core as mx

        def loss(*leaves: Any) -> Any:
            return (get_backend("mlx").gated_rms_norm(*leaves, 3, 1e-5) ** 3).sum()

        return [np.array(g) for g in mx.grad(loss, argnums=(0, 1, 2))(*(mx.array(array) for array in arrays))]

    want = torch_gradient([np.float64(array) for array in gated_values()])
    got = (torch_gradient if backend == "torch" else mlx_gradient)(gated_values())
    for gradient, of in zip(got, want, strict=True):
        assert_close(gradient, of, tolerance=GRADIENT["float32"])
