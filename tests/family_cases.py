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


def falcon_h1(**changes: Any) -> Any:
    """With a limit of dt, which transformers forgets when it decodes with its cache."""
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "mamba_d_ssm": 56,
        "mamba_n_heads": 8, "mamba_d_head": 7, "mamba_d_state": 9, "mamba_n_groups": 2, "mamba_chunk_size": 16,
        "eos_token_id": None,
        "mamba_rms_norm": False, "mamba_norm_before_gate": False, "time_step_limit": [1.25, 1.5],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
        "embedding_multiplier": 0.2, "lm_head_multiplier": 0.4, "key_multiplier": 3.4,
        "attention_in_multiplier": 1.2, "attention_out_multiplier": 1.9, "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 1.7, "ssm_multipliers": [1.8, 1.6, 2.3, 1.9, 3.1], "mlp_multipliers": [0.85, 0.6],
    }  # fmt: skip
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**(fields | changes)))


def zamba2(**changes: Any) -> Any:
    """Three uses of two shared blocks, so that one is used twice."""
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"], "num_mem_blocks": 2,
        "mamba_d_state": 7, "mamba_ngroups": 2, "n_mamba_heads": 6, "chunk_size": 16, "num_attention_heads": 6,
        "adapter_rank": 5, "use_mem_rope": True, "use_shared_attention_adapter": True, "time_step_min": 0.02,
        "add_bias_linear": True, "pad_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**(fields | changes)))


def mamba2attn(**changes: Any) -> Any:
    """The official package, which is not needed for the tests, is the formulas in official_model.py instead."""
    from official_model import OfficialModel

    attn_cfg = {
        "causal": True, "d_conv": 4, "head_dim": 10, "num_heads": 6, "num_heads_kv": 2, "out_proj_bias": False,
        "qkv_proj_bias": False, "rotary_emb_dim": 6,
    }  # fmt: skip
    raw: dict[str, Any] = {
        "d_model": 36, "d_intermediate": 0, "n_layer": 2, "vocab_size": VOCABULARY, "pad_vocab_size_multiple": 16,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 9, "d_conv": 3, "expand": 2, "headdim": 12, "ngroups": 2},
        "attn_layer_idx": [1], "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "tie_embeddings": True,
    }  # fmt: skip
    return OfficialModel(raw | {"attn_cfg": attn_cfg | changes.pop("attn_cfg", {})} | changes)


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
    "falcon_h1": falcon_h1,
    "falcon_h1-norm-first-biases": lambda: falcon_h1(
        mamba_rms_norm=True,
        mamba_norm_before_gate=True,
        mamba_proj_bias=True,
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=6,
        mamba_d_conv=3,
        num_hidden_layers=1,
    ),
    "falcon_h1-gate-first-tied": lambda: falcon_h1(
        mamba_rms_norm=True,
        projectors_bias=True,
        tie_word_embeddings=True,
        mamba_conv_bias=False,
        mamba_d_ssm=None,
        mamba_expand=2,
        mamba_d_head="auto",
        num_hidden_layers=1,
    ),
    "jamba": jamba,
    "nemotron_h": nemotron_h,
    "nemotron_h-biases": lambda: nemotron_h(use_bias=True, mlp_bias=True, n_groups=1),
    "nemotron_h-experts": lambda: nemotron_h(
        layers_block_type=["mamba", "moe", "attention", "moe", "mlp"],
        n_routed_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=26,
        routed_scaling_factor=2.5,
        mlp_bias=True,
    ),
    "nemotron_h-experts-groups-latent": lambda: nemotron_h(
        layers_block_type=["mamba", "moe", "mamba", "moe"],
        n_routed_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=26,
        n_group=4,
        topk_group=2,
        moe_latent_size=12,
        norm_topk_prob=False,
    ),
    "jamba-dense": lambda: jamba(num_experts=1, num_experts_per_tok=1, mamba_proj_bias=True, rms_norm_eps=1e-4),
    "zamba2": zamba2,
    "zamba2-untied": lambda: zamba2(
        num_mem_blocks=4,
        add_bias_linear=False,
        use_mem_rope=False,
        use_shared_attention_adapter=False,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        mamba_d_conv=3,
        time_step_min=1e-9,
    ),
    "mamba2attn": mamba2attn,
    "mamba2attn-mlps-biases": lambda: mamba2attn(
        d_intermediate=100,
        attn_layer_idx=[0],
        tie_embeddings=False,
        attn_cfg={
            "d_conv": 0,
            "num_heads_kv": 6,
            "rotary_emb_dim": 0,
            "out_proj_bias": True,
            "qkv_proj_bias": True,
            "softmax_scale": 0.7,
        },
    ),
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
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):  # a router's, which no gradient reaches
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model


def write(name: str, folder: Path) -> Any:
    """Save the model of a case as transformers does; return it."""
    model = build(name)
    model.save_pretrained(folder)
    return model
