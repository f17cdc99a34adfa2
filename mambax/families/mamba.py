"""Mamba-1: Hugging Face's ``mamba``, and the layout of the original package.

``config.json`` of transformers has ``model_type`` and fields such as ``hidden_size``; that of the original package
has ``d_model`` and ``ssm_cfg``. Files that carry both spellings exist; they must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, CLASSIFIER, ENCODER, Family, Fields
from mambax.families.translation import expand, merged_ssm_cfg, padded, refuse, require, spelled_fields

RESCALE = "rescale_prenorm_residual"
OURS = "mambax"
"""An object in the files that we write: what transformers must not see, and ignores.

With ``rescale_prenorm_residual`` true, transformers 5.23 divides the ``out_proj`` weights that it has just read by
``sqrt(n_layer)``, as if they were new. It says how weights were initialised and nothing about how to use them, so
it is written as false, with its real value here.
"""

SPELLINGS: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size", "d_model"),
    "n_layer": ("num_hidden_layers", "n_layer"),
    "vocab_size": ("vocab_size",),
    "d_state": ("state_size", "d_state"),
    "d_conv": ("conv_kernel", "d_conv"),
    "dt_rank": ("time_step_rank", "dt_rank"),
    "use_bias": ("use_bias", "bias"),
    "use_conv_bias": ("use_conv_bias", "conv_bias"),
    "norm_epsilon": ("layer_norm_epsilon", "norm_epsilon"),
    "residual_in_fp32": ("residual_in_fp32",),
    "dt_min": ("time_step_min", "dt_min"),
    "dt_max": ("time_step_max", "dt_max"),
    "dt_init": ("time_step_init_scheme", "dt_init"),
    "dt_scale": ("time_step_scale", "dt_scale"),
    "dt_init_floor": ("time_step_floor", "dt_init_floor"),
    RESCALE: (RESCALE,),
    "tie_embeddings": ("tie_word_embeddings", "tie_embeddings"),
}
"""Our field -> its names in files. The first one is Hugging Face's, and the one that is written."""

_FLOATS = {"norm_epsilon", "dt_min", "dt_max", "dt_scale", "dt_init_floor"}
_IGNORED = {"layer", "layer_idx", "device", "dtype"}
_SSM_CFG = {
    "d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor",
    "conv_bias", "bias", "use_fast_path",
} | _IGNORED  # fmt: skip
"""Arguments of the official ``Mamba``."""


def read_core(raw: Mapping[str, Any], where: str) -> Fields:
    """The fields of a Mamba-1 model in either layout; also of the families that extend it."""
    merged = merged_ssm_cfg(raw, _SSM_CFG, _IGNORED, "Mamba-1", where)
    for name in ("attn_layer_idx", "attn_cfg", "d_intermediate"):
        if merged.get(name):
            raise ValueError(
                f"{where}: {name} is {merged[name]!r}; attention and MLP blocks are not supported in this layout"
            )
    refuse(merged, {"rms_norm": (True,), "hidden_act": ("silu", "swish")}, where)
    fields = spelled_fields(merged, SPELLINGS, where)
    fields.values["expand"] = expand(merged, fields.values.get("d_model"), where)
    require(fields, SPELLINGS, ("d_model", "n_layer", "vocab_size"), where)
    return fields


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    fields = read_core(raw, where)
    fields.values[RESCALE] = read_rescale(raw, fields.values.get(RESCALE, False))
    return fields


def read_rescale(raw: Mapping[str, Any], plain: Any) -> Any:
    """What a file of Hugging Face says of :data:`RESCALE`: what :func:`write_rescale` put there, else ``plain``.

    Raises:
        ValueError: for something else in its place, as a newer mambax may have put there.
    """
    ours = raw.get(OURS)
    if ours is None:
        return plain
    if not isinstance(ours, dict) or ours.keys() - {RESCALE}:
        raise ValueError(
            f"{OURS} is {str(ours)[:80]}; expected an object with {RESCALE!r} alone. If a newer mambax wrote the "
            "file, update mambax"
        )
    return ours.get(RESCALE, plain)


def write_rescale(config: MambaLMConfig) -> dict[str, Any]:
    """:data:`RESCALE` in a file of Hugging Face, hidden from transformers."""
    return {RESCALE: False} | ({OURS: {RESCALE: True}} if config.rescale_prenorm_residual else {})


def _read_original(raw: Mapping[str, Any], where: str) -> Fields:
    fields = read_core(raw, where)
    multiple = raw.get("pad_vocab_size_multiple", 8)
    fields.values["vocab_size"] = padded(fields.values["vocab_size"], multiple, where)
    return fields


def write_core(config: MambaLMConfig) -> dict[str, Any]:
    """The fields of a Mamba-1 model as transformers spells them.

    An ``expand`` that is not whole is written as it is; transformers takes whole ones alone.
    """
    raw: dict[str, Any] = {}
    for field, names in SPELLINGS.items():
        value = getattr(config, field)
        raw[names[0]] = float(value) if field in _FLOATS else value
    raw |= {"expand": config.expand, "intermediate_size": config.d_inner, "hidden_act": "silu"}
    return raw | {"use_cache": True} | write_rescale(config)


def _write(config: MambaLMConfig) -> dict[str, Any]:
    return {"model_type": "mamba"} | write_core(config)


def to_parameter(name: str, config: MambaLMConfig) -> str:
    """Inside mambax, paths are those of transformers' ``MambaForCausalLM``; some files name the table otherwise."""
    if name.startswith(("embeddings.", "embedding.", "layers.", "norm_f.")):
        name = "backbone." + name
    return "backbone.embeddings.weight" if name == "backbone.embedding.weight" else name


_ARCHITECTURES = {
    "MambaForCausalLM": CAUSAL_LM,
    "MambaLMHeadModel": CAUSAL_LM,  # the class in the original package
    "MambaForSequenceClassification": CLASSIFIER,
    "MambaModel": ENCODER,
}

HUGGING_FACE = Family(
    name="mamba",
    title="Mamba-1",
    architectures=_ARCHITECTURES,
    matches=lambda raw: raw.get("model_type") == "mamba" and "dim" not in raw,
    read=_read,
    write=_write,
    to_parameter=to_parameter,
)

ORIGINAL = Family(
    name="mamba_original",
    title="Mamba-1 (original layout)",
    architectures=_ARCHITECTURES,
    matches=lambda raw: (
        "model_type" not in raw
        and {"d_model", "n_layer"} <= raw.keys()
        and (not isinstance(raw.get("ssm_cfg"), dict) or raw["ssm_cfg"].get("layer", "Mamba1") == "Mamba1")
    ),
    read=_read_original,
    write=_write,
    to_parameter=to_parameter,
    original=True,
    written_as="mamba",
)
