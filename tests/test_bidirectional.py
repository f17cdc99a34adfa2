"""Mixers that read in both directions: against their two halves, and what a whole-sequence model promises.

Dimensions: B batch, L length, M d_model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import WITH_GRADIENTS, backend_params, token_ids
from tolerances import GRADIENT, assert_close

import mambax
from mambax.options import Mamba2Options

KINDS = ("bimamba", "bimamba_tied", "bimamba2", "bimamba2_tied")
KIND = pytest.mark.parametrize("kind", KINDS)


def config_of(kind: str, **changes: Any) -> mambax.MambaClassificationConfig:
    fields: dict[str, Any] = {
        "d_model": 24, "n_layer": 2, "d_state": 5, "d_conv": 3, "dt_rank": 3, "vocab_size": 31, "num_labels": 3,
        "use_bias": True, "layer_types": (kind,) * 2,
        "mamba2": Mamba2Options(n_heads=6, head_dim=8, d_state=5, n_groups=2, d_conv=3, use_bias=True),
    }  # fmt: skip
    return mambax.MambaClassificationConfig(**(fields | changes))


def classifier(name: str, kind: str, **changes: Any) -> Any:
    return mambax.from_config(config_of(kind, **changes), backend=name, seed=3)


def logits_of(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with model.nn.no_grad():
        return model.nn.to_numpy(model(ids, None, mask).logits)


def halves(model: Any, mixer: Any) -> tuple[Any, Any]:
    """The two directions as whole causal mixers in float64, on NumPy."""
    numpy: Any = mambax.get_backend("numpy")
    kind = "mamba2" if "bimamba2" in model.config.layer_types[0] else "mamba"
    weights = {name: model.nn.to_numpy(array) for name, array in model.nn.parameters(mixer).items()}
    made = []
    for direction in ("mamba_fwd", "mamba_rev"):
        causal = numpy.Block.mixers[kind](model.config)
        own = {
            name: weights.get(f"{direction}.{name}", weights[f"mamba_fwd.{name}"])
            for name in numpy.parameters(causal)
        }
        numpy.set_parameters(causal, {name: array.astype(np.float64) for name, array in own.items()})
        made.append(causal)
    return made[0], made[1]


@KIND
def test_it_is_the_sum_of_a_mixer_each_way(nn, kind):
    model = classifier(nn.name, kind)
    mixer = model.backbone.layers[1].mixer
    ahead, back = halves(model, mixer)
    x = np.random.default_rng(0).standard_normal((2, 37, 24))
    want = ahead(x)[0] + back(x[:, ::-1])[0][:, ::-1]
    if "tied" in kind:  # one product with out_proj, and so its bias once
        want -= np.asarray(ahead.out_proj.bias)
    with nn.no_grad():
        got, state = mixer(nn.from_numpy(x.astype(np.float32)))
    assert_close(nn.to_numpy(got), want)
    assert not state._fields


@KIND
def test_a_padded_row_is_that_row_alone(nn, kind):
    model, ids = classifier(nn.name, kind), token_ids(3, 20, 31)
    mask = np.ones((3, 20), bool)
    mask[0, :7] = mask[1, 15:] = mask[2, 4:9] = False
    got = logits_of(model, ids, mask)
    for row in range(3):
        assert_close(got[row], logits_of(model, ids[row : row + 1, mask[row]])[0], what=f"row {row}")


@KIND
def test_a_packed_row_is_its_sequences_one_by_one(nn, kind):
    encoder = classifier(nn.name, kind).backbone
    x = np.random.default_rng(1).standard_normal((1, 30, 24)).astype(np.float32)
    begins = np.zeros((1, 30), bool)
    begins[0, [4, 5, 22]] = True
    with nn.no_grad():
        packed = nn.to_numpy(encoder(nn.from_numpy(x), boundaries=begins).hidden_states)
        for start, stop in ((0, 4), (4, 5), (5, 22), (22, 30)):
            alone = encoder(nn.from_numpy(x[:, start:stop])).hidden_states
            assert_close(packed[:, start:stop], nn.to_numpy(alone), what=f"{start} to {stop}")


def test_the_first_position_sees_the_last_token(nn):
    x = np.random.default_rng(2).standard_normal((1, 5, 24)).astype(np.float32)
    other = x.copy()
    other[0, -1] = -x[0, -1]
    for kind, sees in (("bimamba", True), ("mamba", False)):
        encoder = classifier(nn.name, kind).backbone
        with nn.no_grad():
            first, second = (nn.to_numpy(encoder(nn.from_numpy(a)).hidden_states)[0, 0] for a in (x, other))
        assert (np.abs(first - second).max() > 1e-5) == sees, kind


@pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
@KIND
def test_gradients_are_differences_of_the_loss(backend, kind):
    """Along the gradient itself, of every parameter at once; the reference in float64."""
    model, ids, labels = classifier(backend, kind), token_ids(2, 11, 31), np.array([0, 2])
    nn = model.nn
    if backend == "torch":
        model(ids, labels=labels).loss.backward()
        gradient = {name: array.grad.numpy() for name, array in nn.parameters(model).items()}
    else:
        import mlx.nn
        from mlx.utils import tree_flatten

        _, found = mlx.nn.value_and_grad(model, lambda: model(ids, labels=labels).loss)()
        gradient = {name: np.array(array) for name, array in tree_flatten(found)}
    reference = classifier("numpy", kind)
    weights = {name: nn.to_numpy(array).astype(np.float64) for name, array in nn.parameters(model).items()}
    rng = np.random.default_rng(4)
    for group in ("in_proj", "conv1d", "A_log", "out_proj", "mamba_rev", "embeddings"):
        names = [name for name in weights if group in name]
        direction = {name: rng.standard_normal(weights[name].shape) for name in names}

        def loss(step: float, direction: dict[str, np.ndarray] = direction) -> float:
            moved = {name: weights[name] + step * direction[name] for name in direction}
            reference.nn.set_parameters(reference, weights | moved)
            return float(reference(ids, labels=labels).loss)

        want = (loss(1e-5) - loss(-1e-5)) / 2e-5
        got = sum(float((gradient[name] * direction[name]).sum()) for name in names)
        scale = sum(float(np.linalg.norm(gradient[name]) * np.linalg.norm(direction[name])) for name in names)
        assert abs(got - want) <= GRADIENT["float32"] * scale, group


@KIND
def test_it_is_saved_and_read(nn, kind, tmp_path):
    model, ids = classifier(nn.name, kind, pooling="last"), token_ids(2, 13, 31)
    model.save_pretrained(tmp_path)
    again = mambax.load(tmp_path, backend=nn.name)
    assert again.config == model.config
    np.testing.assert_array_equal(logits_of(again, ids), logits_of(model, ids))


def test_what_it_cannot_do_is_refused(nn):
    model, ids = classifier(nn.name, "bimamba"), token_ids(1, 5, 31)
    state = model(ids).state
    for given in (state, model.init_state(1)):
        with pytest.raises(ValueError, match="cannot continue one"):
            model(ids, given)
    fields = {name: getattr(model.config, name) for name in ("d_model", "n_layer", "vocab_size", "layer_types")}
    with pytest.raises(ValueError, match="a language model cannot read from the end"):
        mambax.from_config(mambax.MambaLMConfig(**fields), backend=nn.name)
    with pytest.raises(ValueError, match="pooling 'state' needs 'mamba'"):
        classifier(nn.name, "bimamba", pooling="state")
