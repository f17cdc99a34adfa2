"""A config.json that is none, or of a model that mambax does not have: each refused, and the message says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bad_checkpoints import CONFIG, folder, refused, weights
from checkpoint_writers import hf_config, original_config, write_config

__all__ = ["folder", "weights"]  # fixtures of the tests here


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "not valid JSON"),
        ("hidden_size: 40", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "model_type"),
    ],
)
def test_config_that_is_none(folder: Path, text: str, fragment: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused(folder, "config.json", fragment)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 10**9, 2**70, "40", 40.5, True, [40], {"__float__": "Infinity"}])
def test_sizes_that_are_none(folder: Path, field: str, value: Any) -> None:
    write_config(folder, hf_config(CONFIG, **{field: value}, intermediate_size=...))
    refused(folder, f"config.json: {field}: MambaLMConfig.", "expected a whole number from 1 to ")


@pytest.mark.parametrize("value", [0, -80, 10**9, "80", 80.0, True])
def test_inner_sizes_that_are_none(folder: Path, value: Any) -> None:
    write_config(folder, hf_config(CONFIG, intermediate_size=value))
    refused(folder, f"intermediate_size is {value!r}; expected a whole number")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"hidden_size": ...}, ["hidden_size is missing"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        (
            {"model_type": "llama"},
            ["model_type 'llama' is not supported", "supported are model_type 'mamba'", "state-spaces layout"],
        ),
        ({"model_type": "falcon_mamba"}, ["architectures ['MambaForCausalLM'] is not supported", "Falcon-Mamba"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "supported are"]),
        ({"architectures": "MambaForCausalLM"}, ["is not supported; supported are"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'; only 'silu' or 'swish' is supported"]),
        ({"quantization_config": {"bits": 4}}, ["quantised checkpoints are not supported"]),
        ({"d_model": 41}, ["hidden_size is 40, but d_model is 41"]),
        ({"layer_norm_epsilon": -1}, ["layer_norm_epsilon: MambaLMConfig.norm_epsilon is -1", "a number from 0"]),
        ({"time_step_rank": "full"}, ["time_step_rank", "'auto' or a whole number"]),
        ({"eos_token_id": 24}, ["eos_token_id", "token ids from 0 to 23"]),
        ({"architectures": ["MambaForSequenceClassification"], "num_labels": 2}, ["pooling is None", "'last'"]),
    ],
)
def test_config_of_another_model(folder: Path, changes: dict[str, Any], fragments: list[str]) -> None:
    write_config(folder, hf_config(CONFIG, **changes))
    refused(folder, "config.json", *fragments)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg with layer 'Mamba3'; supported are"),
        ({"ssm_cfg": {"headdim": 64, "ngroups": 1}}, "headdim, ngroups is not a Mamba-1 model"),
        ({"ssm_cfg": [1]}, "ssm_cfg is [1]; expected an object"),
        ({"rms_norm": False}, "rms_norm is False; only True is supported"),
        ({"attn_layer_idx": [1]}, "attention and MLP blocks are not supported"),
        ({"attn_cfg": {"num_heads": 2}}, "attention and MLP blocks are not supported"),
        ({"d_intermediate": 80}, "attention and MLP blocks are not supported"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0; expected a whole number from 1"),
        ({"d_model": "forty"}, "d_model: MambaLMConfig.d_model is 'forty'"),
        ({"n_layer": ...}, "neither model_type nor d_model and n_layer"),
    ],
)
def test_original_config_of_another_model(folder: Path, changes: dict[str, Any], fragment: str) -> None:
    write_config(folder, original_config(CONFIG, 24, **changes))
    refused(folder, "config.json", fragment)
