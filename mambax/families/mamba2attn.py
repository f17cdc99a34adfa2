"""Mamba-2 with attention or MLPs between its blocks, in the layout of the original package: ``mamba2attn-2.7b``.

``config.json`` has ``"layer": "Mamba2"`` in ``ssm_cfg``, the numbers of the attention layers in ``attn_layer_idx``,
their sizes in ``attn_cfg``, and in ``d_intermediate`` the width of an MLP after every layer, or 0. transformers has
no such model, so that it is written in this layout again; the weights as safetensors, where the official package
looks for a ``pytorch_model.bin``.

Source: ``MambaLMHeadModel``, ``MHA`` and ``GatedMLP`` of mamba_ssm; Dao and Gu 2024, section 9.2.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families import mamba, mamba2
from mambax.families.family import CAUSAL_LM, Family, Fields
from mambax.families.translation import refuse
from mambax.options import AttentionOptions, Mamba2Options, MLPOptions

NAME = "mamba2attn"
_LAYER = re.compile(r"(backbone\.layers\.)(\d{1,6})\.(norm|mixer|norm2|mlp)\.(.+)")
_SECOND = {"norm2": "norm", "mlp": "mixer"}
"""The names of the MLP's block, which is a part of the layer before it there, and our names."""
_ELSEWHERE = ("attn_layer_idx", "attn_cfg", "d_intermediate")
_ATTN_CFG = {
    "num_heads", "num_heads_kv", "head_dim", "mlp_dim", "qkv_proj_bias", "out_proj_bias", "softmax_scale", "causal",
    "d_conv", "rotary_emb_dim", "rotary_emb_base", "rotary_emb_interleaved",
}  # fmt: skip
"""Arguments of the official ``MHA``."""
_IGNORED = {"layer_idx", "device", "dtype"}
_MULTIPLE = 128
"""Of which the width of the official ``GatedMLP`` is one, rounded up."""


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    fields = mamba2.ORIGINAL.read({name: raw[name] for name in raw if name not in _ELSEWHERE}, where)
    values, width = fields.values, raw.get("d_intermediate") or 0
    n_layer = values["n_layer"]
    if type(n_layer) is not int or not 1 <= n_layer <= 2048:
        raise ValueError(f"{where}: n_layer is {n_layer!r}; expected a whole number from 1 to 2048")
    if type(width) is not int or not 0 <= width < 2**24:
        raise ValueError(f"{where}: d_intermediate is {width!r}; expected a whole number from 0 to {2**24 - 1}")
    attending = raw.get("attn_layer_idx") or []
    numbers = isinstance(attending, list) and all(type(i) is int and 0 <= i < n_layer for i in attending)
    if not numbers or len(set(attending)) != len(attending):
        raise ValueError(
            f"{where}: attn_layer_idx is {str(attending)[:80]}; expected numbers of layers from 0 to {n_layer - 1}"
        )
    after = ("gated_mlp",) if width else ()
    kinds = [kind for i in range(n_layer) for kind in ("mha" if i in attending else "mamba2", *after)]
    values |= {"n_layer": len(kinds), "layer_types": tuple(kinds)}
    values["rescale_prenorm_residual"] = raw.get("rescale_prenorm_residual", True)
    if attending:
        values["attention"] = _attention(raw.get("attn_cfg"), values["d_model"], f"{where}: attn_cfg")
    if width:
        values["mlp"] = MLPOptions(d_intermediate=-(-width // _MULTIPLE) * _MULTIPLE)
    return fields


def _attention(cfg: Any, d_model: int, where: str) -> AttentionOptions:
    """The sizes of attention from ``attn_cfg``, with the defaults of the official ``MHA``."""
    if not isinstance(cfg, dict):
        raise ValueError(f"{where} is {str(cfg)[:80]}; expected an object")
    unknown = sorted(cfg.keys() - _ATTN_CFG - _IGNORED)
    if unknown:
        raise ValueError(f"{where} with {', '.join(unknown)[:200]} is not of an MHA layer; remove what it is")
    supported = {"causal": (True,), "mlp_dim": (0,), "rotary_emb_interleaved": (False,)}
    refuse({"causal": False} | cfg, supported, where)
    heads, turned = cfg.get("num_heads"), cfg.get("rotary_emb_dim", 0)
    if type(heads) is not int or heads < 1:
        raise ValueError(f"{where}: num_heads is {heads!r}; expected a whole number from 1")
    width = cfg.get("head_dim")
    if width is None and d_model % heads:
        raise ValueError(f"{where}: num_heads is {heads} without head_dim; expected a divisor of d_model {d_model}")
    key_heads = cfg.get("num_heads_kv")
    try:
        return AttentionOptions(
            n_heads=heads,
            head_dim=d_model // heads if width is None else width,
            n_kv_heads=heads if key_heads is None else key_heads,
            use_bias=cfg.get("qkv_proj_bias", True),
            use_out_bias=cfg.get("out_proj_bias", True),
            rope_theta=cfg.get("rotary_emb_base", 10000.0) if turned else None,
            rope_dim=turned,
            scale=cfg.get("softmax_scale"),
            d_conv=cfg.get("d_conv", 0),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _write(config: MambaLMConfig) -> dict[str, Any]:
    attention, mamba2_options, mlp = config.attention, config.mamba2, config.mlp
    if mamba2_options is None:
        raise ValueError(f"a {MAMBA2ATTN.title} checkpoint cannot hold a model without mamba2 options")
    mixers = config.layer_kinds[:: 2 if mlp else 1]
    raw = {
        "d_model": config.d_model,
        "d_intermediate": 0 if mlp is None else mlp.d_intermediate,
        "n_layer": len(mixers),
        "vocab_size": config.vocab_size,
        "ssm_cfg": _ssm_cfg(config, mamba2_options),
        "attn_layer_idx": [i for i, kind in enumerate(mixers) if kind == "mha"],
        "attn_cfg": {} if attention is None else _attn_cfg(attention),
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_embeddings,
    }
    if config.norm_epsilon != 1e-5:
        raw["norm_epsilon"] = float(config.norm_epsilon)
    return raw if config.rescale_prenorm_residual else raw | {"rescale_prenorm_residual": False}


def _ssm_cfg(config: MambaLMConfig, options: Mamba2Options) -> dict[str, Any]:
    ratio = options.d_inner / config.d_model
    cfg = {
        "layer": "Mamba2",
        "d_state": options.d_state,
        "d_conv": options.d_conv,
        "expand": int(ratio) if ratio.is_integer() else ratio,
        "headdim": options.head_dim,
        "ngroups": options.n_groups,
        "dt_min": float(config.dt_min),
        "dt_max": float(config.dt_max),
        "dt_init_floor": float(config.dt_init_floor),
        "bias": options.use_bias,
        "conv_bias": options.use_conv_bias,
    }
    return cfg if options.dt_limit == (0.0, float("inf")) else cfg | {"dt_limit": list(options.dt_limit)}


def _attn_cfg(options: AttentionOptions) -> dict[str, Any]:
    cfg = {
        "causal": True,
        "d_conv": options.d_conv,
        "head_dim": options.head_dim,
        "num_heads": options.n_heads,
        "num_heads_kv": options.n_kv_heads,
        "out_proj_bias": options.use_out_bias,
        "qkv_proj_bias": options.use_bias,
        "rotary_emb_dim": options.rope_dim,
    }
    if options.rope_theta is not None:
        cfg["rotary_emb_base"] = options.rope_theta
    return cfg if options.scale is None else cfg | {"softmax_scale": options.scale}


def _to_parameter(name: str, config: MambaLMConfig) -> str:
    name = mamba.to_parameter(name, config)
    named = _LAYER.fullmatch(name)
    if named is None or config.mlp is None:
        return name
    block = 2 * int(named[2]) + (named[3] in _SECOND)
    return f"{named[1]}{block}.{_SECOND.get(named[3], named[3])}.{named[4]}"


def _to_checkpoint(parameter: str, config: MambaLMConfig) -> str:
    if parameter == "backbone.embeddings.weight":
        return "backbone.embedding.weight"
    named = _LAYER.fullmatch(parameter)
    if named is None or config.mlp is None:
        return parameter
    layer, second = divmod(int(named[2]), 2)
    theirs = {ours: name for name, ours in _SECOND.items()} if second else {}
    return f"{named[1]}{layer}.{theirs.get(named[3], named[3])}.{named[4]}"


MAMBA2ATTN = Family(
    name=NAME,
    title="Mamba-2 with attention (original layout)",
    architectures={"MambaLMHeadModel": CAUSAL_LM},
    matches=lambda raw: (
        mamba2.ORIGINAL.matches(raw) and bool(raw.get("attn_layer_idx") or raw.get("d_intermediate"))
    ),
    read=_read,
    write=_write,
    to_parameter=_to_parameter,
    to_checkpoint=_to_checkpoint,
    original=True,
)
