"""Tiny random checkpoints of every family that transformers writes, of odd sizes and with every option that counts.

A family adds its configurations to :data:`CASES`; test_families.py holds each of them against transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCABULARY = 101


def falcon_mamba(**changes: Any) -> Any:
    """Its published files say ``expand: 16``, which is not what their weights have."""
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 40, "num_hidden_layers": 3, "state_size": 8, "conv_kernel": 4,
        "expand": 16, "intermediate_size": 80, "time_step_rank": 5, "mixer_rms_eps": 1e-4,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**(fields | changes)))


CASES: dict[str, Callable[[], Any]] = {
    "falcon_mamba": falcon_mamba,
    "falcon_mamba-biases-tied": lambda: falcon_mamba(use_bias=True, tie_word_embeddings=True, conv_kernel=3),
}
"""Name -> what makes the model of transformers, with its initial weights."""


def build(name: str) -> Any:
    """The model of a case, in evaluation mode, every parameter moved by random amounts: an initial value such as a
    bias of zeros or a norm of ones would hide what is missing."""
    pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    model = CASES[name]().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            scale = 0.3 if path.endswith(("A_log", ".D", "dt_bias", "norm.weight", "layernorm.weight")) else 0.05
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def write(name: str, folder: Path) -> Any:
    """Save the model of a case as transformers does; return it."""
    model = build(name)
    model.save_pretrained(folder)
    return model
