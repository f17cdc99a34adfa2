"""Gradients: torch, MLX and central differences of the float64 recurrence agree, parameter by parameter.

Dimensions: B batch, L length, D d_inner, N d_state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
from harness import WITH_GRADIENTS, backend_params, build, config_of, installed, scan_params, weights_of
from test_scan import arguments, mask_of
from tolerances import GRADIENT, assert_close, relative_error

from mambax import get_backend

CONFIG = config_of(d_model=4, n_layer=2, d_state=3, d_conv=3, dt_rank=2, vocab_size=7)
WEIGHTS = weights_of(CONFIG)
IDS = np.array([[1, 5, 5, 0, 2, 6], [3, 3, 6, 1, 4, 0]])
MASKS = {
    "no mask": None,
    "mask": np.array([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool),  # padded left, with a hole, and right
}
CASES = pytest.mark.parametrize("case", MASKS)
BACKENDS = pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
RNG = np.random.default_rng(5)
PROBE = RNG.standard_normal((2, 6, 7))
START = {
    f"layers.{i}.{name}": RNG.standard_normal(shape).astype(np.float32)
    for i in range(2)
    for name, shape in (("conv_state", (2, 2, 8)), ("ssm_state", (2, 8, 3)))
}
END = {name: RNG.standard_normal(array.shape) for name, array in START.items()}
"""The loss weighs every logit at a real position and every number of the final state, each by its own weight."""


def reference_loss(values: dict[str, np.ndarray], case: str) -> float:
    """The loss by the independent recurrence; ``values`` are weights and the initial state."""
    mask, loss = MASKS[case], 0.0
    for row in range(2):
        real = np.ones(6, bool) if mask is None else mask[row]
        kinds = ("conv_state", "ssm_state")
        state = reference.RowState(*([values[f"layers.{i}.{kind}"][row] for i in range(2)] for kind in kinds))
        logits, state = reference.logits_row(values, IDS[row][real], state)
        loss += (logits * PROBE[row][real]).sum()
        for i in range(2):
            loss += (state.past[i] * END[f"layers.{i}.conv_state"][row]).sum()
            loss += (state.h[i] * END[f"layers.{i}.ssm_state"][row]).sum()
    return float(loss)


def central_differences(function: Callable[[], float], array: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of a function with respect to an array that it reads, element by element."""
    gradient = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = function()
        array[index] = kept - step
        gradient[index] = (above - function()) / (2 * step)
        array[index] = kept
    return gradient


@cache
def expected(case: str) -> dict[str, np.ndarray]:
    """Gradients of the loss, by central differences."""
    values = {name: np.array(array, np.float64) for name, array in (WEIGHTS | START).items()}
    return {name: central_differences(lambda: reference_loss(values, case), values[name]) for name in values}


def loss_of(nn: Any, model: Any, start: dict[str, Any], case: str) -> Any:
    """The loss of a model of a backend, as an array of the backend."""
    dtype = start["layers.0.ssm_state"].dtype
    layers = [start[f"layers.{i}.{name}"] for i in range(2) for name in ("conv_state", "ssm_state")]
    state = model.init_state(2)
    state.layers = tuple(type(state.layers[0])(*pair) for pair in (layers[:2], layers[2:]))
    mask = np.ones((2, 6), bool) if MASKS[case] is None else MASKS[case]
    output = model(IDS, state, MASKS[case])
    probe = nn.from_numpy((PROBE * mask[..., None]).astype(np.float32))
    loss = (output.logits * nn.astype(probe, dtype)).sum()
    for name, array in output.state.arrays().items():
        if name in END:
            loss = loss + (array * nn.astype(nn.from_numpy(np.float32(END[name])), dtype)).sum()
    return loss


def torch_gradients(model: Any, case: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    import torch

    nn = model.nn
    start = {name: torch.tensor(array, dtype=nn.dtype(dtype), requires_grad=True) for name, array in START.items()}
    loss_of(nn, model, start, case).backward()
    return {name: array.grad.numpy() for name, array in {**nn.parameters(model), **start}.items()}


def mlx_gradients(model: Any, case: str) -> dict[str, np.ndarray]:
    import mlx.core as mx
    import mlx.nn
    from mlx.utils import tree_flatten

    nn = model.nn
    start = {name: mx.array(array) for name, array in START.items()}
    _, of_parameters = mlx.nn.value_and_grad(model, lambda: loss_of(nn, model, start, case))()
    of_state = mx.grad(lambda start: loss_of(nn, model, start, case))(start)
    return {name: np.array(array) for name, array in [*tree_flatten(of_parameters), *of_state.items()]}


def gradients(model: Any, case: str) -> dict[str, np.ndarray]:
    return {"torch": torch_gradients, "mlx": mlx_gradients}[model.nn.name](model, case)


def assert_gradients(got: dict[str, np.ndarray], want: dict[str, np.ndarray], dtype: str = "float32") -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], what=name, tolerance=GRADIENT[dtype])


@CASES
@pytest.mark.parametrize(("backend", "impl"), scan_params(WITH_GRADIENTS))
def test_gradients_of_every_parameter_and_of_the_initial_state(backend, impl, case):
    config = config_of(**(CONFIG.to_dict() | {"scan": impl}))
    assert_gradients(gradients(build(get_backend(backend), config, WEIGHTS), case), expected(case))


