"""Checkpoints whose tensors, folder or index do not fit: each refused, and the message says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_checkpoints import CONFIG, NORM, folder, refused, weights
from checkpoint_writers import hf_config, save_safetensors, write_config, write_hf
from harness import rounded

import mambax

__all__ = ["folder", "weights"]  # fixtures of the tests here


def test_the_unspoilt_checkpoint_loads(folder: Path) -> None:
    mambax.load(folder, backend="numpy")


# --- names, shapes, dtypes and values ---------------------------------------------------------------------------


def test_missing_extra_and_misshapen_tensors_are_all_listed(folder: Path, weights: dict[str, np.ndarray]) -> None:
    spoilt = {name: array for name, array in weights.items() if name != NORM}
    spoilt["backbone.layers.0.mixer.D"] = np.zeros(79, np.float32)
    spoilt["backbone.layers.1.mixer.D"] = np.zeros(80, np.float32)
    spoilt["backbone.layers.0.norm.weight"] = np.zeros(40, np.int8)
    save_safetensors(folder / "model.safetensors", spoilt)
    refused(
        folder,
        f"1 missing: {NORM} [40]",
        "1 unexpected: backbone.layers.1.mixer.D [80]",
        "1 of another shape: backbone.layers.0.mixer.D: expected [80], found [79]",
        "1 of another dtype: backbone.layers.0.norm.weight: expected a float dtype, found int8",
        "Is it the config.json of these weights",
    )


def test_a_long_list_is_cut(folder: Path) -> None:
    write_config(folder, hf_config(CONFIG, num_hidden_layers=4000))
    assert len(refused(folder, "missing: backbone.layers.1.", "more")) < 2000


def test_a_convolution_that_is_neither_layout(folder: Path, weights: dict[str, np.ndarray]) -> None:
    name = "backbone.layers.0.mixer.conv1d.weight"
    save_safetensors(folder / "model.safetensors", weights | {name: weights[name].reshape(3, 1, 80)})
    refused(folder, f"{name}: expected [80, 1, 3], found [3, 1, 80]")


def test_the_same_parameter_twice(folder: Path, weights: dict[str, np.ndarray]) -> None:
    table = weights["backbone.embeddings.weight"]
    save_safetensors(folder / "model.safetensors", weights | {"backbone.embedding.weight": table})
    refused(folder, "1 unexpected: backbone.embedding")


def test_an_untied_head_that_is_missing(folder: Path) -> None:
    write_config(folder, hf_config(CONFIG, tie_word_embeddings=False))
    refused(folder, "1 missing: lm_head.weight [24, 40]", "set tie_word_embeddings to true")


def test_a_tied_head_that_differs(folder: Path, weights: dict[str, np.ndarray]) -> None:
    head = weights["backbone.embeddings.weight"].copy()
    head[-1, -1] += 1e-3
    save_safetensors(folder / "model.safetensors", weights | {"lm_head.weight": head})
    refused(folder, "lm_head.weight differs from backbone.embeddings.weight", "tie_word_embeddings")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_not_finite_are_named(
    folder: Path, weights: dict[str, np.ndarray], dtype: str, value: float
) -> None:
    spoilt = rounded(weights, dtype)
    name = "backbone.layers.0.mixer.in_proj.weight"
    spoilt[name].flat[-1] = value
    save_safetensors(folder / "model.safetensors", spoilt)
    refused(folder, f"{name} has weights that are NaN or infinite", "earlier checkpoint")


def test_values_too_large_for_the_dtype_asked_for(folder: Path, weights: dict[str, np.ndarray]) -> None:
    save_safetensors(folder / "model.safetensors", weights | {NORM: np.full(40, 1e6, np.float32)})
    with pytest.raises(ValueError, match=rf"{NORM} has values too large for float16 .*load with dtype='bfloat16'"):
        mambax.load(folder, backend="numpy", dtype="float16")


# --- the folder and the index -----------------------------------------------------------------------------------


def test_empty_folder(tmp_path: Path) -> None:
    refused(
        tmp_path, "no config.json; expected a folder with config.json and weights; found nothing", error=OSError
    )


def test_no_such_folder_and_a_file(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder", error=FileNotFoundError)
    refused(
        folder / "model.safetensors",
        "expected a folder with config.json and weights, found a file",
        error=NotADirectoryError,
    )
    for name in ("./nowhere", "a/b/c", "model"):
        with pytest.raises(FileNotFoundError, match=r"no such folder; expected a folder .*, or a repository"):
            mambax.load(name, backend="numpy")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights; expected model.safetensors or pytorch_model.bin", "config.json", error=OSError)


@pytest.fixture
def sharded(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    return write_hf(tmp_path / "sharded", CONFIG, weights, shards=2)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "shard model-00002-of-00002.safetensors is missing", "download", error=FileNotFoundError)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..\\b.safetensors", "C:b.safetensors",
     "..", "", ".hidden.safetensors", "model.pkl", "a\0.safetensors", 7, None],
)  # fmt: skip
def test_shard_name_that_leaves_the_folder(sharded: Path, name: Any) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"][NORM] = name
    path.write_text(json.dumps(index), encoding="utf-8")
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded.parent / "secret.safetensors")
    refused(sharded, "is not the name of a shard; expected a plain file name")


def test_index_that_does_not_fit_its_shards(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["weight_map"][NORM]
    path.write_text(json.dumps(index), encoding="utf-8")
    refused(sharded, f"does not fit model.safetensors.index.json: '{NORM}' is in the shard alone")
    path.write_text("{}", encoding="utf-8")
    refused(sharded, "weight_map is missing")
