"""The selective scan in MLX's own operations: gradients of every kind, and bounded graphs and memory.

Dimensions: B batch, L length, D channels, N d_state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tolerances import GRADIENT, assert_close

from mambax import scan
from mambax.scan import CHUNK

pytest.importorskip("mlx.core")

import mlx.core as mx
from mambax_mlx import chunked, host, ops
from mlx_cases import normal, peak, scan_arguments

pytestmark = pytest.mark.skipif(host.default_device() != "cpu", reason="MLX's default device is not the CPU")


def chunked_loss(values: dict[str, Any], **options: Any) -> Any:
    y, h = chunked.selective_scan(**values, delta_softplus=True, **options)
    return (y * normal(*y.shape, seed=3)).sum() + (h * normal(*h.shape, seed=4)).sum()


def sequential_loss(values: dict[str, Any], **options: Any) -> Any:
    y, h = scan.selective_scan(ops, **values, delta_softplus=True, **options)
    return (y * normal(*y.shape, seed=3)).sum() + (h * normal(*h.shape, seed=4)).sum()


@pytest.mark.parametrize("length", [5, 16, 40, CHUNK + 44])
@pytest.mark.parametrize("flag", ["", "mask", "boundaries"])
def test_gradients_of_chunks_also_compiled(length, flag):
    values = scan_arguments(length)
    known = np.random.default_rng(length).random((2, length)) < 0.1
    options = {flag: mx.array(known if flag == "boundaries" else ~known)} if flag else {}
    want = mx.grad(lambda v: sequential_loss(v, **options))(values)
    gradient = mx.grad(lambda v: chunked_loss(v, **options))
    for got in (gradient(values), mx.compile(gradient)(values)):
        for name, expected in want.items():
            assert_close(got[name], expected, tolerance=GRADIENT["float32"], what=name)


def test_chunks_are_differentiable_twice_and_in_vmap():
    values = scan_arguments(20)

    def second(loss: Any) -> Any:
        return mx.grad(lambda v: (mx.grad(loss)(v)["u"] ** 2).sum())(values)["delta"]

    assert_close(second(chunked_loss), second(sequential_loss), tolerance=GRADIENT["float32"])
    rest = {name: values[name] for name in ("delta", "A", "B", "C")}
    both = mx.vmap(lambda u: chunked.selective_scan(u, **rest, delta_softplus=True)[0])(
        mx.stack([values["u"], values["u"] * 2])
    )
    assert_close(both[1], chunked.selective_scan(values["u"] * 2, **rest, delta_softplus=True)[0])


def nodes(array: Any, path: Any) -> int:
    """The operations of the graph behind an array."""
    mx.export_to_dot(str(path), array)
    return path.read_text(encoding="utf-8").count("[label")


def test_the_graph_grows_with_chunks_and_not_with_tokens(tmp_path):
    def size(length: int) -> int:
        values = scan_arguments(length)
        mx.eval(values)
        return nodes(chunked.selective_scan(**values)[0], tmp_path / "graph.dot")

    one, two, three = size(CHUNK), size(2 * CHUNK), size(3 * CHUNK)
    assert abs(size(CHUNK - 16) - one) <= 0.1 * one
    assert three - two == pytest.approx(two - one, rel=0.05)


def test_training_through_chunks_takes_the_memory_of_the_activations():
    length, channels, states = 8 * CHUNK, 64, 16
    values = {
        "u": normal(1, length, channels), "delta": normal(1, length, channels), "A": -mx.ones((channels, states)),
        "B": normal(1, length, states), "C": normal(1, length, states),
    }  # fmt: skip
    mx.eval(values)
    rows = values["u"].nbytes
    found = peak(lambda: mx.grad(chunked_loss)(values))
    stored = peak(lambda: mx.grad(lambda v: sequential_by_pairs(v))(values))
    assert found < 40 * rows  # every state would be 16 times the rows, and there are several such arrays
    assert stored > 4 * found


def sequential_by_pairs(values: dict[str, Any]) -> Any:
    y, h = scan.selective_scan(ops, **values, delta_softplus=True, algorithm="pscan")
    return (y * normal(*y.shape, seed=3)).sum() + (h * normal(*h.shape, seed=4)).sum()
