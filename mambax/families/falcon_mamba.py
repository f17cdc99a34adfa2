"""Falcon-Mamba: Mamba-1 whose time step, B and C go through an RMSNorm without weights, with a head of its own.

Its published ``config.json`` says ``expand: 16``; the weights, and ``intermediate_size``, say otherwise and are
believed.

Source: ``FalconMambaMixer`` of transformers; Zuo et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mambax.config import MambaLMConfig
from mambax.families.family import CAUSAL_LM, ENCODER, Family, Fields
from mambax.families.mamba import read_core, to_parameter, write_core

MODEL_TYPE = "falcon_mamba"


def _read(raw: Mapping[str, Any], where: str) -> Fields:
    fields = read_core(raw, where)
    values, spelled = fields.values, fields.spelled
    values.setdefault("rescale_prenorm_residual", False)
    values |= {"dt_b_c_norm": "weightless", "dt_b_c_norm_epsilon": raw.get("mixer_rms_eps", 1e-6)}
    spelled["dt_b_c_norm_epsilon"] = "mixer_rms_eps"
    values.setdefault("tie_embeddings", True)  # as in transformers; the published files say false
    return fields


def _write(config: MambaLMConfig) -> dict[str, Any]:
    return {"model_type": MODEL_TYPE, "mixer_rms_eps": float(config.dt_b_c_norm_epsilon)} | write_core(config)


FALCON_MAMBA = Family(
    name=MODEL_TYPE,
    title="Falcon-Mamba",
    architectures={"FalconMambaForCausalLM": CAUSAL_LM, "FalconMambaModel": ENCODER},
    matches=lambda raw: raw.get("model_type") == MODEL_TYPE,
    read=_read,
    write=_write,
    to_parameter=to_parameter,
)
