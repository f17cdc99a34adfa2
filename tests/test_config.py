"""Configurations: derived values, what is refused and how it is said."""

from __future__ import annotations

import dataclasses
import pickle
import re
from typing import Any

import pytest

from mambax import BaseMambaConfig, MambaClassificationConfig, MambaConfig, MambaLMConfig

SMALL: dict[str, Any] = {"d_model": 40, "n_layer": 2}
LM = {**SMALL, "vocab_size": 50}


def test_defaults_are_those_of_the_official_package():
    config = MambaConfig(d_model=768, n_layer=24)
    assert BaseMambaConfig is MambaConfig
    assert (config.d_inner, config.d_state, config.d_conv, config.dt_rank) == (1536, 16, 4, 48)
    assert (config.use_bias, config.use_conv_bias, config.norm_epsilon) == (False, True, 1e-5)
    assert (config.dt_min, config.dt_max, config.dt_init, config.dt_scale) == (0.001, 0.1, "random", 1.0)
    assert config.dt_init_floor == 1e-4
    assert config.residual_in_fp32
    assert config.rescale_prenorm_residual


def test_derived_values():
    assert MambaConfig(**SMALL).dt_rank == 3  # ceil(40 / 16)
    assert MambaConfig(**SMALL, dt_rank=5).dt_rank == 5
    assert MambaConfig(**SMALL, expand=1.5).d_inner == 60
    assert MambaConfig(d_model=1, n_layer=1, expand=1).dt_rank == 1
    assert MambaLMConfig(**LM, eos_token_id=3).eos_token_ids == (3,)
    assert MambaLMConfig(**LM, eos_token_id=[3, 4]).eos_token_ids == (3, 4)
    assert MambaLMConfig(**LM).eos_token_ids == ()


def test_a_config_is_a_frozen_value():
    config = MambaLMConfig(**LM)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 8
    assert config == MambaLMConfig(**config.to_dict())
    assert config == pickle.loads(pickle.dumps(config))
    assert len({config, MambaLMConfig(**LM), dataclasses.replace(config, d_state=8)}) == 2
    labelled = MambaClassificationConfig(**LM, num_labels=3, pooling="last")
    assert MambaClassificationConfig(**labelled.to_dict()) == labelled


WHOLE: dict[str, tuple[int, int]] = {
    "d_model": (1, 2**17), "n_layer": (1, 4096), "d_state": (1, 4096), "d_conv": (1, 64), "dt_rank": (1, 80),
}  # fmt: skip
BAD_WHOLE = [0, -1, 10**12, 2.5, 4.0, "4", "four", None, True, float("nan"), [4]]


@pytest.mark.parametrize("field", WHOLE)
@pytest.mark.parametrize("value", BAD_WHOLE, ids=repr)
def test_sizes_that_are_not_sizes(field, value):
    with pytest.raises(ValueError, match=re.escape(f"MambaConfig.{field} is {value!r}; expected")) as error:
        MambaConfig(**(SMALL | {field: value}))
    low, high = WHOLE[field]
    assert str(low) in str(error.value)
    assert str(high) in str(error.value)


@pytest.mark.parametrize("value", BAD_WHOLE, ids=repr)
def test_vocabulary_and_label_sizes_that_are_not_sizes(value):
    with pytest.raises(ValueError, match=re.escape(f"MambaLMConfig.vocab_size is {value!r}; expected a")):
        MambaLMConfig(**SMALL, vocab_size=value)
    with pytest.raises(ValueError, match=re.escape(f"num_labels is {value!r}; expected a whole number")):
        MambaClassificationConfig(**LM, num_labels=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expand", 0), ("expand", -2), ("expand", 1e9), ("expand", 1.33), ("expand", "2"),
        ("expand", float("inf")), ("expand", float("nan")), ("norm_epsilon", -1e-5), ("norm_epsilon", None),
        ("norm_epsilon", "small"), ("norm_epsilon", float("nan")), ("dt_min", 0), ("dt_min", float("nan")),
        ("dt_max", 1e-4), ("dt_max", float("inf")),
        ("dt_scale", -1), ("dt_init_floor", -1), ("dt_init", "uniform"), ("dt_init", None), ("use_bias", 1),
        ("use_conv_bias", "yes"), ("residual_in_fp32", None), ("rescale_prenorm_residual", 0), ("scan", None),
        ("dt_rank", "automatic"),
    ],
)  # fmt: skip
def test_other_fields_out_of_range(field, value):
    with pytest.raises(ValueError, match=re.escape(f"MambaConfig.{field} is {value!r}; expected ")):
        MambaConfig(**(SMALL | {field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tie_embeddings", 1), ("bos_token_id", 50), ("bos_token_id", -1), ("pad_token_id", 1.5),
        ("pad_token_id", 10**9), ("pad_token_id", True), ("eos_token_id", 50), ("eos_token_id", -1),
        ("eos_token_id", "</s>"), ("eos_token_id", 1.5), ("eos_token_id", True),
    ],
)  # fmt: skip
def test_token_ids_outside_the_vocabulary(field, value):
    with pytest.raises(ValueError, match=re.escape(f"MambaLMConfig.{field} is {value!r}; expected ")):
        MambaLMConfig(**LM, **{field: value})


def test_one_bad_token_id_among_several():
    with pytest.raises(ValueError, match="eos_token_id is 50; expected token ids from 0 to 49"):
        MambaLMConfig(**LM, eos_token_id=[1, 50])


@pytest.mark.parametrize("pooling", ["max", "", None, 3])
def test_an_unknown_pooling(pooling):
    with pytest.raises(ValueError, match=re.escape(f"{pooling!r}; expected one of 'last', 'mean', 'state'")):
        MambaClassificationConfig(**LM, num_labels=2, pooling=pooling)


def test_unknown_and_missing_fields():
    with pytest.raises(TypeError, match="hidden_size"):
        MambaConfig(hidden_size=4, n_layer=1)
    with pytest.raises(TypeError, match="n_layer"):
        MambaConfig(d_model=4)
    with pytest.raises(TypeError):
        MambaConfig(40, 2)
