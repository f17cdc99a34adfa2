"""The fused CPU kernels of the scan of Mamba-2, by themselves and as ops of every backend.

Dimensions: B batch, L length, H heads, P head_dim, G groups, N d_state.
"""

from __future__ import annotations

import concurrent.futures
import tracemalloc
from typing import Any

import numpy as np
import pytest
from harness import BACKENDS, TORCH_COMPILES, WITH_GRADIENTS, backend_params
from mambax_cpu import ssd as fused
from mambax_cpu.ssd_tiles import CHUNK, PARTS
from tolerances import FORWARD, GRADIENT, assert_close

from mambax import get_backend
from mambax import ssd as duality
from mambax.registry import is_installed

TORCH = pytest.mark.skipif(not is_installed("torch"), reason="torch is not installed")
MLX = pytest.mark.skipif(not is_installed("mlx"), reason="mlx is not installed")
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
LIMITS = (0.1, 0.6)
SIZES = [  # (B, L, H, P, G, N): borders of chunks, of rows of tiles, of vectors, of parts of a group
    (1, 1, 1, 1, 1, 1),
    (2, 1, 4, 17, 2, 5),
    (1, 7, 2, 16, 1, 16),
    (1, CHUNK, 3, 33, 3, 32),
    (2, 2 * CHUNK + 9, 6, 9, 3, 21),
    (1, CHUNK + 1, 2 * PARTS + 1, 3, 1, 17),
    (1, 3 * CHUNK + 5, 3, 64, 1, 128),
]


def values_of(
    batch: int, length: int, heads: int, width: int, groups: int, states: int, seed: int = 0
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads) - 1,
        "A": -np.exp(normal(heads)),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, width, states),
    }


def flags_of(kind: str, batch: int, length: int) -> dict[str, np.ndarray]:
    """A mask that leaves a whole chunk out, or beginnings of sequences, one at the very first position."""
    rng = np.random.default_rng(length)
    if kind == "mask":
        mask = rng.random((batch, length)) < 0.7
        mask[0, : length // 2] = False
        return {"mask": mask}
    if kind == "boundaries":
        boundaries = rng.random((batch, length)) < 0.06
        boundaries[-1, 0] = True
        return {"boundaries": boundaries}
    return {}


def reference(values: dict[str, Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The sequential form in float64."""
    wide = {name: np.float64(value) for name, value in values.items()}
    return get_backend("numpy").ssd(**wide, dt_softplus=True, impl="sequential", **options)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel is to write holds NaN before: nothing can be left out, or read before it is written."""

    def poison(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    monkeypatch.setattr(fused, "room", poison)


# --- the kernels ------------------------------------------------------------------------------------------------


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


# --- as ops of the backends --------------------------------------------------------------------------------------


def as_arrays(nn: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {name: nn.from_numpy(value.copy()) for name, value in values.items()}


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


# --- the gated norm ----------------------------------------------------------------------------------------------


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
