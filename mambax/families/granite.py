"""Granite 4 hybrids: Mamba-2 and attention, each followed by a shared MLP and perhaps a mixture of experts.

Factors stand on the embeddings, on what each block adds, on the products of attention, and under the logits.

Source: ``GraniteMoeHybridForCausalLM`` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.bamba import mamba2_options, write_mamba2
from mambax.families.family import CAUSAL_LM, Family, Fields
from mambax.families.pairs import LayerPairs, head_dim, rope_theta, whole_numbers, write_head_dim
from mambax.families.translation import refuse, require, spelled_fields
from mambax.options import AttentionOptions, MLPOptions

MODEL_TYPE = "granitemoehybrid"
NAMES = LayerPairs(
    {"mamba2": "mamba", "attention": "self_attn", "shared_moe": ""},
    ("input_layernorm", "post_attention_layernorm"),
    "norm",
)
SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "norm_epsilon": ("rms_norm_eps",),
    "tie_embeddings": ("tie_word_embeddings",),
    "embedding_multiplier": ("embedding_multiplier",),
    "residual_multiplier": ("residual_multiplier",),
}
_NUMBERS = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008, "num_local_experts": 8,
    "num_experts_per_tok": 2, "shared_intermediate_size": 1024, "mamba_n_heads": 128, "mamba_n_groups": 1,
    "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
_KINDS = {
    "mamba": "mamba2", "linear_attention": "mamba2", "attention": "attention", "full_attention": "attention",
}  # fmt: skip


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    refuse(raw, {"hidden_act": ("silu", "swish"), "position_embedding_type": (None, "nope", "rope")}, where)
    fields = spelled_fields(raw, SPELLINGS, where)
    require(fields, SPELLINGS, ("d_model", "vocab_size"), where)
    values, number = fields.values, whole_numbers(raw, _NUMBERS, where)
    heads, layers = number["num_attention_heads"], number["num_hidden_layers"]
    named = raw.get("layer_types") or ["mamba"] * layers
    if not isinstance(named, list) or len(named) != layers or not set(map(str, named)) <= _KINDS.keys():
        known = ", ".join(map(repr, _KINDS))
        raise ValueError(f"{where}: layer_types is {str(named)[:80]}; expected {layers} of {known}")
    kinds = [kind for name in named for kind in (_KINDS[name], "shared_moe")]
    scaling = raw.get("logits_scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or scaling == 0:
        raise ValueError(f"{where}: logits_scaling is {scaling!r}; expected a number other than 0")
    rotary = raw.get("position_embedding_type") == "rope"
    values.setdefault("norm_epsilon", 1e-6)
    values.setdefault("tie_embeddings", False)
    values |= {
        "n_layer": len(kinds),
        "layer_types": tuple(kinds),
        "residual_in_fp32": False,
        "rescale_prenorm_residual": False,
        "logits_multiplier": 1 / scaling,
        "mamba2": mamba2_options(raw, number, values["norm_epsilon"], where),
        "attention": AttentionOptions(
            n_heads=heads,
            head_dim=head_dim(raw, values["d_model"], heads, where),
            n_kv_heads=raw.get("num_key_value_heads") or heads,
            use_bias=raw.get("attention_bias", False),
            rope_theta=rope_theta(raw, where) if rotary else None,
            scale=raw.get("attention_multiplier", 1.0),
        ),
        "mlp": MLPOptions(
            d_intermediate=number["intermediate_size"],
            d_shared=number["shared_intermediate_size"],
            n_experts=number["num_local_experts"],
            n_experts_per_token=number["num_experts_per_tok"] if number["num_local_experts"] else 0,
        ),
    }
    fields.spelled["n_layer"] = "num_hidden_layers"
    return fields


def _write(config: MambaLMConfig) -> dict[str, Any]:
    attention, mamba2, mlp = config.attention, config.mamba2, config.mlp
    if attention is None or mamba2 is None or mlp is None:
        raise ValueError("a Granite checkpoint cannot hold a model without attention, mamba2 and mlp options")
    theirs = {"mamba2": "mamba", "attention": "attention"}
    raw: dict[str, Any] = {"model_type": MODEL_TYPE, "hidden_act": "silu", "use_cache": True}
    raw |= {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
    raw |= write_mamba2(mamba2, config.d_model)
    if attention.rope_theta is not None:
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": attention.rope_theta}
    return raw | {
        "num_hidden_layers": config.n_layer // 2,
        "layer_types": [theirs.get(kind, kind) for kind in config.layer_kinds[::2]],
        "position_embedding_type": None if attention.rope_theta is None else "rope",
        "logits_scaling": 1 / config.logits_multiplier,
        "attention_multiplier": attention.scale,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        **write_head_dim(attention, config.d_model),
        "attention_bias": attention.use_bias,
        "intermediate_size": mlp.d_intermediate,
        "shared_intermediate_size": mlp.d_shared,
        "num_local_experts": mlp.n_experts,
        "num_experts_per_tok": mlp.n_experts_per_token or 1,
    }


GRANITE = Family(
    name=MODEL_TYPE,
    title="Granite 4 hybrid",
    architectures={"GraniteMoeHybridForCausalLM": CAUSAL_LM},
    matches=lambda raw: raw.get("model_type") == MODEL_TYPE,
    read=_read,
    write=_write,
    to_parameter=NAMES.to_parameter,
    to_checkpoint=NAMES.to_checkpoint,
)
