"""The two public checkpoint layouts, and the one place where their spellings are translated.

``config.json`` of Hugging Face's transformers has ``model_type`` and fields such as ``hidden_size``; that of the
original package has ``d_model`` and ``ssm_cfg``. Files that carry both spellings exist; they must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambax.config import POOLINGS, MambaClassificationConfig, MambaLMConfig, Pooling
from mambax.quantization import check_kind

MODEL_TYPE = "mamba"
CAUSAL_LM = "MambaForCausalLM"
CLASSIFIER = "MambaForSequenceClassification"
ENCODER = "MambaModel"
ARCHITECTURES = {
    CAUSAL_LM: CAUSAL_LM,
    "MambaLMHeadModel": CAUSAL_LM,  # the class in the original package
    CLASSIFIER: CLASSIFIER,
    ENCODER: ENCODER,
}
"""Names found in ``architectures``, and the model that each means."""

SUPPORTED = (
    f"supported are model_type {MODEL_TYPE!r} (Mamba-1; architectures {', '.join(ARCHITECTURES)}) and the original "
    "state-spaces layout with d_model, n_layer and ssm_cfg"
)

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

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SSM_CFG = {
    "d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor",
    "conv_bias", "bias", "layer", "use_fast_path", "layer_idx", "device", "dtype",
}  # fmt: skip
"""Arguments of the official ``Mamba``; the last four do not change what it computes."""


@dataclass(frozen=True)
class Description:
    """What a ``config.json`` says about a model.

    Args:
        config: its configuration.
        architecture: :data:`CAUSAL_LM`, :data:`CLASSIFIER` or :data:`ENCODER`.
        pooling: of an encoder.
        original: whether the layout is the original package's.
        quantization: kind and group size of quantised weights (see :mod:`mambax.quantization`), or None.
    """

    config: MambaLMConfig
    architecture: str = CAUSAL_LM
    pooling: Pooling = "mean"
    original: bool = False
    quantization: tuple[str, int] | None = None


def read_config(raw: Mapping[str, Any], where: str) -> Description:
    """Translate a ``config.json`` of either layout.

    Args:
        raw: the parsed file.
        where: its path, for messages.

    Raises:
        ValueError: for an unknown architecture, with the list of what is supported; for a field out of range; and
            for a field that would change the numbers but is not supported.
    """
    original = "model_type" not in raw
    if original and not ("d_model" in raw and "n_layer" in raw):
        raise ValueError(f"{where}: neither model_type nor d_model and n_layer are there; {SUPPORTED}")
    if not original and raw["model_type"] != MODEL_TYPE:
        raise ValueError(f"{where}: model_type {str(raw['model_type'])[:80]!r} is not supported; {SUPPORTED}")
    architecture = _architecture(raw, where)
    merged = _merge_ssm_cfg(raw, where)
    _refuse_unsupported(merged, where)

    found: dict[str, tuple[str, Any]] = {}  # field -> (its spelling here, value)
    for field, names in SPELLINGS.items():
        value = _agreed(merged, names, where)
        if value is not None:
            found[field] = value
    values = {field: value for field, (_, value) in found.items()}
    if original:
        values["vocab_size"] = _padded(values.get("vocab_size"), merged.get("pad_vocab_size_multiple", 8), where)
        token_default = None
    else:
        values.setdefault(RESCALE, False)
        ours = raw.get(OURS)
        if isinstance(ours, dict) and RESCALE in ours:
            values[RESCALE] = ours[RESCALE]
        token_default = 0  # as in transformers
    values |= {name: merged.get(name, token_default) for name in TOKEN_IDS}
    values["expand"] = _expand(merged, values.get("d_model"), where)
    for field in ("d_model", "n_layer", "vocab_size"):
        if values.get(field) is None:
            raise ValueError(f"{where}: {SPELLINGS[field][0]} is missing; expected a whole number")

    pooling = _pooling(merged, architecture, where)
    config_cls: type[MambaLMConfig] = MambaLMConfig
    if architecture == CLASSIFIER:
        config_cls = MambaClassificationConfig
        values |= {"num_labels": _num_labels(merged, where), "pooling": pooling}
    try:
        config = config_cls(**values)
    except ValueError as error:
        field = str(error).partition(" ")[0].rpartition(".")[2]
        spelling = found[field][0] if field in found else field
        raise ValueError(f"{where}: {spelling}: {error}") from error
    return Description(config, architecture, pooling, original, _quantization(merged, where))


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    named = raw.get("architectures") or [CAUSAL_LM]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        raise ValueError(f"{where}: architectures {str(named)[:80]} is not supported; {SUPPORTED}")
    return ARCHITECTURES[named[0]]


def _merge_ssm_cfg(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields with those of ``ssm_cfg`` among them."""
    ssm_cfg = raw.get("ssm_cfg") or {}
    if not isinstance(ssm_cfg, dict):
        raise ValueError(f"{where}: ssm_cfg is {str(ssm_cfg)[:80]}; expected an object")
    unknown = sorted(ssm_cfg.keys() - SSM_CFG)
    if ssm_cfg.get("layer", "Mamba1") != "Mamba1" or unknown:
        what = f"layer {ssm_cfg['layer']!r}" if "layer" in ssm_cfg else ", ".join(unknown)
        raise ValueError(f"{where}: ssm_cfg with {what[:200]} is not a Mamba-1 model; {SUPPORTED}")
    merged = {name: value for name, value in raw.items() if name != "ssm_cfg"}
    for name in ssm_cfg.keys() & SSM_CFG - {"layer", "layer_idx", "device", "dtype"}:
        if merged.setdefault(name, ssm_cfg[name]) != ssm_cfg[name]:
            raise ValueError(
                f"{where}: {name} is {merged[name]!r}, but {ssm_cfg[name]!r} in ssm_cfg; make them agree"
            )
    return merged


