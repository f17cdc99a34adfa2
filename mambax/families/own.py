"""Models of one's own making that no published family describes, such as a hybrid with layers in a new order.

``config.json`` has ``model_type: "mambax"`` and the fields of the configuration under mambax's own names. No other
library opens such a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, CLASSIFIER, ENCODER, Family, Fields
from mambax.families.translation import TOKEN_IDS

MODEL_TYPE = "mambax"
_ELSEWHERE = {"scan", "family", "num_labels", "pooling", *TOKEN_IDS}
"""Fields that every family has, or that are no property of the weights."""

_FIELDS = {field.name for field in dataclasses.fields(MambaLMConfig)} - _ELSEWHERE
_BESIDE = {
    "architectures", "model_type", "dtype", "torch_dtype", "id2label", "label2id", "num_labels", "pooling",
    "quantization", "quantization_config", "transformers_version", "_name_or_path", *TOKEN_IDS,
}  # fmt: skip
"""What else may be in a file: fields that every family has, and notes of other tools that mean nothing here."""


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    if unknown := sorted(raw.keys() - _FIELDS - _BESIDE):
        raise ValueError(
            f"{where}: unknown field {unknown[0][:80]!r}; expected those of MambaLMConfig alone. If a newer mambax "
            "wrote the file, update mambax"
        )
    values = {name: raw[name] for name in _FIELDS if name in raw}
    missing = {"d_model", "n_layer", "vocab_size"} - values.keys()
    if missing:
        raise ValueError(f"{where}: {min(missing)} is missing; expected a whole number")
    return Fields(values, {name: name for name in values})


def _write(config: MambaLMConfig) -> dict[str, Any]:
    plain = config.to_dict()
    return {"model_type": MODEL_TYPE} | {name: plain[name] for name in sorted(_FIELDS)}


OWN = Family(
    name=MODEL_TYPE,
    title="mambax",
    architectures={
        "MambaForCausalLM": CAUSAL_LM,
        "MambaForSequenceClassification": CLASSIFIER,
        "MambaModel": ENCODER,
    },
    matches=lambda raw: raw.get("model_type") == MODEL_TYPE,
    read=_read,
    write=_write,
)
