"""Mamba-2: Hugging Face's ``mamba2``, and the layout of the original package.

In the original layout ``ssm_cfg`` has ``"layer": "Mamba2"``, and the vocabulary is padded up to a multiple of 16.
With attention or MLPs it is of the family in :mod:`mambax.families.mamba2attn`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, ENCODER, Family, Fields
from mambax.families.mamba import RESCALE, read_rescale, to_parameter, write_rescale
from mambax.families.translation import merged_ssm_cfg, padded, refuse, require, spelled_fields
from mambax.options import Mamba2Options

MODEL_TYPE = "mamba2"

SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size", "d_model"),
    "n_layer": ("num_hidden_layers", "n_layer"),
    "vocab_size": ("vocab_size",),
    "norm_epsilon": ("layer_norm_epsilon", "norm_epsilon"),
    "residual_in_fp32": ("residual_in_fp32",),
    "dt_min": ("time_step_min", "dt_min"),
    "dt_max": ("time_step_max", "dt_max"),
    "dt_init_floor": ("time_step_floor", "dt_init_floor"),
    RESCALE: (RESCALE,),
    "tie_embeddings": ("tie_word_embeddings", "tie_embeddings"),
}
"""Our field of the model -> its names in files; the first is Hugging Face's."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "n_heads": ("num_heads",),
    "head_dim": ("head_dim", "headdim"),
    "d_state": ("state_size", "d_state"),
    "n_groups": ("n_groups", "ngroups"),
    "d_conv": ("conv_kernel", "d_conv"),
    "dt_limit": ("time_step_limit", "dt_limit"),
    "use_bias": ("use_bias", "bias"),
    "use_conv_bias": ("use_conv_bias", "conv_bias"),
}
"""Our field of the mixer -> its names in files."""

_FLOATS = {"norm_epsilon", "dt_min", "dt_max", "dt_init_floor"}
_IGNORED = {
    "layer", "layer_idx", "device", "dtype", "conv_init", "A_init_range", "chunk_size", "use_mem_eff_path",
    "process_group", "sequence_parallel",
}  # fmt: skip
_SSM_CFG = {
    "d_state", "d_conv", "expand", "headdim", "ngroups", "d_ssm", "D_has_hdim", "rmsnorm", "norm_before_gate",
    "dt_min", "dt_max", "dt_init_floor", "dt_limit", "bias", "conv_bias", "activation",
} | _IGNORED  # fmt: skip
"""Arguments of the official ``Mamba2``; the ignored ones do not change what trained weights compute."""

_HF_DEFAULTS = {"n_heads": 128, "head_dim": 64, "d_state": 128, "n_groups": 8, "d_conv": 4}
"""What transformers takes where the file says nothing."""


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    refuse(raw, {"hidden_act": ("silu", "swish")}, where)
    fields = _fields(raw, _HF_DEFAULTS, where)
    fields.values.setdefault("tie_embeddings", False)
    fields.values[RESCALE] = read_rescale(raw, fields.values.get(RESCALE, False))
    options = fields.values["mamba2"]
    expand, d_model = raw.get("expand", 2), fields.values["d_model"]
    if not _are_numbers(expand, d_model) or expand * d_model != options.d_inner:
        raise ValueError(
            f"{where}: num_heads * head_dim is {options.d_inner}, but expand is {expand!r} and hidden_size "
            f"{d_model!r}; expected the product of the latter to be the same"
        )
    return fields


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _read_original(raw: Mapping[str, Any], where: str) -> Fields:
    merged = merged_ssm_cfg(raw, _SSM_CFG, _IGNORED, "Mamba-2", where)
    supported = {
        "rms_norm": (True,), "rmsnorm": (True,), "norm_before_gate": (False,), "D_has_hdim": (False,),
        "d_ssm": (None,), "activation": ("silu", "swish"),
    }  # fmt: skip
    refuse(merged, supported, where)
    d_model, head_dim = merged.get("d_model"), merged.get("headdim", 64)
    expand = merged.get("expand", 2)
    inner = expand * d_model if _are_numbers(expand, d_model) else 0
    if type(head_dim) is not int or head_dim < 1 or inner % head_dim or inner < head_dim:
        raise ValueError(f"{where}: headdim is {head_dim!r}; expected a divisor of expand * d_model = {inner}")
    fields = _fields(merged | {"num_heads": inner // head_dim}, {}, where)
    multiple = raw.get("pad_vocab_size_multiple", 16)
    fields.values["vocab_size"] = padded(fields.values["vocab_size"], multiple, where)
    return fields


def _fields(raw: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> Fields:
    fields = spelled_fields(raw, SPELLINGS, where)
    require(fields, SPELLINGS, ("d_model", "n_layer", "vocab_size"), where)
    of_mixer = spelled_fields(raw, OPTIONS, where)
    if "norm_epsilon" in fields.values:
        of_mixer.values["norm_epsilon"] = fields.values["norm_epsilon"]
    try:
        options = Mamba2Options(**(dict(defaults) | of_mixer.values))
    except ValueError as error:
        field = str(error).partition(" ")[0].rpartition(".")[2]
        raise ValueError(f"{where}: {of_mixer.spelled.get(field, field)}: {error}") from error
    n_layer = fields.values["n_layer"]
    kinds = (MODEL_TYPE,) * n_layer if type(n_layer) is int and n_layer < 5000 else None
    fields.values.update(mamba2=options, layer_types=kinds)
    return fields


def _write(config: MambaLMConfig) -> dict[str, Any]:
    options = config.mamba2
    if options is None:
        raise ValueError("a Mamba-2 checkpoint cannot hold a model whose configuration has mamba2 = None")
    raw: dict[str, Any] = {"model_type": MODEL_TYPE}
    for field, names in SPELLINGS.items():
        value = getattr(config, field)
        raw[names[0]] = float(value) if field in _FLOATS else value
    values = dataclasses.asdict(options)
    raw |= {names[0]: values[field] for field, names in OPTIONS.items()}
    raw |= {"time_step_limit": list(options.dt_limit), "hidden_act": "silu", "use_cache": True}
    raw |= write_rescale(config)
    expand = options.d_inner / config.d_model
    return raw | {"expand": int(expand) if expand.is_integer() else expand}


HUGGING_FACE = Family(
    name=MODEL_TYPE,
    title="Mamba-2",
    architectures={"Mamba2ForCausalLM": CAUSAL_LM, "Mamba2Model": ENCODER},
    matches=lambda raw: raw.get("model_type") == MODEL_TYPE,
    read=_read,
    write=_write,
    to_parameter=to_parameter,
)

ORIGINAL = Family(
    name="mamba2_original",
    title="Mamba-2 (original layout)",
    architectures={"Mamba2ForCausalLM": CAUSAL_LM, "MambaLMHeadModel": CAUSAL_LM},
    matches=lambda raw: (
        "model_type" not in raw
        and {"d_model", "n_layer"} <= raw.keys()
        and isinstance(raw.get("ssm_cfg"), dict)
        and raw["ssm_cfg"].get("layer") == "Mamba2"
    ),
    read=_read_original,
    write=_write,
    to_parameter=to_parameter,
    original=True,
    written_as=MODEL_TYPE,
)
