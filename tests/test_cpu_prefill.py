"""Many tokens through a stack of blocks at once: the same as block by block, and as float64.

Dimensions: B batch, L length, M d_model, D d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import build, config_of, rounded, token_ids, weights_of
from tolerances import FORWARD, assert_close, relative_error

from mambax import get_backend

torch = pytest.importorskip("torch")

SHAPES: list[dict[str, Any]] = [
    {},
    {"d_conv": 1, "d_state": 33, "dt_rank": 17, "use_conv_bias": False, "use_bias": False},
    {"d_model": 72, "d_state": 16, "d_conv": 4, "dt_rank": 48, "residual_in_fp32": False},
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, and the products of the kernels count as fast."""
    from mambax_cpu import block, convolution, norm, products, prompts, scan

    def room(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    def narrow_room(dtype: Any, *shape: int) -> np.ndarray:
        return np.full(shape, np.nan, dtype)

    for module in (block, convolution, norm, products, prompts, scan):
        for name, poison in (("room", room), ("narrow_room", narrow_room)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, poison)
    monkeypatch.setattr(products, "is_fast", lambda: True)


def given(model: Any, batch: int, length: int) -> tuple[Any, Any]:
    """Hidden states (B, L, M) of tokens, and the states that five others left before them."""
    nn, ids = model.nn, token_ids(batch, 5 + length)
    with nn.no_grad():
        state = model(ids[:, :5]).state
        return model.backbone.embeddings(nn.from_numpy(ids[:, 5:])), state.layers


def one_by_one(model: Any, hidden: Any, states: Any) -> list[np.ndarray]:
    after = []
    with model.nn.no_grad():
        for layer, state in zip(model.backbone.layers, states, strict=True):
            hidden, state = layer(hidden, state)
            after += [*state]
    return [model.nn.to_numpy(array) for array in (hidden, *after)]


def at_once(model: Any, hidden: Any, states: Any) -> list[np.ndarray] | None:
    with model.nn.no_grad():
        found = model.nn.decode_step(model.backbone.layers, hidden, states)
    return found and [model.nn.to_numpy(a) for a in (found[0], *(array for state in found[1] for array in state))]


def exactly(nn: Any, array: Any) -> np.ndarray:
    """A copy in float64."""
    return np.asarray(nn.to_numpy(array)).astype(np.float64)


def unchanged(nn: Any, states: Any, before: Any) -> None:
    for state, old in zip(states, before, strict=True):
        assert all(np.array_equal(exactly(nn, array), value) for array, value in zip(state, old, strict=True))


BOTH = pytest.mark.parametrize("backend", ["torch", "numpy"])


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 33), (1, 97), (3, 40), (40, 2)])
def test_against_blocks_one_by_one_and_float64(backend, shape, batch, length):
    config = config_of(**shape)
    weights = weights_of(config)
    model, exact = (
        build(get_backend(name), config, weights, dtype)
        for name, dtype in ((backend, "float32"), ("numpy", "float64"))
    )
    hidden, states = given(model, batch, length)
    wide = [type(state)(*(exactly(model.nn, array) for array in state)) for state in states]
    got, want = at_once(model, hidden, states), one_by_one(model, hidden, states)
    assert got is not None
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, tolerance=FORWARD["float32"])
    unchanged(model.nn, states, wide)
    for a, b in zip(got, one_by_one(exact, exactly(model.nn, hidden), wide), strict=True):
        assert_close(a, b, tolerance=4e-6)


WHOLE: list[dict[str, Any]] = [  # sizes of whole vectors, for which one kernel reads the prompt
    {"d_model": 48, "d_conv": 4, "d_state": 16, "dt_rank": 32},
    {"d_model": 80, "d_conv": 4, "d_state": 24, "dt_rank": 48, "residual_in_fp32": False},
    {"d_model": 64, "d_conv": 4, "d_state": 8, "dt_rank": 16, "use_bias": False, "use_conv_bias": False},
]


def pairs_or_skip(dtype: str) -> None:
    from mambax_cpu import prompts

    if dtype == "bfloat16" and not prompts.multiplies_pairs():
        pytest.skip("this processor does not multiply pairs of bfloat16")


