"""One token through a stack of blocks on MLX: compiled as on a GPU, and by NumPy's blocks on the CPU."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
from harness import build, config_of, run, token_ids
from tolerances import assert_close

from mambax import get_backend

pytest.importorskip("mlx.core")

import mlx.core as mx
import mlx.nn
from mambax_mlx import host, step

nn = get_backend("mlx")
pytestmark = pytest.mark.skipif(host.default_device() != "cpu", reason="MLX's default device is not the CPU")


# --- compiled -----------------------------------------------------------------------------------------------------


def one_token(model: Any, compiled: bool) -> tuple[Any, Any]:
    """Hidden states and layer states after a token that follows others."""
    state = model(token_ids(2, 7)).state
    hidden = model.backbone.embeddings(mx.array([[3], [5]]))
    if compiled:
        return step.compiled_step(model.backbone.layers, hidden, state.layers)
    after = []
    for layer, layer_state in zip(model.backbone.layers, state.layers, strict=True):
        hidden, layer_state = layer(hidden, layer_state)
        after.append(layer_state)
    return hidden, after


def test_the_compiled_step_is_the_step():
    model = build(nn, config_of(d_model=64, n_layer=1))
    for change in (lambda: None, lambda: None, lambda: nn.quantize(model, 4), lambda: scale_weights(model)):
        change()
        got, want = one_token(model, True), one_token(model, False)
        assert_close(got[0], want[0])
        for a, b in zip(got[1], want[1], strict=True):
            assert type(a) is type(b)
            assert_close(a.conv, b.conv)
            assert_close(a.ssm, b.ssm)


def scale_weights(model: Any) -> None:
    model.update({"backbone": {"layers": [{"norm": {"weight": mx.full((64,), 0.7)}}]}})


def test_the_compiled_step_keeps_no_model_alive_and_is_not_copied():
    model = build(nn, config_of(n_layer=1))
    one_token(model, True)
    other = copy.deepcopy(model)
    assert_close(one_token(other, True)[0], one_token(model, False)[0])
    held = weakref.ref(model.backbone.layers[0])
    del model
    gc.collect()
    assert held() is None


def test_the_whole_model_with_the_compiled_step(monkeypatch):
    model = build(nn, config_of(n_layer=1))
    want = model.generate([1, 2, 3], max_new_tokens=12, eos=())
    monkeypatch.setattr(step, "default_device", lambda: "gpu")
    got = model.generate([1, 2, 3], max_new_tokens=12, eos=())
    assert "_compiled_step" in vars(model.backbone.layers[0])
    assert got.tokens == want.tokens
    assert_close(run(model, [[4]], got.state)[0], run(model, [[4]], want.state)[0])


# --- by NumPy's blocks --------------------------------------------------------------------------------------------


def host_step(model: Any) -> Any:
    """Hidden states and layer states after a token that follows others; None where the blocks have to do it."""
    state = model(token_ids(2, 7)).state
    hidden = model.backbone.embeddings(mx.array([[3], [5]]))
    with nn.no_grad():
        return step.decode_step(model.backbone.layers, hidden, state.layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [None, 4, 8, "int4"])
def test_numpys_blocks_compute_the_token(kind, dtype):
    model = build(nn, config_of(d_model=64), dtype=dtype)
    if kind is not None:
        nn.quantize(model, kind)
    got, want = host_step(model), one_token(model, False)
    assert got[0].dtype == want[0].dtype
    assert_close(got[0].astype(mx.float32), want[0].astype(mx.float32), dtype)
    for a, b in zip(got[1], want[1], strict=True):
        assert a.conv.dtype == b.conv.dtype
        assert_close(a.conv.astype(mx.float32), b.conv.astype(mx.float32), dtype)
        assert_close(a.ssm, b.ssm, dtype)


def test_numpys_blocks_see_every_change_of_the_weights():
    """An array that is changed in place stays the same Python object."""
    model = build(nn, config_of(d_model=64))
    mixers = [layer.mixer for layer in model.backbone.layers]

    def in_place() -> None:
        mixers[1].in_proj.weight[3] = 7.0

    def added() -> None:
        mixers[0].D += 1

    for change in (lambda: None, in_place, added, lambda: scale_weights(model), lambda: nn.quantize(model, 8)):
        change()
        assert_close(host_step(model)[0], one_token(model, False)[0])


def test_where_numpys_blocks_do_not_step_in():
    plain = build(nn, config_of())
    state, hidden = plain.init_state(1).layers, plain.backbone.embeddings(mx.array([[3]]))
    assert step.decode_step(plain.backbone.layers, hidden, state) is None  # a gradient may be wanted
    seen = []

    def inside(hidden: Any) -> Any:
        with nn.no_grad():
            seen.append(step.decode_step(plain.backbone.layers, hidden, state))
        return hidden

    mx.compile(inside)(hidden)
    assert seen == [None]
    assert host_step(build(nn, config_of(scan="sequential"))) is None
    assert host_step(nn.quantize(build(nn, config_of(d_model=64)), 2)) is None
    plain.backbone.layers[1].mixer.out_proj = mlx.nn.Linear(80, 40)
    assert host_step(plain) is None
