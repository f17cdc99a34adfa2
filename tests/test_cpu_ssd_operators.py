"""The fused CPU kernels of the scan of Mamba-2 as ops of every backend, and their gradients.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_ssd_cases import LIMITS, NAMES, as_arrays, flags_of, poison_memory, reference, values_of
from harness import BACKENDS, MLX, TORCH, TORCH_COMPILES, WITH_GRADIENTS, backend_params
from mambax_cpu import ssd as fused
from mambax_cpu.ssd_tiles import CHUNK
from tolerances import FORWARD, GRADIENT, assert_close

from mambax import get_backend
from mambax import ssd as duality


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


@pytest.mark.parametrize("impl", ["auto", "cpu", *duality.ALGORITHMS])
@pytest.mark.parametrize("backend", backend_params(BACKENDS))
def test_every_implementation_on_every_backend(backend, impl):
    nn = get_backend(backend)
    sizes = (2, CHUNK + 9, 6, 5, 3, 7)
    values = values_of(*sizes)
    for kind in ("plain", "mask", "boundaries"):
        flags = flags_of(kind, *sizes[:2])
        y, final = nn.ssd(**as_arrays(nn, values | flags), dt_softplus=True, dt_limit=LIMITS, impl=impl)
        want_y, want_final = reference(values, dt_limit=LIMITS, **flags)
        real = flags.get("mask", np.ones(sizes[:2], bool))
        assert_close(nn.to_numpy(y)[real], want_y[real], what=f"y, {kind}")
        assert_close(nn.to_numpy(final), want_final, what=f"final state, {kind}")


def weighted(nn: Any, y: Any, final: Any, mask: np.ndarray | None) -> Any:
    """A number whose gradient is another one at every output that exists."""
    weights = np.cos(np.arange(np.prod(y.shape))).reshape(y.shape)
    if mask is not None:
        weights = weights * mask[..., None, None]
    ends = np.sin(np.arange(np.prod(final.shape))).reshape(final.shape)
    like = {"dtype": np.float64} if y.dtype == nn.float64 else {"dtype": np.float32}
    return (y * nn.from_numpy(weights.astype(**like))).sum() + (final * nn.from_numpy(ends.astype(**like))).sum()


def torch_gradients(values: dict[str, Any], real: np.ndarray | None, **options: Any) -> dict[str, np.ndarray]:
    import torch

    nn = get_backend("torch")
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    weighted(nn, *nn.ssd(**leaves, dt_softplus=True, **options), real).backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}


def mlx_gradients(values: dict[str, Any], real: np.ndarray | None, **options: Any) -> dict[str, np.ndarray]:
    import mlx.core as mx

    nn = get_backend("mlx")

    def loss(leaves: dict[str, Any]) -> Any:
        return weighted(nn, *nn.ssd(**leaves, dt_softplus=True, **options), real)

    return {name: np.array(g) for name, g in mx.grad(loss)(as_arrays(nn, values)).items()}


@pytest.mark.parametrize("kind", ["plain", "mask", "boundaries"])
@pytest.mark.parametrize("sizes", [(2, 1, 4, 17, 2, 5), (2, CHUNK + 9, 6, 9, 3, 21), (1, 150, 11, 16, 1, 16)])
@pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
@TORCH
def test_gradients(backend, sizes, kind):
    import torch

    nn = get_backend(backend)
    values, flags = values_of(*sizes), flags_of(kind, *sizes[:2])
    gradients = torch_gradients if backend == "torch" else mlx_gradients
    tensors = {name: torch.tensor(flag) for name, flag in flags.items()}
    wide = {name: np.float64(value) for name, value in values.items()}
    mask = flags.get("mask")
    for limit in ((0.0, float("inf")), LIMITS):
        got = gradients(values, mask, dt_limit=limit, impl="cpu", **as_arrays(nn, flags))
        want = torch_gradients(wide, mask, dt_limit=limit, impl="sequential", **tensors)
        assert got.keys() == want.keys() == set(NAMES)
        for name, gradient in got.items():
            assert np.isfinite(gradient).all(), name
            assert_close(gradient, want[name], what=name, tolerance=GRADIENT["float32"])


@TORCH
def test_torch_finds_nothing_wrong_with_the_operator():
    import torch
    from mambax_torch import cpu_ssd

    assert callable(cpu_ssd.ssd)  # importing it is what registers the operator
    values = values_of(2, 9, 4, 5, 2, 3)
    leaves = [torch.tensor(values[name], requires_grad=True) for name in NAMES]
    *five, D, bias, state = leaves
    operator = torch.ops.mambax.cpu_ssd.default
    mask = torch.ones(2, 9, dtype=torch.bool)
    torch.library.opcheck(operator, (*five, D, bias, True, 0.0, float("inf"), state, mask, None, True))
    plain = [leaf.detach() for leaf in five]
    torch.library.opcheck(operator, (*plain, None, None, True, *LIMITS, None, None, mask, False))


@TORCH
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_for_one_argument_alone(name):
    import torch

    nn = get_backend("torch")
    values = values_of(2, 9, 4, 5, 2, 3)
    want = torch_gradients(values, None)
    tensors = {key: torch.tensor(value, requires_grad=key == name) for key, value in values.items()}
    weighted(nn, *nn.ssd(**tensors, dt_softplus=True), None).backward()
    np.testing.assert_array_equal(tensors[name].grad, want[name])


@TORCH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_tensors(dtype):
    import torch

    nn = get_backend("torch")
    values = values_of(2, CHUNK + 3, 4, 9, 2, 5)
    leaves = {
        name: torch.tensor(value).to(getattr(torch, dtype)).requires_grad_() for name, value in values.items()
    }
    y, final = nn.ssd(**leaves, dt_softplus=True)
    assert (y.dtype, final.dtype) == (leaves["x"].dtype, torch.float32)
    rounded = {name: leaf.detach().float().numpy() for name, leaf in leaves.items()}
    assert_close(y.detach().float(), reference(rounded)[0], dtype)
    (y.float().square().sum() + final.square().sum()).backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    wide = {name: torch.tensor(value, requires_grad=True) for name, value in rounded.items()}
    y, final = nn.ssd(**wide, dt_softplus=True)
    (y.square().sum() + final.square().sum()).backward()
    for name, leaf in leaves.items():  # the rounded output moves the gradient by a few roundings
        assert_close(leaf.grad.float(), wide[name].grad, what=name, tolerance=5 * FORWARD[dtype])


@TORCH
@TORCH_COMPILES
def test_compiled_without_a_graph_break():
    import torch

    nn = get_backend("torch")
    values = values_of(2, CHUNK + 9, 4, 5, 2, 3)

    def loss(*leaves: Any) -> Any:
        named = dict(zip(NAMES, leaves, strict=True))
        return sum(part.square().sum() for part in nn.ssd(**named, dt_softplus=True, dt_limit=LIMITS))

    eager = [torch.tensor(values[name], requires_grad=True) for name in NAMES]
    loss(*eager).backward()
    compiled = [torch.tensor(values[name], requires_grad=True) for name in NAMES]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for got, want in zip(compiled, eager, strict=True):
        assert_close(got.grad, want.grad)


@TORCH
def test_torch_says_why_the_kernels_cannot_run():
    import torch

    nn = get_backend("torch")
    values = {name: torch.tensor(value).double() for name, value in values_of(1, 3, 2, 2, 1, 2).items()}
    with pytest.raises(ValueError, match="float64; use 'sequential' or 'chunked'"):
        nn.ssd(**values, impl="cpu")
    nn.ssd(**values)
    floats = {name: value.float() for name, value in values.items()}
    x = floats.pop("x")
    gradient = torch.func.grad(lambda x: nn.ssd(x, **floats)[0].sum())(x)  # where it is "auto", others run
    assert torch.isfinite(gradient).all()


@MLX
def test_mlx_does_without_the_kernels_where_there_are_no_values():
    import mlx.core as mx

    nn = get_backend("mlx")
    values = as_arrays(nn, values_of(3, 9, 4, 5, 2, 3))
    x = values.pop("x")
    rows = {name: value for name, value in values.items() if name not in ("A", "D", "dt_bias")}
    shared = {name: value for name, value in values.items() if name not in rows}

    def row(x: Any, *arrays: Any) -> Any:
        alone = {name: array[None] for name, array in zip(rows, arrays, strict=True)}
        return nn.ssd(x[None], **alone, **shared, dt_softplus=True)[0][0]

    got = mx.vmap(row)(x, *rows.values())
    assert_close(np.array(got), np.array(nn.ssd(x, **values, dt_softplus=True)[0]))


@pytest.mark.parametrize("backend", backend_params(BACKENDS))
def test_the_kernels_run_unless_another_implementation_is_named(backend, monkeypatch):
    nn = get_backend(backend)
    called: list[int] = []
    original = fused.forward

    def counted(given: Any, **options: Any) -> Any:
        called.append(given.sizes.length)
        return original(given, **options)

    monkeypatch.setattr(fused, "forward", counted)
    values = as_arrays(nn, values_of(1, 3, 2, 2, 1, 2))
    nn.ssd(**values)
    nn.ssd(**as_arrays(nn, values_of(1, 1, 2, 2, 1, 2)))
    nn.ssd(**values, impl="chunked")
    assert called == [3, 1]
