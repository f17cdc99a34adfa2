"""From a model to a folder that mambax and transformers open."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mambax import affine
from mambax.affine import Affine
from mambax.checkpoint.json_files import dump_object
from mambax.checkpoint.layouts import CAUSAL_LM, CLASSIFIER, ENCODER, Description, checkpoint_name, write_config
from mambax.checkpoint.loading import Progress, load, packed_dtypes, stored_shapes
from mambax.checkpoint.matching import main_dtype
from mambax.checkpoint.safetensors_files import write_safetensors
from mambax.checkpoint.sources import CONFIG
from mambax.checkpoint.tensors import FLOATS, TensorInfo, is_finite
from mambax.checkpoint.weights import SAFETENSORS
from mambax.config import MambaClassificationConfig
from mambax.paths import path_of

INDEX = f"{SAFETENSORS}.index.json"
_METADATA = {"format": "pt"}  # which older transformers insist on


def save_pretrained(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: bool = True,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a model of any backend as a Hugging Face checkpoint.

    Everything is written beside its place first and moved when all of it is there, so that a save that fails leaves
    an older checkpoint in the folder as it was.

    Args:
        model: a causal language model, a classifier or a feature extractor of mambax.
        folder: where to; made if need be. Files of an older checkpoint are replaced.
        tokenizer: write ``model.tokenizer`` too, if there is one.
        max_shard_size: bytes, at least 1; above it the weights go into several files with an index.

    Raises:
        ValueError: when the weights are not those that a ``config.json`` can describe, or not finite, and when the
            file that they were loaded from has been written to.
        OSError: when a file cannot be written.
    """
    target = path_of(folder, "folder")
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, int) or max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size!r}; expected a whole number of bytes, at least 1")
    described = describe(model)
    parameters = model.nn.parameters(model)
    if model.adapter is not None:
        raise ValueError(
            "save_pretrained: the model has adapters, which are no part of such a checkpoint; merge them into its "
            "weights with mambax.adapters.merge_adapter(model), or write them alone with "
            "mambax.adapters.save_adapter(model, folder)"
        )
    model.mappings.check()
    described = dataclasses.replace(described, quantization=_quantization(parameters, described))
    checked = _check_parameters(model, parameters, described)
    packed = packed_dtypes(described)
    dtype = main_dtype((name, info.dtype) for name, info in checked.items() if name not in packed)
    config_file = dump_object(write_config(described, dtype))
    parameter = {checkpoint_name(name, described.config): name for name in checked}
    infos = {name: checked[path] for name, path in parameter.items()}

    def read(name: str) -> np.ndarray:
        values = model.nn.to_numpy(parameters[parameter[name]])
        if values.dtype in FLOATS.values() and not is_finite(values):
            raise ValueError(
                f"{name} has weights that are NaN or infinite, so the model was not saved; {target} is as it was"
            )
        return values

    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: expected a folder to write to, found a file; name another")
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    staging = target / f".saving-{os.urandom(4).hex()}"
    staging.mkdir()
    try:
        shards = _shards(infos, max_shard_size)
        for shard, names in shards.items():
            write_safetensors(staging / shard, {name: infos[name] for name in names}, read, _METADATA)
        if len(shards) > 1:
            (staging / INDEX).write_bytes(dump_object(_index(infos, shards)))
        if tokenizer and model.tokenizer is not None:
            model.tokenizer.save_pretrained(staging)
        (staging / CONFIG).write_bytes(config_file)
        _move_all(staging, target, shards)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made:
            with suppress(OSError):  # it is not empty, unless nothing was saved
                target.rmdir()


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
) -> None:
    """Rewrite a checkpoint of any layout that :func:`mambax.load` takes as a Hugging Face one. Needs no framework.

    Args:
        source: a folder, or a repository ``"owner/name"``.
        folder: where to write; not the source itself.
        dtype: of the weights; as in the source when None.
        revision, local_files_only, progress: as of :func:`mambax.load`.
        max_shard_size: as of :func:`save_pretrained`.

    Raises:
        ValueError: when the folder is the source, and as :func:`mambax.load` does.
        OSError: as :func:`mambax.load` and :func:`save_pretrained` do.
    """
    source_folder, target = path_of(source, "source"), path_of(folder, "folder")
    if source_folder.is_dir() and source_folder.resolve() == target.resolve():
        raise ValueError(f"{folder}: source and target are the same folder; name another target")
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only, "progress": progress}
    model = load(source, backend="numpy", dtype=dtype, **options)
    save_pretrained(model, folder, max_shard_size=max_shard_size)


