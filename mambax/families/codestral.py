"""Codestral-Mamba in Mistral's layout: Mamba-2 in ``params.json`` and ``consolidated.safetensors``.

Its conversion by Hugging Face is a ``mamba2`` checkpoint like any other.

Source: ``MambaArgs`` and ``Mamba`` of mistral_inference, which build the official package's Mamba-2 with its
defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families import mamba2
from mambax.families.family import CAUSAL_LM, Family, Fields
from mambax.families.mamba import to_parameter
from mambax.families.translation import refuse

_NAMES = {"dim": "d_model", "n_layers": "n_layer"}
_KNOWN = ("vocab_size", "residual_in_fp32", "pad_vocab_size_multiple", "tie_embeddings")


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    refuse(raw, {"rms_norm": (True,), "model_type": ("mamba",)}, where)
    original: dict[str, Any] = {ours: raw.get(theirs) for theirs, ours in _NAMES.items()}
    original |= {name: raw[name] for name in _KNOWN if name in raw}
    original.setdefault("pad_vocab_size_multiple", 1)
    original["ssm_cfg"] = {"layer": "Mamba2", "ngroups": raw.get("n_groups", 1)}
    fields = mamba2.ORIGINAL.read(original, where)
    fields.spelled.update({ours: theirs for theirs, ours in _NAMES.items()})
    return fields


def _parameter(name: str, config: MambaLMConfig) -> str:
    return to_parameter(name.removeprefix("model."), config)


CODESTRAL = Family(
    name="codestral",
    title="Codestral-Mamba (Mistral's layout)",
    architectures={"Mamba": CAUSAL_LM},
    matches=lambda raw: {"dim", "n_layers"} <= raw.keys(),
    read=_read,
    write=mamba2.HUGGING_FACE.write,
    to_parameter=_parameter,
    original=True,
    written_as="mamba2",
)
