"""Jamba: Mamba-1 with learned norms of dt, B and C, attention without positions, and mixtures of experts.

A layer of transformers is two blocks here, a mixer and an MLP or a mixture of experts, each with its norm.

Source: ``JambaForCausalLM`` of transformers; Lieber et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, Family, Fields
from mambax.families.pairs import LayerPairs, head_dim, whole_numbers, write_head_dim
from mambax.families.translation import refuse, require, spelled_fields
from mambax.options import AttentionOptions, MLPOptions

MODEL_TYPE = "jamba"
NAMES = LayerPairs(
    {"mamba": "mamba", "attention": "self_attn", "mlp": "feed_forward", "moe": "feed_forward"},
    ("input_layernorm", "pre_ff_layernorm"),
    "final_layernorm",
)

SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "norm_epsilon": ("rms_norm_eps",),
    "d_state": ("mamba_d_state",),
    "d_conv": ("mamba_d_conv",),
    "expand": ("mamba_expand",),
    "dt_rank": ("mamba_dt_rank",),
    "use_conv_bias": ("mamba_conv_bias",),
    "use_bias": ("mamba_proj_bias",),
    "tie_embeddings": ("tie_word_embeddings",),
}

_PLACES = {
    "num_hidden_layers": 32, "attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2,
    "expert_layer_offset": 1, "num_experts": 16, "num_experts_per_tok": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336,
}  # fmt: skip
"""Whole numbers in the file, with the defaults of transformers."""


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    refuse(raw, {"hidden_act": ("silu", "swish"), "sliding_window": (None,), "rope_scaling": (None,)}, where)
    fields = spelled_fields(raw, SPELLINGS, where)
    require(fields, SPELLINGS, ("d_model", "vocab_size"), where)
    place = whole_numbers(raw, _PLACES, where)
    heads, d_model = place["num_attention_heads"], fields.values["d_model"]
    width = head_dim(raw, d_model, heads, where)
    kinds: list[str] = []
    for i in range(place["num_hidden_layers"]):
        kinds.append("attention" if i % place["attn_layer_period"] == place["attn_layer_offset"] else "mamba")
        expert = place["num_experts"] > 1 and i % place["expert_layer_period"] == place["expert_layer_offset"]
        kinds.append("moe" if expert else "mlp")
    values = fields.values
    values.setdefault("norm_epsilon", 1e-6)
    values.setdefault("tie_embeddings", False)
    values |= {
        "n_layer": len(kinds),
        "layer_types": tuple(kinds),
        "dt_b_c_norm": "learned",
        "dt_b_c_norm_epsilon": values["norm_epsilon"],
        "residual_in_fp32": False,
        "rescale_prenorm_residual": False,
        "attention": AttentionOptions(n_heads=heads, head_dim=width, n_kv_heads=place["num_key_value_heads"]),
        "mlp": MLPOptions(
            d_intermediate=place["intermediate_size"],
            n_experts=place["num_experts"],
            n_experts_per_token=place["num_experts_per_tok"] if place["num_experts"] else 0,
        ),
    }
    fields.spelled["n_layer"] = "num_hidden_layers"
    return fields


def _write(config: MambaLMConfig) -> dict[str, Any]:
    if config.attention is None or config.mlp is None:
        raise ValueError("a Jamba checkpoint cannot hold a model without attention and mlp options")
    kinds = config.layer_kinds
    raw: dict[str, Any] = {"model_type": MODEL_TYPE, "hidden_act": "silu", "use_cache": True}
    raw |= {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
    raw |= _period("attn_layer", [kind == "attention" for kind in kinds[::2]])
    raw |= _period("expert_layer", [kind == "moe" for kind in kinds[1::2]])
    return raw | {
        "num_hidden_layers": len(kinds) // 2,
        "num_experts": config.mlp.n_experts,
        "num_experts_per_tok": config.mlp.n_experts_per_token or 1,
        "num_attention_heads": config.attention.n_heads,
        "num_key_value_heads": config.attention.n_kv_heads,
        **write_head_dim(config.attention, config.d_model),
        "intermediate_size": config.mlp.d_intermediate,
    }


def _period(name: str, there: list[bool]) -> dict[str, int]:
    """The period and offset at which layers of a kind stand; beyond the last layer where there are none."""
    places = [i for i, is_there in enumerate(there) if is_there]
    if not places:
        return {f"{name}_period": len(there) + 1, f"{name}_offset": len(there)}
    period = places[1] - places[0] if len(places) > 1 else max(len(there), places[0] + 1)
    return {f"{name}_period": period, f"{name}_offset": places[0]}


JAMBA = Family(
    name=MODEL_TYPE,
    title="Jamba",
    architectures={"JambaForCausalLM": CAUSAL_LM},
    matches=lambda raw: raw.get("model_type") == MODEL_TYPE,
    read=_read,
    write=_write,
    to_parameter=NAMES.to_parameter,
    to_checkpoint=NAMES.to_checkpoint,
)
