"""The shapes of models that are measured, and where their weights lie. Imports no framework."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "mamba-130m": {"d_model": 768, "n_layer": 24, "vocab_size": 50280},
    "small": {"d_model": 64, "n_layer": 2, "vocab_size": 256},
    "tiny": {"d_model": 32, "n_layer": 2, "vocab_size": 96},
    "mamba2-130m": {
        "d_model": 768, "n_layer": 24, "vocab_size": 50288, "layer_types": ("mamba2",) * 24, "family": "mamba2",
        "rescale_prenorm_residual": False,  # or transformers divides out_proj again when it loads
        "mamba2": {"n_heads": 24, "head_dim": 64, "d_state": 128},
    },
    "mamba2-tiny": {
        "d_model": 32, "n_layer": 2, "vocab_size": 96, "layer_types": ("mamba2",) * 2, "family": "mamba2",
        "rescale_prenorm_residual": False,
        "mamba2": {"n_heads": 4, "head_dim": 16, "d_state": 16},
    },
}  # fmt: skip
"""Fields of :class:`mambax.MambaLMConfig`; others have their defaults (d_state 16, d_conv 4, expand 2, tied)."""

SHAPE_FILE = "shape.json"
REFERENCE = "reference.npy"
"""Logits (V,) after the last of PROMPT random tokens (seed 1), in float32."""

PROMPT = 64


def read_shape(folder: Path) -> dict[str, Any]:
    """The shape of the weights in a folder, with every default filled in."""
    return json.loads((folder / SHAPE_FILE).read_text(encoding="utf-8"))


def folder_of(folder: Path, dtype: str) -> Path:
    """The checkpoint in Hugging Face's layout in a dtype."""
    return folder / dtype


def gguf_of(folder: Path, kind: str) -> Path:
    """The GGUF file of a type of llama.cpp (``"F32"``, ``"BF16"``, ``"Q8_0"``, ...)."""
    return folder / f"{kind}.gguf"


def matrix_flops(shape: dict[str, Any], length: int) -> int:
    """Floating-point operations of a model's matrix products over a prompt, the head once.

    Of Mamba-1, or of Mamba-2 in every layer.
    """
    m = shape["d_model"]
    if shape.get("mamba2"):
        o = shape["mamba2"]
        d = o["n_heads"] * o["head_dim"]
        per_token = m * (3 * d + 2 * o.get("n_groups", 1) * o["d_state"] + o["n_heads"])
        return 2 * (length * shape["n_layer"] * per_token + shape["vocab_size"] * m)
    d = round(shape["expand"] * m)
    per_token = 3 * m * d + d * (shape["dt_rank"] + 2 * shape["d_state"]) + shape["dt_rank"] * d
    return 2 * (length * shape["n_layer"] * per_token + shape["vocab_size"] * m)
