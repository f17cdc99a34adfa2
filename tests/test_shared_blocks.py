"""Blocks that several places of a model share: what files may say of them, states, gradients, and Zamba2's values.

Dimensions: B batch, L length.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import family_cases
import numpy as np
import pytest
from harness import WITH_GRADIENTS, assert_states_close, backend_params, run, token_ids
from tolerances import FORWARD, GRADIENT, assert_close

import mambax
from mambax.checkpoint.layouts import read_config
from mambax.layer_states import AttentionState, LayerState
from mambax.options import AttentionOptions, MLPOptions, SharedOptions

BACKENDS = pytest.mark.parametrize("backend", backend_params())

SHARED = SharedOptions(places=(0, 2, 3), n_blocks=2, adapter_rank=3, adapts_attention=True)
CONFIG = mambax.MambaLMConfig(
    d_model=24, n_layer=4, vocab_size=50,
    attention=AttentionOptions(n_heads=4, head_dim=10, n_kv_heads=2, rope_theta=100.0),
    mlp=MLPOptions(d_intermediate=20, activation="gelu"),
    shared=SHARED,
)  # fmt: skip
"""Mamba-1, of which backends may take a whole stack of blocks in one step, with shared blocks among them."""


def model_of(backend: str) -> Any:
    """A model in which no adapter is zero."""
    model = mambax.from_config(CONFIG, backend=backend)
    nn, rng, values = model.nn, np.random.default_rng(0), {}
    for name, array in sorted(nn.parameters(model).items()):
        values[name] = nn.to_numpy(array) + np.float32(0.05) * rng.standard_normal(array.shape, np.float32)
    nn.set_parameters(model, {name: nn.from_numpy(array) for name, array in values.items()})
    return model


@BACKENDS
def test_each_use_has_a_cache_of_its_own_and_any_split_is_one_call(backend, tmp_path):
    model, ids = model_of(backend), token_ids(2, 30, 50)
    whole, end = run(model, ids)
    assert [type(layer) for layer in end.layers] == [LayerState] * 4 + [AttentionState] * 3
    assert [layer.key.shape for layer in end.layers[4:]] == [(2, 2, 30, 10)] * 3
    state, parts = None, []
    for start, stop in ((0, 7), *((i, i + 1) for i in range(7, 12)), (12, 30)):
        logits, state = run(model, ids[:, start:stop], state)
        parts.append(logits)
    assert_close(np.concatenate(parts, 1), whole)
    assert_states_close(state, end)
    end.save(tmp_path / "a.state")
    assert_states_close(model.load_state(tmp_path / "a.state"), end)


def test_every_backend_computes_the_same_and_files_hold_it(tmp_path):
    ids = token_ids(2, 40, 50)
    first = model_of("numpy")
    want = run(first, ids)[0]
    first.save_pretrained(tmp_path)
    for backend in mambax.backend_names():
        again = mambax.load(tmp_path, backend=backend)
        assert again.config == CONFIG
        assert_close(run(again, ids)[0], want, what=backend)


@pytest.mark.parametrize("backend", backend_params(WITH_GRADIENTS))
def test_computing_again_for_the_gradient_changes_no_gradient(backend):
    from test_families import gradients_of

    ids = token_ids(2, 17, 50)
    probe = np.random.default_rng(0).standard_normal((2, 17, 50)).astype(np.float32)
    want, again = gradients_of(model_of(backend), ids, probe), model_of(backend)
    again.backbone.gradient_checkpointing = True
    got = gradients_of(again, ids, probe)
    assert got.keys() == want.keys()
    assert any("shared_blocks.1.attention.k_adapters" in name for name in want)
    for name, gradient in want.items():
        assert np.abs(gradient).max() > 0, name
        assert_close(got[name], gradient, tolerance=GRADIENT["float32"], what=name)


@BACKENDS
def test_gelu_is_exact(backend):
    nn = mambax.get_backend(backend)
    x = np.linspace(-9, 9, 2001).astype(np.float32)
    want = np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)])
    got = nn.to_numpy(nn.gelu(nn.from_numpy(x)))
    assert got.dtype == np.float32
    assert_close(got, want, tolerance=FORWARD["float32"])
    assert np.abs(got - want).max() < 1e-6


def test_options_of_shared_blocks_that_cannot_be():
    for changes, message in (
        ({"places": (2, 1)}, "places is .* expected numbers of blocks, in ascending order"),
        ({"places": ()}, "places"),
        ({"places": (1, 4)}, r"places is \(1, 4\); expected numbers of blocks below n_layer \(4\)"),
        ({"n_blocks": 4}, "n_blocks is 4"),
        ({"adapter_rank": 0}, "adapter_rank is 0; expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, shared=dataclasses.replace(SHARED, **changes))
    with pytest.raises(ValueError, match="mlp is None"):
        mambax.from_config(dataclasses.replace(CONFIG, mlp=None), backend="numpy")


# --- Zamba2 -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zamba2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zamba2")
    family_cases.write("zamba2", folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; only 'gelu' is supported"),
        ({"time_step_limit": [0.0, 1.0]}, r"time_step_limit is \[0.0, 1.0\]; only None is supported"),
        ({"time_step_min": 0}, "time_step_min is 0; expected a number above 0"),
        ({"use_long_context": True}, "use_long_context is True, by which .* only False is supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"layers_block_type": ["mamba"] * 6}, "layers_block_type is .* expected 6 of .* one 'hybrid' at least"),
        ({"layers_block_type": ["hybrid"] * 5}, "layers_block_type is .* expected 6 of"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; only 6 is supported with adapters"),
        ({"attention_head_dim": 6}, "attention_head_dim is 6; only 12, which other fields give, is supported"),
        ({"add_bias_linear": "yes"}, "add_bias_linear is 'yes'; expected true or false"),
        ({"num_attention_heads": 5}, "hidden_size is 36; expected a whole number of which num_attention_heads 5"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, .* where 2 blocks have 3 uses"),
    ],
)
def test_values_of_zamba2_that_are_refused(zamba2, changes, message):
    raw = json.loads((zamba2 / "config.json").read_text(encoding="utf-8"))
    read_config(raw, "config.json")
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read_config(raw | changes, "config.json")


def test_weights_that_a_file_repeats_for_every_use_must_be_equal(zamba2, tmp_path):
    from safetensors.numpy import load_file, save_file

    (tmp_path / "config.json").write_bytes((zamba2 / "config.json").read_bytes())
    tensors = load_file(zamba2 / "model.safetensors")
    first, again = (f"model.layers.{i}.shared_transformer.self_attn.o_proj.weight" for i in (1, 4))
    assert again not in tensors
    tensors[again] = tensors[first].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    ids = token_ids(1, 9, family_cases.VOCABULARY)
    np.testing.assert_array_equal(
        run(mambax.load(tmp_path, backend="numpy"), ids)[0], run(mambax.load(zamba2, backend="numpy"), ids)[0]
    )
    tensors[again][3, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.4\.shared_transformer.* differs from .*layers\.1.*two places"):
        mambax.load(tmp_path, backend="numpy")
    tensors[again.replace("layers.4", "layers.2")] = tensors.pop(again)  # a layer without a shared block
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.2\.shared_transformer"):
        mambax.load(tmp_path, backend="numpy")