@CASES
def test_float64_gradients(case):
    model = build(get_backend("torch"), CONFIG, WEIGHTS, "float64")
    assert_gradients(torch_gradients(model, case, "float64"), expected(case), "float64")


@CASES
def test_tied_embeddings_gather_both_gradients(case):
    config = config_of(**(CONFIG.to_dict() | {"tie_embeddings": True}))
    weights = {name: array for name, array in WEIGHTS.items() if name != "lm_head.weight"}
    values = {name: np.array(array, np.float64) for name, array in (weights | START).items()}
    name = "backbone.embeddings.weight"
    want = central_differences(lambda: reference_loss(values, case), values[name])
    for backend in installed(WITH_GRADIENTS):
        got = gradients(build(get_backend(backend), config, weights), case)
        assert_close(got[name], want, what=backend, tolerance=GRADIENT["float32"])


# --- the op by itself, over chunk borders ------------------------------------------------------------------------


def scan_loss(values: dict[str, Any], mask: np.ndarray | None, probes: tuple[np.ndarray, np.ndarray]) -> float:
    y, final = reference.scan(**values, delta_softplus=True, mask=mask)
    return float(np.nansum(y * probes[0]) + (final * probes[1]).sum())


@cache
def scan_expected(length: int) -> tuple[dict[str, np.ndarray], np.ndarray, tuple[np.ndarray, np.ndarray], dict]:
    """(values, mask, probes, gradients) of the scan with respect to everything that it takes."""
    values = arguments(length, batch=2, channels=2, n=2)
    mask = mask_of(3, length)[:2]
    rng = np.random.default_rng(0)
    y_probe, end_probe = rng.standard_normal((2, length, 2)), rng.standard_normal((2, 2, 2))
    probes = y_probe.astype(np.float32), end_probe.astype(np.float32)
    wide = {name: np.float64(value) for name, value in values.items()}
    want = {name: central_differences(lambda: scan_loss(wide, mask, probes), wide[name]) for name in wide}
    return values, mask, probes, want


@pytest.mark.parametrize(("backend", "impl"), scan_params(WITH_GRADIENTS))
@pytest.mark.parametrize("length", [1, 2, 37])
def test_gradients_of_the_scan(backend, impl, length):
    nn = get_backend(backend)
    values, mask, probes, want = scan_expected(length)
    y_probe, end_probe = nn.from_numpy(probes[0] * mask[..., None]), nn.from_numpy(probes[1])

    def loss(arrays: dict[str, Any]) -> Any:
        y, final = nn.selective_scan(**arrays, mask=nn.from_numpy(mask), delta_softplus=True, impl=impl)
        return (y * y_probe).sum() + (final * end_probe).sum()

    if backend == "torch":
        arrays = {name: nn.from_numpy(value).requires_grad_() for name, value in values.items()}
        loss(arrays).backward()
        got = {name: array.grad for name, array in arrays.items()}
    else:
        import mlx.core as mx

        got = mx.grad(loss)({name: nn.from_numpy(value) for name, value in values.items()})
    assert_gradients({name: nn.to_numpy(array) for name, array in got.items()}, want)


@pytest.mark.parametrize(("backend", "impl"), scan_params(WITH_GRADIENTS))
@pytest.mark.parametrize(("step", "decay"), [(50.0, 1000.0), (1e-6, 1e-6), (50.0, 1e-3)])
def test_gradients_at_extreme_steps_are_finite(backend, impl, step, decay):
    nn = get_backend(backend)
    values = arguments(40) | {"A": np.full((5, 3), -decay, np.float32)}
    values["delta"] = np.full_like(values["delta"], np.log(np.expm1(step)) if step < 1 else step)
    values["delta_bias"] = np.zeros(5, np.float32)

    def loss(arrays: dict[str, Any]) -> Any:
        y, final = nn.selective_scan(**arrays, delta_softplus=True, impl=impl)
        return (y * y).sum() + (final * final).sum()

    if backend == "torch":
        arrays = {name: nn.from_numpy(value).requires_grad_() for name, value in values.items()}
        loss(arrays).backward()
        got = {name: array.grad for name, array in arrays.items()}
    else:
        import mlx.core as mx

        got = mx.grad(loss)({name: nn.from_numpy(value) for name, value in values.items()})
    for name, array in got.items():
        assert np.isfinite(nn.to_numpy(array)).all(), name


@BACKENDS
def test_a_planted_error_in_a_gradient_is_caught(backend):
    """A mask that the backward pass forgot, and one per cent in one weight."""
    model = build(get_backend(backend), CONFIG, WEIGHTS)
    got = gradients(model, "no mask")
    name = "backbone.layers.0.mixer.dt_proj.bias"
    assert relative_error(got[name], expected("mask")[name]) > 30 * GRADIENT["float32"]
    name = "backbone.layers.1.mixer.D"
    wrong = build(model.nn, CONFIG, WEIGHTS | {name: WEIGHTS[name] * 1.01})
    with pytest.raises(AssertionError, match="relative error"):
        assert_gradients(gradients(wrong, "no mask"), expected("no mask"))
