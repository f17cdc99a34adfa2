"""Falcon-H1: Mamba-2 and attention side by side in every layer, followed by an MLP, with a factor on everything.

The factors (muP) are applied by the model and never multiplied into weights. dt is clamped to ``time_step_limit``
after its softplus, as in transformers, except that its decoding of single tokens with a cache forgets to;
``time_step_min`` and ``time_step_max`` are not looked at by either. Where ``mamba_rms_norm`` is true,
``mamba_norm_before_gate`` says whether the norm comes before the gate; the fused training path of transformers
takes it for false always, its other paths as the file says it.

Source: ``FalconH1ForCausalLM`` of transformers; Zuo et al. 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, Family, Fields
from mambax.families.pairs import LayerPairs, head_dim, rope_theta, whole_numbers
from mambax.families.translation import refuse, require, spelled_fields
from mambax.options import AttentionOptions, Mamba2Options, MLPOptions, ParallelOptions

MODEL_TYPE = "falcon_h1"
NAMES = LayerPairs(
    {"parallel": "", "mlp": "feed_forward"}, ("input_layernorm", "pre_ff_layernorm"), "final_layernorm"
)
SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "norm_epsilon": ("rms_norm_eps",),
    "tie_embeddings": ("tie_word_embeddings",),
    "embedding_multiplier": ("embedding_multiplier",),
    "logits_multiplier": ("lm_head_multiplier",),
}
_NUMBERS = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
_FACTORS = ("ssm_in_multiplier", "ssm_out_multiplier", "attention_in_multiplier", "attention_out_multiplier")


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    supported = {
        "hidden_act": ("silu", "swish"), "mamba_use_mlp": (True,), "attn_layer_indices": (None,),
        "mamba_rms_norm": (False, True), "mamba_norm_before_gate": (True, False),
    }  # fmt: skip
    refuse(raw, supported, where)
    fields = spelled_fields(raw, SPELLINGS, where)
    require(fields, SPELLINGS, ("d_model", "vocab_size"), where)
    values = fields.values
    values.setdefault("norm_epsilon", 1e-5)
    values.setdefault("tie_embeddings", False)
    number = whole_numbers(raw, _NUMBERS, where)
    number["mamba_d_ssm"] = _d_ssm(raw, number, values["d_model"], where)
    number["head_dim"] = head_dim(raw, values["d_model"], number["num_attention_heads"], where)
    layers = number["num_hidden_layers"]
    gate, down = _multipliers(raw, "mlp_multipliers", 2, where)
    parts = _multipliers(raw, "ssm_multipliers", 5, where)
    values |= {
        "mamba2": _mamba2(raw, number, parts, values["norm_epsilon"]),
        "attention": _attention(raw, number, rope_theta(raw, where)),
        "mlp": MLPOptions(
            d_intermediate=number["intermediate_size"],
            use_bias=raw.get("mlp_bias", False),
            gate_multiplier=gate,
            out_multiplier=down,
        ),
        "parallel": ParallelOptions(**{name: raw.get(name, 1.0) for name in _FACTORS}),
        "n_layer": 2 * layers,
        "layer_types": ("parallel", "mlp") * layers,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": False,
    }
    fields.spelled["n_layer"] = "num_hidden_layers"
    return fields


def _d_ssm(raw: Mapping[str, Any], number: Mapping[str, int], d_model: Any, where: str) -> int:
    """Width of the state-space branch: ``mamba_d_ssm``, or where that is null a multiple of the model's width."""
    inner = raw.get("mamba_d_ssm", 1024)
    inner = number["mamba_expand"] * d_model if inner is None else inner
    heads, width = number["mamba_n_heads"], raw.get("mamba_d_head", "auto")
    if type(inner) is not int or inner < heads or inner % heads or width not in ("auto", None, inner // heads):
        raise ValueError(
            f"{where}: mamba_d_ssm is {inner!r}, mamba_n_heads {heads} and mamba_d_head {width!r}; expected the "
            "first to be the product of the others"
        )
    return inner


def _multipliers(raw: Mapping[str, Any], name: str, count: int, where: str) -> list[float]:
    """A list of factors, ones where the file has none."""
    found = raw.get(name)
    found = [1.0] * count if found is None else found
    if not isinstance(found, list) or len(found) != count:
        raise ValueError(f"{where}: {name} is {str(found)[:80]}; expected {count} numbers")
    return found


def _mamba2(raw: Mapping[str, Any], number: Mapping[str, int], parts: list[float], epsilon: float) -> Mamba2Options:
    norm_first = raw.get("mamba_norm_before_gate", True)
    return Mamba2Options(
        n_heads=number["mamba_n_heads"],
        head_dim=number["mamba_d_ssm"] // number["mamba_n_heads"],
        d_state=number["mamba_d_state"],
        n_groups=number["mamba_n_groups"],
        d_conv=number["mamba_d_conv"],
        dt_limit=raw.get("time_step_limit") or (0.0, float("inf")),
        use_bias=raw.get("mamba_proj_bias", False),
        use_out_bias=raw.get("projectors_bias", False),
        use_conv_bias=raw.get("mamba_conv_bias", True),
        norm_epsilon=epsilon,
        gated_norm=("norm_first" if norm_first else "gate_first") if raw.get("mamba_rms_norm", False) else "none",
        part_multipliers=tuple(parts),
    )


def _attention(raw: Mapping[str, Any], number: Mapping[str, int], theta: float) -> AttentionOptions:
    return AttentionOptions(
        n_heads=number["num_attention_heads"],
        head_dim=number["head_dim"],
        n_kv_heads=number["num_key_value_heads"],
        use_bias=raw.get("attention_bias", False),
        rope_theta=theta,
        key_multiplier=raw.get("key_multiplier", 1.0),
    )


def _write(config: MambaLMConfig) -> dict[str, Any]:
    attention, mamba2, mlp = config.attention, config.mamba2, config.mlp
    if attention is None or mamba2 is None or mlp is None:
        raise ValueError("a Falcon-H1 checkpoint cannot hold a model without attention, mamba2 and mlp options")
    factors = config.parallel or ParallelOptions()
    raw: dict[str, Any] = {"model_type": MODEL_TYPE, "hidden_act": "silu", "use_cache": True}
    raw |= {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
    raw |= {name: getattr(factors, name) for name in _FACTORS}
    return raw | {
        "num_hidden_layers": config.n_layer // 2,
        "mamba_d_ssm": mamba2.d_inner,
        "mamba_expand": _NUMBERS["mamba_expand"],  # which says nothing beside mamba_d_ssm
        "mamba_n_heads": mamba2.n_heads,
        "mamba_d_head": mamba2.head_dim,
        "mamba_d_state": mamba2.d_state,
        "mamba_n_groups": mamba2.n_groups,
        "mamba_d_conv": mamba2.d_conv,
        "mamba_conv_bias": mamba2.use_conv_bias,
        "mamba_proj_bias": mamba2.use_bias,
        "projectors_bias": mamba2.use_out_bias,
        "mamba_rms_norm": mamba2.gated_norm != "none",
        "mamba_norm_before_gate": mamba2.gated_norm == "norm_first",
        "time_step_limit": list(mamba2.dt_limit),
        "ssm_multipliers": list(mamba2.part_multipliers),
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.use_bias,
        "key_multiplier": attention.key_multiplier,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
        "intermediate_size": mlp.d_intermediate,
        "mlp_bias": mlp.use_bias,
        "mlp_multipliers": [mlp.gate_multiplier, mlp.out_multiplier],
        "mamba_use_mlp": True,
    }


FALCON_H1 = Family(
    name=MODEL_TYPE,
    title="Falcon-H1",
    architectures={"FalconH1ForCausalLM": CAUSAL_LM},
    matches=lambda raw: raw.get("model_type") == MODEL_TYPE,
    read=_read,
    write=_write,
    to_parameter=NAMES.to_parameter,
    to_checkpoint=NAMES.to_checkpoint,
    folded_by_mlx_lm=True,
)
