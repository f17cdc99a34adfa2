"""Many tokens through a stack of blocks at once: the same as block by block, and as float64.

Dimensions: B batch, L length, M d_model, D d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import build, config_of, token_ids, weights_of
from tolerances import FORWARD, assert_close

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
    from mambax_cpu import block, convolution, norm, products, scan

    def room(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    def narrow_room(dtype: Any, *shape: int) -> np.ndarray:
        return np.full(shape, np.nan, dtype)

    for module in (block, convolution, norm, products, scan):
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 33), (1, 97), (3, 40), (40, 2)])
def test_against_blocks_one_by_one_and_float64(shape, batch, length):
    config = config_of(**shape)
    weights = weights_of(config)
    model, exact = (
        build(get_backend(name), config, weights, dtype)
        for name, dtype in (("torch", "float32"), ("numpy", "float64"))
    )
    hidden, states = given(model, batch, length)
    before = [array.clone() for state in states for array in state]
    got, want = at_once(model, hidden, states), one_by_one(model, hidden, states)
    assert got is not None
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, tolerance=FORWARD["float32"])
    assert all(map(torch.equal, before, [array for state in states for array in state]))
    wide = [type(s)(*(np.float64(array.numpy()) for array in s)) for s in states]
    for a, b in zip(got, one_by_one(exact, np.float64(hidden.numpy()), wide), strict=True):
        assert_close(a, b, tolerance=4e-6)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_weights(quantize):
    nn = get_backend("torch")
    model = nn.quantize(build(nn, config_of(d_model=80, d_state=16, dt_rank=20)), quantize)
    hidden, states = given(model, 2, 40)
    got = at_once(model, hidden, states)
    assert got is not None
    for a, b in zip(got, one_by_one(model, hidden, states), strict=True):
        assert_close(a, b, tolerance=FORWARD["float32"])


def test_threads_change_no_bit():
    model = build(get_backend("torch"), config_of(d_model=200, dt_rank=12))
    hidden, states = given(model, 1, 150)
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
    from mambax_cpu import products

    nn = get_backend("torch")
    model = build(nn, config_of())
    assert at_once(model, *given(model, 1, 32)) is None  # a few tokens
    hidden, states = given(model, 1, 40)
    assert at_once(model, hidden.double(), states) is None
    narrow = build(nn, config_of(), dtype="bfloat16")
    assert at_once(narrow, *given(narrow, 1, 40)) is None  # PyTorch has a product for them
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
