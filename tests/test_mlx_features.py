"""An MLX model is an MLX module: everything that MLX does with one works."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import reference
from harness import build, config_of, run, token_ids, weights_of
from tolerances import assert_close, relative_error

import mambax
from mambax.config import MambaClassificationConfig

pytest.importorskip("mlx.core")

import mlx.core as mx
import mlx.nn
import mlx.optimizers
from mambax_mlx import module
from mlx.utils import tree_flatten

nn = mambax.get_backend("mlx")

CONFIG = config_of(n_layer=2)
WEIGHTS = weights_of(CONFIG)


@pytest.fixture
def model() -> Any:
    return build(nn, CONFIG, WEIGHTS)


def loss_of(model: Any, ids: Any) -> Any:
    """Cross-entropy of the next token."""
    logits = model(ids).logits
    return mlx.nn.losses.cross_entropy(logits[:, :-1], ids[:, 1:], reduction="mean")


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_names_are_those_of_checkpoints(tied):
    config = config_of(tie_embeddings=tied)
    model = mambax.from_config(config, backend="mlx")
    names = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    assert names == {name: array.shape for name, array in weights_of(config).items()}
    if mambax.registry.is_installed("torch"):
        held = mambax.from_config(config, backend="torch").state_dict()
        assert names == {name: tuple(tensor.shape) for name, tensor in held.items()}


def test_value_and_grad_and_an_optimiser():
    model = mambax.from_config(config_of(n_layer=1), backend="mlx")
    ids = mx.array(token_ids(4, 24))
    step = mlx.nn.value_and_grad(model, loss_of)
    optimiser = mlx.optimizers.AdamW(learning_rate=1e-2)
    losses = []
    for _ in range(25):
        loss, gradients = step(model, ids)
        optimiser.update(model, gradients)
        mx.eval(model.parameters(), optimiser.state)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_freeze_and_unfreeze(model):
    everything = dict(tree_flatten(model.trainable_parameters()))
    assert everything.keys() == WEIGHTS.keys()
    model.freeze()
    assert not tree_flatten(model.trainable_parameters())
    assert nn.parameters(model).keys() == WEIGHTS.keys()
    model.backbone.layers[1].mixer.unfreeze()
    held = dict(tree_flatten(model.trainable_parameters()))
    assert held
    assert all(name.startswith("backbone.layers.1.mixer.") for name in held)
    _, gradients = mlx.nn.value_and_grad(model, loss_of)(model, mx.array(token_ids(2, 6)))
    assert dict(tree_flatten(gradients)).keys() == held.keys()
    model.unfreeze()
    assert dict(tree_flatten(model.trainable_parameters())).keys() == WEIGHTS.keys()


def quantizable(path: str, module: Any) -> bool:
    """Linear layers and the table of embeddings, but not the time steps, to which the model is sensitive."""
    return hasattr(module, "to_quantized") and not path.endswith("dt_proj")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_quantize(bits, tied):
    """The quantised model is the model with the weights that its bits stand for."""
    config = config_of(d_model=64, n_layer=2, tie_embeddings=tied)
    weights = weights_of(config)
    model = build(nn, config, weights)
    mlx.nn.quantize(model, group_size=32, bits=bits, class_predicate=quantizable)
    held = nn.parameters(model)
    seen = {name: np.float64(nn.to_numpy(array)) for name, array in held.items() if name in weights}
    packed = [name.removesuffix(".scales") for name in held if name.endswith(".scales")]
    assert len(packed) == 2 * 3 + 1 + (not tied)
    for path in packed:
        parts = (held[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
        seen[f"{path}.weight"] = np.float64(np.array(mx.dequantize(*parts, group_size=32, bits=bits)))
    ids = token_ids(2, 40)
    assert_close(run(model, ids)[0], reference.logits(seen, ids))
    assert 1e-3 < relative_error(run(model, ids)[0], reference.logits(weights, ids)) < {4: 0.6, 8: 0.05}[bits]
    tokens = model.generate([1, 2, 3], max_new_tokens=5).tokens
    assert tokens == build(nn, config, seen).generate([1, 2, 3], max_new_tokens=5).tokens


def test_a_quantized_classifier():
    config = MambaClassificationConfig(d_model=64, n_layer=1, d_state=8, vocab_size=101, num_labels=32)
    model = nn.MambaForSequenceClassification(config)
    want = nn.to_numpy(model(token_ids(2, 9)).logits)
    mlx.nn.quantize(model, group_size=32, bits=8, class_predicate=quantizable)
    assert_close(nn.to_numpy(model(token_ids(2, 9)).logits), want, tolerance=0.05)


def test_compile(model):
    forward = mx.compile(lambda ids: model(ids).logits)
    for length in (6, 9, 6):
        ids = mx.array(token_ids(2, length))
        assert_close(nn.to_numpy(forward(ids)), nn.to_numpy(model(ids).logits))

    def step(ids: Any, state: list[Any]) -> tuple[Any, list[Any]]:
        layers = tuple(type(start.layers[0])(*pair) for pair in zip(state[0::2], state[1::2], strict=True))
        output = model(ids, type(start)(layers, start.tokens_seen))
        return output.logits, [array for layer in output.state.layers for array in layer]

    start = model.init_state(2)
    compiled, state = mx.compile(step), [array for layer in start.layers for array in layer]
    parts = []
    for i in range(5):
        logits, state = compiled(mx.array(token_ids(2, 5))[:, i : i + 1], state)
        parts.append(nn.to_numpy(logits))
    assert_close(np.concatenate(parts, 1), run(model, token_ids(2, 5))[0])


def test_compiled_training_step(model):
    ids = mx.array(token_ids(2, 7))
    plain = mlx.nn.value_and_grad(model, loss_of)
    compiled = mx.compile(lambda ids: plain(model, ids), inputs=model.state)
    want, got = plain(model, ids), compiled(ids)
    assert_close(got[0].item(), want[0].item())
    for (name, a), (_, b) in zip(tree_flatten(got[1]), tree_flatten(want[1]), strict=True):
        assert_close(nn.to_numpy(a), nn.to_numpy(b), what=name)


def test_save_and_load_weights(model, tmp_path):
    path = str(tmp_path / "weights.safetensors")
    model.save_weights(path)
    other = mambax.from_config(CONFIG, backend="mlx", seed=3)
    other.load_weights(path)
    ids = token_ids(2, 5)
    np.testing.assert_array_equal(run(other, ids)[0], run(model, ids)[0])


def test_setting_weights_wires_memory_once_on_a_mac(monkeypatch):
    limits: list[int] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12345})
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    module._keep_resident.cache_clear()
    for _ in range(2):
        build(nn, CONFIG, WEIGHTS)
    assert limits == [12345]
    module._keep_resident.cache_clear()
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    build(nn, CONFIG, WEIGHTS)
    assert limits == [12345]


def test_deepcopy(model):
    other = copy.deepcopy(model)
    ids = token_ids(2, 5)
    np.testing.assert_array_equal(run(other, ids)[0], run(model, ids)[0])


def test_set_dtype(model):
    model.set_dtype(mx.bfloat16)
    logits, state = run(model, token_ids(2, 9))
    assert logits.dtype == np.float32
    assert all(layer.ssm.dtype == mx.float32 for layer in state.layers)
    assert_close(logits, reference.logits(WEIGHTS, token_ids(2, 9)), tolerance=0.1)


def test_an_id_outside_the_vocabulary_in_an_array_is_never_another_token(model):
    for bad in (101, -1):
        assert np.isnan(run(model, mx.array([[1, bad]]))[0][0, 1]).all()


def test_derivatives_that_a_loss_without_logits_lacks_are_refused_and_not_zero():
    layer = nn.Linear(np.ones((7, 4), np.float32), None)

    def in_chunks(x: Any) -> Any:
        return nn.summed_over_chunks(layer, lambda rows: ((layer(rows) ** 3).sum(),), [x], 4)[0]

    x = mx.arange(40).reshape(10, 4) / 40
    gradient = mx.grad(in_chunks)(x)
    assert_close(gradient, mx.grad(lambda x: (layer(x) ** 3).sum())(x))
    for derivative in (
        lambda: mx.jvp(in_chunks, [x], [x]),
        lambda: mx.grad(lambda x: (mx.grad(in_chunks)(x) ** 2).sum())(x),
    ):
        with pytest.raises(NotImplementedError, match="compute the loss from the logits"):
            derivative()
