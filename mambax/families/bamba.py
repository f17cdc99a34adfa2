"""Bamba: Mamba-2 and attention with rotary embeddings of half a head, each followed by an MLP.

Source: ``BambaForCausalLM`` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, Family, Fields
from mambax.families.pairs import LayerPairs, head_dim, rope_theta, whole_numbers, write_head_dim
from mambax.families.translation import refuse, require, spelled_fields
from mambax.options import AttentionOptions, Mamba2Options, MLPOptions

MODEL_TYPE = "bamba"
NAMES = LayerPairs(
    {"mamba2": "mamba", "attention": "self_attn", "mlp": "feed_forward"},
    ("input_layernorm", "pre_ff_layernorm"),
    "final_layernorm",
)
SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "norm_epsilon": ("rms_norm_eps",),
    "tie_embeddings": ("tie_word_embeddings",),
}
_TURNED = 0.5
"""Of the channels of a head; transformers takes another fraction from ``rope_parameters`` alone."""
_NUMBERS = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip


def mamba2_options(raw: Mapping[str, Any], number: Mapping[str, int], epsilon: float, where: str) -> Mamba2Options:
    """The options of the Mamba-2 mixers of Bamba and of the families that took them over.

    Raises:
        ValueError: for sizes that do not fit each other.
    """
    inner, heads = number["mamba_expand"] * raw["hidden_size"], number["mamba_n_heads"]
    width = raw.get("mamba_d_head", "auto")
    width = inner // heads if width in ("auto", None) else width
    if type(width) is not int or width * heads != inner:
        raise ValueError(
            f"{where}: mamba_d_head is {width!r} and mamba_n_heads {heads}; expected a product of mamba_expand * "
            f"hidden_size = {inner}"
        )
    return Mamba2Options(
        n_heads=heads,
        head_dim=width,
        d_state=number["mamba_d_state"],
        n_groups=number["mamba_n_groups"],
        d_conv=number["mamba_d_conv"],
        dt_limit=raw.get("time_step_limit") or (0.0, float("inf")),
        use_bias=raw.get("mamba_proj_bias", False),
        use_conv_bias=raw.get("mamba_conv_bias", True),
        norm_epsilon=epsilon,
    )


def write_mamba2(options: Mamba2Options, d_model: int) -> dict[str, Any]:
    """The fields that :func:`mamba2_options` reads."""
    return {
        "mamba_n_heads": options.n_heads,
        "mamba_d_head": options.head_dim,
        "mamba_d_state": options.d_state,
        "mamba_n_groups": options.n_groups,
        "mamba_d_conv": options.d_conv,
        "mamba_expand": options.d_inner // d_model,
        "mamba_proj_bias": options.use_bias,
        "mamba_conv_bias": options.use_conv_bias,
        "time_step_limit": list(options.dt_limit),
    }


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    refuse(raw, {"hidden_act": ("silu", "swish")}, where)
    fields = spelled_fields(raw, SPELLINGS, where)
    require(fields, SPELLINGS, ("d_model", "vocab_size"), where)
    values = fields.values
    number = whole_numbers(raw, _NUMBERS, where)
    heads = number["num_attention_heads"]
    width = head_dim(raw, values["d_model"], heads, where)
    attending = raw.get("attn_layer_indices") or []
    layers = range(number["num_hidden_layers"])
    if not isinstance(attending, list) or not all(type(i) is int and i in layers for i in attending):
        raise ValueError(f"{where}: attn_layer_indices is {str(attending)[:80]}; expected numbers of layers")
    kinds = [kind for i in layers for kind in ("attention" if i in attending else "mamba2", "mlp")]
    values.setdefault("norm_epsilon", 1e-5)
    values.setdefault("tie_embeddings", False)
    values |= {
        "n_layer": len(kinds),
        "layer_types": tuple(kinds),
        "residual_in_fp32": False,
        "rescale_prenorm_residual": False,
        "mamba2": mamba2_options(raw, number, values["norm_epsilon"], where),
        "attention": AttentionOptions(
            n_heads=heads,
            head_dim=width,
            n_kv_heads=number["num_key_value_heads"],
            use_bias=raw.get("attention_bias", False),
            rope_theta=rope_theta(raw, where, _TURNED),
            rope_dim=int(width * _TURNED),
        ),
        "mlp": MLPOptions(d_intermediate=number["intermediate_size"], use_bias=raw.get("mlp_bias", False)),
    }
    fields.spelled["n_layer"] = "num_hidden_layers"
    return fields


def _write(config: MambaLMConfig) -> dict[str, Any]:
    attention, mamba2, mlp = config.attention, config.mamba2, config.mlp
    if attention is None or mamba2 is None or mlp is None:
        raise ValueError("a Bamba checkpoint cannot hold a model without attention, mamba2 and mlp options")
    raw: dict[str, Any] = {"model_type": MODEL_TYPE, "hidden_act": "silu", "use_cache": True}
    raw |= {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
    raw |= write_mamba2(mamba2, config.d_model)
    return raw | {
        "num_hidden_layers": config.n_layer // 2,
        "attn_layer_indices": [i for i, kind in enumerate(config.layer_kinds[::2]) if kind == "attention"],
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        **write_head_dim(attention, config.d_model),
        "attention_bias": attention.use_bias,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rope_theta,
            "partial_rotary_factor": _TURNED,
        },
        "intermediate_size": mlp.d_intermediate,
        "mlp_bias": mlp.use_bias,
    }


BAMBA = Family(
    name=MODEL_TYPE,
    title="Bamba",
    architectures={"BambaForCausalLM": CAUSAL_LM},
    matches=lambda raw: raw.get("model_type") == MODEL_TYPE,
    read=_read,
    write=_write,
    to_parameter=NAMES.to_parameter,
    to_checkpoint=NAMES.to_checkpoint,
)
