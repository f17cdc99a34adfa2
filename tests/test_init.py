"""Initial weights: the official package's scheme, from one seed, the same on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from harness import config_of, installed

import mambax
from mambax import MambaClassificationConfig, get_backend

CONFIG = config_of(
    d_model=256, n_layer=4, d_state=16, d_conv=4, dt_rank=16, vocab_size=700, use_bias=True, tie_embeddings=False
)


def weights_of(config: Any, backend: str = "numpy", seed: int = 0) -> dict[str, np.ndarray]:
    nn = get_backend(backend)
    model = mambax.from_config(config, backend=backend, seed=seed)
    return {name: nn.to_numpy(array) for name, array in nn.parameters(model).items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return weights_of(CONFIG)


def of_layers(weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """One parameter of every layer, stacked."""
    return np.stack([weights[f"backbone.layers.{i}.mixer.{name}"] for i in range(CONFIG.n_layer)])


def test_one_seed_gives_the_same_bits_on_every_backend():
    want = weights_of(config_of())
    for backend in installed()[1:]:
        got = weights_of(config_of(), backend)
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == np.float32
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_seeds_differ_and_layers_differ():
    one, two = weights_of(config_of(), seed=1), weights_of(config_of(), seed=2)
    drawn = [n for n in one if not np.array_equal(one[n], two[n])]
    constant = {"norm.weight", "A_log", "D", "in_proj.bias", "out_proj.bias", "norm_f.weight"}
    assert all(any(n.endswith(c) for c in constant) for n in one if n not in drawn)
    for name in ("in_proj.weight", "dt_proj.bias", "conv1d.weight"):
        assert not np.array_equal(*(one[f"backbone.layers.{i}.mixer.{name}"] for i in (0, 1)))


def uniform_in(values: np.ndarray, bound: float) -> None:
    """Uniform in [-bound, bound]: the range is reached and not passed, and the moments fit."""
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    assert np.abs(values).max() > 0.97 * bound
    assert abs(values.std() - bound / 3**0.5) < 0.05 * bound
    assert abs(values.mean()) < 6 * bound / 3**0.5 / values.size**0.5


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("in_proj.weight", 256**-0.5),
        ("x_proj.weight", 512**-0.5),
        ("out_proj.weight", 512**-0.5 / 4**0.5),  # divided by the square root of the number of layers
        ("dt_proj.weight", 16**-0.5),
        ("conv1d.weight", 4**-0.5),
        ("conv1d.bias", 4**-0.5),
    ],
)
def test_uniform_weights(weights, name, bound):
    uniform_in(of_layers(weights, name), bound)


def test_options_of_the_scheme():
    plain = weights_of(config_of(d_model=256, rescale_prenorm_residual=False))
    uniform_in(plain["backbone.layers.0.mixer.out_proj.weight"], 512**-0.5)
    constant = weights_of(config_of(dt_rank=4, dt_init="constant", dt_scale=3.0))
    assert (constant["backbone.layers.0.mixer.dt_proj.weight"] == np.float32(3 * 4**-0.5)).all()
    scaled = weights_of(config_of(d_model=256, dt_scale=0.1))
    uniform_in(scaled["backbone.layers.0.mixer.dt_proj.weight"], 0.1 * 5**-0.5)


def test_constant_weights(weights):
    assert (of_layers(weights, "A_log") == np.log(np.arange(1, 17)).astype(np.float32)).all()
    for name in weights:
        if name.endswith((".D", "norm.weight", "norm_f.weight")):
            assert (weights[name] == 1).all(), name
        if name.endswith(("in_proj.bias", "out_proj.bias")):
            assert (weights[name] == 0).all(), name


def test_embeddings_and_head(weights):
    table = weights["backbone.embeddings.weight"]
    assert abs(table.std() - 0.02) < 2e-4
    assert abs(table.mean()) < 3e-4
    assert 0.06 < np.abs(table).max() < 0.14  # normal, not uniform
    uniform_in(weights["lm_head.weight"], 256**-0.5)


def test_time_steps_are_log_uniform(weights):
    dt = reference.softplus(np.float64(of_layers(weights, "dt_proj.bias")))
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    u = (np.log(dt) - np.log(0.001)) / np.log(100)  # uniform in [0, 1]
    assert abs(u.mean() - 0.5) < 0.03
    assert abs(u.std() - 12**-0.5) < 0.02
    assert np.histogram(u, 10, (0, 1))[0].min() > 0.7 * u.size / 10


def test_time_steps_do_not_go_below_the_floor():
    config = config_of(d_model=256, dt_min=1e-6, dt_max=1e-3, dt_init_floor=1e-4)
    dt = reference.softplus(np.float64(weights_of(config)["backbone.layers.0.mixer.dt_proj.bias"]))
    assert dt.min() == pytest.approx(1e-4, rel=1e-4)
    assert dt.max() > 5e-4


def test_a_classification_head():
    config = MambaClassificationConfig(d_model=256, n_layer=1, vocab_size=11, num_labels=40)
    weights = weights_of(config)
    uniform_in(weights["score.weight"], 256**-0.5)
    assert (weights["score.bias"] == 0).all()


def test_the_seed_is_checked():
    for seed in (-1, 1.5, "lucky"):
        with pytest.raises(ValueError, match="seed is"):
            mambax.from_config(config_of(), backend="numpy", seed=seed)
