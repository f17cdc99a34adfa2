"""Every family of checkpoints that mambax reads and writes, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.families import (
    bamba,
    codestral,
    falcon_h1,
    falcon_mamba,
    granite,
    jamba,
    mamba,
    mamba2,
    mamba2attn,
    nemotron_h,
    own,
    zamba2,
)
from mambax.families.family import CAUSAL_LM, CLASSIFIER, ENCODER, Family, Fields

__all__ = ["CAUSAL_LM", "CLASSIFIER", "ENCODER", "FAMILIES", "Family", "Fields", "family_of", "named", "supported"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        mamba.HUGGING_FACE,
        mamba.ORIGINAL,
        falcon_mamba.FALCON_MAMBA,
        mamba2.HUGGING_FACE,
        mamba2attn.MAMBA2ATTN,  # before the one without attention, whose files look like its own
        mamba2.ORIGINAL,
        codestral.CODESTRAL,
        jamba.JAMBA,
        bamba.BAMBA,
        granite.GRANITE,
        nemotron_h.NEMOTRON_H,
        falcon_h1.FALCON_H1,
        zamba2.ZAMBA2,
        own.OWN,
    )
}


def supported() -> str:
    """What can be loaded, in words."""
    types = [family.name for family in FAMILIES.values() if not family.original]
    originals = [family.title for family in FAMILIES.values() if family.original]
    return (
        f"supported are model_type {', '.join(map(repr, types))} and the original state-spaces layout with "
        f"d_model, n_layer and ssm_cfg ({', '.join(originals)})"
    )


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The family that a ``config.json`` is of.

    Raises:
        ValueError: when it is of none, with the list of what is supported.
    """
    for family in FAMILIES.values():
        if family.matches(raw):
            return family
    if "model_type" in raw:
        raise ValueError(f"{where}: model_type {str(raw['model_type'])[:80]!r} is not supported; {supported()}")
    if {"d_model", "n_layer"} <= raw.keys():
        ssm_cfg: Any = raw["ssm_cfg"]
        raise ValueError(f"{where}: ssm_cfg with layer {str(ssm_cfg.get('layer'))[:80]!r}; {supported()}")
    raise ValueError(f"{where}: neither model_type nor d_model and n_layer are there; {supported()}")


def named(name: str) -> Family:
    """The family of this name.

    Raises:
        ValueError: when there is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; expected one of {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]