def _refuse_unsupported(merged: Mapping[str, Any], where: str) -> None:
    """Refuse what would change the numbers if it were ignored."""
    if merged.get("quantization"):
        raise ValueError(
            f"{where}: quantization is set; quantised by others is not supported, use the full weights"
        )
    for name in ("attn_layer_idx", "attn_cfg", "d_intermediate"):
        if merged.get(name):
            raise ValueError(f"{where}: {name} is {merged[name]!r}; attention and MLP blocks are not supported")
    if merged.get("rms_norm", True) is not True:
        raise ValueError(f"{where}: rms_norm is {merged['rms_norm']!r}; only RMSNorm is supported, not LayerNorm")
    if merged.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{where}: hidden_act is {merged['hidden_act']!r}; only 'silu' is supported")


def _quantization(merged: Mapping[str, Any], where: str) -> tuple[str, int] | None:
    """Kind and group size of weights that mambax quantised; those of others would need their own reader."""
    raw: Any = merged.get("quantization_config")
    if not raw:
        return None
    if not isinstance(raw, dict) or raw.get("quant_method") != OURS:
        raise ValueError(
            f"{where}: quantization_config is {str(raw)[:80]}; quantised checkpoints are not supported "
            "unless mambax wrote them, use the full ones"
        )
    kind: Any = raw.get("kind")
    group_size: Any = raw.get("group_size")
    try:
        check_kind(kind, group_size)
    except ValueError as error:
        raise ValueError(f"{where}: quantization_config: {error}") from error
    return kind, group_size


def _agreed(merged: Mapping[str, Any], names: tuple[str, ...], where: str) -> tuple[str, Any] | None:
    """(spelling, value) of a field; None when the file says nothing."""
    said = [(name, merged[name]) for name in names if merged.get(name) is not None]
    if not said:
        return None
    for name, value in said[1:]:
        if value != said[0][1]:
            raise ValueError(f"{where}: {said[0][0]} is {said[0][1]!r}, but {name} is {value!r}; make them agree")
    return said[0]


