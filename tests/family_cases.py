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


def mamba2(**changes: Any) -> Any:
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 36, "num_hidden_layers": 3, "state_size": 10, "conv_kernel": 4,
        "expand": 2, "num_heads": 12, "head_dim": 6, "n_groups": 3, "chunk_size": 16,
    }  # fmt: skip
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**(fields | changes)))


def jamba(**changes: Any) -> Any:
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 5,
        "num_attention_heads": 6, "num_key_value_heads": 2, "mamba_d_state": 7, "mamba_dt_rank": 5,
        "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 5, "num_experts_per_tok": 2, "eos_token_id": None,
    }  # fmt: skip
    return transformers.JambaForCausalLM(transformers.JambaConfig(**(fields | changes)))


def bamba(**changes: Any) -> Any:
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1, 3], "mamba_n_heads": 8,
        "mamba_d_state": 7, "mamba_n_groups": 2, "mamba_chunk_size": 16, "eos_token_id": None,
    }  # fmt: skip
    return transformers.BambaForCausalLM(transformers.BambaConfig(**(fields | changes)))


def granite(**changes: Any) -> Any:
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 28, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8, "mamba_d_state": 7, "mamba_n_groups": 2, "mamba_chunk_size": 16,
        "shared_intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 2, "eos_token_id": None,
        "embedding_multiplier": 1.5, "residual_multiplier": 0.4, "logits_scaling": 3.0, "attention_multiplier": 0.1,
    }  # fmt: skip
    return transformers.GraniteMoeHybridForCausalLM(transformers.GraniteMoeHybridConfig(**(fields | changes)))


def nemotron_h(**changes: Any) -> Any:
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 52, "head_dim": 10,
        "layers_block_type": ["mamba", "attention", "mlp", "mamba", "mlp"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "mamba_num_heads": 6, "mamba_head_dim": 14, "ssm_state_size": 7, "n_groups": 3,
        "chunk_size": 16, "eos_token_id": None,
        "time_step_min": 1e-9,  # below which transformers 5.23 clamps dt, whatever time_step_limit says
    }  # fmt: skip
    return transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**(fields | changes)))


CASES: dict[str, Callable[[], Any]] = {
    "falcon_mamba": falcon_mamba,
    "falcon_mamba-biases-tied": lambda: falcon_mamba(use_bias=True, tie_word_embeddings=True, conv_kernel=3),
    "bamba": bamba,
    "bamba-biases-tied": lambda: bamba(
        attention_bias=True, mlp_bias=True, mamba_proj_bias=True, tie_word_embeddings=True, num_key_value_heads=4
    ),
    "granite": granite,
    "granite-dense-rope-tied": lambda: granite(
        num_local_experts=0, position_embedding_type="rope", tie_word_embeddings=True, attention_bias=True
    ),
    "jamba": jamba,
    "nemotron_h": nemotron_h,
    "nemotron_h-biases": lambda: nemotron_h(use_bias=True, mlp_bias=True, n_groups=1),
    "jamba-dense": lambda: jamba(num_experts=1, num_experts_per_tok=1, mamba_proj_bias=True, rms_norm_eps=1e-4),
    "mamba2": mamba2,
    "mamba2-limits": lambda: mamba2(time_step_limit=[0.05, 0.2], n_groups=1, use_bias=True, use_conv_bias=False),
    "mamba2-codestral": lambda: mamba2(
        hidden_size=64, num_heads=2, head_dim=64, state_size=128, n_groups=2, vocab_size=112, num_hidden_layers=2
    ),
    "mamba2-tied": lambda: mamba2(n_groups=12, tie_word_embeddings=True, conv_kernel=2, layer_norm_epsilon=1e-3),
}
"""Name -> what makes the model of transformers, with its initial weights."""


OriginalMamba2 = tuple[dict[str, Any], dict[str, Any]]
"""A ``config.json`` and the tensors beside it."""


def original_mamba2(theirs: Any, **changes: Any) -> OriginalMamba2:
    """The config and tensors of the official package for a Mamba-2 model of transformers with its defaults: a head
    of 64 channels, 128 states, a convolution over 4 inputs. The vocabulary is padded to a multiple of 16."""
    config = theirs.config
    ssm_cfg = {
        "layer": "Mamba2",
        "ngroups": config.n_groups,
        "headdim": config.head_dim,
        "d_state": config.state_size,
    }
    raw = {
        "d_model": config.hidden_size, "n_layer": config.num_hidden_layers, "vocab_size": VOCABULARY - 4,
        "ssm_cfg": ssm_cfg, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "tie_embeddings": config.tie_word_embeddings, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {},
    }  # fmt: skip
    tensors = {name.replace("embeddings", "embedding"): tensor for name, tensor in theirs.state_dict().items()}
    return raw | changes, tensors


def codestral(theirs: Any) -> OriginalMamba2:
    """Mistral's ``params.json`` and tensors for such a model."""
    config = theirs.config
    raw = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "vocab_size": config.vocab_size,
        "n_groups": config.n_groups, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 1, "tie_embeddings": config.tie_word_embeddings, "model_type": "mamba",
    }  # fmt: skip
    return raw, {f"model.{name}": tensor for name, tensor in original_mamba2(theirs)[1].items()}


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
