"""A ``config.json`` as a whole: its family translates what the model is, and what all families share is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambax import affine
from mambax.affine import Affine
from mambax.config import POOLINGS, MambaClassificationConfig, MambaLMConfig, Pooling
from mambax.families import CAUSAL_LM, CLASSIFIER, ENCODER, Family, Fields, family_of, named, supported
from mambax.families.translation import TOKEN_IDS
from mambax.quantization import check_kind

__all__ = [
    "CAUSAL_LM",
    "CLASSIFIER",
    "ENCODER",
    "Description",
    "checkpoint_name",
    "parameter_name",
    "read_config",
    "write_config",
]

OURS = "mambax"


@dataclass(frozen=True)
class Description:
    """What a ``config.json`` says about a model.

    Args:
        config: its configuration.
        architecture: :data:`CAUSAL_LM`, :data:`CLASSIFIER` or :data:`ENCODER`.
        pooling: of an encoder.
        original: whether the layout is that of an original package, which names no tokenizer.
        layout: name of the family as which the files are laid out, where it is not ``config.family``, as which they
            would be written.
        quantization: kind and group size of quantised weights (see :mod:`mambax.quantization`), or how MLX packed
            them (see :mod:`mambax.affine`), or None.
    """

    config: MambaLMConfig
    architecture: str = CAUSAL_LM
    pooling: Pooling = "mean"
    original: bool = False
    layout: str = ""
    quantization: tuple[str, int] | Affine | None = None


def read_config(raw: Mapping[str, Any], where: str) -> Description:
    """Translate a ``config.json`` of any family.

    Args:
        raw: the parsed file.
        where: its path, for messages.

    Raises:
        ValueError: for an unknown family or architecture, with the list of what is supported; for a field out of
            range; and for a field that would change the numbers but is not supported.
    """
    family = family_of(raw, where)
    architecture = _architecture(family, raw, where)
    fields = _fields(family, raw, where)
    token_default = None if family.original or family.name == OURS else 0  # as in transformers
    values = fields.values | {name: raw.get(name, token_default) for name in TOKEN_IDS}
    values["family"] = family.written_as or family.name
    pooling = _pooling(raw, architecture, where)
    config_cls: type[MambaLMConfig] = MambaLMConfig
    if architecture == CLASSIFIER:
        config_cls = MambaClassificationConfig
        values |= {"num_labels": _num_labels(raw, where), "pooling": pooling}
    try:
        config = config_cls(**values)
    except ValueError as error:
        field = str(error).partition(" ")[0].rpartition(".")[2]
        raise ValueError(f"{where}: {fields.spelled.get(field, field)}: {error}") from error
    layout = family.name if family.written_as else ""
    return Description(config, architecture, pooling, family.original, layout, _quantization(raw, where))


def _fields(family: Family, raw: Mapping[str, Any], where: str) -> Fields:
    """What a family reads in a file, which its own errors name, and those of the options that it builds do not."""
    try:
        return family.read(raw, where)
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}") from error


def _architecture(family: Family, raw: Mapping[str, Any], where: str) -> str:
    known = family.architectures
    found = raw.get("architectures") or [next(iter(known))]
    if not isinstance(found, list) or len(found) != 1 or found[0] not in known:
        raise ValueError(
            f"{where}: architectures {str(found)[:80]} is not supported; supported are {', '.join(known)} in "
            f"{family.title} checkpoints; {supported()}"
        )
    return known[found[0]]


def _quantization(merged: Mapping[str, Any], where: str) -> tuple[str, int] | Affine | None:
    """How the weights were quantised, by mambax or by MLX; those of others would need their own reader."""
    if (packed := affine.from_config(merged, where)) is not None:
        return packed
    raw: Any = merged.get("quantization_config")
    if not raw:
        return None
    if not isinstance(raw, dict) or raw.get("quant_method") != OURS:
        raise ValueError(
            f"{where}: quantization_config is {str(raw)[:80]}; quantised checkpoints are not supported "
            "unless mambax or mlx-lm wrote them, use the full ones"
        )
    kind: Any = raw.get("kind")
    group_size: Any = raw.get("group_size")
    try:
        check_kind(kind, group_size)
    except ValueError as error:
        raise ValueError(f"{where}: quantization_config: {error}") from error
    return kind, group_size


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
    """The ``config.json`` of a model whose weights are of this dtype, as its family's other readers open it.

    Raises:
        ValueError: when a checkpoint of the configuration's family cannot describe the model.
    """
    config, family = described.config, named(str(described.config.family))
    raw: dict[str, Any] = {"architectures": [family.written_architecture(described.architecture)]}
    raw |= family.write(config)
    raw |= {name: getattr(config, name) for name in TOKEN_IDS}
    if isinstance(config, MambaClassificationConfig):
        labels = [f"LABEL_{i}" for i in range(config.num_labels)]
        raw["id2label"] = {str(i): label for i, label in enumerate(labels)}
        raw["label2id"] = {label: i for i, label in enumerate(labels)}
        raw["pooling"] = config.pooling
    elif described.architecture == ENCODER:
        raw["pooling"] = described.pooling
    raw |= {"dtype": dtype}
    if isinstance(described.quantization, Affine):
        raw["quantization"] = described.quantization.to_config()
    elif described.quantization is not None:  # transformers refuses a method that it does not know
        kind, group_size = described.quantization
        raw["quantization_config"] = {"quant_method": OURS, "kind": kind, "group_size": group_size}
    _check_written(config, raw, family)
    return raw


def _check_written(config: MambaLMConfig, raw: dict[str, Any], family: Family) -> None:
    """Refuse a configuration that would be another one when it is read again."""
    again, mine = read_config(raw, "the new config.json").config.to_dict(), config.to_dict()
    lost = sorted(name for name in mine if name != "scan" and mine[name] != again[name])
    if lost:
        raise ValueError(
            f"a {family.title} checkpoint cannot hold {lost[0]} = {mine[lost[0]]!r}; build the model with "
            f"family={OURS!r} in its configuration to save it in mambax's own layout"
        )


def parameter_name(name: str, described: Description) -> str:
    """The path inside mambax of a tensor that a checkpoint calls ``name``."""
    return named(described.layout or str(described.config.family)).to_parameter(name, described.config)


def checkpoint_name(parameter: str, config: MambaLMConfig) -> str:
    """The name in a checkpoint of the parameter at this path."""
    return named(str(config.family)).to_checkpoint(parameter, config)