@BOTH
@pytest.mark.parametrize("shape", WHOLE)
@pytest.mark.parametrize(("batch", "length"), [(1, 33), (1, 97), (3, 42), (40, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_one_kernel(backend, dtype, shape, batch, length, monkeypatch):
    from mambax_cpu import prompts

    pairs_or_skip(dtype)
    config = config_of(**shape)
    weights = rounded(weights_of(config), dtype)
    model, exact = (
        build(get_backend(name), config, weights, kind) for name, kind in ((backend, dtype), ("numpy", "float64"))
    )
    hidden, states = given(model, batch, length)
    wide = [type(state)(*(exactly(model.nn, array) for array in state)) for state in states]
    asked: list[Any] = []
    read = prompts.read
    monkeypatch.setattr(prompts, "read", lambda *args: asked.append(args) or read(*args))
    got, want = at_once(model, hidden, states), one_by_one(model, hidden, states)
    assert got is not None
    assert len(asked) == 1
    unchanged(model.nn, states, wide)
    right = one_by_one(exact, exactly(model.nn, hidden), wide)
    for a, b, c in zip(got, want, right, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, c, tolerance=4e-6 if dtype == "float32" else FORWARD[dtype])
        assert_close(a, b, dtype)


def test_extreme_time_steps_and_rates_in_one_kernel():
    from mambax_cpu import prompts

    for dtype in ("float32", *(["bfloat16"] if prompts.multiplies_pairs() else [])):
        config = config_of(**WHOLE[0])
        weights = weights_of(config)
        for name, array in weights.items():
            if name.endswith("dt_proj.bias"):
                array[:] = np.linspace(-40, 50, len(array))
            elif name.endswith("A_log"):
                array[:] = np.linspace(-12, np.log(1000), array.size).reshape(array.shape)
        weights = rounded(weights, dtype)
        model, exact = (
            build(get_backend(name), config, weights, kind)
            for name, kind in (("torch", dtype), ("numpy", "float64"))
        )
        hidden, states = given(model, 1, 40)
        got, plain = at_once(model, hidden, states), one_by_one(model, hidden, states)
        assert got is not None
        wide = [type(s)(*(np.float64(array.float().numpy()) for array in s)) for s in states]
        right = one_by_one(exact, np.float64(hidden.float().numpy()), wide)
        for a, b, c in zip(got, plain, right, strict=True):
            # such a model makes much of the roundings of bfloat16, wherever they are
            assert_close(a, c, tolerance=max(FORWARD[dtype], 2 * relative_error(b, c)))


def test_functions_for_results_to_be_rounded():
    pairs_or_skip("bfloat16")
    from coarse_functions import coarse

    x = np.linspace(-86, 86, 32_000).astype(np.float32)
    results = np.full((3, x.size), np.nan, np.float32)
    coarse(x, results, x.size)
    wide = x.astype(np.float64)
    for got, want in zip(results, (np.exp2(wide), np.logaddexp(wide, 0), 1 / (1 + np.exp(-wide))), strict=True):
        assert np.abs(got / want - 1).max() < 2e-5  # of which the rounding of x log2(e) makes the most
    ends = np.array([-np.inf, -1e30, -300, -0.0, 30, np.nan] + [0] * 10, np.float32)
    results = np.full((3, 16), np.nan, np.float32)
    coarse(ends, results, 16)
    np.testing.assert_allclose(results[0, :6], [0, 0, 0, 1, 2.0**30, np.nan], rtol=1e-5)
    np.testing.assert_allclose(results[1, :6], [0, 0, 0, np.log(2), 30, np.nan], rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(results[2, :6], [0, 0, 0, 0.5, 1, np.nan], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_and_infinity_come_out_in_one_kernel(dtype):
    pairs_or_skip(dtype)
    model = build(get_backend("torch"), config_of(**WHOLE[0]), dtype=dtype)
    hidden, states = given(model, 2, 40)
    hidden[1, 20, 3] = float("nan")
    got = at_once(model, hidden, states)
    assert got is not None
    assert np.isfinite(got[0][0]).all()
    assert np.isfinite(got[0][1, :20]).all()
    assert np.isnan(got[0][1, 20:]).all()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_weights(quantize):
    nn = get_backend("torch")
    model = nn.quantize(build(nn, config_of(d_model=80, d_state=16, dt_rank=20)), quantize)
    hidden, states = given(model, 2, 40)
    got = at_once(model, hidden, states)
    assert got is not None
    for a, b in zip(got, one_by_one(model, hidden, states), strict=True):
        assert_close(a, b, tolerance=FORWARD["float32"])


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float32", {"d_model": 200, "dt_rank": 12}), ("float32", WHOLE[1]), ("bfloat16", WHOLE[1])],
)
def test_threads_change_no_bit(dtype, shape):
    pairs_or_skip(dtype)
    model = build(get_backend("torch"), config_of(**shape), dtype=dtype)
    hidden, states = given(model, 1, 300)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(at_once(model, hidden, states))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


def test_who_works_is_what_torch_says(monkeypatch):
    from mambax_cpu import prefill

    asked: list[int] = []
    read = prefill.read
    monkeypatch.setattr(prefill, "read", lambda *args: asked.append(args[-1]) or read(*args))
    model = build(get_backend("torch"), config_of())
    assert at_once(model, *given(model, 1, 40)) is not None
    assert asked == [torch.get_num_threads()]


def test_what_is_left_to_the_blocks(monkeypatch):
    from mambax_cpu import products, prompts

    nn = get_backend("torch")
    model = build(nn, config_of())
    assert at_once(model, *given(model, 1, 32)) is None  # a few tokens
    hidden, states = given(model, 1, 40)
    assert at_once(model, hidden.double(), states) is None
    for changes in ({"d_conv": 3}, {"d_model": 40}, {"dt_rank": 5}, {"d_state": 9}):
        narrow = build(nn, config_of(**WHOLE[0] | changes), dtype="bfloat16")
        assert at_once(narrow, *given(narrow, 1, 40)) is None  # PyTorch has a product for these
    narrow = build(nn, config_of(**WHOLE[0]), dtype="bfloat16")
    monkeypatch.setattr(prompts, "multiplies_pairs", lambda: False)
    assert at_once(narrow, *given(narrow, 1, 40)) is None
    monkeypatch.setattr(products, "is_fast", lambda: False)
    assert at_once(model, hidden, states) is None


@pytest.mark.parametrize("values", [[1.0, 5.0, 5.0, -2.0], [1.0, float("nan"), 7.0], [-float("inf")] * 3])
def test_the_largest_value_is_found_as_torch_does(values):
    nn = get_backend("torch")
    x = torch.tensor([values, values[::-1]])
    np.testing.assert_array_equal(nn.max(x, 1), torch.amax(x, 1))
    np.testing.assert_array_equal(nn.argmax(x, 1), torch.argmax(x, 1))
    assert nn.argmax(x, 1).dtype == torch.int64
    wanted = x.clone().requires_grad_()
    assert nn.max(wanted, 1).requires_grad