def describe(model: Any) -> Description:
    """What the ``config.json`` of a model says.

    Raises:
        ValueError: for what is not a whole model of mambax.
    """
    if getattr(model, "nn", None) is None or getattr(model, "config", None) is None:
        raise ValueError(
            f"save_pretrained: expected a model of mambax, found {type(model).__name__}; of a wrapper, give the "
            "model inside"
        )
    nn, config = model.nn, model.config
    if isinstance(model, nn.MambaForSequenceClassification) and isinstance(config, MambaClassificationConfig):
        return Description(config, CLASSIFIER, config.pooling)
    if isinstance(model, nn.MambaForFeatureExtraction):
        return Description(config, ENCODER, model.pooling)
    if isinstance(model, nn.MambaForCausalLM):
        return Description(config, CAUSAL_LM)
    raise ValueError(
        "save_pretrained: expected a MambaForCausalLM, MambaForSequenceClassification or MambaForFeatureExtraction "
        f"of the {nn.name} backend, found {type(model).__name__}; save others with their framework's own means"
    )


def _quantization(parameters: Mapping[str, Any], described: Description) -> tuple[str, int] | Affine | None:
    """How a model is quantised; None for one that is not. A model of int4 has layers of int8."""
    if any(name.endswith(".biases") for name in parameters):
        shapes = {name: tuple(array.shape) for name, array in parameters.items()}
        return affine.found_in(shapes, stored_shapes(described, "save_pretrained"))
    found: tuple[str, int] | None = None
    for name, scales in parameters.items():
        packed = parameters.get(name.removesuffix("scales") + "weight") if name.endswith(".scales") else None
        dtype = "" if packed is None else str(packed.dtype).rpartition(".")[2]
        if packed is not None and dtype == "uint8":
            return "int4", 2 * packed.shape[1] // scales.shape[1]
        if dtype == "int8":
            found = "int8", 32
    return found


def _check_parameters(model: Any, parameters: dict[str, Any], described: Description) -> dict[str, TensorInfo]:
    """dtype and shape of every parameter, if they are those that a model of this configuration has."""
    expected = stored_shapes(described, "save_pretrained")
    found = {name: tuple(array.shape) for name, array in parameters.items()}
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    packed = packed_dtypes(described)
    dtypes = {**FLOATS, **{dtype.name: dtype for dtype in packed.values()}}
    names = {dtype: name for name in dtypes if (dtype := _dtype_or_none(model.nn, name)) is not None}
    for name in sorted(expected.keys() & found.keys()):
        stored = dtypes.get(names.get(parameters[name].dtype, ""))
        if stored not in ([packed[name]] if name in packed else FLOATS.values()):
            different.append(name)
    if different:
        first = different[0]
        raise ValueError(
            f"save_pretrained: parameter {first} is {found.get(first, 'missing')}, expected "
            f"{expected.get(first, 'none of this name')} in float32, float16, bfloat16 or float64. A checkpoint "
            "can hold the model that its config describes alone: one with a mixer of your own, with adapters or "
            "quantised is saved with its framework's own means"
        )
    return {name: TensorInfo(dtypes[names[parameters[name].dtype]], shape) for name, shape in expected.items()}


def _dtype_or_none(nn: Any, name: str) -> Any:
    """The backend's dtype of this name; None where it has none."""
    try:
        return nn.dtype(name)
    except ValueError:
        return None


def _shards(infos: dict[str, TensorInfo], limit: int) -> dict[str, list[str]]:
    """File name -> parameters, none above the limit unless a single parameter is."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if groups[-1] and size + info.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += info.nbytes
    if len(groups) == 1:
        return {SAFETENSORS: groups[0]}
    stem = SAFETENSORS.removesuffix(".safetensors")
    return {f"{stem}-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _index(infos: dict[str, TensorInfo], shards: dict[str, list[str]]) -> dict[str, Any]:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    total = sum(info.nbytes for info in infos.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _move_all(staging: Path, target: Path, shards: dict[str, list[str]]) -> None:
    """Put the new files in their places, and take away those of an older checkpoint that would be read instead.

    Raises:
        IsADirectoryError: when a folder has the name of one of them; nothing has been touched then.
    """
    stale = {path.name for path in target.glob("model-[0-9]*-of-[0-9]*.safetensors")} | {SAFETENSORS, INDEX}
    stale -= shards.keys() | ({INDEX} if len(shards) > 1 else set())
    places = {path: target / path.relative_to(staging) for path in sorted(staging.rglob("*")) if path.is_file()}
    for place in [*places.values(), *(target / name for name in sorted(stale))]:
        if place.is_dir():
            raise IsADirectoryError(
                f"{place}: expected a file or nothing, found a folder, so that nothing was saved; move it away"
            )
    for path, place in places.items():
        place.parent.mkdir(exist_ok=True)
        path.replace(place)
    for name in stale:
        (target / name).unlink(missing_ok=True)
