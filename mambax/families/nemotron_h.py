"""Nemotron-H: blocks of Mamba-2, attention without positions, MLPs of the square of relu, and mixtures of experts.

They come in any order; ``hybrid_override_pattern`` has a letter for each: M, *, - and E.

Source: ``NemotronHForCausalLM`` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, Family, Fields
from mambax.families.pairs import whole_numbers
from mambax.families.translation import agreed, refuse, require, spelled_fields
from mambax.options import AttentionOptions, Mamba2Options, MLPOptions, SigmoidMoEOptions

MODEL_TYPE = "nemotron_h"
SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "norm_epsilon": ("layer_norm_epsilon",),
    "tie_embeddings": ("tie_word_embeddings",),
    "residual_in_fp32": ("residual_in_fp32",),
}
_NUMBERS = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_num_heads": 128,
    "mamba_head_dim": 64, "ssm_state_size": 128,
}  # fmt: skip
_HEAD_DIM = 128
"""Where a file says nothing of it, in transformers as in NVIDIA's code, whatever the width of the model."""
_WIDTH = {"intermediate_size": 21504}
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
_EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LETTERS = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "sigmoid_moe"}
_KINDS = {
    "mamba": "mamba2", "linear_attention": "mamba2", "attention": "attention", "full_attention": "attention",
    "mlp": "mlp", "moe": "sigmoid_moe",
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


def _mlp(raw: Mapping[str, Any], experts: bool, where: str) -> MLPOptions:
    """The options of the MLPs, and of the experts where there are some.

    The MLP beside experts has the width that is named for it, however many ``n_shared_experts`` says it stands for:
    so it is in transformers, and one is what every public model has.
    """
    options: dict[str, Any] = {}
    if experts:
        refuse(raw, {"n_shared_experts": (1,), "norm_topk_prob": (True, False)}, where)
        number, latent = whole_numbers(raw, _EXPERTS, where), raw.get("moe_latent_size")
        options = {
            "d_shared": number["moe_shared_expert_intermediate_size"],
            "n_experts": number["n_routed_experts"],
            "n_experts_per_token": number["num_experts_per_tok"],
            "sigmoid_moe": SigmoidMoEOptions(
                d_expert=number["moe_intermediate_size"],
                d_latent=0 if latent is None else latent,
                n_groups=number["n_group"],
                n_groups_per_token=number["topk_group"],
                normalised=raw.get("norm_topk_prob", True),
                scale=raw.get("routed_scaling_factor", 1.0),
            ),
        }
    return MLPOptions(
        d_intermediate=whole_numbers(raw, _WIDTH, where)["intermediate_size"],
        activation="relu2",
        gated=False,
        use_bias=raw.get("mlp_bias", False),
        **options,
    )


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    supported = {
        "mamba_hidden_act": ("silu", "swish"), "mlp_hidden_act": ("relu2",), "sliding_window": (None,),
        "attention_bias": (False,), "num_nextn_predict_layers": (0, None),
    }  # fmt: skip
    refuse(raw, supported, where)
    kinds = _kinds(raw, where)
    fields = spelled_fields(raw, SPELLINGS, where)
    require(fields, SPELLINGS, ("d_model", "vocab_size"), where)
    values, number = fields.values, whole_numbers(raw, _NUMBERS, where)
    defaults = {"n_groups": 8, "d_conv": 4, "dt_limit": (0.0, float("inf")), "use_conv_bias": True}
    renamed = {field: agreed(raw, names, where) for field, names in _RENAMED.items()}
    options = defaults | {field: found[1] for field, found in renamed.items() if found is not None}
    values.setdefault("norm_epsilon", 1e-5)
    values.setdefault("tie_embeddings", False)
    values.setdefault("residual_in_fp32", False)
    mamba2 = Mamba2Options(
        n_heads=number["mamba_num_heads"], head_dim=number["mamba_head_dim"], d_state=number["ssm_state_size"],
        use_bias=raw.get("use_bias", False), norm_epsilon=values["norm_epsilon"], **options,
    )  # fmt: skip
    width = agreed(raw, ("head_dim", "attention_head_dim"), where)
    values |= {
        "n_layer": len(kinds),
        "layer_types": kinds,
        "rescale_prenorm_residual": False,
        "mamba2": mamba2,
        "attention": AttentionOptions(
            n_heads=number["num_attention_heads"],
            head_dim=_HEAD_DIM if width is None else width[1],
            n_kv_heads=number["num_key_value_heads"],
        ),
        "mlp": _mlp(raw, "sigmoid_moe" in kinds, where),
    }
    fields.spelled["n_layer"] = "layers_block_type"
    return fields


def _write(config: MambaLMConfig) -> dict[str, Any]:
    attention, mamba2, mlp = config.attention, config.mamba2, config.mlp
    if attention is None or mamba2 is None or mlp is None:
        raise ValueError("a Nemotron-H checkpoint cannot hold a model without attention, mamba2 and mlp options")
    theirs = {"mamba2": "mamba", "attention": "attention", "mlp": "mlp", "sigmoid_moe": "moe"}
    raw: dict[str, Any] = {"model_type": MODEL_TYPE, "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2"}
    raw |= {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
    raw |= {names[0]: getattr(mamba2, field) for field, names in _RENAMED.items()}
    if (experts := mlp.sigmoid_moe) is not None:
        raw |= {
            "n_routed_experts": mlp.n_experts,
            "num_experts_per_tok": mlp.n_experts_per_token,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": mlp.d_shared,
            "moe_intermediate_size": experts.d_expert,
            "moe_latent_size": experts.d_latent or None,
            "n_group": experts.n_groups,
            "topk_group": experts.n_groups_per_token,
            "norm_topk_prob": experts.normalised,
            "routed_scaling_factor": experts.scale,
        }
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
