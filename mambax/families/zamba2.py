"""Zamba2: Mamba-2 everywhere, and before some layers one of a few shared blocks of attention and an MLP.

transformers stores a shared block where it is used for the first time, and its other uses as the same tensors.

Source: ``Zamba2ForCausalLM`` of transformers; Glorioso et al. 2024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, Family, Fields
from mambax.families.pairs import rope_theta, whole_numbers
from mambax.families.translation import agreed, refuse, require, spelled_fields
from mambax.options import AttentionOptions, Mamba2Options, MLPOptions, SharedOptions

MODEL_TYPE = "zamba2"
SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size",),
    "vocab_size": ("vocab_size",),
    "norm_epsilon": ("rms_norm_eps",),
    "tie_embeddings": ("tie_word_embeddings",),
}
_NUMBERS = {
    "num_hidden_layers": 54, "num_attention_heads": 32, "mamba_d_state": 64, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_ngroups": 1, "n_mamba_heads": 8, "num_mem_blocks": 1, "adapter_rank": 128,
}  # fmt: skip
_KINDS = ("mamba", "linear_attention", "hybrid")
_DEFAULT_PLACES = (6, 12, 18, 24, 30, 36, 42, 47, 51)
"""Of the hybrid layers among 54, where the file does not name the layers."""

_OUTSIDE = {
    "model.embed_tokens.weight": "backbone.embeddings.weight",
    "model.final_layernorm.weight": "backbone.norm_f.weight",
}
_PARTS = {
    "self_attn.": "attention.", "feed_forward.": "mlp.", "input_layernorm.": "norm.",
    "pre_ff_layernorm.": "mlp_norm.",
}  # fmt: skip
"""What the parts of a shared block are called in files, and here."""
_OF_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(mamba_decoder\.)?(mamba|input_layernorm)\.(.+)")
_OF_USE = re.compile(r"model\.layers\.(\d{1,6})\.(?:linear|shared_transformer)\.(.+)")
_ADAPTER = re.compile(r"(attention|mlp)\.(?:linear_([qkv])|gate_up_proj)_adapter_list\.(\d{1,6})\.([01])\.weight")
_MIXER = re.compile(r"backbone\.layers\.(\d+)\.(norm|mixer)\.(.+)")
_SHARED = re.compile(r"backbone\.shared_blocks\.(\d+)\.(.+)")
_OWN = re.compile(r"(attention|mlp)\.(?:([qkv])_)?adapters\.(\d+)\.(down|up)\.weight")


def _flag(raw: Mapping[str, Any], name: str, where: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {name} is {str(value)[:80]!r}; expected true or false")
    return value


def _places(raw: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    """The numbers of the layers before which a shared block is used."""
    named = agreed(raw, ("layers_block_type", "layer_types"), where)
    if named is None and layers == _NUMBERS["num_hidden_layers"]:
        return _DEFAULT_PLACES
    name, kinds = named or ("layers_block_type", None)
    fits = isinstance(kinds, list) and len(kinds) == layers and all(kind in _KINDS for kind in kinds)
    if kinds is None or not fits or "hybrid" not in kinds:
        known = ", ".join(map(repr, _KINDS))
        raise ValueError(
            f"{where}: {name} is {str(kinds)[:80]}; expected {layers} of {known}, one 'hybrid' at least"
        )
    return tuple(i for i, kind in enumerate(kinds) if kind == "hybrid")


def _check_derived(raw: Mapping[str, Any], derived: Mapping[str, int], where: str) -> None:
    """Refuse sizes that follow from others, where the file has other ones."""
    for name, value in derived.items():
        if raw.get(name, value) != value:
            raise ValueError(
                f"{where}: {name} is {raw[name]!r}; only {value}, which other fields give, is supported"
            )


def _theta(raw: Mapping[str, Any], where: str) -> float | None:
    """The base of the rotary embedding; None where there is none."""
    if not _flag(raw, "use_mem_rope", where):
        return None
    if _flag(raw, "use_long_context", where):
        raise ValueError(
            f"{where}: use_long_context is True, by which Zyphra's code enlarges rope_theta and transformers does "
            "not; only False is supported: set it, and the rope_theta that the model was trained with"
        )
    return rope_theta(raw, where)


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    refuse(raw, {"hidden_act": ("gelu",), "time_step_limit": (None,)}, where)
    fields = spelled_fields(raw, SPELLINGS, where)
    require(fields, SPELLINGS, ("d_model", "vocab_size"), where)
    values, number = fields.values, whole_numbers(raw, _NUMBERS, where)
    M, heads, bias = values["d_model"], number["num_attention_heads"], _flag(raw, "add_bias_linear", where)
    inner, ssm_heads = number["mamba_expand"] * M, number["n_mamba_heads"]
    if type(M) is not int or M < 1 or 2 * M % heads or inner % ssm_heads:
        raise ValueError(
            f"{where}: hidden_size is {M!r}; expected a whole number of which num_attention_heads {heads} divides "
            f"the double and n_mamba_heads {ssm_heads} divides mamba_expand times it"
        )
    places = _places(raw, number["num_hidden_layers"], where)
    adapts = _flag(raw, "use_shared_attention_adapter", where)
    kv_heads, width = raw.get("num_key_value_heads") or heads, 2 * M // heads
    if adapts and kv_heads != heads:
        raise ValueError(f"{where}: num_key_value_heads is {kv_heads!r}; only {heads} is supported with adapters")
    derived = {"attention_head_dim": width, "attention_hidden_size": 2 * M, "mamba_headdim": inner // ssm_heads}
    _check_derived(raw, derived, where)
    least = raw.get("time_step_min", 0.001)
    if isinstance(least, bool) or not isinstance(least, (int, float)) or not least > 0:
        raise ValueError(f"{where}: time_step_min is {least!r}; expected a number above 0")
    values.setdefault("norm_epsilon", 1e-5)
    values.setdefault("tie_embeddings", True)
    blocks = min(number["num_mem_blocks"], len(places))
    if values["tie_embeddings"] is False and blocks < len(places):
        raise ValueError(
            f"{where}: tie_word_embeddings is False, by which transformers stores each use of a shared block as a "
            f"block of its own; only True is supported where {blocks} blocks have {len(places)} uses"
        )
    values |= {
        "n_layer": number["num_hidden_layers"],
        "layer_types": ("mamba2",) * number["num_hidden_layers"],
        "residual_in_fp32": False,
        "rescale_prenorm_residual": False,
        "mamba2": Mamba2Options(
            n_heads=ssm_heads, head_dim=inner // ssm_heads, d_state=number["mamba_d_state"],
            n_groups=number["mamba_ngroups"], d_conv=number["mamba_d_conv"], use_bias=bias,
            dt_limit=(least, float("inf")),  # what transformers clamps dt with
        ),
        "attention": AttentionOptions(
            n_heads=heads, head_dim=width, n_kv_heads=kv_heads, rope_theta=_theta(raw, where),
            scale=(width / 2) ** -0.5,
        ),
        "mlp": MLPOptions(
            d_intermediate=raw.get("intermediate_size") or 4 * M, activation="gelu", use_bias=bias
        ),
        "shared": SharedOptions(
            places=places, n_blocks=blocks,
            adapter_rank=number["adapter_rank"], adapts_attention=adapts,
        ),
    }  # fmt: skip
    fields.spelled["n_layer"] = "num_hidden_layers"
    return fields


def _write(config: MambaLMConfig) -> dict[str, Any]:
    attention, mamba2, mlp, shared = config.attention, config.mamba2, config.mlp, config.shared
    if attention is None or mamba2 is None or mlp is None or shared is None:
        raise ValueError(
            "a Zamba2 checkpoint cannot hold a model without attention, mamba2, mlp and shared options"
        )
    raw: dict[str, Any] = {"model_type": MODEL_TYPE, "hidden_act": "gelu", "use_cache": True}
    raw |= {names[0]: getattr(config, field) for field, names in SPELLINGS.items()}
    if attention.rope_theta is not None:
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": attention.rope_theta}
    return raw | {
        "num_hidden_layers": config.n_layer,
        "layers_block_type": ["hybrid" if i in shared.places else "mamba" for i in range(config.n_layer)],
        "num_mem_blocks": shared.n_blocks,
        "adapter_rank": shared.adapter_rank,
        "use_shared_attention_adapter": shared.adapts_attention,
        "use_mem_rope": attention.rope_theta is not None,
        "use_long_context": False,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "intermediate_size": mlp.d_intermediate,
        "add_bias_linear": mlp.use_bias,
        "n_mamba_heads": mamba2.n_heads,
        "mamba_expand": mamba2.d_inner // config.d_model,
        "mamba_d_state": mamba2.d_state,
        "mamba_ngroups": mamba2.n_groups,
        "mamba_d_conv": mamba2.d_conv,
        "use_conv_bias": True,
        "time_step_min": mamba2.dt_limit[0],
    }


def _shared(config: MambaLMConfig) -> SharedOptions:
    if config.shared is None:
        raise ValueError("a Zamba2 checkpoint cannot hold a model without shared options")
    return config.shared


def _to_parameter(name: str, config: MambaLMConfig) -> str:
    shared = _shared(config)
    if (named := _OF_LAYER.fullmatch(name)) is not None and (int(named[1]) in shared.places) == bool(named[2]):
        part = "mixer" if named[3] == "mamba" else "norm"
        return f"backbone.layers.{named[1]}.{part}.{named[4]}"
    if (named := _OF_USE.fullmatch(name)) is None or int(named[1]) not in shared.places:
        return _OUTSIDE.get(name, name)
    use = shared.places.index(int(named[1]))
    block, inside = use % shared.n_blocks, named[2]
    if name.endswith(".linear.weight"):
        return f"backbone.shared_blocks.{block}.outputs.{use // shared.n_blocks}.weight"
    for theirs, ours in _PARTS.items():
        inside = ours + inside.removeprefix(theirs) if inside.startswith(theirs) else inside
    if (adapter := _ADAPTER.fullmatch(inside)) is not None:
        if int(adapter[3]) % shared.n_blocks != block:
            return name  # the adapter of a use of another block
        kind, number = f"{adapter[2]}_" if adapter[2] else "", int(adapter[3]) // shared.n_blocks
        inside = f"{adapter[1]}.{kind}adapters.{number}.{('down', 'up')[int(adapter[4])]}.weight"
    return f"backbone.shared_blocks.{block}.{inside}"


def _to_checkpoint(parameter: str, config: MambaLMConfig) -> str:
    shared = _shared(config)
    if (named := _MIXER.fullmatch(parameter)) is not None:
        part = "mamba" if named[2] == "mixer" else "input_layernorm"
        decoder = "mamba_decoder." if int(named[1]) in shared.places else ""
        return f"model.layers.{named[1]}.{decoder}{part}.{named[3]}"
    if (named := _SHARED.fullmatch(parameter)) is None:
        return {ours: theirs for theirs, ours in _OUTSIDE.items()}.get(parameter, parameter)
    block, inside = int(named[1]), named[2]
    if inside.startswith("outputs."):
        use = int(inside.split(".")[1]) * shared.n_blocks + block
        return f"model.layers.{shared.places[use]}.linear.weight"
    if (own := _OWN.fullmatch(inside)) is not None:
        product = f"linear_{own[2]}" if own[2] else "gate_up_proj"
        use = int(own[3]) * shared.n_blocks + block
        inside = f"{own[1]}.{product}_adapter_list.{use}.{('down', 'up').index(own[4])}.weight"
    for theirs, ours in _PARTS.items():
        if inside.startswith(ours):
            inside = theirs + inside.removeprefix(ours)
            break
    return f"model.layers.{shared.places[block]}.shared_transformer.{inside}"


ZAMBA2 = Family(
    name=MODEL_TYPE,
    title="Zamba2",
    architectures={"Zamba2ForCausalLM": CAUSAL_LM},
    matches=lambda raw: raw.get("model_type") == MODEL_TYPE,
    read=_read,
    write=_write,
    to_parameter=_to_parameter,
    to_checkpoint=_to_checkpoint,
)
