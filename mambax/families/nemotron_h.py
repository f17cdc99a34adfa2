"""Nemotron-H: blocks of Mamba-2, attention without positions, and MLPs of the square of relu, in any order.

``hybrid_override_pattern`` has a letter for each: M, * and -. Its mixtures of experts (E) are not supported.

Source: ``NemotronHForCausalLM`` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, Family, Fields
from mambax.families.pairs import head_dim, whole_numbers
from mambax.families.translation import agreed, refuse, require, spelled_fields
from mambax.options import AttentionOptions, Mamba2Options, MLPOptions

MODEL_TYPE = "nemotron_h"
SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "norm_epsilon": ("layer_norm_epsilon",),
    "tie_embeddings": ("tie_word_embeddings",),
    "residual_in_fp32": ("residual_in_fp32",),
}
_NUMBERS = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 21504, "mamba_num_heads": 128,
    "mamba_head_dim": 64, "ssm_state_size": 128,
}  # fmt: skip
_RENAMED = {
    "n_groups": ("n_groups", "mamba_n_groups"),
    "d_conv": ("conv_kernel", "mamba_d_conv"),
    "dt_limit": ("time_step_limit", "mamba_dt_limit"),
    "use_conv_bias": ("use_conv_bias", "mamba_conv_bias"),
}
"""Options of the Mamba-2 mixers that older files spell otherwise."""
_NO_LEAST_DT = 1e-9
"""``time_step_min`` of saved files whose dt has no lower limit: NVIDIA's code initialises with it alone, but that
of transformers 5 takes it for the lower limit of dt, with 0.001 when it is missing; its logarithm must exist."""
_LETTERS = {"M": "mamba2", "*": "attention", "-": "mlp"}
_KINDS = {
    "mamba": "mamba2", "linear_attention": "mamba2", "attention": "attention", "full_attention": "attention",
    "mlp": "mlp",
}  # fmt: skip


def _kinds(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    pattern = raw.get("hybrid_override_pattern")
    named: Any = raw.get("layers_block_type") or raw.get("layer_types")
    table = _KINDS
    if named is None:
        named, table = pattern, _LETTERS
    if not named or not isinstance(named, (str, list)) or not all(str(kind) in table for kind in named):
        raise ValueError(
            f"{where}: layers_block_type or hybrid_override_pattern is {str(named)[:80]!r}; supported are "
            f"{', '.join(map(repr, table))}"
        )
    return tuple(table[kind] for kind in named)


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    supported = {
        "mamba_hidden_act": ("silu", "swish"), "mlp_hidden_act": ("relu2",), "sliding_window": (None,),
        "attention_bias": (False,),
    }  # fmt: skip
    refuse(raw, supported, where)
    kinds = _kinds(raw, where)
    fields = spelled_fields(raw, SPELLINGS, where)
    require(fields, SPELLINGS, ("d_model", "vocab_size"), where)
    values, number = fields.values, whole_numbers(raw, _NUMBERS, where)
    heads = number["num_attention_heads"]
    defaults = {"n_groups": 8, "d_conv": 4, "dt_limit": (0.0, float("inf")), "use_conv_bias": True}
    renamed = {field: agreed(raw, names, where) for field, names in _RENAMED.items()}
    options = defaults | {field: found[1] for field, found in renamed.items() if found is not None}
    values.setdefault("norm_epsilon", 1e-5)
    values.setdefault("tie_embeddings", False)
    values.setdefault("residual_in_fp32", False)
    try:
        mamba2 = Mamba2Options(
            n_heads=number["mamba_num_heads"], head_dim=number["mamba_head_dim"], d_state=number["ssm_state_size"],
            use_bias=raw.get("use_bias", False), norm_epsilon=values["norm_epsilon"], **options,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    width = raw.get("head_dim") or raw.get("attention_head_dim") or head_dim(values["d_model"], heads, where)
    values |= {
        "n_layer": len(kinds),
        "layer_types": kinds,
        "rescale_prenorm_residual": False,
        "mamba2": mamba2,
        "attention": AttentionOptions(
            n_heads=heads,
            head_dim=width,
            n_kv_heads=number["num_key_value_heads"],
        ),
        "mlp": MLPOptions(
            d_intermediate=number["intermediate_size"],
            activation="relu2",
            gated=False,
            use_bias=raw.get("mlp_bias", False),
        ),
    }
    fields.spelled["n_layer"] = "layers_block_type"
    return fields


def _write(config: MambaLMConfig) -> dict[str, Any]:
    attention, mamba2, mlp = config.attention, config.mamba2, config.mlp
    if attention is None or mamba2 is None or mlp is None:
        raise ValueError("a Nemotron-H checkpoint cannot hold a model without attention, mamba2 and mlp options")
    theirs = {"mamba2": "mamba", "attention": "attention", "mlp": "mlp"}
    raw: dict[str, Any] = {"model_type": MODEL_TYPE, "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2"}
    raw |= {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
    raw |= {names[0]: getattr(mamba2, field) for field, names in _RENAMED.items()}
    return raw | {
        "layers_block_type": [theirs.get(kind, kind) for kind in config.layer_kinds],
        "time_step_limit": list(mamba2.dt_limit),
        "time_step_min": mamba2.dt_limit[0] or _NO_LEAST_DT,
        "mamba_num_heads": mamba2.n_heads,
        "mamba_head_dim": mamba2.head_dim,
        "ssm_state_size": mamba2.d_state,
        "use_bias": mamba2.use_bias,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": False,
        "intermediate_size": mlp.d_intermediate,
        "mlp_bias": mlp.use_bias,
        "use_cache": True,
        "rescale_prenorm_residual": False,
    }


def _to_parameter(name: str, config: MambaLMConfig) -> str:
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


NEMOTRON_H = Family(
    name=MODEL_TYPE,
    title="Nemotron-H",
    architectures={"NemotronHForCausalLM": CAUSAL_LM},
    matches=lambda raw: raw.get("model_type") == MODEL_TYPE,
    read=_read,
    write=_write,
    to_parameter=_to_parameter,
)
