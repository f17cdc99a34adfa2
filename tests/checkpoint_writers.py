"""Checkpoints for tests, written without a line of mambax: by hand, and by torch and the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mambax import MambaLMConfig

Arrays = Mapping[str, np.ndarray]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def hf_config(config: MambaLMConfig, **changes: Any) -> dict[str, Any]:
    """``config.json`` as transformers 5 writes it; a change to ``...`` leaves a field out."""
    raw = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "dtype": "float32", "hidden_act": "silu",
        "hidden_size": config.d_model, "num_hidden_layers": config.n_layer, "vocab_size": config.vocab_size,
        "state_size": config.d_state, "conv_kernel": config.d_conv, "time_step_rank": config.dt_rank,
        "expand": config.expand, "intermediate_size": config.d_inner, "use_bias": config.use_bias,
        "use_conv_bias": config.use_conv_bias, "layer_norm_epsilon": config.norm_epsilon,
        "residual_in_fp32": config.residual_in_fp32, "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.1, "use_cache": True,
        "time_step_limit": [0.0, {"__float__": "Infinity"}], "transformers_version": "5.23.0",
    }  # fmt: skip
    return {name: value for name, value in (raw | changes).items() if value is not ...}


def original_config(config: MambaLMConfig, vocab_size: int, **changes: Any) -> dict[str, Any]:
    """``config.json`` of the original package; ``vocab_size`` is the one before it is padded."""
    ssm_cfg = {
        "d_state": config.d_state, "d_conv": config.d_conv, "expand": config.expand, "dt_rank": config.dt_rank,
        "bias": config.use_bias, "conv_bias": config.use_conv_bias,
    }  # fmt: skip
    raw = {
        "d_model": config.d_model, "n_layer": config.n_layer, "vocab_size": vocab_size, "ssm_cfg": ssm_cfg,
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    return {name: value for name, value in (raw | changes).items() if value is not ...}


def write_config(folder: Path, raw: Mapping[str, Any]) -> Path:
    """Write ``config.json`` into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def as_torch(array: np.ndarray) -> Any:
    """A tensor that owns its memory."""
    torch = pytest.importorskip("torch")
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def save_safetensors(path: Path, arrays: Arrays) -> None:
    """A safetensors file, by the safetensors library."""
    pytest.importorskip("safetensors")
    if any(array.dtype == BFLOAT16 for array in arrays.values()):
        from safetensors.torch import save_file

        save_file({name: as_torch(array) for name, array in arrays.items()}, path, {"format": "pt"})
    else:
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {"format": "pt"})


def write_hf(folder: Path, config: MambaLMConfig, arrays: Arrays, *, shards: int = 1, **changes: Any) -> Path:
    """A Hugging Face checkpoint in one safetensors file or in several with an index."""
    write_config(folder, hf_config(config, **changes))
    if shards == 1:
        save_safetensors(folder / "model.safetensors", arrays)
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = list(arrays)[i::shards]
        save_safetensors(folder / shard, {name: arrays[name] for name in names})
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_original(
    folder: Path, config: MambaLMConfig, arrays: Arrays, *, vocab_size: int, legacy: bool = False, **changes: Any
) -> Path:
    """An original checkpoint: ``pytorch_model.bin`` as the official package saves it, with a tied head twice."""
    torch = pytest.importorskip("torch")
    write_config(folder, original_config(config, vocab_size, **changes))
    state = {name.replace("embeddings", "embedding"): as_torch(array) for name, array in arrays.items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    return folder
