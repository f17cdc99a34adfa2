"""Both spellings of ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_writers import hf_config, original_config
from harness import config_of

from mambax import MambaClassificationConfig, MambaLMConfig
from mambax.checkpoint.json_files import read_object
from mambax.checkpoint.layouts import CLASSIFIER, ENCODER, Description, read_config, write_config

CONFIGS = {
    "odd": config_of(),
    "defaults": MambaLMConfig(d_model=64, n_layer=2, vocab_size=128),
    "everything else": MambaLMConfig(
        d_model=48, n_layer=1, d_state=5, d_conv=2, expand=1.25, dt_rank=7, use_bias=True, use_conv_bias=False,
        norm_epsilon=1e-3, residual_in_fp32=False, dt_min=0.01, dt_max=0.2, dt_init="constant", dt_scale=2.0,
        dt_init_floor=1e-3, rescale_prenorm_residual=False, vocab_size=99, tie_embeddings=False, bos_token_id=1,
        eos_token_id=(2, 3), pad_token_id=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_survives_writing_and_reading(name: str) -> None:
    config = CONFIGS[name]
    raw = write_config(Description(config), "float32")
    assert read_config(raw, "here") == Description(config)
    classifier = MambaClassificationConfig(**config.to_dict(), num_labels=7, pooling="state")
    raw = write_config(Description(classifier, CLASSIFIER, "state"), "float32")
    assert read_config(raw, "here") == Description(classifier, CLASSIFIER, "state")
    raw = write_config(Description(config, ENCODER, "last"), "float32")
    assert read_config(raw, "here") == Description(config, ENCODER, "last")


@pytest.mark.parametrize("name", ["odd", "defaults"])
def test_transformers_reads_the_same_fields(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    raw = write_config(Description(config), "bfloat16")
    theirs = transformers.MambaConfig.from_dict(raw)
    assert (theirs.hidden_size, theirs.intermediate_size) == (config.d_model, config.d_inner)
    assert (theirs.time_step_rank, theirs.conv_kernel) == (config.dt_rank, config.d_conv)
    assert str(theirs.dtype).endswith("bfloat16")
    assert not theirs.rescale_prenorm_residual, "transformers would rescale the weights that it reads"
    theirs.save_pretrained(tmp_path)
    assert read_config(read_object(tmp_path / "config.json"), "there").config == config


def test_what_an_absent_field_means_in_each_layout() -> None:
    hf = read_config(
        {"model_type": "mamba", "hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 11}, "here"
    ).config
    assert (hf.expand, hf.d_state, hf.d_conv, hf.dt_rank, hf.norm_epsilon) == (2, 16, 4, 3, 1e-5)
    assert (hf.tie_embeddings, hf.rescale_prenorm_residual, hf.eos_token_id) == (True, False, 0)
    original = read_config({"d_model": 48, "n_layer": 2, "vocab_size": 11}, "here")
    assert original.original
    assert (original.config.vocab_size, original.config.tie_embeddings) == (16, True)
    assert (original.config.rescale_prenorm_residual, original.config.eos_token_id) == (True, None)


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "rows"), [(50277, 8, 50280), (50280, 8, 50280), (50277, 16, 50288), (7, 1, 7)]
)
def test_the_padded_vocabulary(vocab_size: int, multiple: int, rows: int) -> None:
    raw = original_config(config_of(), vocab_size, pad_vocab_size_multiple=multiple)
    assert read_config(raw, "here").config.vocab_size == rows
    assert read_config(hf_config(config_of(), vocab_size=vocab_size), "here").config.vocab_size == vocab_size


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"time_step_rank": "auto"}, "dt_rank", 3),
        ({"intermediate_size": 100, "expand": 2}, "expand", 2.5),
        ({"intermediate_size": ..., "expand": 3}, "expand", 3),
        ({"hidden_act": "swish"}, "d_model", 40),
        ({"use_mambapy": True, "rms_norm": True, "ssm_cfg": {}, "my_own_field": [1]}, "d_model", 40),
        ({"d_model": 40, "n_layer": 3, "d_inner": 80}, "expand", 2),
        ({"eos_token_id": [1, 2]}, "eos_token_id", (1, 2)),
        ({"eos_token_id": None}, "eos_token_id", None),
        ({"hidden_size": ..., "d_model": 40}, "d_model", 40),
        ({"rescale_prenorm_residual": True}, "rescale_prenorm_residual", True),
    ],
)  # fmt: skip
def test_fields_of_hugging_face(changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(read_config(hf_config(config_of(), **changes), "here").config, field) == value


def test_infinity_in_either_spelling(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": Infinity, "b": {"__float__": "Infinity"}, "c": [{"__float__": "-Infinity"}]}', "utf-8")
    infinity = float("inf")
    assert read_object(path) == {"a": infinity, "b": infinity, "c": [-infinity]}
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_object(path) == {"a": 1}


def test_arguments_of_the_official_block() -> None:
    ssm_cfg = {
        "layer": "Mamba1", "d_state": 4, "d_conv": 2, "expand": 3, "dt_rank": 9, "dt_min": 0.01, "dt_max": 0.2,
        "dt_init": "constant", "dt_scale": 2.0, "dt_init_floor": 1e-3, "conv_bias": False, "bias": True,
        "use_fast_path": False,
    }  # fmt: skip
    config = read_config(original_config(config_of(), 24, ssm_cfg=ssm_cfg), "here").config
    assert config == MambaLMConfig(
        d_model=40, n_layer=3, vocab_size=24, d_state=4, d_conv=2, expand=3, dt_rank=9, dt_min=0.01, dt_max=0.2,
        dt_init="constant", dt_scale=2.0, dt_init_floor=1e-3, use_conv_bias=False, use_bias=True,
    )  # fmt: skip


def test_fields_in_two_places_must_agree() -> None:
    raw = original_config(config_of(), 24, ssm_cfg={"d_state": 8}, d_state=16)
    with pytest.raises(ValueError, match="d_state is 16, but 8 in ssm_cfg; make them agree"):
        read_config(raw, "here")
