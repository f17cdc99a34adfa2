"""Linear layers over many rows in PyTorch on the CPU: every way, their gradients, and what must go on working.

Dimensions: R rows.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from harness import TORCH_COMPILES
from tolerances import FORWARD, GRADIENT, assert_close

pytest.importorskip("torch")

import mambax_torch as nn
import torch
from mambax_torch import layers, product_ops

SHAPES = [(2, 64, 48, 300), (1, 200, 300, 48), (3, 41, 65, 65)]
"""(B, L, in, out): narrow to wide, wide to narrow, odd."""


@pytest.fixture(autouse=True)
def always_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_ops, "LARGE", 0)


@pytest.fixture(params=["kernels", "onednn", "torch", "measured"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to every product, whatever this machine would choose."""
    if request.param == "measured":
        return
    chosen = {
        "kernels": product_ops._kernels,
        "onednn": product_ops._onednn,
        "torch": torch.nn.functional.linear,
    }[request.param]
    try:
        chosen(torch.ones(2, 2), torch.ones(2, 2), None)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"not here: {error}")
    narrow = chosen if request.param == "torch" else product_ops._widened
    monkeypatch.setattr(product_ops, "fastest", lambda dtype: chosen if dtype == torch.float32 else narrow)


def values_of(shape: tuple[int, ...], bias: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    batch, length, inputs, outputs = shape
    rng = np.random.default_rng(seed)
    values = {"x": rng.standard_normal((batch, length, inputs)), "weight": rng.standard_normal((outputs, inputs))}
    return values | ({"bias": rng.standard_normal(outputs)} if bias else {})


def leaves_of(values: dict[str, np.ndarray], dtype: Any, requires_grad: bool = True) -> dict[str, Any]:
    return {name: torch.tensor(v, dtype=dtype, requires_grad=requires_grad) for name, v in values.items()}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(way, shape, with_bias):
    values = values_of(shape, with_bias)
    want = leaves_of(values, torch.float64)
    got = leaves_of(values, torch.float32)
    dy = torch.from_numpy(np.random.default_rng(1).standard_normal((*shape[:2], shape[3])))
    expected = torch.nn.functional.linear(**want)
    y = layers._linear(got["x"], got["weight"], got.get("bias"))
    assert y.grad_fn is not None
    assert "mambax_cpu_product" in y.grad_fn.name()
    assert_close(y.detach(), expected.detach())
    with torch.no_grad():
        assert torch.equal(layers._linear(got["x"], got["weight"], got.get("bias")), y)
    expected.backward(dy)
    y.backward(dy.float())
    for name, leaf in got.items():
        assert leaf.grad.is_contiguous()
        assert_close(leaf.grad, want[name].grad, what=name, tolerance=GRADIENT["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights(way, dtype):
    values = values_of((2, 60, 96, 80))
    narrow = leaves_of(values, getattr(torch, dtype))
    want = {name: leaf.detach().double().requires_grad_() for name, leaf in narrow.items()}
    y = layers._linear(**narrow)
    assert y.dtype == getattr(torch, dtype)
    expected = torch.nn.functional.linear(want["x"], want["weight"], want["bias"])
    assert_close(y.detach().double(), expected.detach(), dtype)
    y.sum().backward()
    expected.sum().backward()
    for name, leaf in narrow.items():
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad.double(), want[name].grad, what=name, tolerance=FORWARD[dtype])


def test_any_memory_layout(way):
    values = leaves_of(values_of((2, 40, 48, 70)), torch.float32, requires_grad=False)
    want = torch.nn.functional.linear(**leaves_of(values_of((2, 40, 48, 70)), torch.float64, requires_grad=False))
    wide = torch.full((2, 40, 100), float("nan"))
    wide[..., 5:53] = values["x"]
    for x in (wide[..., 5:53], values["x"].transpose(0, 1).contiguous().transpose(0, 1)):
        for weight in (values["weight"], values["weight"].t().contiguous().t()):
            assert_close(layers._linear(x, weight, values["bias"]), want)


def test_gradients_only_where_they_are_wanted_and_of_gradients():
    leaves = leaves_of(values_of((1, 50, 30, 20)), torch.float32)
    leaves["weight"].requires_grad_(False)
    layers._linear(**leaves).sum().backward()
    assert leaves["weight"].grad is None
    assert leaves["x"].grad is not None
    norms = []
    for op, dtype in ((layers._linear, torch.float32), (torch.nn.functional.linear, torch.float64)):
        leaves = leaves_of(values_of((1, 50, 30, 20)), dtype)
        (gradient,) = torch.autograd.grad(op(**leaves).square().sum(), leaves["x"], create_graph=True)
        gradient.square().sum().backward()
        norms.append(leaves["weight"].grad)
    assert_close(norms[0], norms[1], tolerance=GRADIENT["float32"])


@TORCH_COMPILES
def test_the_operator_and_compiling():
    leaves = leaves_of(values_of((2, 33, 30, 20)), torch.float32)
    torch.library.opcheck(torch.ops.mambax.cpu_product.default, (leaves["x"], leaves["weight"], leaves["bias"]))
    torch.library.opcheck(torch.ops.mambax.cpu_product.default, (leaves["x"], leaves["weight"], None))
    want = torch.autograd.grad(layers._linear(**leaves).square().sum(), list(leaves.values()))
    compiled = torch.compile(lambda **v: layers._linear(**v).square().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(**leaves), list(leaves.values()))
    for gradient, expected in zip(got, want, strict=True):
        assert_close(gradient, expected)


def test_a_layer_whose_weight_changes_is_used_as_it_is_then():
    layer = nn.Linear(np.ones((70, 60), np.float32), np.zeros(70, np.float32))
    x = torch.ones(50, 60)
    assert_close(layer(x).detach(), np.full((50, 70), 60.0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    layer(x).sum().backward()
    optimizer.step()
    assert_close(layer(x).detach(), np.full((50, 70), 60 * 0.5 - 0.5))
    layer.weight.data[:] = 2
    layer.bias.data = torch.ones(70)
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(same(x).detach(), np.full((50, 70), 121.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    seen = []
    layer.register_forward_hook(lambda *args: seen.append(args[-1].shape))
    torch.func.vmap(layer)(x[None])
    assert layer(x).shape == seen[-1]


def test_the_choice_is_measured_and_the_users_settings_are_kept(monkeypatch):
    state = torch.get_rng_state()
    product_ops.fastest.cache_clear()
    product_ops.fastest(torch.float32)
    product_ops.fastest(torch.float16)
    assert torch.equal(torch.get_rng_state(), state)

    def refused(*_: Any) -> Any:
        raise AssertionError("oneDNN was turned off")

    monkeypatch.setattr(product_ops, "_onednn", refused)
    monkeypatch.setattr(product_ops, "fastest", lambda dtype: refused)
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)  # as by torch.backends.mkldnn.flags
    assert_close(layers._linear(torch.ones(40, 30), torch.ones(20, 30), None), np.full((40, 20), 30.0))


def test_a_way_that_fails_is_not_taken_and_without_llvmlite_the_kernels_are_not_tried(monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(product_ops, "_onednn", broken)
    monkeypatch.setattr("mambax_cpu.missing", lambda: "it needs llvmlite")
    product_ops.fastest.cache_clear()
    try:
        assert product_ops.fastest(torch.float32) is torch.nn.functional.linear
    finally:
        product_ops.fastest.cache_clear()
