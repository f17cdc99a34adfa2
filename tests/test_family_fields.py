"""Fields of a ``config.json`` that change the numbers: read as transformers reads them, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

import mambax
from mambax import get_backend
from mambax.checkpoint.layouts import read_config
from mambax.config import MambaLMConfig
from mambax.families import named
from mambax.options import AttentionOptions, MLPOptions, SharedOptions

SIZES = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"mamba_n_heads": 8, "mamba_d_state": 7}
RAW: dict[str, dict[str, Any]] = {
    "bamba": SIZES | HEADS | {"attn_layer_indices": [1]},
    "falcon_h1": SIZES | HEADS | {"mamba_d_ssm": 56},
    "granitemoehybrid": SIZES | HEADS | {"position_embedding_type": "rope"},
    "jamba": SIZES,
    "mamba2": {
        "vocab_size": 101,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_heads": 12,
        "head_dim": 6,
        "n_groups": 3,
    },
    "nemotron_h": SIZES | {"layers_block_type": ["mamba", "attention", "mlp"]},
    "zamba2": SIZES | {"layers_block_type": ["mamba", "hybrid"], "use_mem_rope": True},
}


def read(family: str, **changes: Any) -> MambaLMConfig:
    return read_config(RAW[family] | {"model_type": family} | changes, "config.json").config


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h", "zamba2"])
def test_key_heads_that_are_null_are_as_many_as_those_of_queries(family):
    attention = read(family, num_key_value_heads=None).attention
    assert attention is not None
    assert attention.n_kv_heads == attention.n_heads == 4


def test_heads_of_nemotron_are_128_wide_where_the_file_says_nothing():
    for changes, width in (({}, 128), ({"head_dim": 10}, 10), ({"attention_head_dim": 14}, 14)):
        attention = read("nemotron_h", num_key_value_heads=2, **changes).attention
        assert attention is not None
        assert attention.head_dim == width
    with pytest.raises(ValueError, match="head_dim is 10, but attention_head_dim is 14"):
        read("nemotron_h", head_dim=10, attention_head_dim=14)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "linear", "factor": 2.0}, "rope_type 'linear' is not supported.*Use a checkpoint without"),
        ({"full_attention": {"rope_theta": 5e5}}, "rope_parameters with full_attention is .*Use a checkpoint"),
        ({"partial_rotary_factor": 0.25}, "rope_parameters: partial_rotary_factor is 0.25; only"),
        ([1], "expected an object"),
    ],
)
@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "granitemoehybrid", "zamba2"])
def test_other_rotary_embeddings_are_refused(family, parameters, message):
    with pytest.raises(ValueError, match=message):
        read(family, num_key_value_heads=4, rope_parameters=parameters)


@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "granitemoehybrid", "jamba"])
def test_the_width_of_heads_is_what_the_file_says(family):
    for changes, width in (({}, 12), ({"head_dim": None}, 12), ({"head_dim": 16}, 16)):
        config = read(family, num_key_value_heads=2, **changes)
        assert config.attention is not None
        assert config.attention.head_dim == width
        again = named(family).write(config)
        assert read_config(again | {"pad_token_id": 0}, "config.json").config.attention == config.attention
    with pytest.raises(ValueError, match=r"config\.json: head_dim is 'wide'; expected a whole number"):
        read(family, num_key_value_heads=2, head_dim="wide")


def test_the_fraction_that_turns_in_bamba():
    attention = read("bamba", num_key_value_heads=2, rope_parameters={"partial_rotary_factor": 0.5}).attention
    assert attention is not None
    assert (attention.rope_dim, attention.rope_theta) == (6, 10000.0)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bamba", {"attention_bias": "yes"}, "AttentionOptions.use_bias is 'yes'"),
        ("bamba", {"attn_layer_indices": [[1]]}, "attn_layer_indices is .*expected numbers of layers"),
        ("bamba", {"time_step_limit": "all"}, "dt_limit is 'all'"),
        ("falcon_h1", {"mamba_n_heads": None}, "mamba_d_ssm is 56, mamba_n_heads 128"),
        ("falcon_h1", {"key_multiplier": None}, "key_multiplier is None"),
        ("granitemoehybrid", {"num_experts_per_tok": 9}, "n_experts_per_token is 9"),
        ("mamba2", {"expand": None}, "num_heads .* is 72, but expand is None and hidden_size 36"),
        ("mamba2", {"expand": 3}, "num_heads .* is 72, but expand is 3 and hidden_size 36"),
        ("nemotron_h", {"mlp_bias": 1}, "MLPOptions.use_bias is 1"),
        ("zamba2", {"intermediate_size": "wide"}, "d_intermediate is 'wide'"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(family, changes, message):
    kv_heads = {} if family == "mamba2" else {"num_key_value_heads": 4}
    with pytest.raises(ValueError, match=rf"^config\.json: .*{message}"):
        read(family, **kv_heads | changes)


def test_expand_of_the_original_layout_that_is_no_number():
    raw = {"d_model": 36, "n_layer": 2, "vocab_size": 101, "ssm_cfg": {"layer": "Mamba2", "expand": "2"}}
    with pytest.raises(ValueError, match=r"config\.json: headdim is 64"):
        read_config(raw, "config.json")


def test_jamba_without_experts_is_read_and_written():
    config = read("jamba", num_key_value_heads=2, num_experts=0, attn_layer_period=2, attn_layer_offset=1)
    assert config.mlp is not None
    assert (config.mlp.n_experts, config.mlp.n_experts_per_token) == (0, 0)


def test_options_in_a_file_that_lack_a_size_are_refused():
    raw = {"model_type": "mambax", "d_model": 12, "n_layer": 1, "vocab_size": 9, "layer_types": ["mlp"]}
    with pytest.raises(ValueError, match=r"mlp is \{\}; expected MLPOptions with at least d_intermediate"):
        read_config(raw | {"mlp": {}}, "config.json")
    with pytest.raises(ValueError, match=r"mlp is \['depth'\]; expected fields of MLPOptions"):
        read_config(raw | {"mlp": {"depth": 3}}, "config.json")


FACTORS: list[dict[str, Any]] = [{"gated": False}, {"gate_multiplier": 2.0}, {"out_multiplier": 0.5}]
UNKNOWN = [("shared", changes) for changes in FACTORS]
UNKNOWN += [
    (kind, changes)
    for kind in ("shared_moe", "gated_mlp")
    for changes in [*FACTORS, {"activation": "relu2"}, {"use_bias": True}]
]


@pytest.mark.parametrize(("kind", "changes"), UNKNOWN)
def test_options_that_a_block_does_not_know_are_refused(kind, changes):
    """They would change nothing, without a word."""
    mlp = MLPOptions(d_intermediate=20, d_shared=10, **changes)
    attention = AttentionOptions(n_heads=4, head_dim=6, n_kv_heads=4)
    options: dict[str, Any] = {"layer_types": (kind,), "mlp": mlp}
    if kind == "shared":
        options |= {"layer_types": ("mlp",), "attention": attention, "shared": SharedOptions(places=(0,))}
    config = mambax.MambaLMConfig(d_model=12, n_layer=1, vocab_size=9, **options)
    with pytest.raises(ValueError, match=f"mlp.{next(iter(changes))} is .*which is all that '{kind}' blocks know"):
        get_backend("numpy").MambaForCausalLM(config)
