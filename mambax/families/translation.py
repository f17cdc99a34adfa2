"""What the translations of the families share: reading fields of a ``config.json`` under several spellings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mambax.families.family import Fields

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def agreed(raw: Mapping[str, Any], names: Iterable[str], where: str) -> tuple[str, Any] | None:
    """(spelling, value) of a field that the file may call by any of these names; None when it says nothing.

    Raises:
        ValueError: when it says two different things.
    """
    said = [(name, raw[name]) for name in names if raw.get(name) is not None]
    if not said:
        return None
    for name, value in said[1:]:
        if value != said[0][1]:
            raise ValueError(f"{where}: {said[0][0]} is {said[0][1]!r}, but {name} is {value!r}; make them agree")
    return said[0]


def spelled_fields(raw: Mapping[str, Any], spellings: Mapping[str, tuple[str, ...]], where: str) -> Fields:
    """The configuration fields of a file, each by the first spelling that is there."""
    fields = Fields({})
    for field, names in spellings.items():
        found = agreed(raw, names, where)
        if found is not None:
            fields.spelled[field], fields.values[field] = found
    return fields


def refuse(raw: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Refuse fields that would change the numbers if they were ignored.

    Args:
        raw: the file.
        expected: field -> the values that mean what mambax computes, the first of which is the default.
        where: the file's path.

    Raises:
        ValueError: naming the field, its value and what is supported.
    """
    for name, values in expected.items():
        value = raw.get(name, values[0])
        if not any(value is v or (value == v and type(value) is type(v)) for v in values):
            supported = " or ".join(map(repr, values))
            raise ValueError(f"{where}: {name} is {repr(value)[:80]}; only {supported} is supported")


def require(fields: Fields, spellings: Mapping[str, tuple[str, ...]], names: Iterable[str], where: str) -> None:
    """Refuse a file in which a field is missing that has no default.

    Raises:
        ValueError: naming it.
    """
    for name in names:
        if fields.values.get(name) is None:
            raise ValueError(f"{where}: {spellings[name][0]} is missing; expected a whole number")


def expand(raw: Mapping[str, Any], d_model: Any, where: str) -> Any:
    """``d_inner / d_model``, from ``intermediate_size`` if the file has it: that is what the weights have."""
    named = agreed(raw, ("intermediate_size", "d_inner"), where)
    ratio = raw.get("expand", 2)
    if type(d_model) is not int or d_model < 1:
        return ratio  # the configuration will say what is wrong with d_model
    if named is not None:
        if type(named[1]) is not int or not 1 <= named[1] <= 2**23:
            raise ValueError(f"{where}: {named[0]} is {named[1]!r}; expected a whole number from 1 to {2**23}")
        ratio = named[1] / d_model
    return int(ratio) if isinstance(ratio, float) and ratio.is_integer() else ratio


def padded(vocab_size: Any, multiple: Any, where: str) -> Any:
    """The rows of the table in the original layout: ``vocab_size`` rounded up."""
    if type(multiple) is not int or not 1 <= multiple <= 2**16:
        raise ValueError(
            f"{where}: pad_vocab_size_multiple is {multiple!r}; expected a whole number from 1 to 65536"
        )
    return -(-vocab_size // multiple) * multiple if type(vocab_size) is int else vocab_size


def merged_ssm_cfg(
    raw: Mapping[str, Any], known: set[str], ignored: set[str], title: str, where: str
) -> dict[str, Any]:
    """The fields of an original ``config.json`` with those of its ``ssm_cfg`` among them.

    Args:
        raw: the file.
        known: names that ``ssm_cfg`` may have.
        ignored: those of them that change nothing that is computed.
        title: of the family, for messages.
        where: the file's path.

    Raises:
        ValueError: for a name that is not known, and for two values that do not agree.
    """
    ssm_cfg = raw.get("ssm_cfg") or {}
    if not isinstance(ssm_cfg, dict):
        raise ValueError(f"{where}: ssm_cfg is {str(ssm_cfg)[:80]}; expected an object")
    unknown = sorted(ssm_cfg.keys() - known)
    if unknown:
        raise ValueError(
            f"{where}: ssm_cfg with {', '.join(unknown)[:200]} is not a {title} model; remove what it is"
        )
    merged = {name: value for name, value in raw.items() if name != "ssm_cfg"}
    for name in ssm_cfg.keys() - ignored:
        if merged.setdefault(name, ssm_cfg[name]) != ssm_cfg[name]:
            raise ValueError(
                f"{where}: {name} is {merged[name]!r}, but {ssm_cfg[name]!r} in ssm_cfg; make them agree"
            )
    return merged
