"""Whole-model logits against transformers and against an independent float64 recurrence.

Comparing tokens is not enough: an error of one per cent in one op passes every comparison of greedy tokens.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
from harness import build, config_of, rounded, run, scan_params, token_ids, weights_of
from tolerances import FORWARD, assert_close, relative_error

from mambax import MambaLMConfig, get_backend

LENGTHS = (1, 2, 7, 64, 257, 1000)
CONFIGS = {
    "odd sizes, untied, all biases": {},
    "tied, no projection bias": {"use_bias": False, "tie_embeddings": True},
    "tied, all biases": {"tie_embeddings": True},
    "no bias at all": {"use_bias": False, "use_conv_bias": False},
    "projection bias alone": {"use_conv_bias": False},
    "all ones": {"d_conv": 1, "dt_rank": 1, "d_state": 1, "d_model": 7, "n_layer": 1},
    "one channel": {"d_model": 1, "expand": 1, "dt_rank": 1},
    "three times as wide": {"d_model": 10, "expand": 3, "d_conv": 2},
    "another epsilon": {"norm_epsilon": 1e-2},
    "everyday sizes": {"d_model": 64, "d_state": 16, "d_conv": 4, "dt_rank": "auto", "use_bias": False},
}
BY_CONFIG = pytest.mark.parametrize("name", CONFIGS)
BY_LENGTH = pytest.mark.parametrize("length", LENGTHS)


@cache
def case(name: str) -> tuple[MambaLMConfig, reference.Weights]:
    config = config_of(**CONFIGS[name])
    return config, weights_of(config)


def ids_of(length: int) -> np.ndarray:
    return token_ids(2 if length < 500 else 1, length)


@cache
def exact(name: str, length: int) -> np.ndarray:
    """Logits of the independent recurrence."""
    config, weights = case(name)
    return reference.logits(weights, ids_of(length), config.norm_epsilon)


@cache
def hugging_face(name: str) -> Any:
    """``transformers.MambaForCausalLM`` with the same weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, weights = case(name)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            state_size=config.d_state,
            num_hidden_layers=config.n_layer,
            expand=config.expand,
            conv_kernel=config.d_conv,
            time_step_rank=config.dt_rank,
            layer_norm_epsilon=config.norm_epsilon,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            tie_word_embeddings=config.tie_embeddings,
            residual_in_fp32=config.residual_in_fp32,
        )
    )
    tensors = {key: torch.tensor(value, dtype=torch.float32) for key, value in weights.items()}
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    model.load_state_dict(tensors)
    return model.eval()


@cache
def hugging_face_logits(name: str, length: int) -> np.ndarray:
    import torch

    with torch.no_grad():
        return hugging_face(name)(torch.tensor(ids_of(length)), use_cache=False).logits.numpy()


@BY_CONFIG
@BY_LENGTH
def test_float32_logits_agree_with_transformers(nn, name, length):
    config, weights = case(name)
    got, state = run(build(nn, config, weights), ids_of(length))
    assert got.dtype == np.float32
    assert_close(got, hugging_face_logits(name, length))
    assert_close(got, exact(name, length))
    assert state.get_cache_info().tokens_seen == (length,) * len(got)


def test_a_fractional_expansion(nn):
    """transformers takes whole numbers alone, so that the recurrence decides."""
    config = config_of(d_model=10, expand=1.5)
    weights = weights_of(config)
    assert weights["backbone.layers.0.mixer.D"].shape == (15,)
    assert_close(run(build(nn, config, weights), ids_of(64))[0], reference.logits(weights, ids_of(64)))


@BY_CONFIG
@BY_LENGTH
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_float64_logits_agree_with_an_independent_recurrence(backend, name, length):
    nn = get_backend(backend)
    config, weights = case(name)
    got, _ = run(build(nn, config, weights, "float64"), ids_of(length))
    assert got.dtype == np.float64
    # torch's float64 exponentials are good to a few more units in the last place than NumPy's
    assert_close(got, exact(name, length), "float64", tolerance=0 if backend == "numpy" else 1e-11)


@pytest.mark.parametrize(("backend", "impl"), scan_params())
@BY_LENGTH
def test_every_scan_implementation_gives_the_same_logits(backend, impl, length):
    nn, name = get_backend(backend), "odd sizes, untied, all biases"
    config, weights = config_of(scan=impl), case(name)[1]
    got, state = run(build(nn, config, weights), ids_of(length))
    assert_close(got, exact(name, length))
    _, want = reference.logits_row(weights, ids_of(length)[0])
    for layer, past, h in zip(state.layers, want.past, want.h, strict=True):
        assert_close(nn.to_numpy(layer.ssm)[0], h, what="ssm state")
        assert_close(nn.to_numpy(layer.conv)[0], past, what="conv state")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("residual", [True, False])
@BY_LENGTH
def test_narrow_weights(nn, dtype, residual, length):
    """Against the float64 recurrence with the same rounded weights: only the arithmetic differs."""
    config = config_of(d_model=64, residual_in_fp32=residual, n_layer=2)
    weights = weights_of(config)
    same = {name: np.float64(array) for name, array in rounded(weights, dtype).items()}
    model = build(nn, config, weights, dtype)
    got, state = run(model, ids_of(length))
    assert got.dtype == np.float32
    assert_close(got, reference.logits(same, ids_of(length)), dtype)
    assert all(layer.ssm.dtype == nn.float32 and layer.conv.dtype == nn.dtype(dtype) for layer in state.layers)
    assert all(layer.ssm.dtype == nn.float32 for layer in model.init_state().layers)


def test_logits_to_keep_are_the_last_ones(nn):
    model = build(nn, config_of())
    ids = token_ids(2, 9)
    whole, _ = run(model, ids)
    for keep in (1, 4, 9, 100):
        some, state = run(model, ids, logits_to_keep=keep)
        assert_close(some, whole[:, -keep:])
        assert state.get_cache_info().tokens_seen == (9, 9)


# --- planted errors: the tests above would see them --------------------------------------------------------------


def planted_error(nn: Any) -> float:
    name = "odd sizes, untied, all biases"
    config = config_of(scan="pscan")  # one that is written over the ops
    return relative_error(run(build(nn, config, case(name)[1]), ids_of(64))[0], exact(name, 64))


@pytest.mark.parametrize("op", ["exp", "softplus", "silu"])
def test_one_per_cent_in_one_op_of_one_backend_is_caught(nn, op, monkeypatch):
    """Planted at the seam's host of the op, where the shared scan and convolution find it."""
    ops = importlib.import_module(f"mambax_{nn.name}.ops")
    right = getattr(ops, op)
    assert planted_error(nn) <= FORWARD["float32"]
    monkeypatch.setattr(nn, op, lambda x: right(x) * 1.01)
    monkeypatch.setattr(ops, op, lambda x: right(x) * 1.01)
    assert planted_error(nn) > 30 * FORWARD["float32"]


def test_one_per_cent_in_one_parameter_of_one_layer_is_caught(nn):
    config, weights = case("odd sizes, untied, all biases")
    for name in weights:
        wrong = weights | {name: weights[name] * 1.01}
        error = relative_error(run(build(nn, config, wrong), ids_of(7))[0], reference.logits(weights, ids_of(7)))
        assert error > FORWARD["float32"], name
