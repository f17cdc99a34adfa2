"""GGUF files for llama.cpp from the same weights: ``python -m benchmarks.gguf_files FOLDER``.

The float32 file is written with the gguf package; llama.cpp's own quantisation makes the others from it.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contender import Unavailable, optional
from benchmarks.shapes import folder_of, gguf_of, read_shape

FLOAT32 = "F32"
TYPES = {"BF16": "LLAMA_FTYPE_MOSTLY_BF16", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
TYPES["Q4_K_M"] = "LLAMA_FTYPE_MOSTLY_Q4_K_M"
"""Type -> the constant of llama.cpp."""

INSTALL = "llama-cpp-python gguf (builds llama.cpp: needs a C++ compiler and minutes)"


def silent(library: Any) -> None:
    """Keep llama.cpp from writing to standard error."""
    callback = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(callback, ctypes.c_void_p(0))
    silent.kept = callback  # it must live as long as the library  # pyright: ignore[reportFunctionMemberAccess]


def write(folder: Path) -> None:
    """Write a file of every type.

    Raises:
        Unavailable: when gguf or llama-cpp-python is not installed.
        RuntimeError: when llama.cpp cannot make a type.
    """
    library = optional("llama_cpp", INSTALL)
    _write_float32(folder)
    silent(library)
    for kind, constant in TYPES.items():
        params = library.llama_model_quantize_default_params()
        params.ftype = getattr(library, constant)
        paths = [str(gguf_of(folder, k)).encode() for k in (FLOAT32, kind)]
        code = library.llama_model_quantize(*paths, ctypes.byref(params))
        if code:
            raise RuntimeError(f"llama_model_quantize to {kind} returned {code}; expected 0")


def _write_float32(folder: Path) -> None:
    gguf = optional("gguf", INSTALL)
    stored = optional("safetensors.numpy", "safetensors").load_file(
        folder_of(folder, "float32") / "model.safetensors"
    )
    shape = read_shape(folder)
    writer = gguf.GGUFWriter(str(gguf_of(folder, FLOAT32)), "mamba")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(shape["d_model"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(shape["n_layer"])
    writer.add_ssm_conv_kernel(shape["d_conv"])
    writer.add_ssm_inner_size(round(shape["expand"] * shape["d_model"]))
    writer.add_ssm_state_size(shape["d_state"])
    writer.add_ssm_time_step_rank(shape["dt_rank"])
    writer.add_layer_norm_rms_eps(shape["norm_epsilon"])
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_file_type(0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape["vocab_size"])
    for name, value in stored.items():
        writer.add_tensor(*_renamed(name, value.astype(np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """A tensor of Hugging Face's layout as llama.cpp names and stores it."""
    whole = {
        "backbone.embeddings.weight": "token_embd.weight",
        "backbone.norm_f.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name], value
    parts = {
        "mixer.in_proj.weight": "ssm_in.weight", "mixer.conv1d.weight": "ssm_conv1d.weight",
        "mixer.conv1d.bias": "ssm_conv1d.bias", "mixer.x_proj.weight": "ssm_x.weight",
        "mixer.dt_proj.weight": "ssm_dt.weight", "mixer.dt_proj.bias": "ssm_dt.bias",
        "mixer.A_log": "ssm_a", "mixer.D": "ssm_d", "mixer.out_proj.weight": "ssm_out.weight",
        "norm.weight": "attn_norm.weight",
    }  # fmt: skip
    _, _, number, part = name.split(".", 3)  # backbone.layers.0.mixer...
    if part == "mixer.A_log":
        value = -np.exp(value)
    elif part == "mixer.conv1d.weight":
        value = value[:, 0]
    return f"blk.{number}.{parts[part]}", np.ascontiguousarray(value)


if __name__ == "__main__":
    try:
        write(Path(sys.argv[1]))
    except Unavailable as reason:
        print(reason)
