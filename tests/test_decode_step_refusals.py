"""Where the blocks have to be called one by one: the fused step of one token leaves alone what it does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from decode_steps import FUSED, MODELS, at_once, given
from harness import build, config_of, token_ids
from tolerances import assert_close

from mambax import MambaConfig, get_backend


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Any:
    """Each backend that has kernels for the step."""
    return get_backend(request.param)


def changes_of_numpy(nn: Any) -> dict[str, Callable[[Any], None]]:
    """What a user may do to a model, by name."""

    def own_mixer(model: Any) -> None:
        mixer = model.backbone.layers[1].mixer

        class Mixer(type(mixer)):
            def forward(self, *args: Any) -> Any:
                mixed, state = super().forward(*args)
                return mixed * 2, state

        mixer.__class__ = Mixer

    def forward_of_an_instance(model: Any) -> None:
        norm = model.backbone.layers[2].norm
        norm.forward = lambda x, inner=norm.forward: inner(x) * 2

    def narrow_A(model: Any) -> None:
        mixer = model.backbone.layers[0].mixer
        nn.set_parameters(mixer, {"A_log": nn.astype(mixer.A_log, nn.dtype("float16"))})

    def named_scan(model: Any) -> None:
        mixer = model.backbone.layers[1].mixer
        mixer.config = dataclasses.replace(mixer.config, scan="sequential")

    return {f.__name__: f for f in (own_mixer, forward_of_an_instance, narrow_A, named_scan)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("change", sorted(changes_of_numpy(get_backend("numpy"))))
def test_a_changed_model_is_called_block_by_block(fused, change, kind):
    model = MODELS[kind](fused)
    hidden, states = given(fused, model)
    assert at_once(fused, model.backbone.layers, hidden, states) is not None
    changes_of_numpy(fused)[change](model)
    assert at_once(fused, model.backbone.layers, hidden, states) is None
    with fused.no_grad():
        model(token_ids(2, 1), model(token_ids(2, 4)).state)  # which works all the same


@pytest.mark.parametrize("kind", MODELS)
def test_a_patched_class_is_called(fused, kind, monkeypatch):
    model = MODELS[kind](fused)
    hidden, states = given(fused, model)
    assert at_once(fused, model.backbone.layers, hidden, states) is not None
    monkeypatch.setattr(fused.RMSNorm, "forward", lambda self, x: x)
    assert at_once(fused, model.backbone.layers, hidden, states) is None


@pytest.mark.parametrize("kind", MODELS)
def test_other_inputs_are_left_to_the_blocks(fused, kind):
    nn, model = fused, MODELS[kind](fused)
    hidden, states = given(nn, model)
    layers = model.backbone.layers
    two = nn.concat([hidden, hidden], axis=1)
    assert at_once(nn, layers, two, states) is None
    assert at_once(nn, layers, nn.astype(hidden, nn.float64), states) is None
    conv, ssm = states[1]
    for other in (type(states[1])(conv, ssm[:1]), type(states[1])(nn.astype(conv, nn.dtype("float16")), ssm)):
        assert at_once(nn, layers, hidden, (states[0], other, states[2])) is None
    many = np.zeros((33, 1, 40), np.float32)
    assert at_once(nn, layers, nn.from_numpy(many), model.init_state(33).layers) is None
    plain = model(token_ids(2, 1), model(token_ids(2, 4)).state)
    masked = model(token_ids(2, 1), model(token_ids(2, 4)).state, np.ones((2, 1), bool))
    with nn.no_grad():
        assert_close(nn.to_numpy(masked.logits.detach() if nn.name == "torch" else masked.logits),
                     nn.to_numpy(plain.logits.detach() if nn.name == "torch" else plain.logits))  # fmt: skip


def test_float64_goes_block_by_block():
    nn = get_backend("numpy")
    model = build(nn, config_of(), dtype="float64")
    hidden, states = given(nn, model)
    assert at_once(nn, model.backbone.layers, hidden, states) is None


@pytest.mark.parametrize("changes", [{"dt_b_c_norm": "weightless"}, {"residual_multiplier": 0.5}])
def test_options_that_the_kernels_do_not_know(fused, changes):
    model = build(fused, config_of(**changes))
    hidden, states = given(fused, model)
    assert at_once(fused, model.backbone.layers, hidden, states) is None


def test_who_adds_a_field_to_the_configuration_looks_here():
    """A field that changes what a block computes has to be known to ``decode_step`` of every backend: there, blocks
    that are not as the kernels know them are left to the ordinary path. Then add it here."""
    known = {
        "d_model", "n_layer", "d_state", "d_conv", "expand", "dt_rank", "use_bias", "use_conv_bias",
        "norm_epsilon", "residual_in_fp32", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor",
        "rescale_prenorm_residual", "scan", "dt_b_c_norm", "dt_b_c_norm_epsilon", "residual_multiplier",
        "layer_types", "mamba2", "attention", "mlp", "parallel", "shared", "family",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(MambaConfig)} == known
