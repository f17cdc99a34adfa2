"""Models of every family at a size that fits any machine: published configurations with fewer and narrower layers.

The widths about keep their proportions; the widths of heads, the states and the vocabularies stay. ``python -m
benchmarks.family_shapes NAME FOLDER`` writes random weights of one, in float32.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mambax
from mambax.checkpoint.layouts import read_config

COMPILED = 600
"""Tokens that are read once weights are written: by then, the kernels are compiled and kept for later processes."""


@dataclass(frozen=True)
class Shape:
    """One model.

    Args:
        of: the published model, and what is smaller here.
        raw: its ``config.json``.
        flat: whether the memory of reading a prompt is not to depend on its length.
    """

    of: str
    raw: dict[str, Any]
    flat: bool = False


FAMILIES: dict[str, Shape] = {
    "mamba": Shape(
        "mamba-130m: 16 layers of 24",
        {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 16, "state_size": 16, "vocab_size": 50280},
        flat=True,
    ),
    "falcon_mamba": Shape(
        "falcon-mamba-7b: width 768 of 4096, 8 layers of 64",
        {
            "model_type": "falcon_mamba", "hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 1536,
            "state_size": 16, "time_step_rank": 48, "vocab_size": 65024, "tie_word_embeddings": False,
        },
        flat=True,
    ),
    "mamba2": Shape(
        "mamba2-130m: 12 layers of 24",
        {
            "model_type": "mamba2", "hidden_size": 768, "num_hidden_layers": 12, "num_heads": 24, "head_dim": 64,
            "state_size": 128, "n_groups": 1, "expand": 2, "vocab_size": 50288, "tie_word_embeddings": True,
        },
        flat=True,
    ),
    "codestral": Shape(
        "Mamba-Codestral-7B as converted by Hugging Face, 8 groups: width 768 of 4096, 8 layers of 64",
        {
            "model_type": "mamba2", "hidden_size": 768, "num_hidden_layers": 8, "num_heads": 24, "head_dim": 64,
            "state_size": 128, "n_groups": 8, "expand": 2, "vocab_size": 32768, "tie_word_embeddings": False,
        },
        flat=True,
    ),
    "jamba": Shape(
        "Jamba-v0.1: width 512 of 4096, 8 layers of 32, MLPs of twice the width",
        {
            "model_type": "jamba", "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1024,
            "attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1,
            "num_experts": 16, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
            "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 32, "vocab_size": 65536,
        },
    ),
    "bamba": Shape(
        "Bamba-9B: width 512 of 4096, 10 layers of 32",
        {
            "model_type": "bamba", "hidden_size": 512, "num_hidden_layers": 10, "intermediate_size": 1792,
            "attn_layer_indices": [9], "num_attention_heads": 4, "num_key_value_heads": 1, "mamba_n_heads": 16,
            "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2, "vocab_size": 128256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "granitemoehybrid": Shape(
        "granite-4.0-h-tiny: width 512 of 1536, 8 layers of 40, 64 experts of 128 instead of 512",
        {
            "model_type": "granitemoehybrid", "hidden_size": 512, "num_hidden_layers": 8,
            "layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 2, "intermediate_size": 128,
            "shared_intermediate_size": 341, "num_local_experts": 64, "num_experts_per_tok": 6,
            "num_attention_heads": 4, "num_key_value_heads": 1, "mamba_n_heads": 16, "mamba_d_head": 64,
            "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2, "vocab_size": 100352,
            "embedding_multiplier": 12, "logits_scaling": 6, "residual_multiplier": 0.22,
            "attention_multiplier": 0.0078125, "tie_word_embeddings": True,
        },
    ),
    "nemotron_h": Shape(
        "Nemotron-H-8B: width 512 of 4096, the first 13 blocks of 52",
        {
            "model_type": "nemotron_h", "hidden_size": 512, "hybrid_override_pattern": "M-M-M-M*-M-M-",
            "intermediate_size": 2688, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128,
            "mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
            "vocab_size": 131072,
        },
    ),
    "falcon_h1": Shape(
        "Falcon-H1-0.5B: 4 layers of 36",
        {
            "model_type": "falcon_h1", "hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 2048,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "mamba_d_ssm": 1536,
            "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
            "vocab_size": 32784, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
        },
    ),
    "zamba2": Shape(
        "Zamba2-1.2B: width 512 of 2048, 18 layers of 38",
        {
            "model_type": "zamba2", "hidden_size": 512, "num_hidden_layers": 18, "intermediate_size": 2048,
            "layers_block_type": (["mamba"] * 5 + ["hybrid"]) * 3, "num_mem_blocks": 1, "adapter_rank": 32,
            "use_shared_attention_adapter": True, "use_mem_rope": True, "num_attention_heads": 8,
            "n_mamba_heads": 16, "mamba_d_state": 64, "mamba_ngroups": 1, "mamba_expand": 2, "vocab_size": 32000,
        },
    ),
    "mamba2attn": Shape(
        "mamba2attn-2.7b: width 768 of 2560, 12 layers of 64",
        {
            "d_model": 768, "d_intermediate": 0, "n_layer": 12, "vocab_size": 50288, "rms_norm": True,
            "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [9],
            "attn_cfg": {
                "causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 9, "num_heads_kv": 3,
                "out_proj_bias": False, "qkv_proj_bias": False, "rotary_emb_dim": 64,
            },
            "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
            "tie_embeddings": True,
        },
    ),
    "bidirectional": Shape(
        "a classifier of whole sequences in both directions, of no published size",
        {
            "model_type": "mambax", "architectures": ["MambaForSequenceClassification"], "d_model": 768,
            "n_layer": 6, "layer_types": ["bimamba_tied"] * 6, "vocab_size": 50280, "num_labels": 2,
            "pooling": "mean",
        },
    ),
}  # fmt: skip
"""Name -> shape. All are causal language models but the last."""

TINY = {
    "mamba2": Shape(
        "tiny", {
            "model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16,
            "state_size": 16, "n_groups": 1, "vocab_size": 96,
        }, flat=True,
    ),
    "bidirectional": Shape(
        "tiny", {
            "model_type": "mambax", "architectures": ["MambaForSequenceClassification"], "d_model": 32,
            "n_layer": 1, "layer_types": ["bimamba"], "vocab_size": 96, "num_labels": 2, "pooling": "mean",
        },
    ),
}  # fmt: skip
"""Those of a dry run."""


def config_of(shape: Shape) -> mambax.MambaLMConfig:
    """The configuration that mambax reads."""
    return read_config(shape.raw, shape.of).config


def write(shape: Shape, folder: Path) -> None:
    """Write random weights of a shape as its family is laid out, and let the CPU kernels be compiled."""
    model = mambax.from_config(config_of(shape), backend="numpy", seed=0)
    mambax.save_pretrained(model, folder)
    from benchmarks.contenders.family_memory import read

    read(mambax.load(folder, backend="numpy"), COMPILED)


if __name__ == "__main__":
    write((TINY if "--tiny" in sys.argv else FAMILIES)[sys.argv[1]], Path(sys.argv[2]))