def _padded(vocab_size: Any, multiple: Any, where: str) -> Any:
    """The rows of the table in the original layout: ``vocab_size`` rounded up."""
    if type(multiple) is not int or not 1 <= multiple <= 2**16:
        raise ValueError(
            f"{where}: pad_vocab_size_multiple is {multiple!r}; expected a whole number from 1 to 65536"
        )
    return -(-vocab_size // multiple) * multiple if type(vocab_size) is int else vocab_size


def _expand(merged: Mapping[str, Any], d_model: Any, where: str) -> Any:
    """``d_inner / d_model``, from ``intermediate_size`` if the file has it: that is what the weights have."""
    named = _agreed(merged, ("intermediate_size", "d_inner"), where)
    expand = merged.get("expand", 2)
    if type(d_model) is not int or d_model < 1:
        return expand  # the configuration will say what is wrong with d_model
    if named is not None:
        if type(named[1]) is not int or not 1 <= named[1] <= 2**23:
            raise ValueError(f"{where}: {named[0]} is {named[1]!r}; expected a whole number from 1 to {2**23}")
        expand = named[1] / d_model
    return int(expand) if isinstance(expand, float) and expand.is_integer() else expand


def _pooling(merged: Mapping[str, Any], architecture: str, where: str) -> Pooling:
    default = None if architecture == CLASSIFIER else "mean"
    pooling = merged.get("pooling", default)
    if architecture != CAUSAL_LM and pooling not in POOLINGS:
        raise ValueError(
            f"{where}: pooling is {pooling!r}; add the one that the model was trained with, one of "
            + ", ".join(map(repr, POOLINGS))
        )
    return pooling if pooling in POOLINGS else "mean"


def _num_labels(merged: Mapping[str, Any], where: str) -> Any:
    labels, count = merged.get("id2label"), merged.get("num_labels")
    if labels is not None and not isinstance(labels, dict):
        raise ValueError(f"{where}: id2label is {type(labels).__name__}; expected an object")
    if labels is not None and count is not None and len(labels) != count:
        raise ValueError(f"{where}: num_labels is {count!r}, but id2label has {len(labels)}; make them agree")
    return 2 if labels is None and count is None else count if labels is None else len(labels)


def write_config(described: Description, dtype: str) -> dict[str, Any]:
    """The ``config.json`` that transformers opens, of weights of this dtype.

    An ``expand`` that is not whole is written as it is; transformers takes whole ones alone.
    """
    config = described.config
    raw: dict[str, Any] = {"architectures": [described.architecture], "model_type": MODEL_TYPE}
    for field, names in SPELLINGS.items():
        value = getattr(config, field)
        raw[names[0]] = float(value) if field in _FLOATS else value
    raw |= {"expand": config.expand, "intermediate_size": config.d_inner, "hidden_act": "silu"}
    raw |= {name: getattr(config, name) for name in TOKEN_IDS}
    if isinstance(config, MambaClassificationConfig):
        labels = [f"LABEL_{i}" for i in range(config.num_labels)]
        raw["id2label"] = {str(i): label for i, label in enumerate(labels)}
        raw["label2id"] = {label: i for i, label in enumerate(labels)}
        raw["pooling"] = config.pooling
    elif described.architecture == ENCODER:
        raw["pooling"] = described.pooling
    raw |= {"dtype": dtype, "use_cache": True, RESCALE: False}
    if config.rescale_prenorm_residual:
        raw[OURS] = {RESCALE: True}
    if described.quantization is not None:  # transformers refuses a method that it does not know
        kind, group_size = described.quantization
        raw["quantization_config"] = {"quant_method": OURS, "kind": kind, "group_size": group_size}
    return raw


_FLOATS = {"norm_epsilon", "dt_min", "dt_max", "dt_scale", "dt_init_floor"}


def parameter_name(name: str, architecture: str) -> str:
    """The path inside mambax of a tensor that a checkpoint calls ``name``."""
    if architecture == ENCODER and name.startswith(("embeddings.", "embedding.", "layers.", "norm_f.")):
        name = "backbone." + name
    return "backbone.embeddings.weight" if name == "backbone.embedding.weight" else name
